"""The counter-based stream: Philox's published vectors, and numbers that depend on (seed, position) alone."""

from __future__ import annotations

from textmill.sampling.random_stream import philox4x32, uniform


def test_philox_matches_the_published_vectors() -> None:
    ones = 0xFFFFFFFF
    assert philox4x32((0, 0), (0, 0, 0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox4x32((ones, ones), (ones,) * 4) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    assert philox4x32((0xA4093822, 0x299F31D0), (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)) == (
        0xD16CFE09,
        0x94FDCCEB,
        0x5001E420,
        0x24126EA1,
    )


def test_draws_look_uniform_and_differ_by_seed_and_position() -> None:
    values = [uniform(seed, position) for seed in range(40) for position in range(50)]
    assert all(0.0 <= value < 1.0 for value in values)
    assert len(set(values)) == len(values)
    assert abs(sum(values) / len(values) - 0.5) < 0.02
    assert uniform(1 << 40, 3) != uniform(0, 3)
