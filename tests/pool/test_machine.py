"""What the process may use of the machine, read from files of both cgroup versions."""

import os
from pathlib import Path

from llamaherd.pool.machine import available_memory, usable_cores

MIB = 1024 * 1024


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def meminfo(tmp_path: Path, mib: int) -> Path:
    path = tmp_path / "meminfo"
    path.write_text(f"MemTotal: 99999999 kB\nMemAvailable:   {mib * 1024} kB\n")
    return path


def member(tmp_path: Path, line: str) -> Path:
    path = tmp_path / "membership"
    path.write_text(line + "\n")
    return path


def test_without_cgroups_the_systems_figure_counts(tmp_path: Path) -> None:
    none = tmp_path / "none"
    assert available_memory(none, none, meminfo(tmp_path, 100)) == 100 * MIB


def test_a_version_2_limit_counts_what_its_cache_could_give_back(tmp_path: Path) -> None:
    group = tmp_path / "a"
    write(group, memory__max=f"{50 * MIB}", memory__current=f"{40 * MIB}", memory__stat=f"inactive_file {5 * MIB}")
    assert available_memory(tmp_path, member(tmp_path, "0::/a"), meminfo(tmp_path, 100)) == 15 * MIB


def test_the_limit_of_a_parent_counts(tmp_path: Path) -> None:
    write(tmp_path / "a", memory__max=f"{50 * MIB}", memory__current=f"{20 * MIB}")
    write(tmp_path / "a" / "b", memory__max="max", memory__current=f"{20 * MIB}")
    assert available_memory(tmp_path, member(tmp_path, "0::/a/b"), meminfo(tmp_path, 100)) == 30 * MIB


def test_a_version_1_limit_counts_even_where_the_own_path_is_not_visible(tmp_path: Path) -> None:
    write(
        tmp_path / "memory",
        memory__limit_in_bytes=f"{30 * MIB}",
        memory__usage_in_bytes=f"{20 * MIB}",
        memory__stat=f"total_inactive_file {MIB}",
    )
    joined = member(tmp_path, "4:memory:/docker/0123")
    assert available_memory(tmp_path, joined, meminfo(tmp_path, 100)) == 11 * MIB


def test_no_limit_and_no_meminfo_is_unknown(tmp_path: Path) -> None:
    write(tmp_path, memory__max="max", memory__current="1")
    assert available_memory(tmp_path, member(tmp_path, "0::/"), tmp_path / "missing") is None


def test_cores_are_those_of_the_affinity_mask() -> None:
    assert 1 <= usable_cores() <= len(os.sched_getaffinity(0))


def test_a_cpu_quota_below_one_core_still_leaves_one(tmp_path: Path) -> None:
    write(tmp_path, cpu__max="5000 100000")
    assert usable_cores(tmp_path, member(tmp_path, "0::/")) == 1


def test_a_version_1_quota_counts(tmp_path: Path) -> None:
    write(tmp_path / "cpu", cpu__cfs_quota_us="5000", cpu__cfs_period_us="100000")
    assert usable_cores(tmp_path, member(tmp_path, "3:cpu,cpuacct:/")) == 1


def test_an_unlimited_quota_changes_nothing(tmp_path: Path) -> None:
    write(tmp_path, cpu__max="max 100000")
    write(tmp_path / "cpu", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    for line in ("0::/", "3:cpu,cpuacct:/"):
        assert usable_cores(tmp_path, member(tmp_path, line)) == len(os.sched_getaffinity(0))
