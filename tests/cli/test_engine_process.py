"""The engine's process: what it tells the launcher, what its log tells of a run."""

from __future__ import annotations

import json
import os
from pathlib import Path

from textmill.cli.child import Handed, read_handed
from textmill.cli.engine_process import gained, takes_every_core
from textmill.cli.permits import fill_permits
from textmill.cli.progress import table_lines
from textmill.cli.status import StatusLines, StatusPipe
from textmill.config import Settings


def test_statuses_cross_the_pipe_whole_whatever_the_pieces() -> None:
    read, write = os.pipe()
    pipe = StatusPipe(write)
    pipe.report("load", "weights: ü\n", table=[("weights", "1 MiB")])
    pipe.beat(7, 1.5, True)
    pipe.fail("no\nway")
    data = os.read(read, 1 << 16) + b"not json\n[1]\n{}\n"
    lines = StatusLines()
    found = [status for byte in data for status in lines.feed(bytes([byte]))]
    assert [(status.phase, status.message, status.error) for status in found] == [
        ("load", "weights: ü\n", ""),
        ("beat", "", ""),
        ("error", "", "no\nway"),
    ]
    assert found[0].fields["table"] == [["weights", "1 MiB"]]
    assert found[0].fields["seconds"] >= 0
    assert found[1].fields == {"step": 7, "age": 1.5, "working": True}
    os.close(read)
    pipe.report("load", "into the void")  # the launcher is gone: no error
    os.close(write)


def test_settings_and_model_are_handed_over_whole(tmp_path: Path) -> None:
    handed = Handed(Settings(api_key="k", cors_allow_origin=("a",)), {"model_id": "m", "path": Path("/x")})
    file = tmp_path / "settings.json"
    file.write_text(handed.to_json())
    assert read_handed(file) == Handed(handed.settings, {"model_id": "m", "path": "/x"})
    assert json.loads(handed.to_json())["settings"]["api_key"] == "k"


def test_profile_shows_what_changed() -> None:
    assert gained({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 2.5, "c": 3.0}) == {"b": 0.5, "c": 3.0}


def test_kernels_leave_a_core_to_the_rest_only_if_told_so() -> None:
    cores = len(os.sched_getaffinity(0))
    assert takes_every_core(Settings(), "cpu")
    assert takes_every_core(Settings(cpu_threads=cores), "cpu")
    assert takes_every_core(Settings(cpu_threads=1), "cpu") == (cores == 1)
    assert not takes_every_core(Settings(), "cuda")


def test_tables_of_rows_or_a_mapping() -> None:
    assert table_lines([["weights", "98 MiB", 1], ["KV", "1,024 MiB"]]) == [
        "weights  98 MiB     1",
        "KV       1,024 MiB",
    ]
    assert table_lines({"a": 1}) == ["a  1"]
    assert table_lines(None) == []


def test_permits_can_be_taken_and_given_back_up_to_their_number() -> None:
    """Also when the pipe is as full as it gets: giving back never blocks."""
    for count in (0, 1, 128, 65536, 200_000):
        permits = fill_permits(count)
        for _ in range(3):
            taken = 0
            while taken < count:
                taken += len(os.read(permits, 3000))
            for given in range(0, count, 1000):
                piece = min(1000, count - given)
                assert os.write(permits, b"." * piece) == piece
        left = 0
        while chunk := read_or_nothing(permits):
            left += chunk
        assert left == count
        os.close(permits)


def test_single_permits_go_round_in_a_full_pipe() -> None:
    permits = fill_permits(65536)
    for _ in range(20_000):
        assert os.read(permits, 1)
        assert os.write(permits, b".") == 1
    os.close(permits)


def read_or_nothing(fd: int) -> int:
    try:
        return len(os.read(fd, 1 << 16))
    except BlockingIOError:
        return 0
