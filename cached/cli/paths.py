"""`path`: wait until a model is proven on disk, print its directory, and link to it where asked.

Owns the symlink, the one thing that the commands ever write. Replaces a symlink atomically and never anything
that is not one.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cached.cli import options, progress, tables, words
from cached.client.errors import CachedError

if TYPE_CHECKING:
    from cached.v1 import model_cache_pb2 as pb

Link = Annotated[
    Path | None,
    typer.Option(
        "--link",
        metavar="DIR",
        help="Also make DIR a symlink to it, in one step; only a symlink is ever replaced.",
        show_default=False,
    ),
]
Ttl = Annotated[
    int | None,
    typer.Option(
        "--ttl",
        metavar="S",
        min=1,
        max=options.WEEK_S,
        help="Keep it by a lease of S seconds, at most a week; else nothing keeps it.",
        show_default=False,
    ),
]


def path(
    ref: options.RefArgument,
    link: Link = None,
    ttl: Ttl = None,
    run_dir: options.RunDir = None,
    address: options.Address = None,
    timeout: options.Timeout = None,
) -> None:
    """Wait until a model is proven on disk, and print its directory.

    Example: MODEL_PATH=$(cachectl path https://host/minilm/ --ttl 600)

    Nothing else goes to stdout. Where the daemon's data is mounted elsewhere, say so by CACHED_DATA_DIR.
    """
    if link is not None:
        check_linkable(link)  # before the wait: nobody wants to be refused after a download
    with options.connect(run_dir, address, timeout, reading=True) as node, progress.shown() as shown:
        grant = node.acquire_path(ref, ttl, shown.show)
    directory = local_path(grant.model, os.environ.get("CACHED_DATA_DIR"))
    _tell_lease(grant, ttl)
    if link is not None:
        make_link(link, directory)
    elif not directory.is_dir():
        _note(f"note: {directory} cannot be seen from here; {_MOUNT}")
    print(directory)


_MOUNT = "mount the daemon's data directory at the same place, or set CACHED_DATA_DIR"


def local_path(model: pb.Model, data_dir: str | None) -> Path:
    """The model's directory; under ``data_dir`` where the daemon's data is mounted elsewhere."""
    if not data_dir:
        return Path(model.path)
    return Path(data_dir).absolute() / "trees" / model.id.removeprefix("sha256:")


def check_linkable(link: Path) -> None:
    """Refuse a link whose place is taken by something else, or is nowhere. Raises CachedError."""
    if not link.parent.is_dir():
        raise _refused(f"cannot make {link}: {link.parent} is no directory", f"mkdir -p {link.parent}")
    if os.path.lexists(link) and not link.is_symlink():
        raise _refused(
            f"{link} is there and is no symlink; it is left as it is",
            "move it away, or name another place with --link",
        )


def make_link(link: Path, directory: Path) -> None:
    """Make ``link`` a symlink to ``directory``; whoever looks sees the old one or the new one."""
    if not directory.is_dir():
        raise _refused(f"{directory} cannot be seen from here, so {link} is not made", _MOUNT)
    check_linkable(link)
    made = link.with_name(f".{link.name[:200]}.{secrets.token_hex(4)}")
    try:
        made.symlink_to(directory)
        try:
            made.replace(link)
        except OSError:
            made.unlink()
            raise
    except OSError as error:
        raise _refused(
            f"cannot make {link}: {error.strerror}", "name a place with --link that this user may write to"
        ) from error


def _refused(message: str, hint: str) -> CachedError:
    return CachedError("FAILED_PRECONDITION", "LINK_REFUSED", message, hint)


def _tell_lease(grant: pb.Grant, ttl_s: int | None) -> None:
    if ttl_s is None:
        return
    _note(f"leased for {words.span(ttl_s)} as {grant.lease_id}")


def _note(line: str) -> None:
    tables.say(tables.console(stderr=True), line)
