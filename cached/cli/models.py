"""`ls`, `show` and `status`: what is here, how it stands, and what the node has room for.

Owns these commands' words. Changes nothing; `ls` and `show` work for replicas too.
"""

from __future__ import annotations

import json
import time
from typing import Any

from cached.cli import options, records, tables
from cached.cli.options import Output


def ls(
    output: options.OutputFormat = Output.TABLE,
    run_dir: options.RunDir = None,
    address: options.Address = None,
    timeout: options.Timeout = None,
) -> None:
    """List every model that this node knows of.

    Example: cachectl ls

    `cachectl show REF` says why a model is failed or refused, and who holds it.
    """
    with options.connect(run_dir, address, timeout, reading=True) as node:
        models = sorted(node.list(), key=lambda m: m.ref)
    if output is Output.JSON:
        _print_json([records.listed(m) for m in models])
    elif models:
        console = tables.console()
        console.print(tables.models(models, folded=tables.on_terminal(console)))
    else:
        tables.say(tables.console(stderr=True), "no models here yet; `cachectl prefetch REF` brings one")


def show(
    ref: options.KnownArgument,
    output: options.OutputFormat = Output.TABLE,
    run_dir: options.RunDir = None,
    address: options.Address = None,
    timeout: options.Timeout = None,
) -> None:
    """Show one model: its state and why, holders, path, files.

    Example: cachectl show https://host/minilm/ -o json
    """
    with options.connect(run_dir, address, timeout, reading=True) as node:
        model = node.get(ref)
    if output is Output.JSON:
        _print_json(records.shown(model))
        return
    console = tables.console()
    tables.sheet(console, tables.model_facts(model, time.time()))
    if model.files:
        console.print()
        console.print(tables.files(model.files))


def status(
    output: options.OutputFormat = Output.TABLE,
    run_dir: options.RunDir = None,
    address: options.Address = None,
    timeout: options.Timeout = None,
) -> None:
    """Show the node: its daemon, and the room on each device.

    Example: cachectl status --timeout 5
    """
    with options.connect(run_dir, address, timeout) as node:
        known = node.status()
    if output is Output.JSON:
        _print_json(records.status(known))
        return
    console = tables.console()
    tables.sheet(console, tables.node_facts(known))
    console.print()
    folded = tables.on_terminal(console)
    console.print(tables.places(known.places, folded))
    gpus = [place for place in known.places if place.name]
    if gpus:
        console.print()
        console.print(tables.gpus(gpus, folded))
        for line in tables.uuids(gpus) if folded else ():
            tables.say(console, line)
    for remark in tables.remarks(known.places):
        tables.say(console, remark)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))
