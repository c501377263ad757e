"""The probe of the machine answers with figures that a machine can have."""

from __future__ import annotations

from textmill.kernels.limits import machine_limits
from textmill.kernels.native import instruction_set, set_threads


def test_limits_are_of_the_machines_order() -> None:
    threads = set_threads(0)
    limits = machine_limits(seconds=0.005, megabytes=16)
    assert limits.threads == threads
    assert 0.2 < limits.read_gb_s < 10_000
    if instruction_set() != "portable":
        assert 0.5 < limits.float_gmac_s < limits.byte_gmac_s < 1e6
