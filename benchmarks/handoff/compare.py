"""From the request to the state dict: ours beside others', on the same files, cold and warm.

Owns who is compared and the order of the runs: the cold ones first, while nothing of a model is locked in
memory; then the warm ones, from a standby that has it. Round after round, each in a fresh process. The first
round is not counted; in it every state dict's digest is compared.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from rich.table import Table

from benchmarks.demo.processes import DemoError
from benchmarks.handoff.models import Model, bring_in, give_up
from benchmarks.handoff.replica import Task
from benchmarks.handoff.stage import Replica, Stage

OURS = "cached, host"


@dataclass(frozen=True, slots=True)
class Contestant:
    """``cold``: nothing of its files is in the page cache when it begins. ``package``: what it needs."""

    name: str
    kind: str
    cold: bool = False
    package: str = ""
    env: Mapping[str, str] = field(default_factory=dict)

    @property
    def missing(self) -> str:
        """Why it cannot be had here."""
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"the package {self.package} is not installed"
        return ""


def everybody() -> tuple[Contestant, ...]:
    small = {"NUMPY_MADVISE_HUGEPAGE": "0"}
    cold = (
        Contestant("cached, disk, cold", "ours-disk", cold=True),
        Contestant("safetensors, cold", "safetensors", cold=True, package="safetensors"),
        Contestant("runai-model-streamer, cold", "runai", True, "runai_model_streamer"),
        Contestant("runai, no huge pages, cold", "runai", True, "runai_model_streamer", small),
        Contestant("fastsafetensors, cold", "fastsafetensors", True, "fastsafetensors"),
        Contestant("tensorizer, cold", "tensorizer", True, "tensorizer"),
    )
    warm = (
        Contestant(OURS, "ours-host"),
        Contestant("cached, disk", "ours-disk"),
        Contestant("safetensors", "safetensors", package="safetensors"),
        Contestant("runai-model-streamer", "runai", package="runai_model_streamer"),
        Contestant("runai, no huge pages", "runai", package="runai_model_streamer", env=small),
        Contestant("fastsafetensors", "fastsafetensors", package="fastsafetensors"),
        Contestant("tensorizer", "tensorizer", package="tensorizer"),
    )
    return (*warm, *cold)


@dataclass(slots=True)
class Race:
    """One model's runs, and who failed with what reason. ``tree`` has its files under their own names."""

    stage: Stage
    model: Model
    tree: Path
    runs: dict[str, list[Replica]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    state: str = ""

    def rounds(self, contestants: Sequence[Contestant], warm_up: int, count: int) -> None:
        """``warm_up`` rounds that are not counted, then ``count``. What came is compared in the first."""
        for number in range(warm_up + count):
            shift = number % len(contestants)
            for one in [*contestants[shift:], *contestants[:shift]]:
                if one.name not in self.failed:
                    self.run(one, first=number == 0, counts=number >= warm_up)

    def run(self, one: Contestant, first: bool, counts: bool) -> None:
        (give_up if one.cold else bring_in)(self.files(one))
        path = self.tensorized if one.kind == "tensorizer" else self.tree
        try:
            done = self.stage.replica(Task(one.kind, self.model.ref, str(path)), one.env, ask_sum=first)
        except DemoError as error:
            if one.kind.startswith("ours"):
                raise
            self.failed[one.name] = last_line(str(error))
            return
        if first:
            self.check(one, done.state)
        if counts:
            self.runs.setdefault(one.name, []).append(done)

    def check(self, one: Contestant, state: str) -> None:
        self.state = self.state or state
        if state != self.state:
            raise DemoError(f"{one.name} loaded another state dict of {self.model.name} than the others")

    def files(self, one: Contestant) -> list[Path]:
        if one.kind == "tensorizer":
            return [self.tensorized]
        return [path.resolve() for path in sorted(self.tree.glob("*.safetensors"))]

    @property
    def tensorized(self) -> Path:
        return self.stage.places.work / f"{self.model.name}.tensors"

    def tensorize(self) -> None:
        """What tensorizer reads, made of the same tensors; a failure is its own row's."""
        if importlib.util.find_spec("tensorizer") is None:
            return
        try:
            task = Task("serializer", str(self.tensorized), str(self.tree), touch=False)
            self.stage.replica(task, {}, ask_sum=False)
        except DemoError as error:
            self.failed |= {
                one.name: last_line(str(error)) for one in everybody() if one.kind == "tensorizer"
            }


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1].strip()


# --- what it comes to -----------------------------------------------------------------------


def step_ms(runs: Sequence[Replica], step: str) -> float:
    return 1000 * median(run.took[step] for run in runs)


def table_of(race: Race) -> Table:
    model = race.model
    title = f"{model.name}: {model.size_bytes / 1e9:.2f} GB in {model.tensors} tensors, ms (median)"
    table = Table("loaded by", title=title)
    for heading in ("exchange", "map", "state dict", "best", "worst", "first touch", "all", "to ours"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in everybody():
        if one.name in race.runs:
            table.add_row(one.name, *cells_of(race, one))
        else:
            table.add_row(one.name, *["-"] * 8)
    return table


def cells_of(race: Race, one: Contestant) -> list[str]:
    runs = race.runs[one.name]
    exchange, complete, touched = (step_ms(runs, step) for step in ("exchange", "complete", "touched"))
    completes = [1000 * run.took["complete"] for run in runs]
    ours = one.kind.startswith("ours")
    return [
        f"{exchange:.1f}" if ours else "",
        f"{complete - exchange:.1f}" if ours else "",
        f"{complete:.1f}",
        f"{min(completes):.1f}",
        f"{max(completes):.1f}",
        f"{touched - complete:.1f}",
        f"{touched:.1f}",
        f"{touched / step_ms(race.runs[OURS], 'touched'):.2f}",
    ]


def missing_text(race: Race) -> str:
    """Who is not in the table, and why."""
    reasons = {one.name: one.missing or race.failed.get(one.name, "") for one in everybody()}
    return "\n".join(f"{name} was not measured: {reason}" for name, reason in reasons.items() if reason)


def imports_text(races: Sequence[Race]) -> str:
    """What is apart from all figures: the imports before the clock starts."""
    runs = {one.kind: race.runs[one.name] for race in races for one in everybody() if one.name in race.runs}
    each = [f"{kind} {step_imports(found, 'library'):.2f}" for kind, found in runs.items()]
    torch_s = median(run.imports["torch"] for found in runs.values() for run in found)
    return f"Imports, before the clock starts: torch {torch_s:.2f} s, and then {', '.join(each)} s"


def step_imports(runs: Sequence[Replica], name: str) -> float:
    return median(run.imports[name] for run in runs)


def as_records(races: Sequence[Race]) -> list[dict[str, object]]:
    return [
        {
            "model": race.model.name,
            "bytes": race.model.size_bytes,
            "by": name,
            "s": [dict(r.took) for r in runs],
        }
        for race in races
        for name, runs in race.runs.items()
    ]
