"""Backing off under pressure: the rule on figures, and the reading of files as the kernel writes them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from cached.config import PressureSettings
from cached.node.pressure import (
    DOWN_EVERY_S,
    LEAST_SHARE,
    SHARES,
    UP_AFTER_S,
    Level,
    Pressure,
    of_others,
    own_group,
    step,
)

BOUNDS = {"cpu": 0.6, "io": 0.6, "memory": 0.1}


def steps(level: Level, stalled: dict[str, float], seconds: int, begin_s: int = 100) -> list[float]:
    """The shares, second by second."""
    shares = []
    for second in range(seconds):
        level = step(level, stalled, BOUNDS, float(begin_s + second))
        shares.append(level.share)
    return shares


@pytest.mark.parametrize("name", ["cpu", "io", "memory"])
def test_it_goes_down_step_by_step_as_far_as_the_resource_allows(name: str) -> None:
    shares = steps(Level(), {name: 0.95}, 20)
    assert shares[0] == 0.5 and shares[-1] == LEAST_SHARE[name]
    assert sorted(shares, reverse=True) == shares
    changes = [second for second in range(1, 20) if shares[second] != shares[second - 1]]
    assert all(later - earlier >= DOWN_EVERY_S for earlier, later in itertools.pairwise(changes))
    assert set(shares) == {share for share in SHARES if LEAST_SHARE[name] <= share < 1}


def test_one_resource_does_not_raise_what_another_lowered() -> None:
    paused = Level(0.0, 100.0, 100.0)
    assert set(steps(paused, {"cpu": 0.9}, 30, 103)) == {0.0}


def test_it_comes_back_step_by_step_once_it_is_calm() -> None:
    shares = steps(Level(0.0, 100.0, 100.0), {"cpu": 0.3}, 30)
    assert shares[int(UP_AFTER_S) - 1] == 0.0
    assert [shares[int(UP_AFTER_S) * count] for count in range(1, 5)] == [0.1, 0.25, 0.5, 1.0]
    assert shares[-1] == 1.0


def test_between_the_bounds_it_stays_where_it_is() -> None:
    assert set(steps(Level(0.5, 100.0, 100.0), {"io": 0.5}, 60)) == {0.5}
    assert set(steps(Level(), {"cpu": 0.6, "io": 0.6, "memory": 0.1}, 60)) == {1.0}


def test_a_prefetch_that_only_disturbs_itself_keeps_most_of_its_speed() -> None:
    """The pressure it makes follows its share; without a group of its own, that is what is seen."""
    level, shares = Level(), []
    for second in range(300):
        level = step(level, {"io": 0.9 * level.share, "cpu": 0.5 * level.share}, BOUNDS, float(second))
        shares.append(level.share)
    assert sum(shares) / len(shares) > 0.5 and min(shares) >= 0.5


def test_our_own_waiting_does_not_count_but_for_memory() -> None:
    node = {"cpu": 10.0, "io": 8.0, "memory": 3.0}
    assert of_others(node, None) == node
    own = {"cpu": 9.0, "io": 8.5, "memory": 3.0}
    assert of_others(node, own) == {"cpu": 1.0, "io": 0.0, "memory": 3.0}


def write(directory: Path, suffix: str = "", **totals_s: float) -> None:
    directory.mkdir(exist_ok=True)
    for name, total_s in totals_s.items():
        line = f"avg10=0.00 avg60=0.00 avg300=0.00 total={int(total_s * 1e6)}"
        (directory / f"{name}{suffix}").write_text(f"some {line}\nfull {line}\n")


def test_the_files_are_read_as_the_kernel_writes_them(tmp_path: Path) -> None:
    pressure = Pressure(PressureSettings(), tmp_path / "node")
    assert not pressure.available()
    pressure.look(1.0)
    assert pressure.background_share() == 1.0
    for second in range(10):
        write(tmp_path / "node", cpu=1000 + 0.5 * second, io=7, memory=3 + 0.2 * second)
        pressure.look(10.0 + second)
    assert pressure.available()
    assert pressure.background_share() == 0.0
    for second in range(60):
        pressure.look(20.0 + second)
    assert pressure.background_share() == 1.0


@pytest.mark.parametrize(("own_s", "share"), [(0.9, 1.0), (0.1, 0.25)])
def test_a_busy_node_counts_as_far_as_it_is_not_us(tmp_path: Path, own_s: float, share: float) -> None:
    pressure = Pressure(PressureSettings(), tmp_path / "node", tmp_path / "own")
    for second in range(20):
        write(tmp_path / "node", cpu=second, io=0, memory=0)
        write(tmp_path / "own", ".pressure", cpu=own_s * second, io=0, memory=0)
        pressure.look(float(second))
    assert pressure.background_share() == share


def test_the_root_group_says_nothing_of_us_alone(tmp_path: Path) -> None:
    pressure = Pressure(PressureSettings(), tmp_path / "node", tmp_path / "own")
    for second in range(20):
        for place, suffix in (("node", ""), ("own", ".pressure")):
            write(tmp_path / place, suffix, cpu=second, io=0, memory=0)
        pressure.look(float(second))
    assert pressure.background_share() == 0.25


def test_a_bound_of_100_percent_is_never_exceeded(tmp_path: Path) -> None:
    pressure = Pressure(PressureSettings(100.0, 100.0, 100.0), tmp_path)
    for second in range(20):
        write(tmp_path, cpu=1.01 * second, io=second, memory=second)
        pressure.look(float(second))
    assert pressure.background_share() == 1.0


def test_the_own_group_is_the_one_of_version_2(tmp_path: Path) -> None:
    group = tmp_path / "root" / "a" / "b"
    group.mkdir(parents=True)
    cgroup = tmp_path / "cgroup"
    assert own_group(cgroup, tmp_path / "root") is None
    cgroup.write_text("4:memory:/a/b\n")
    assert own_group(cgroup, tmp_path / "root") is None
    cgroup.write_text("4:memory:/x\n0::/a/b\n")
    assert own_group(cgroup, tmp_path / "root") is None
    (group / "cpu.pressure").write_text("")
    assert own_group(cgroup, tmp_path / "root") == group
