"""`cachectl`: what operators and scripts ask of the node's daemon.

Owns the command line: which commands there are, how an error is told, and what a command exits with. One file
for each group of commands; they ask the daemon and decide nothing.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, NoReturn

import typer
from rich.text import Text

from cached.cli import claims, disk, models, paths, running, tables
from cached.client.errors import CachedError

FAILED = 1
INTERRUPTED = 130
_GROUPS: Mapping[str, Mapping[str, Callable[..., None]]] = {
    "Bring and keep": {
        "prefetch": claims.prefetch,
        "pin": claims.pin,
        "unpin": claims.unpin,
        "swap": claims.swap,
        "path": paths.path,
        "run": running.run,
    },
    "Look": {"ls": models.ls, "show": models.show, "status": models.status},
    "Check and remove": {"verify": disk.verify, "evict": disk.evict},
}
_EXIT_CODES = (
    "Exit codes: 0 done, 1 failed, 2 usage, 3 not found, 4 verification failed, 5 does not fit, "
    "6 no daemon, 7 denied, 8 out of time, 130 interrupted; of `run`, the command's own."
)


def main() -> None:
    """The command's entry point."""
    # gRPC would tell of a daemon that ends in its own words, before we tell of it in ours.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    signal.signal(signal.SIGTERM, _end_tidily)
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line, print what it has to say, and return what to exit with."""
    try:
        # Without standalone mode, typer raises its errors and returns the code of an early exit.
        code = application()(list(arguments), prog_name="cachectl", standalone_mode=False)
        sys.stdout.flush()
    except CachedError as error:
        return _tell(error.message, error.hint, error.exit_code)
    except typer.TyperException as error:
        return _tell(error.format_message(), _usage_hint(arguments), error.exit_code)
    except BrokenPipeError:
        # Whoever read us has seen enough; what is left must not fail again at the interpreter's end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    return code if isinstance(code, int) else 0


def _end_tidily(signal_number: int, _: object) -> NoReturn:
    # An exception, so that a live line is taken down and the terminal has its cursor back.
    sys.exit(128 + signal_number)


def application() -> typer.Typer:
    """Every command under its group."""
    app = typer.Typer(
        add_completion=False,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog=_EXIT_CODES,
    )
    app.callback(invoke_without_command=True)(_root)
    for group, commands in _GROUPS.items():
        for name, command in commands.items():
            app.command(name, rich_help_panel=group)(command)
    return app


def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", metavar="", help="Print the version.")] = False,
) -> None:
    """Make model weights local, proven and warm on this node: ask its daemon, `cached`."""
    if version:
        import cached

        print(f"cachectl {cached.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


def _usage_hint(arguments: Sequence[str]) -> str:
    known = (name for commands in _GROUPS.values() for name in commands)
    command = next((f"cachectl {name}" for name in known if name in arguments[:1]), "cachectl")
    return f"`{command} --help` says how it is used"


def _tell(message: str, hint: str, exit_code: int) -> int:
    console = tables.console(stderr=True)
    tables.say(console, Text.assemble(("error:", "bold red"), " ", message))
    if hint:
        tables.say(console, Text.assemble(("hint:", "bold"), " ", hint))
    return exit_code
