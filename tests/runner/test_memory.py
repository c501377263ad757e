"""Free memory as the machine and its control groups tell it, and the cache cut from it."""

from __future__ import annotations

from pathlib import Path

import pytest

from textmill.errors import ConfigError
from textmill.runner.memory import MIB, free_memory, plan_cache


def machine(tmp_path: Path, *, available_kib: int, cgroup: str = "") -> tuple[Path, Path]:
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    cgroups.mkdir()
    (proc / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable: {available_kib} kB\n")
    if cgroup:
        (proc / "self" / "cgroup").write_text(f"0::/{cgroup}\n")
    return proc, cgroups


def limit(folder: Path, *, maximum: str, current: int, inactive: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{maximum}\n")
    (folder / "memory.current").write_text(f"{current}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\n")


def test_the_machine_alone(tmp_path: Path) -> None:
    assert free_memory(*machine(tmp_path, available_kib=1000)) == 1000 * 1024


def test_a_control_group_or_its_parent_can_be_tighter(tmp_path: Path) -> None:
    proc, cgroups = machine(tmp_path, available_kib=1000, cgroup="box/inner")
    limit(cgroups / "box" / "inner", maximum="max", current=1)
    limit(cgroups / "box", maximum="600000", current=400000, inactive=100000)
    assert free_memory(proc, cgroups) == 300000


def test_version_1_groups(tmp_path: Path) -> None:
    proc, cgroups = machine(tmp_path, available_kib=1000)
    (proc / "self" / "cgroup").write_text("5:cpu:/\n4:memory:/box\n0::/\n")
    folder = cgroups / "memory" / "box"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text("5000\n")
    (folder / "memory.usage_in_bytes").write_text("4000\n")
    (folder / "memory.stat").write_text("total_inactive_file 7\n")
    assert free_memory(proc, cgroups) == 1007


def test_this_machine_has_some() -> None:
    assert free_memory() > 64 * MIB


def plan(**changes: int | None) -> int:
    sizes: dict[str, int | None] = {"requested_bytes": None, "requested_tokens": None, "free_bytes": 8 * 1024 * MIB}
    sizes |= changes
    return plan_cache(block_size=16, bytes_per_block=MIB, max_total_tokens=2048, **sizes).num_blocks  # type: ignore[arg-type]


def test_sizes() -> None:
    assert plan() == 768
    assert plan(free_bytes=100 * MIB) == 50  # half of what is free
    assert plan(requested_bytes=7 * MIB) == 7
    assert plan(requested_tokens=33) == 3


def test_more_than_is_free_is_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"200 MiB wanted, 100 MiB free"):
        plan(requested_bytes=200 * MIB, free_bytes=100 * MIB)
    with pytest.raises(ConfigError, match="Not enough memory"):
        plan(free_bytes=MIB)
