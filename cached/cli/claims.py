"""`prefetch`, `pin`, `unpin` and `swap`: what an operator wants to be here, and where.

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
    str,
    typer.Option(
        "--on",
        metavar="DEVICE",
        help="Where to keep it: disk, host (memory), cuda:N, cuda:UUID, cuda:any or cuda:all.",
    ),
]
InPlace = Annotated[
    str, typer.Option("--on", metavar="DEVICE", help="In which memory: host, cuda:N or cuda:UUID.")
]
Out = Annotated[str, typer.Argument(metavar="OUT", help="The model that leaves the device.")]
Copies = Annotated[
    int, typer.Option("--copies", metavar="N", min=1, max=64, help="With cuda:any: on how many GPUs.")
]
Priority = Annotated[
    int,
    typer.Option("--priority", metavar="N", min=-1000, max=1000, help="Pins of a higher one are met first."),
]
Unclaimed = Annotated[
    bool,
    typer.Option(
        "--unclaimed",
        metavar="",
        help="On a GPU: also while it is given to nobody; needed where there is no orchestrator.",
    ),
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
    copies: Copies = 1,
    priority: Priority = 0,
    unclaimed: Unclaimed = False,
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
        model = node.pin(ref, on, wait, shown.show, copies, priority, unclaimed)
    standing = on if on in model.devices else ", ".join(_gpus(model)) if on.startswith("cuda:") else ""
    if standing:
        size = words.size(model.bytes)
        _say(f"{model.ref or ref} is pinned and stands on {standing}: {size}{_unattested(model)}")
    else:
        why = f": {model.reason}" if model.reason else ""
        _say(f"{model.ref or ref} is pinned on {on}; it is {words.state(model) or 'not here yet'}{why}")


def swap(
    out: Out,
    ref: options.RefArgument,
    on: InPlace,
    wait: options.Wait = False,
    run_dir: options.RunDir = None,
    address: options.Address = None,
    timeout: options.Timeout = None,
) -> None:
    """Pin one model in a device's memory in the place of another, as one plan.

    Example: cachectl swap hf://org/old hf://org/new --on cuda:0 --wait

    It has the other's priority, and its --unclaimed. The one that leaves stays on disk, and in host memory
    where it stands there: the way back is as short.
    """
    with options.connect(run_dir, address, timeout) as node, progress.shown() as shown:
        model = node.swap(out, ref, on, wait, shown.show)
    _say(f"{model.ref or ref} is pinned on {on} in the place of {out}; it is on {words.places(model)}")


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


def _gpus(model: pb.Model) -> list[str]:
    return [device for device in model.devices if device.startswith("cuda:")]


def _unattested(model: pb.Model) -> str:
    return "" if model.attested else " (unattested: its origin publishes no digests)"
