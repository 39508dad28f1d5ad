"""Control groups: finding them in what the kernel says, and the arithmetic of admission."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cached.model import CachedError, ErrorKind
from preloader.groups import (
    HEADROOM_BYTES,
    Groups,
    Scope,
    charged_elsewhere_bytes,
    check_room,
    find_groups,
    own_groups,
)

MIB = 2**20


def mountinfo(mount: Path, version: int, root: str = "/") -> str:
    end = "cgroup2 cgroup2 rw" if version == 2 else "cgroup cgroup rw,memory"
    other = f"30 25 0:30 / {mount}/cpu rw - cgroup cgroup rw,cpu,cpuacct"
    disk = "27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw"
    return "\n".join([disk, other, f"31 25 0:31 {root} {mount} rw,nosuid shared:2 - {end}"])


def group(directory: Path, version: int, limit: str, usage: int, **stat: int) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes",)
    for name, value in zip(names, (limit, str(usage)), strict=False):
        (directory / name).write_text(value + "\n")
    if version == 1:
        (directory / "memory.usage_in_bytes").write_text(f"{usage}\n")
    (directory / "memory.stat").write_text("".join(f"{k} {v}\n" for k, v in stat.items()))
    return directory


def memory(tmp_path: Path, total_mib: int, available_mib: int) -> Path:
    path = tmp_path / "meminfo"
    path.write_text(f"MemTotal: {total_mib * 1024} kB\nMemAvailable: {available_mib * 1024} kB\n")
    return path


# --- finding --------------------------------------------------------------------------------


def test_version_1_is_found_from_the_own_group_up(tmp_path: Path) -> None:
    own = group(tmp_path / "m/a/b", 1, "1", 0)
    parent, top = group(tmp_path / "m/a", 1, "1", 0), group(tmp_path / "m", 1, "1", 0)
    found = find_groups("9:cpu:/x\n4:memory:/a/b\n0::/c", mountinfo(tmp_path / "m", 1))
    assert (found.version, found.directories) == (1, (own, parent, top))


def test_version_1_in_a_container_that_is_told_the_hosts_path(tmp_path: Path) -> None:
    top = group(tmp_path / "m", 1, "1", 0)
    text = mountinfo(tmp_path / "m", 1, root="/docker/abc")
    assert find_groups("4:memory:/docker/abc", text).directories == (top,)
    own = group(tmp_path / "m/sub", 1, "1", 0)
    assert find_groups("4:memory:/docker/abc/sub", text).directories == (own, top)
    # A sibling whose name merely begins alike is not below that root.
    assert find_groups("4:memory:/docker/abcsub", text).directories == (top,)


def test_version_2_skips_groups_without_the_memory_controller(tmp_path: Path) -> None:
    (tmp_path / "m/pod/box").mkdir(parents=True)
    pod = group(tmp_path / "m/pod", 2, "max", 0)
    assert find_groups("0::/pod/box", mountinfo(tmp_path / "m", 2)).directories == (pod,)


def test_a_path_outside_of_the_namespace_means_the_mounts_top(tmp_path: Path) -> None:
    top = group(tmp_path / "m", 2, "max", 0)
    assert find_groups("0::/../other", mountinfo(tmp_path / "m", 2)).directories == (top,)


def test_no_controller_at_all(tmp_path: Path) -> None:
    found = find_groups("0::/", mountinfo(tmp_path, 2), memory(tmp_path, 100, 60))
    assert found.directories == () and not found.bounded
    assert found.scopes() == (Scope("this machine's memory", 100 * MIB, 40 * MIB),)
    assert found.unevictable_bytes() is None


# --- reading --------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
def test_scopes_count_what_cannot_be_reclaimed(tmp_path: Path, version: int) -> None:
    prefix = "total_" if version == 1 else ""
    stat = {f"{prefix}active_file": 5 * MIB, f"{prefix}inactive_file": 10 * MIB, "unevictable": 3 * MIB}
    own = group(tmp_path / "own", version, str(64 * MIB), 40 * MIB, **stat)
    unlimited = group(tmp_path / "up", version, "max" if version == 2 else str(2**63 - 4096), 0)
    groups = Groups((own, unlimited), version, memory(tmp_path, 100, 60))
    first, machine = groups.scopes()
    assert (first.limit_bytes, first.in_use_bytes) == (64 * MIB, 25 * MIB)
    assert machine.limit_bytes == 100 * MIB
    assert groups.limit_bytes() == 64 * MIB and groups.bounded
    assert groups.unevictable_bytes() == 3 * MIB


def test_memory_high_bounds_like_a_limit(tmp_path: Path) -> None:
    own = group(tmp_path / "own", 2, str(64 * MIB), 0)
    (own / "memory.high").write_text(f"{48 * MIB}\n")
    assert Groups((own,), 2, memory(tmp_path, 100, 60)).limit_bytes() == 48 * MIB


def test_the_lowest_limit_may_be_a_parents(tmp_path: Path) -> None:
    own, up = group(tmp_path / "a/b", 2, str(80 * MIB), 0), group(tmp_path / "a", 2, str(50 * MIB), 0)
    assert Groups((own, up), 2, memory(tmp_path, 100, 60)).limit_bytes() == 50 * MIB


def test_this_process_is_somewhere() -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < own_groups().limit_bytes() <= total


# --- arithmetic -------------------------------------------------------------------------------


def refused(scope: Scope, held: int, locked: int, new: int) -> CachedError:
    with pytest.raises(CachedError) as caught:
        check_room([Scope("wide", 2**50, 0), scope], held, locked, new)
    assert caught.value.problem.kind is ErrorKind.NO_ROOM
    return caught.value


def test_what_fits_to_the_byte_is_admitted() -> None:
    scope = Scope("g", 100 * MIB + HEADROOM_BYTES, 30 * MIB)
    check_room([scope], held_bytes=20 * MIB, locked_bytes=20 * MIB, new_bytes=70 * MIB)
    error = refused(scope, 20 * MIB, 20 * MIB, 70 * MIB + 1)
    assert error.problem.temporary and error.problem.reason == "NO_MEMORY"
    for figure in ("70.0 MiB", "132.0 MiB of g", "20.0 MiB are resident", "10.0 MiB are in use by others"):
        assert figure in error.problem.message


def test_unlocked_residents_count_though_the_kernel_could_reclaim_them() -> None:
    scope = Scope("g", 100 * MIB + HEADROOM_BYTES, 0)
    check_room([scope], held_bytes=60 * MIB, locked_bytes=0, new_bytes=40 * MIB)
    refused(scope, 61 * MIB, 0, 40 * MIB)


def test_what_exceeds_a_limit_alone_is_refused_for_good() -> None:
    error = refused(Scope("control group /x", 64 * MIB, 0), 0, 0, 64 * MIB)
    assert not error.problem.temporary and "64.0 MiB of control group /x" in error.problem.message


def test_charged_elsewhere_allows_for_the_kernels_imprecision() -> None:
    assert charged_elsewhere_bytes(100 * MIB, 96 * MIB, cpus=2) == 0
    assert charged_elsewhere_bytes(100 * MIB, 200 * MIB, cpus=2) == 0
    assert charged_elsewhere_bytes(100 * MIB, 90 * MIB, cpus=2) == 10 * MIB
    assert charged_elsewhere_bytes(100 * MIB, 90 * MIB, cpus=64) == 0
