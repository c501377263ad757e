"""How much memory is really free, and how many key/value blocks that makes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from textmill.errors import ConfigError

MIB = 1 << 20
# On the CPU the cache shares memory with everything else on the machine: at most this share of what is free, and
# by default no more than the larger of this size and two full contexts.
CPU_SHARE = 0.5
CPU_DEFAULT_BYTES = 1024 * MIB
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


def free_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes this process may still take: the machine's available memory, or less where a control group says so."""
    free = [meminfo_available(proc / "meminfo")]
    free += [left for left in (cgroup_v2_left(proc, cgroups), cgroup_v1_left(cgroups / "memory")) if left is not None]
    return max(0, min(free))


def meminfo_available(path: Path) -> int:
    for line in path.read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    raise ConfigError(f"{path} has no MemAvailable line")


def cgroup_v2_left(proc: Path, cgroups: Path) -> int | None:
    """What the tightest of our control group and its parents leaves; reclaimable file cache counts as free."""
    relative = next(
        (line.split("::", 1)[1] for line in read(proc / "self" / "cgroup").splitlines() if line.startswith("0::")),
        None,
    )
    if relative is None:
        return None
    folder = cgroups / relative.strip().lstrip("/")
    left = []
    for place in (folder, *folder.parents):
        if not place.is_relative_to(cgroups):
            break
        limit, used = read(place / "memory.max").strip(), read(place / "memory.current").strip()
        if limit.isdigit() and used.isdigit():
            left.append(int(limit) - int(used) + field(place / "memory.stat", "inactive_file"))
    return min(left, default=None)


def cgroup_v1_left(folder: Path) -> int | None:
    limit, used = read(folder / "memory.limit_in_bytes").strip(), read(folder / "memory.usage_in_bytes").strip()
    if not (limit.isdigit() and used.isdigit()):
        return None
    return int(limit) - int(used) + field(folder / "memory.stat", "total_inactive_file")


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
