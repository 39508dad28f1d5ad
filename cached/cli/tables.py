"""What people read on stdout: tables and sheets that fit a terminal and stay whole in a pipe.

Owns layout. On a terminal, long cells are folded into its width and nothing is cut off; elsewhere every
record is one line however long, so that grep and awk see it whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from cached.cli import words

if TYPE_CHECKING:
    from cached.v1 import model_cache_pb2 as pb
    from cached.v1 import operator_pb2 as op

PIPE_COLUMNS = 100_000
SHORT_DIGEST = 12
_NAME_COLUMNS = 6
_STYLES = {
    "verified": "green",
    "fetching": "cyan",
    "failed": "yellow",
    "evicting": "yellow",
    "refused": "red",
    "quarantined": "red",
}


def console(stderr: bool = False) -> Console:
    """Prints text as it is: no markup, no emoji, no guessed colours; refs may hold any of their signs."""
    made = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not on_terminal(made):
        made.width = PIPE_COLUMNS
    return made


def on_terminal(console: Console) -> bool:
    """Whether somebody looks on; colours that are forced into a pipe do not make it a terminal."""
    return console.file.isatty()


def say(console: Console, line: str | Text) -> None:
    """Print prose, wrapped at words; a long ref or path in it is left to the terminal, to be copied whole."""
    longest = max(map(len, str(line).split()), default=0)
    console.print(line, soft_wrap=longest > console.width // 2)


def models(listed: Iterable[pb.Model], folded: bool) -> Table:
    """One line for each model: what it is, how it stands, where, and who claims it.

    ``folded`` is for a terminal: the facts are kept narrow, so that the ref has room.
    """
    table = _grid("REF", "STATE", ">SIZE", "ON", "CLAIMS")
    listed = list(listed)
    on_gpu = any(r.device.startswith("cuda:") for model in listed for r in model.residencies)
    for column, width in ((1, 13), (3, words.SHORT_DEVICE + 1 if on_gpu else 10), (4, 10)):
        table.columns[column].max_width = width if folded else None
    for model in listed:
        table.add_row(
            Slashed(model.ref or model.id),
            _state(model),
            words.size(model.bytes) if model.bytes else "-",
            words.places(model, short=folded) or "-",
            words.counted([c.kind for c in model.claims]) or "-",
        )
    return table


def files(listed: Iterable[pb.File]) -> Table:
    """One line for each file; the digests are cut short, `-o json` has them whole."""
    table = _grid("FILE", ">SIZE", "SHA256")
    for file in listed:
        table.add_row(Slashed(file.path), words.size(file.bytes), file.sha256[:SHORT_DIGEST] or "-")
    return table


def places(listed: Iterable[op.Place], folded: bool) -> Table:
    """One line for each device: its budget, and whether it can be used."""
    table = _grid("DEVICE", ">USED", ">CLAIMED", ">CAPACITY", ">FREE")
    for place in listed:
        known = place.capacity_bytes > 0
        free_bytes = max(0, place.capacity_bytes - place.used_bytes)
        table.add_row(
            _number(place)[: words.SHORT_DEVICE if folded else None],
            words.size(place.used_bytes),
            words.size(place.claimed_bytes),
            words.size(place.capacity_bytes) if known else "-",
            words.size(free_bytes) if known else "-",
        )
    return table


def gpus(listed: Iterable[op.Place], folded: bool) -> Table:
    """One line for each GPU: what it is, what it reports free, and whose it is."""
    table = _grid("GPU", "NAME", ">FREE", ">TOTAL", ">OUTSIDE", "CLAIMED BY", *([] if folded else ["UUID"]))
    for place in listed:
        figures = (place.free_bytes, place.total_bytes, place.outside_bytes)
        free, total, outside = (words.size(size_bytes) for size_bytes in figures)
        row = [_number(place), place.name, free, total, outside if place.outside_bytes else "-"]
        table.add_row(*row, place.claimed_by or "-", *([] if folded else [place.device]))
    return table


def uuids(listed: Iterable[op.Place]) -> list[str]:
    """Which GPU has which number; beside a table that has no room for it."""
    return [f"{_number(place)} is {place.device}" for place in listed]


def _number(place: op.Place) -> str:
    if place.device.startswith("cuda:MIG-"):  # all instances of a GPU have its number
        return place.device[: words.SHORT_DEVICE]
    return f"cuda:{place.index}" if place.name else place.device


def remarks(listed: Iterable[op.Place]) -> list[Text]:
    """What is wrong with the devices, in words; nothing where all is well."""
    found = []
    for place in listed:
        away = [] if place.connected else ["its standby is not connected; is `preloader serve` running?"]
        found += [Text(f"{_number(place)}: {remark}", style="yellow") for remark in (*away, *place.remarks)]
    return found


def outcome(verified: op.Verified) -> Text:
    """One artifact's outcome of a verification, on one line."""
    name = verified.ref or verified.id
    if verified.ok:
        return Text.assemble(("ok      ", "green"), f"  {words.size(verified.bytes):>8}  {name}")
    return Text.assemble(("differs ", "red"), f"  {words.size(verified.bytes):>8}  {name}: {verified.reason}")


def sheet(console: Console, facts: Iterable[tuple[str, str | Text]]) -> None:
    """Print facts, one a line; those without a value are left out.

    Prose is wrapped beside its name. A path or an id is one word, which the terminal wraps, so that it can
    be copied whole.
    """
    for name, value in facts:
        if not value:
            continue
        if " " in str(value):
            row = Table.grid(padding=(0, 2, 0, 0))
            row.add_column(style="bold", width=_NAME_COLUMNS)
            row.add_column(overflow="fold")
            row.add_row(name, value)
            console.print(row)
        else:
            line = Text.assemble((f"{name:<{_NAME_COLUMNS}}", "bold"), "  ", value)
            console.print(line, soft_wrap=True)


def model_facts(model: pb.Model, now_s: float) -> list[tuple[str, str | Text]]:
    """All that is known of one model, but for its files."""
    return [
        ("ref", model.ref),
        ("id", model.id),
        ("state", _state(model)),
        ("reason", Text(model.reason, style="red")),
        ("hint", model.hint),
        ("origin", _attested(model)),
        ("size", _size(model)),
        ("path", model.path),
        ("on", "\n".join(_standing(model))),
        ("moving", words.progress_line(model.progress) if model.HasField("progress") else ""),
        ("used", words.ago(model.last_used_at, now_s)),
        ("hits", "\n".join(_hits(model, now_s))),
        ("claims", "\n".join(words.claim(c, now_s) for c in model.claims) or "none"),
    ]


def node_facts(status: op.NodeStatus) -> list[tuple[str, str | Text]]:
    """The daemon itself, and what it is busy with."""
    claims = ((status.pins, "pin"), (status.leases, "lease"), (status.prefetches, "prefetch"))
    moving = f"{words.count(status.transfers, 'transfer')}, {words.count(status.loads, 'load')}"
    return [
        ("daemon", f"cached {status.version}, pid {status.pid}, up {words.span(status.uptime_s)}"),
        ("data", status.data_dir),
        ("run", status.run_dir),
        ("models", str(status.models)),
        ("claims", ", ".join(words.count(number, word) for number, word in claims)),
        ("moving", f"{moving}; {words.size(status.origin_bytes)} from origins since it started"),
    ]


class Slashed:
    """A ref or a path that, where it is too long for its cell, is broken behind its slashes."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(min(SHORT_DIGEST, len(self._text)), len(self._text))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = [""]
        for part in re.findall(r"[^/]*/*", self._text):
            if lines[-1] and len(lines[-1]) + len(part) > options.max_width:
                lines.append("")
            lines[-1] += part
        yield Text("\n".join(lines), overflow="fold")


def _attested(model: pb.Model) -> str:
    if not model.revision:
        return ""
    return "attests every digest" if model.attested else "attests no digests (it has no SHA256SUMS)"


def _size(model: pb.Model) -> str:
    if not model.bytes:
        return ""
    return words.size(model.bytes) + (f" in {words.count(len(model.files), 'file')}" if model.files else "")


def _standing(model: pb.Model) -> list[str]:
    inside = {r.device: r for r in model.residencies}
    lines = [device for device in model.devices if device not in inside]
    for residency in inside.values():
        locked = (
            ""
            if residency.locked or residency.state != "resident"
            else " but unlocked: proven at each handoff"
        )
        lines.append(f"{residency.device}: {residency.state}{locked}, {words.size(residency.bytes)}")
    return lines


def _hits(model: pb.Model, now_s: float) -> list[str]:
    used = [r for r in model.residencies if r.hits]
    return [
        f"{words.count(r.hits, 'grant')} from {r.device}, last {words.ago(r.last_used_at, now_s)}"
        for r in used
    ]


def _state(model: pb.Model) -> Text:
    return Text(words.state(model), style=_STYLES.get(model.state, ""))


def _grid(*titles: str) -> Table:
    """A table without lines; a title that starts with ``>`` heads a column of figures."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in titles:
        table.add_column(
            title.lstrip(">"), justify="right" if title.startswith(">") else "left", overflow="fold"
        )
    return table
