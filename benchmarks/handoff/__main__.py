"""``python -m benchmarks.handoff``: what a replica gets and how fast, beside others, measured in one run.

Owns the order: what needs a page cache that can be emptied comes first, then what stands in locked memory.
Exits with 1 when an aim is missed. Ctrl-C leaves no process and no directory behind.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

from rich.console import Console

from benchmarks import plan_speed
from benchmarks.demo.processes import DemoError, Places, supervise
from benchmarks.handoff import compare, loading, round_trips, scaling
from benchmarks.handoff.compare import Race
from benchmarks.handoff.models import Model, experts, transformer, write_model
from benchmarks.handoff.stage import ROOT, Stage, environment
from benchmarks.peers.figures import Aim, aims_table

WIDTH = 130
MOST_GB = 8.0
SPARE_BYTES = 2**30
EQUAL_BYTES = 64 * 2**20
PACKAGES = ("torch", "safetensors", "runai-model-streamer", "fastsafetensors", "tensorizer")


@dataclass(frozen=True, slots=True)
class Options:
    """``sizes``: bytes of the models that others load too; ``tensors``: of those that are equally large."""

    sizes: tuple[int, ...]
    tensors: tuple[int, ...]
    equal_bytes: int
    heavy: int
    crowds: tuple[int, ...]
    crowd_bytes: tuple[int, ...]
    warm_up: int
    runs: int
    seconds: float
    calibrate_bytes: int
    plan: tuple[int, int]
    record: Path | None

    @property
    def total_bytes(self) -> int:
        many = (len(self.tensors) + self.heavy) * self.equal_bytes
        return sum(self.sizes) + sum(self.crowd_bytes) + many


@dataclass(frozen=True, slots=True)
class Course:
    options: Options
    stage: Stage
    compared: tuple[Model, ...]
    grown: tuple[Model, ...]
    crowded: tuple[Model, ...]

    @property
    def models(self) -> tuple[Model, ...]:
        return (*self.compared, *self.grown, *self.crowded)


def perform(options: Options, places: Places) -> int:
    """Measure and print. Returns the exit status."""
    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)  # also where nobody sees it, as in a file
    stage = Stage(places, environment(places), console)
    try:
        check_room(places.work, options)
        stage.say(f"making models of {options.total_bytes / 1e9:.1f} GB")
        aims = measure(make(options, stage))
    except DemoError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 1
    console.print(aims_table(aims))
    return int(not all(aim.met for aim in aims))


def make(options: Options, stage: Stage) -> Course:
    origin = stage.places.work / "origin"
    heavy = options.tensors[len(options.tensors) // 2]
    names = {size: f"qwen2-{size / 1e9:g}GB" for size in options.sizes}
    compared = [write_model(origin / name, transformer(size)) for size, name in names.items()]
    grown = [write_model(origin / f"{n}-tensors", experts(n, options.equal_bytes)) for n in options.tensors]
    more = experts(heavy, options.heavy * options.equal_bytes)
    grown.append(write_model(origin / f"{heavy}-tensors-heavy", more))
    crowded = [
        write_model(origin / f"crowd-{n}", transformer(size)) for n, size in enumerate(options.crowd_bytes)
    ]
    return Course(options, stage, tuple(compared), tuple(grown), tuple(crowded))


def measure(course: Course) -> list[Aim]:
    stage, options, console = course.stage, course.options, course.stage.console
    console.print(conditions(options), soft_wrap=True)
    with stage.daemon():
        stage.say("fetching them")
        trees = {model.name: stage.fetch(model.ref) for model in course.models}
        shutil.rmtree(stage.places.work / "origin")
        races = [Race(stage, model, trees[model.name]) for model in course.compared]
        for race in races:
            stage.say(f"{race.model.name}: cold")
            race.tensorize()
            race.rounds(chosen(race, cold=True), options.warm_up, options.runs)
    aims = load_aims(course, trees)
    with stage.daemon("--with-preloader") as daemon:
        for race in races:
            stage.say(f"{race.model.name}: warm")
            stage.stand(race.model.ref)
            race.rounds(chosen(race, cold=False), options.warm_up, options.runs)
            console.print(compare.table_of(race))
            console.print(compare.missing_text(race), markup=False, soft_wrap=True)
            race.tensorized.unlink(missing_ok=True)
        console.print(compare.imports_text(races), soft_wrap=True)
        stage.say("more tensors, more bytes")
        grown = scaling.grow(stage, course.grown, options.warm_up, options.runs)
        console.print(scaling.growth_table(course.grown, grown))
        stage.say("replicas at once")
        crowded = [(model, str(trees[model.name])) for model in course.crowded]
        console.print(scaling.crowds(stage, crowded, options.crowds, 3))
        stage.say("round trips")
        trial = round_trips.Trial(stage, daemon, course.compared[0], options.seconds, options.calibrate_bytes)
        trips = trial.measure()
        console.print(round_trips.table_of(trips))
    if options.record is not None:
        options.record.write_text(json.dumps(compare.as_records(races), indent=1))
    growth = scaling.growth_aims(course.grown, grown)
    return [*growth, *aims, *round_trips.aims_of(trips), *plan_aims(*options.plan)]


def chosen(race: Race, cold: bool) -> list[compare.Contestant]:
    return [one for one in compare.everybody() if one.cold is cold and not one.missing]


def load_aims(course: Course, trees: dict[str, Path]) -> list[Aim]:
    """The load from disk, and what a preloader costs, of the model that is nearest to 1 GB."""
    stage, console = course.stage, course.stage.console
    model = min(course.compared, key=lambda model: abs(model.size_bytes - 10**9))
    tree = trees[model.name]
    files = [path.resolve() for path in sorted(tree.glob("*.safetensors"))]
    stage.say(f"loading {model.name} into host memory")
    with stage.preloader() as process:
        empty = loading.costs(process)
        found = loading.rates(stage, f"sha256:{tree.name}", files, course.options.runs)
        full = loading.costs(process)
    console.print(loading.table_of(model, found))
    console.print(loading.cost_table(empty, full, model))
    return list(loading.aims_of(found))


def plan_aims(artifacts: int, leases: int) -> Iterable[Aim]:
    """One tick of the planner on a full node."""
    node = plan_speed.Node(artifacts, leases)
    for case in plan_speed.CASES:
        name = f"plan, {artifacts:,} artifacts, {leases:,} leases: {case.__name__.replace('_', ' ')}"
        yield Aim(name, plan_speed.median_ms(node, case, 100), plan_speed.AIM_MS, "ms", at_most=True)


def conditions(options: Options) -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    load = "/".join(f"{load:.1f}" for load in os.getloadavg())
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().split("[")[-1].split("]")[0]
    return (
        f"{time.strftime('%Y-%m-%d %H:%M')}: median of {options.runs} fresh processes, in turn; "
        f"{os.cpu_count()} cores, {memory:.0f} GiB, {platform.machine()}, "
        f"Linux {platform.release().split('-')[0]}, transparent huge pages: {huge}, "
        f"Python {platform.python_version()}; load average {load}\n{versions}"
    )


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def check_room(work: Path, options: Options) -> None:
    # At the origin and in the store; then, without the origin, in the store and as tensorizer has it.
    needed = 2 * options.total_bytes + SPARE_BYTES
    free = shutil.disk_usage(work).free
    if free < needed:
        raise DemoError(
            f"{work} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} are needed: give less --gb, "
            "or another --dir"
        )


# --- the command ----------------------------------------------------------------------------


def default_gb() -> float:
    """What stands in locked memory, is copied by a replica, and lies in the page cache once more."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(MOST_GB, memory / 1e9 // 5)


def options_of(argv: Sequence[str]) -> tuple[Options, Path]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.handoff", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--gb", type=float, default=default_gb(), help="the largest model (%(default)g)")
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each (5)")
    parser.add_argument("--quick", action="store_true", help="small models and few runs: whether it works")
    parser.add_argument("--dir", type=Path, default=ROOT / ".demo", help="on a real disk (.demo here)")
    parser.add_argument("--json", type=Path, help="write every run of the comparison there")
    given = parser.parse_args(argv)
    return (quick(given) if given.quick else full(given)), given.dir


def full(given: argparse.Namespace) -> Options:
    return Options(
        sizes=tuple(sorted({10**8, 10**9, int(given.gb * 1e9)})),
        tensors=(100, 1_000, 10_000),
        equal_bytes=EQUAL_BYTES,
        heavy=16,
        crowds=(1, 10, 100),
        crowd_bytes=(10**8, 2 * 2**30),
        warm_up=1,
        runs=max(1, given.runs),
        seconds=6.0,
        calibrate_bytes=10**9,
        plan=(10_000, 1_000),
        record=given.json,
    )


def quick(given: argparse.Namespace) -> Options:
    return Options(
        sizes=(10**8,),
        tensors=(100, 500, 1_000),
        equal_bytes=EQUAL_BYTES // 4,
        heavy=4,
        crowds=(1, 5),
        crowd_bytes=(5 * 10**7,),
        warm_up=0,
        runs=1,
        seconds=1.0,
        calibrate_bytes=2 * 10**8,
        plan=(1_000, 100),
        record=given.json,
    )


def main(argv: Sequence[str]) -> int:
    options, directory = options_of(argv)
    try:
        # The demo's directory and its lock: two measurements at once would measure each other.
        return supervise(directory, partial(perform, options))
    except (DemoError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
