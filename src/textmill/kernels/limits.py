"""What this machine gives at most: the yardstick that profiles are held against."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MachineLimits:
    """What so many threads get together: GB/s read, and 10^9 multiply-adds a second of unsigned times signed bytes (as
    the packed kernels multiply) and of float32. 0: not known for this kind of machine."""

    threads: int
    read_gb_s: float
    byte_gmac_s: float
    float_gmac_s: float


def machine_limits(seconds: float = 0.05, megabytes: int = 128) -> MachineLimits:
    """Measures them, `seconds` for each figure, reading a buffer of `megabytes`; nothing else should run meanwhile.

    ImportError where the native kernels are not built.
    """
    from textmill import _native

    return MachineLimits(*_native.measure_limits(megabytes << 20, seconds))
