"""`run`: acquire a model and run a command that holds it, for engines that are given a path or a name.

Owns the command's environment, its signals and its end. The lease is an open file that the command and all
that it starts inherit: it ends with the last of them, whatever becomes of this process.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cached.cli import options, progress, words
from cached.client.errors import CachedError

if TYPE_CHECKING:
    from cached.client import Model, Progress
    from cached.v1 import model_cache_pb2 as pb

FORWARDED = (
    *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH, signal.SIGCONT),
)
CANNOT_RUN, NOT_FOUND = 126, 127
"""What a shell exits with where it cannot run a command."""


def _size(text: str | None) -> str | None:
    if text is not None and not words.parse_size(text):
        raise typer.BadParameter(f"{text!r} is not a size; write 40GB or 40GiB, say")
    return text


On = Annotated[
    str,
    typer.Option(
        "--on", metavar="DEVICE", help="Where it is to stand meanwhile: disk, host, auto or cuda:N."
    ),
]
Command = Annotated[
    list[str],
    typer.Argument(metavar="-- CMD...", help="The command, with its arguments.", show_default=False),
]
Room = Annotated[
    str | None,
    typer.Option(
        "--room",
        metavar="SIZE",
        help="Before it starts, have idle models leave its GPU until SIZE is free there.",
        show_default=False,
        callback=_size,
    ),
]
RoomOn = Annotated[
    str,
    typer.Option(
        "--room-on",
        metavar="DEVICE",
        help="On which GPU, cuda:N or cuda:UUID; else the first that the command may use.",
        show_default=False,
    ),
]

ReadyAfter = Annotated[
    float | None,
    typer.Option(
        "--ready-after",
        metavar="S",
        min=0,
        help="So many seconds after its start it has taken its room: others may be loaded there again. "
        "Without it, after some minutes.",
        show_default=False,
    ),
]


def run(
    ref: options.RefArgument,
    command: Command,
    on: On = "disk",
    room: Room = None,
    room_on: RoomOn = "",
    ready_after: ReadyAfter = None,
    run_dir: options.RunDir = None,
    address: options.Address = None,
    timeout: options.Timeout = None,
) -> None:
    """Run a command that holds a model for as long as it lives.

    Example: cachectl run hf://org/name --on host --room 40GB -- vllm serve org/name

    It finds MODEL_PATH, MODEL_ID, HF_HUB_OFFLINE, and HF_HUB_CACHE where the model has a name there.

    Signals are passed on; its exit code is ours, 128+N where signal N ended it.
    """
    from cached.client import acquire  # late: nobody who asks for help waits for it

    _check_runs(command[0])
    with progress.shown() as shown:
        model = acquire(
            ref,
            on=on,
            timeout_s=timeout or options.WEEK_S,
            run_dir=run_dir,
            address=address,
            on_progress=lambda told: shown.show(_as_told(told)),
            room_bytes=words.parse_size(room or "") or 0,
            room_on=visible(room_on, os.environ),
        )
    lease_fd = os.dup(model.lease_fd)
    model.close()  # what it has mapped, on a GPU with a context of its own, is of no use here
    raise typer.Exit(_run(command, model, lease_fd, ready_after))


def _check_runs(command: str) -> None:
    """Nobody is to wait, and nothing to leave a GPU, for what cannot be run."""
    if shutil.which(command) is None:
        number = errno.EACCES if "/" in command and os.path.exists(command) else errno.ENOENT
        raise _CannotRun(command, OSError(number, os.strerror(number)))


def visible(room_on: str, env: Mapping[str, str]) -> str:
    """A GPU's number as its UUID where the environment tells: then no driver has to be asked for it."""
    word = re.fullmatch(r"(?:cuda(?::(\d{1,4}))?)?", room_on)
    listed = (env.get("CUDA_VISIBLE_DEVICES") or env.get("NVIDIA_VISIBLE_DEVICES") or "").split(",")
    if word is None or (number := int(word[1] or 0)) >= len(listed):
        return room_on
    name = listed[number].strip()
    return f"cuda:{name}" if name.startswith(("GPU-", "MIG-")) else room_on


def environment(model: Model, env: Mapping[str, str]) -> dict[str, str]:
    """What the command finds: the model by its path, and by its name where it has one."""
    found = {"MODEL_PATH": str(model.path), "MODEL_ID": model.id}
    hub = Path(model.path).parent.parent / "hub"
    name = model.ref.removeprefix("hf://").partition("@")[0].replace("/", "--")
    if model.ref.startswith("hf://") and (hub / f"models--{name}").is_dir():
        found["HF_HUB_CACHE"] = str(hub)
    return {"HF_HUB_OFFLINE": "1", **env, **found}


def _run(command: list[str], model: Model, lease_fd: int, ready_after_s: float | None) -> int:
    """Run it to its end, passing signals on; returns what to exit with."""
    with _signals() as heard:
        try:
            child = subprocess.Popen(command, env=environment(model, os.environ), pass_fds=(lease_fd,))
        except OSError as error:
            raise _CannotRun(command[0], error) from error
        ended = os.pidfd_open(child.pid)
        try:
            ready_at = None if ready_after_s is None else time.monotonic() + ready_after_s
            while ended not in (seen := select.select([heard, ended], [], [], _left_s(ready_at))[0]):
                for number in os.read(heard, 64) if heard in seen else b"":
                    _pass_on(child, number)
                if _left_s(ready_at) == 0.0:
                    ready_at = None
                    _tell_ready(model)
        finally:
            os.close(ended)
    code = child.wait()
    return 128 - code if code < 0 else code


def _left_s(until: float | None) -> float | None:
    return None if until is None else max(0.0, until - time.monotonic())


def _tell_ready(model: Model) -> None:
    """The command goes on whether the daemon hears it or not."""
    try:
        model.ready()
    except CachedError as error:
        typer.echo(f"the daemon was not told that {model.ref} is ready: {error}", err=True)


@contextlib.contextmanager
def _signals() -> Iterator[int]:
    """A descriptor from which signals' numbers can be read, whichever thread the kernel gave them to."""
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before = {number: signal.signal(number, _only_noted) for number in FORWARDED}
    try:
        yield reader
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before_fd)
        os.close(reader)
        os.close(writer)


def _only_noted(number: int, frame: object) -> None:
    """Its number is in the pipe."""


def _pass_on(child: subprocess.Popen[bytes], number: int) -> None:
    # What is typed on a terminal goes to everybody in the foreground, the command too.
    if number not in (signal.SIGINT, signal.SIGQUIT) or not _in_foreground():
        child.send_signal(number)


def _in_foreground() -> bool:
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


class _CannotRun(CachedError):
    def __init__(self, command: str, error: OSError) -> None:
        self.missing = isinstance(error, FileNotFoundError)
        message = f"{command} cannot be run: {error.strerror}"
        super().__init__("FAILED_PRECONDITION", "CANNOT_RUN", message, "name a program, behind --")

    @property
    def exit_code(self) -> int:
        return NOT_FOUND if self.missing else CANNOT_RUN


def _as_told(told: Progress) -> pb.Progress:
    from cached.v1 import model_cache_pb2 as pb

    return pb.Progress(
        phase=pb.Phase.Value(f"PHASE_{told.phase.upper()}"),
        bytes_done=told.done_bytes,
        bytes_total=told.total_bytes,
        rate_bytes_per_s=told.rate_bytes_per_s,
        eta_s=-1.0 if told.eta_s is None else told.eta_s,
        message=told.message,
    )
