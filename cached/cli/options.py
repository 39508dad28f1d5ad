"""What the commands' options have in common: where the daemon is, how long to wait, how to print.

Owns the words and bounds of shared options, and the late way to the daemon: gRPC is imported when a command
runs, so that `--help` stays quick.
"""

from __future__ import annotations

import enum
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cached.cli.node import Node

WEEK_S = 7 * 24 * 3600
"""The longest time to wait and the longest lease; the daemon has the same bound."""

_NODE = "Which daemon, and how long"


class Output(enum.Enum):
    TABLE = "table"
    JSON = "json"


def connect(
    run_dir: Path | None, address: str | None, timeout_s: float | None, reading: bool = False
) -> AbstractContextManager[Node]:
    """The daemon, for the length of a ``with`` block; see ``cached.cli.node``."""
    from cached.cli import node  # late: gRPC is not free to import

    return node.connect(run_dir, address, timeout_s, reading)


def _seconds(value: float | None) -> float | None:
    # Written so that nan is refused too.
    if value is not None and not 0 < value <= WEEK_S:
        raise typer.BadParameter(f"{value:g} is not more than 0 and at most {WEEK_S} seconds")
    return value


RefArgument = Annotated[
    str, typer.Argument(metavar="REF", help="Where the model comes from: https://host/dir/ or file:///dir.")
]
KnownArgument = Annotated[str, typer.Argument(metavar="REF", help="A ref, or an artifact id (sha256:…).")]
RunDir = Annotated[
    Path | None,
    typer.Option(
        "--run-dir",
        metavar="DIR",
        rich_help_panel=_NODE,
        help="The daemon's run directory; else CACHED_RUN_DIR, else /run/cached.",
        show_default=False,
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="ADDR",
        rich_help_panel=_NODE,
        help="Its address instead, unix:/path or HOST:PORT; else CACHED_ADDRESS.",
        show_default=False,
    ),
]
Timeout = Annotated[
    float | None,
    typer.Option(
        "--timeout",
        metavar="S",
        rich_help_panel=_NODE,
        help="Give up after S seconds and exit 8; else 60, or never where bytes are waited for.",
        show_default=False,
        callback=_seconds,
    ),
]
OutputFormat = Annotated[Output, typer.Option("--output", "-o", help="A table for people, or JSON.")]
Wait = Annotated[
    bool,
    typer.Option("--wait", metavar="", help="Wait until it is there and proven, and show how far it is."),
]
