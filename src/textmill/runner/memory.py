"""How much memory is really free, and how many key/value blocks that makes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from textmill.errors import ConfigError

MIB = 1 << 20
# On the CPU the cache shares memory with everything else on the machine: at most this share of what is free, and
# by default no more than the larger of this size and two full contexts.
CPU_SHARE = 0.5
CPU_DEFAULT_BYTES = 768 * MIB
CPU_DEFAULT_CONTEXTS = 2


@dataclass(frozen=True, slots=True)
class CachePlan:
    """How the key/value cache was sized: counts of blocks and tokens, bytes, and the free memory it was cut from."""

    num_blocks: int
    block_size: int
    bytes_per_block: int
    free_bytes: int

    @property
    def tokens(self) -> int:
        return self.num_blocks * self.block_size

    @property
    def total_bytes(self) -> int:
        return self.num_blocks * self.bytes_per_block


def plan_cache(
    *,
    block_size: int,
    bytes_per_block: int,
    max_total_tokens: int,
    requested_bytes: int | None,
    requested_tokens: int | None,
    free_bytes: int,
) -> CachePlan:
    """Blocks for the cache: what was asked for (bytes, else tokens), else a share of what is free (see above)."""
    if requested_bytes is not None:
        blocks = requested_bytes // bytes_per_block
    elif requested_tokens is not None:
        blocks = -(-requested_tokens // block_size)
    else:
        contexts = CPU_DEFAULT_CONTEXTS * -(-max_total_tokens // block_size)
        wanted = max(CPU_DEFAULT_BYTES // bytes_per_block, contexts)
        blocks = min(wanted, int(free_bytes * CPU_SHARE) // bytes_per_block)
    if blocks * bytes_per_block > free_bytes or blocks < 1:
        raise ConfigError(
            f"Not enough memory for the key/value cache: {max(1, blocks) * bytes_per_block / MIB:.0f} MiB wanted, "
            f"{free_bytes / MIB:.0f} MiB free; lower --max-batch-total-tokens or --kv-cache-memory"
        )
    return CachePlan(blocks, block_size, bytes_per_block, free_bytes)


def slots_that_fit(wanted: int, bytes_per_slot: int, free_bytes: int) -> int:
    """How many of the wanted slots a share of the free memory has room for; ConfigError if not for one."""
    fit = min(wanted, int(free_bytes * CPU_SHARE) // bytes_per_slot)
    if fit < 1:
        raise ConfigError(
            f"Not enough memory for the state of a sequence: {bytes_per_slot / MIB:.0f} MiB wanted, "
            f"{free_bytes / MIB:.0f} MiB free"
        )
    return fit


def free_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes this process may still take: the machine's available memory, or less where a control group says so."""
    free: list[float] = [meminfo_available(proc / "meminfo")]
    for line in read(proc / "self" / "cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers == "":
            free += [left(place, VERSION_2) for place in group_and_parents(cgroups, group)]
        elif "memory" in controllers.split(","):
            free += [left(place, VERSION_1) for place in group_and_parents(cgroups / "memory", group)]
    return max(0, int(min(free)))


def meminfo_available(path: Path) -> int:
    for line in path.read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    raise ConfigError(f"{path} has no MemAvailable line")


# Names of a control group's limit, its use, and the line of memory.stat that says what of it can be reclaimed.
VERSION_2 = ("memory.max", "memory.current", "inactive_file")
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def group_and_parents(root: Path, group: str) -> list[Path]:
    """The folders whose limits hold for a group; inside a container its own group is the root."""
    folder = root / group.lstrip("/")
    return [place for place in (folder, *folder.parents) if place.is_relative_to(root)]


def left(folder: Path, names: tuple[str, str, str]) -> float:
    """What a control group leaves; reclaimable file cache counts as free. Infinite without a limit."""
    limit, used = read(folder / names[0]).strip(), read(folder / names[1]).strip()
    if not (limit.isdigit() and used.isdigit()):
        return math.inf
    return int(limit) - int(used) + field(folder / "memory.stat", names[2])


def field(path: Path, name: str) -> int:
    for line in read(path).splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0


def read(path: Path) -> str:
    """The file's text, or nothing where this machine has no such file."""
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""
