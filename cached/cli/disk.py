"""`evict` and `verify`: what an operator does to what is on disk.

Owns these commands' words. What may be evicted and what counts as proven is the daemon's.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from cached.cli import options, progress, records, tables, words
from cached.cli.options import Output
from cached.client.errors import CachedError

if TYPE_CHECKING:
    from cached.v1 import operator_pb2 as op

Some = Annotated[
    str | None,
    typer.Argument(metavar="REF", help="A ref, or an artifact id (sha256:…).", show_default=False),
]
All = Annotated[bool, typer.Option("--all", metavar="", help="Verify every model on this node.")]


def evict(
    ref: options.KnownArgument,
    run_dir: options.RunDir = None,
    address: options.Address = None,
    timeout: options.Timeout = None,
) -> None:
    """Remove a model from memory and disk.

    Example: cachectl evict https://host/minilm/

    What is pinned or leased is left alone, and its holders are named (exit 1).
    """
    with options.connect(run_dir, address, timeout) as node:
        freed_bytes = node.evict(ref)
    tables.say(tables.console(), f"{ref} is evicted: {words.size(freed_bytes)} freed on disk")


def verify(
    ref: Some = None,
    every: All = False,
    output: options.OutputFormat = Output.TABLE,
    run_dir: options.RunDir = None,
    address: options.Address = None,
    timeout: options.Timeout = None,
) -> None:
    """Read what is on disk again and prove it by its digests.

    Example: cachectl verify --all

    Exits 4 where anything differs, and names it.
    """
    if every == (ref is not None):
        raise typer.BadParameter("give either a REF or --all", param_hint="REF")
    outcomes: list[op.Verified] = []
    with options.connect(run_dir, address, timeout) as node, progress.shown(doing="verifying") as shown:
        for outcome in node.verify(ref or "", shown.show):
            outcomes.append(outcome)
            if output is Output.TABLE:
                with shown.aside():
                    tables.say(tables.console(), tables.outcome(outcome))
    if output is Output.JSON:
        print(json.dumps([records.verified(o) for o in outcomes], indent=2, ensure_ascii=False))
    _refuse_different(outcomes)


def _refuse_different(outcomes: list[op.Verified]) -> None:
    different = [o for o in outcomes if not o.ok]
    if different:
        raise CachedError(
            "DATA_LOSS",
            "VERIFICATION_FAILED",
            f"{len(different)} of {words.count(len(outcomes), 'model')} differ from what was proven: "
            + ", ".join(o.ref or o.id for o in different),
            "what differed is no longer served and is kept in quarantine/; "
            "`cachectl prefetch REF --wait` fetches it anew. Suspect the disk",
        )
