"""What the runs come to: medians, ratios, aims, and the tables that show them. Pure; measures nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from rich.table import Table

from benchmarks.peers.contestants import LIMIT, MACHINE, PROTOCOLS, Contestant
from benchmarks.peers.measuring import Sample

GIGA = 1e9
OF_LIMIT = 0.9
UNPROVEN = ("curl", "aria2c", "boto3", "s5cmd", "huggingface_hub")
"""Those that ours is to be faster than, though it proves and they do not."""


@dataclass(frozen=True, slots=True)
class Result:
    """One contestant's counted runs, in the one ``way`` that was fastest before."""

    contestant: Contestant
    way: str
    size_bytes: int
    samples: tuple[Sample, ...]

    @property
    def done_s(self) -> float:
        return median(sample.done_s for sample in self.samples)

    @property
    def best_s(self) -> float:
        return min(sample.done_s for sample in self.samples)

    @property
    def synced_s(self) -> float:
        return median(sample.synced_s for sample in self.samples)

    @property
    def cpu_s(self) -> float:
        return median(sample.cpu_s for sample in self.samples)

    @property
    def peak_mib(self) -> float:
        return median(sample.peak_mib for sample in self.samples)

    @property
    def done_gb_per_s(self) -> float:
        return self.size_bytes / GIGA / self.done_s

    @property
    def synced_gb_per_s(self) -> float:
        return self.size_bytes / GIGA / self.synced_s

    @property
    def cpu_s_per_gb(self) -> float:
        return self.cpu_s / (self.size_bytes / GIGA)


Results = Mapping[str, Result]
"""By the contestant's id."""


@dataclass(frozen=True, slots=True)
class Aim:
    """``value`` is to be at least ``bound``, or with ``at_most`` at most that."""

    name: str
    value: float
    bound: float
    unit: str = ""
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.value <= self.bound if self.at_most else self.value >= self.bound


def quickest(tried: Mapping[str, Sample]) -> str:
    """The way to stay with: the first to have everything on the disk."""
    return min(tried, key=lambda way: tried[way].synced_s)


def aims_of(results: Results) -> list[Aim]:
    """Those whose contestants were measured."""
    aims = []
    for protocol in PROTOCOLS:
        ours = results.get(f"{protocol}/ours")
        if ours is None:
            continue
        for name in UNPROVEN:
            peer = results.get(f"{protocol}/{name}")
            if peer is not None:
                aims.append(Aim(f"{protocol}: {name}'s seconds to ours", peer.done_s / ours.done_s, 1.0))
        most = results.get(f"{protocol}/{LIMIT}")
        if most is not None:
            aims.append(Aim(f"{protocol}: ours to the limit, on disk", most.synced_s / ours.done_s, OF_LIMIT))
    return aims


def machine_table(results: Results) -> Table:
    table = Table("of this machine", title="What its parts allow, each alone")
    for heading in ("GB/s", "GB/s on disk", "CPU s/GB"):
        table.add_column(heading, justify="right")
    table.add_column("best with")
    for result in results.values():
        if result.contestant.protocol == MACHINE:
            rates = (result.done_gb_per_s, result.synced_gb_per_s, result.cpu_s_per_gb)
            table.add_row(result.contestant.name, *(f"{rate:.2f}" for rate in rates), result.way)
    return table


def protocol_table(protocol: str, contestants: Sequence[Contestant], results: Results) -> Table:
    """One line for each contestant, those that are missing included. ``to ours``: its seconds by ours."""
    table = Table("contestant", title=f"Over {protocol}")
    for heading in ("s", "best", "s on disk", "GB/s", "on disk", "to ours", "CPU s/GB", "MiB"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("proves")
    table.add_column("durable")
    ours = results.get(f"{protocol}/ours")
    for contestant in contestants:
        if contestant.protocol == protocol:
            result = results.get(contestant.id)
            cells = ["-"] * 8 if result is None else row_of(result, ours)
            table.add_row(contestant.name, *cells)
    return table


def missing_text(protocol: str, contestants: Sequence[Contestant], failed: Mapping[str, str]) -> str:
    """Who was not measured, and why; ``failed`` by the contestant's id."""
    reasons = {one.name: one.missing or failed.get(one.id) for one in contestants if one.protocol == protocol}
    return "\n".join(f"{name} was not measured: {reason}" for name, reason in reasons.items() if reason)


def row_of(result: Result, ours: Result | None) -> list[str]:
    return [
        f"{result.done_s:.2f}",
        f"{result.best_s:.2f}",
        f"{result.synced_s:.2f}",
        f"{result.done_gb_per_s:.2f}",
        f"{result.synced_gb_per_s:.2f}",
        f"{result.done_s / ours.done_s:.2f}" if ours else "",
        f"{result.cpu_s_per_gb:.2f}",
        f"{result.peak_mib:.0f}",
        result.contestant.proves,
        result.contestant.durable,
    ]


def ways_text(protocol: str, results: Results) -> str:
    """How each was used, where there is something to say about it."""
    ways = [
        f"{result.contestant.name}: {result.way}"
        for result in results.values()
        if result.contestant.protocol == protocol and result.way
    ]
    return "; ".join(ways)


def aims_table(aims: Sequence[Aim]) -> Table:
    table = Table("aim", title="What is aimed at")
    for heading in ("measured", "bound", ""):
        table.add_column(heading, justify="right")
    for aim in aims:
        bound = f"{'at most' if aim.at_most else 'at least'} {aim.bound:g} {aim.unit}".rstrip()
        verdict = "[green]met[/green]" if aim.met else "[red]MISSED[/red]"
        table.add_row(aim.name, f"{aim.value:.2f} {aim.unit}".rstrip(), bound, verdict)
    return table


def as_records(results: Results) -> list[dict[str, object]]:
    """For ``--json``: every counted run."""
    return [
        {
            "protocol": result.contestant.protocol,
            "name": result.contestant.name,
            "way": result.way,
            "bytes": result.size_bytes,
            "done_s": [sample.done_s for sample in result.samples],
            "synced_s": [sample.synced_s for sample in result.samples],
            "cpu_s": [sample.cpu_s for sample in result.samples],
            "peak_mib": [sample.peak_mib for sample in result.samples],
        }
        for result in results.values()
    ]
