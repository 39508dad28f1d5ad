"""`prefetch`, `pin` and `unpin`: what an operator wants to be here, and where.

Owns these commands' words. What they mean is the daemon's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cached.cli import options, progress, tables, words
from cached.client.errors import CachedError

if TYPE_CHECKING:
    from cached.v1 import model_cache_pb2 as pb

On = Annotated[
    str, typer.Option("--on", metavar="DEVICE", help="Where to keep it: disk, host or cuda:UUID (memory).")
]


def prefetch(
    ref: options.RefArgument,
    wait: options.Wait = False,
    run_dir: options.RunDir = None,
    address: options.Address = None,
    timeout: options.Timeout = None,
) -> None:
    """Fetch a model and prove it; nothing keeps it afterwards.

    Example: cachectl prefetch https://host/minilm/ --wait

    Without --wait it goes on by itself, through restarts too; `cachectl show REF` says how far it is.
    """
    with options.connect(run_dir, address, timeout) as node, progress.shown() as shown:
        model = node.prefetch(ref, wait, shown.show)
    if model.state == "verified":
        _say(f"{model.ref or ref} is on disk and proven: {words.size(model.bytes)}{_unattested(model)}")
    else:
        _say(f"{model.ref or ref} is asked for; it is {words.state(model) or 'not here yet'}")


def pin(
    ref: options.RefArgument,
    on: On = "disk",
    wait: options.Wait = False,
    run_dir: options.RunDir = None,
    address: options.Address = None,
    timeout: options.Timeout = None,
) -> None:
    """Keep a model on a device until it is unpinned.

    Example: cachectl pin https://host/minilm/ --on host --wait

    Pins survive restarts. Repeating one is harmless, and waits for what is missing.
    """
    with options.connect(run_dir, address, timeout) as node, progress.shown() as shown:
        model = node.pin(ref, on, wait, shown.show)
    if on in model.devices:
        _say(
            f"{model.ref or ref} is pinned and stands on {on}: {words.size(model.bytes)}{_unattested(model)}"
        )
    else:
        _say(f"{model.ref or ref} is pinned on {on}; it is {words.state(model) or 'not here yet'}")


def unpin(
    ref: options.KnownArgument,
    run_dir: options.RunDir = None,
    address: options.Address = None,
    timeout: options.Timeout = None,
) -> None:
    """Take a model's pins off.

    Example: cachectl unpin https://host/minilm/

    It stays until its room is needed. Exits 3 where there is no pin.
    """
    with options.connect(run_dir, address, timeout) as node:
        pins = node.unpin(ref)
    if not pins:
        raise CachedError(
            "NOT_FOUND", "NO_PIN", f"there is no pin on {ref}", "`cachectl ls` says what is pinned"
        )
    _say(f"{ref} is unpinned ({words.count(pins, 'pin')})")


def _say(line: str) -> None:
    tables.say(tables.console(), line)


def _unattested(model: pb.Model) -> str:
    return "" if model.attested else " (unattested: its origin publishes no digests)"
