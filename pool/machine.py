"""What this process may use of the machine: cores and memory, inside its cgroup's limits."""

import os
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from typing import Final

__all__ = ["available_memory", "oom_kills", "resident_bytes", "usable_cores"]

_MOUNT: Final = Path("/sys/fs/cgroup")
_MEMBERSHIP: Final = Path("/proc/self/cgroup")
_MEMINFO: Final = Path("/proc/meminfo")
_VMSTAT: Final = Path("/proc/vmstat")
_OWN_STATUS: Final = Path("/proc/self/status")


def usable_cores(mount: Path = _MOUNT, membership: Path = _MEMBERSHIP) -> int:
    """Return the cores this process may run on, at least 1.

    The smaller of the affinity mask and the cgroup's CPU quota: ggml's threads spin at barriers, so one thread too many
    slows every step several times.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _own_groups(mount, membership, "cpu"):
        quota = _cpu_quota(folder)
        if quota is not None:
            cores = min(cores, ceil(quota))
    return max(1, cores)


def available_memory(mount: Path = _MOUNT, membership: Path = _MEMBERSHIP, meminfo: Path = _MEMINFO) -> int | None:
    """Return the bytes this process can still commit without swapping or being killed; None where unknown.

    The smaller of the system's ``MemAvailable`` and what is left below each memory limit of the cgroups above it; file
    cache that a cgroup could drop counts as left.
    """
    limits = [_left_in_group(folder) for folder in _own_groups(mount, membership, "memory")]
    limits.append(_mem_available(meminfo))
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else None


def oom_kills(vmstat: Path = _VMSTAT) -> int:
    """Return how many processes the kernel has killed for want of memory since it started; 0 where unknown."""
    return _field(_read(vmstat), "oom_kill")


def resident_bytes(status: Path = _OWN_STATUS) -> int:
    """Return the resident memory of this process, mapped file pages included; 0 where unknown."""
    return _field(_read(status), "VmRSS:") * 1024


def _own_groups(mount: Path, membership: Path, controller: str) -> Iterator[Path]:
    """Yield this process's cgroup folder for a controller and its parents, for both cgroup versions."""
    for line in _read(membership).splitlines():
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        # A controller's mount is named by itself in version 1; inside a container the path may not be visible.
        top = mount / controller if names else mount
        folder = top / path.lstrip("/")
        while folder != top and top in folder.parents:
            yield folder
            folder = folder.parent
        yield top


def _left_in_group(folder: Path) -> int | None:
    for limit_name, usage_name, cache_name in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, usage = _read(folder / limit_name).strip(), _read(folder / usage_name).strip()
        if limit.isdigit() and usage.isdigit():
            cache = _field(_read(folder / "memory.stat"), cache_name)
            return max(0, int(limit) - int(usage) + cache)
    return None


def _cpu_quota(folder: Path) -> float | None:
    both = _read(folder / "cpu.max").split()
    if not both:
        both = [_read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip()]
    if len(both) == 2 and both[0].isdigit() and both[1].isdigit() and int(both[1]) > 0:
        return int(both[0]) / int(both[1])
    return None


def _mem_available(meminfo: Path) -> int | None:
    kilobytes = _field(_read(meminfo), "MemAvailable:")
    return kilobytes * 1024 if kilobytes else None


def _field(text: str, name: str) -> int:
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == name and words[1].isdigit():
            return int(words[1])
    return 0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
