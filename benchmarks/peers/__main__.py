"""``python -m benchmarks.peers``: our verified, durable download beside those of others, measured in one run.

Owns the order of the runs: round after round, so that what disturbs the machine disturbs all alike, each
from the same state: the origin's files in the page cache, the target empty, nothing left to be written to the
disk. The first round is not counted; in it each finds its best way, and what it downloaded is proven. Exits
with 1 when an aim is missed. Ctrl-C leaves no process and no directory behind.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import assert_never

from rich.console import Console

from benchmarks.demo.processes import DemoError, Places, remove_tree, supervise
from benchmarks.peers import contestants, figures, node, stage
from benchmarks.peers.clients import Job
from benchmarks.peers.contestants import PROTOCOLS, Client, Command, Contestant, Ours
from benchmarks.peers.figures import Aim, Result
from benchmarks.peers.measuring import Sample, run_client, run_command
from benchmarks.peers.stage import ROOT, Stage

TIMEOUT_S = 300.0
QUICK_BYTES = 64 * 2**20
DEFAULT_BYTES = 2 * 2**30
SPARE_BYTES = 2**30
WIDTH = 120
TARGET_PREFIX = "target-"
_UNITS = {"": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


@dataclass(frozen=True, slots=True)
class Options:
    size_bytes: int
    shards: int
    runs: int
    protocols: tuple[str, ...]
    peers: tuple[str, ...]
    record: Path | None

    def wants(self, contestant: Contestant) -> bool:
        if contestant.protocol != contestants.MACHINE and contestant.protocol not in self.protocols:
            return False
        return not self.peers or any(contestant.name.startswith(peer) for peer in self.peers)


@dataclass(frozen=True, slots=True)
class Course:
    """What all runs share."""

    stage: Stage
    places: Places
    env: Mapping[str, str]
    console: Console

    def run(self, contestant: Contestant, number: int) -> tuple[Sample, Path]:
        """One download by one of its ways, from the common state; and the folder that it filled."""
        target = Path(tempfile.mkdtemp(prefix=TARGET_PREFIX, dir=self.places.work))
        name, way = contestant.ways[number]
        plan = way(self.stage, target)
        log = self.places.work / "client.log"
        level = partial(self.level, target)
        match plan:
            case Command(argv):
                sample = run_command(list(argv), self.env, target, log, level, TIMEOUT_S)
            case Client(job):
                sample = run_client(node.client_argv(job), self.env, target, log, level, TIMEOUT_S)
            case Ours(job, tiny):
                sample = node.run_ours(self.stage, self.places, self.env, job, tiny, level, TIMEOUT_S)
            case _:
                assert_never(plan)
        shown = f"{contestant.id}{f' ({name})' if name else ''}"
        said = f"{sample.done_s:6.2f} s, on disk {sample.synced_s:6.2f} s, CPU {sample.cpu_s:6.2f} s"
        self.console.print(f"  {shown:<64} {said}  load {os.getloadavg()[0]:.1f}", soft_wrap=True)
        return sample, target

    def level(self, target: Path) -> None:
        """The common state, made when a client is up and about to be told to go.

        Others' files are gone, and only now: the memory that they lay in is free again, and on some machines
        it costs more the longer ago that was. Nothing is on its way to the disk. What the origin has is in
        its page cache.
        """
        for old in self.places.work.glob(TARGET_PREFIX + "*"):
            if old != target:
                remove_tree(old)
        os.sync()
        stage.warm(self.stage, self.places.work)


def perform(options: Options, places: Places) -> int:
    """Measure and print. Returns the exit status."""
    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)  # also where nobody sees it, as in a file
    try:
        check_room(places.work, options.size_bytes)
        console.print(f"· making {options.size_bytes / 2**20:.0f} MiB in {options.shards} files")
        made, _server = stage.build(places.work, options.size_bytes, options.shards)
        course = Course(made, places, node.environment(made, places), console)
        return measure(course, options)
    except DemoError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 1


def measure(course: Course, options: Options) -> int:
    everybody = [one for one in contestants.everybody() if options.wants(one)]
    if not everybody:
        raise DemoError("none of the contestants is left; --peers takes the beginnings of their names")
    failed: dict[str, str] = {}
    results = run_rounds(course, [one for one in everybody if not one.missing], options.runs, failed)
    aims = figures.aims_of(results)
    if any(one.name == "ours" for one in everybody):
        aims.append(resume_aim(course))
    course.console.print(conditions(course.stage, options), soft_wrap=True)
    course.console.print(figures.machine_table(results))
    for protocol in options.protocols:
        course.console.print(figures.protocol_table(protocol, everybody, results))
        course.console.print(figures.ways_text(protocol, results), soft_wrap=True)
        course.console.print(figures.missing_text(protocol, everybody, failed), markup=False, soft_wrap=True)
    course.console.print(figures.aims_table(aims))
    if options.record is not None:
        options.record.write_text(json.dumps(figures.as_records(results), indent=1))
    return int(not all(aim.met for aim in aims))


def run_rounds(
    course: Course, present: Sequence[Contestant], runs: int, failed: dict[str, str]
) -> dict[str, Result]:
    """Who fails in any round is left out of the results, and its reason is put into ``failed``."""
    course.console.print("· first round: not counted, finds each one's best way, proves what came")
    ways: dict[str, int] = {}
    for one in present:
        with leaving_out(course, one, failed):
            ways[one.id] = first_round(course, one)
    samples: dict[str, list[Sample]] = {one.id: [] for one in present}
    for number in range(1, runs + 1):
        course.console.print(f"· round {number} of {runs}")
        # Not always after the same one, whose traces it would carry.
        shift = number % len(present)
        for one in [*present[shift:], *present[:shift]]:
            if one.id not in failed:
                with leaving_out(course, one, failed):
                    samples[one.id].append(course.run(one, ways[one.id])[0])
    return {
        one.id: Result(
            one, one.ways[ways[one.id]][0], size_of(course.stage, samples[one.id]), tuple(samples[one.id])
        )
        for one in present
        if one.id not in failed
    }


@contextmanager
def leaving_out(course: Course, contestant: Contestant, failed: dict[str, str]) -> Iterator[None]:
    """Others may fail, and are told so; without ours there is nothing to compare them with."""
    try:
        yield
    except DemoError as error:
        if contestant.name.startswith("ours"):
            raise
        failed[contestant.id] = str(error)
        course.console.print(f"  {contestant.id} failed: {error}", style="red", markup=False)


def first_round(course: Course, contestant: Contestant) -> int:
    """The number of its fastest way. Raises DemoError where what came is not what the origin has."""
    tried: dict[str, Sample] = {}
    for number, (name, _) in enumerate(contestant.ways):
        tried[name], target = course.run(contestant, number)
        if contestant.fills:
            check_content(course.stage, target, contestant)
    fastest = figures.quickest(tried)
    return [name for name, _ in contestant.ways].index(fastest)


def size_of(made: Stage, samples: Sequence[Sample]) -> int:
    """What one run moved: the model, unless it says otherwise."""
    return int(samples[0].said.get("bytes", made.size_bytes))


def check_content(made: Stage, target: Path, contestant: Contestant) -> None:
    """Without proof nobody else would have noticed."""
    found = {
        sha256(path)
        for path in target.rglob("*")
        if path.is_file() and not path.is_symlink() and path.stat().st_size
    }
    for file in made.files:
        if file.sha256 not in found:
            raise DemoError(f"{contestant.id}: what came is not what the origin has of {file.name}")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def resume_aim(course: Course) -> Aim:
    course.console.print("· killing a fetch worker midway")
    target = Path(tempfile.mkdtemp(prefix=TARGET_PREFIX, dir=course.places.work))
    course.level(target)
    job = Job("ours", "", (), str(target))
    found = node.run_killed(course.stage, course.places, course.env, job, TIMEOUT_S)
    name = f"resume after kill -9 at {100 * found.before_bytes / course.stage.size_bytes:.0f} %: sent again"
    return Aim(name, found.again_bytes / 2**20, node.RESUME_BYTES / 2**20, "MiB", at_most=True)


def conditions(made: Stage, options: Options) -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    load = "/".join(f"{load:.1f}" for load in os.getloadavg())
    return (
        f"{time.strftime('%Y-%m-%d %H:%M')}: {len(made.files)} files, {made.size_bytes / 1e9:.2f} GB; "
        f"median of {options.runs}; {os.cpu_count()} cores, {memory:.0f} GiB, {platform.machine()}, Linux "
        f"{platform.release().split('-')[0]}, Python {platform.python_version()}; load average {load}\n"
        "Seconds from the call for libraries (imported, connected) and for ours (daemon and worker up), "
        "from the start for programs. CPU and memory of all processes of the client."
    )


def check_room(work: Path, size_bytes: int) -> None:
    # The origin's files, what is downloaded, and what was downloaded before.
    needed = 3 * size_bytes + SPARE_BYTES
    free = shutil.disk_usage(work).free
    if free < needed:
        raise DemoError(
            f"{work} has {free / 2**30:.1f} GiB free, and {needed / 2**30:.1f} are needed: give less --size, "
            "or another --dir"
        )


# --- the command ----------------------------------------------------------------------------


def default_size_bytes() -> int:
    """As much as is kept in the page cache with ease, beside a download of the same size."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(DEFAULT_BYTES, memory // 8)


def size(text: str) -> int:
    found = re.fullmatch(r"(\d+)\s*([a-z]*)", text.strip().lower())
    if found is None or found[2] not in _UNITS or int(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size, such as 2GiB")
    return int(found[1]) * _UNITS[found[2]]


def count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1")
    return int(text)


def names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (name.strip() for name in text.split(","))))


def options_of(argv: Sequence[str]) -> tuple[Options, Path]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=(__doc__ or "").split("\n")[0].partition(": ")[2]
    )
    parser.add_argument("--size", type=size, help="of the model (2GiB, less where memory is short)")
    parser.add_argument("--shards", type=count, default=4, help="how many files it is in (4)")
    parser.add_argument("--runs", type=count, default=5, help="counted runs of each (5)")
    parser.add_argument("--only", type=names, default=PROTOCOLS, help=f"protocols ({','.join(PROTOCOLS)})")
    parser.add_argument(
        "--peers", type=names, default=(), help="beginnings of names, such as ours,curl,limit (all)"
    )
    parser.add_argument("--quick", action="store_true", help="64 MiB and one run: whether it works at all")
    parser.add_argument("--dir", type=Path, default=ROOT / ".demo", help="on a real disk (.demo here)")
    parser.add_argument("--json", type=Path, help="write every run there")
    given = parser.parse_args(argv)
    unknown = set(given.only) - set(PROTOCOLS)
    if unknown:
        parser.error(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(PROTOCOLS)}")
    size_bytes = given.size or (QUICK_BYTES if given.quick else default_size_bytes())
    runs = 1 if given.quick else given.runs
    return Options(size_bytes, given.shards, runs, given.only, given.peers, given.json), given.dir


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
