"""The ``preloader`` command: a parent that keeps its children alive, and GPUs' memory by its descriptors.

Owns the children's lives: starts them, starts them again when they end, ends them when it is told to. Knows
no driver and stays small; what the host's standby tells of what it has locked is handed to its successor.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import logging
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

from preloader import log as logs
from preloader.child import TALKING, Child, allow_open_files
from preloader.gpus import Gpus

LOOK_EVERY_S = 1.0
LOCK_TRIES = 5
LOCK_PAUSE_S = 0.02
MAX_SOCKET_PATH_CHARS = 100
"""The kernel takes 107 bytes; the rest is for a temporary name."""

log = logging.getLogger("preloader")


class Host(Child):
    """The host's standby. What it has locked it says, for its successor to be told."""

    def __init__(self, command: tuple[str, ...]) -> None:
        super().__init__("host standby")
        self._command = command
        self._vouched: set[str] = set()

    def spawn(self) -> subprocess.Popen[bytes]:
        vouched = _memory_file("".join(f"{digest}\n" for digest in sorted(self._vouched)))
        try:
            command = (*self._command, "--vouched-fd", str(vouched))
            return subprocess.Popen(command, pass_fds=(vouched,), **TALKING)
        finally:
            os.close(vouched)

    def heard(self, line: bytes) -> None:
        digest = line[1:].decode("ascii", "replace")
        if line.startswith(b"+"):
            self._vouched.add(digest)
        else:
            self._vouched.discard(digest)


class Parent:
    """Every child, until a signal says otherwise."""

    def __init__(self, children: list[Child]) -> None:
        self._children = children
        self._selector = selectors.DefaultSelector()
        self._stopping = False

    def run(self) -> None:
        """Keep the children alive until SIGTERM or SIGINT; then end them."""
        self._listen_to_signals()
        try:
            while not self._stopping:
                self._look(time.monotonic())
                for key, _ in self._selector.select(self._pause_s(time.monotonic())):
                    self._read(key)
        finally:
            for child in self._children:
                child.close()

    def _pause_s(self, now: float) -> float:
        due = [child.start_at - now for child in self._children if child.process is None]
        return max(0.0, min([LOOK_EVERY_S, *due]))

    def _look(self, now: float) -> None:
        for child in self._children:
            if child.process is not None:
                child.look(now)
            elif child.start_at <= now and (pipe := child.start(now)) is not None:
                self._selector.register(pipe, selectors.EVENT_READ, child)

    def _read(self, key: selectors.SelectorKey) -> None:
        data = os.read(key.fd, 65536)
        child: Child | None = key.data
        if child is None:
            self._stopping = True
        elif data:
            child.read(data, time.monotonic())
        else:
            self._selector.unregister(key.fileobj)
            child.ended(time.monotonic())

    def _listen_to_signals(self) -> None:
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(False)
        # The signal's number is written to the pair, so that one wait is for everything.
        signal.set_wakeup_fd(theirs.fileno())
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        self._selector.register(ours, selectors.EVENT_READ, None)
        self._sockets = (ours, theirs)


def main() -> None:
    options = _arguments()
    logs.configure(sys.stderr)
    sockets: Path = options.run_dir / "standby"
    if len(str(sockets / ".host.fds.sock")) > MAX_SOCKET_PATH_CHARS:
        _fail(
            f"the run directory's path {options.run_dir} is too long for a socket", "use a shorter --run-dir"
        )
    try:
        sockets.mkdir(parents=True, exist_ok=True)
        lock = _take_lock(sockets / "preloader.lock")
    except OSError as error:
        _fail(f"{sockets} cannot be used: {error.strerror}", "give a --run-dir that this user may write to")
    allow_open_files()  # each block of GPU memory is one
    # Sockets come into being as 0600: only who may be root here, or this user, talks to a standby.
    os.umask(0o177)
    # A preloader that was killed left them: what has no device any more has no socket.
    _remove_sockets(sockets)
    log.info("preloader runs", extra=logs.fields(pid=os.getpid(), devices=options.devices))
    Parent(_children(options)).run()
    _remove_sockets(sockets)
    os.close(lock)
    log.info("preloader ended")


def _remove_sockets(sockets: Path) -> None:
    for path in sockets.glob("*.sock"):
        path.unlink(missing_ok=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="preloader", description="Keeps models in memory for the daemon.")
    serve = parser.add_subparsers(required=True, metavar="serve").add_parser(
        "serve", help="run the standbys", description="Keeps models in the memory of each device."
    )
    run_dir, data_dir = (
        _default("CACHED_RUN_DIR", "/run/cached"),
        _default("CACHED_DATA_DIR", "/var/lib/cached"),
    )
    serve.add_argument("--run-dir", type=Path, default=run_dir, help="sockets (default %(default)s)")
    serve.add_argument("--data-dir", type=Path, default=data_dir, help="the store (default %(default)s)")
    serve.add_argument(
        "--devices",
        type=_devices,
        default=["host", "cuda:all"],
        metavar="LIST",
        help="comma-separated: host, cuda:all, cuda:<uuid>, cuda:<index> (default host,cuda:all)",
    )
    serve.add_argument(
        "--dev-dir",
        type=Path,
        default=Path("/dev"),
        help="where nvidia0, nvidia1, … are (default %(default)s)",
    )
    serve.add_argument(
        "--same-group",
        action="store_true",
        help="the daemon is in the same control group, so its page cache may be locked as it stands",
    )
    return parser.parse_args()


def _default(variable: str, path: str) -> Path:
    return Path(os.environ.get(variable) or path)


def _devices(text: str) -> list[str]:
    devices = list(dict.fromkeys(text.split(",")))
    for device in devices:
        if not re.fullmatch("host|cuda:(all|[0-9]{1,4}|(GPU|MIG)-[0-9A-Za-z-]{1,60})", device):
            hint = "use host, cuda:all, cuda:<uuid> or cuda:<index>"
            raise argparse.ArgumentTypeError(f"{device!r} is not a device; {hint}")
    return devices


def _children(options: argparse.Namespace) -> list[Child]:
    data_dir, run_dir = options.data_dir.absolute(), options.run_dir.absolute()
    gpus = tuple(device for device in options.devices if device != "host")
    children: list[Child] = []
    if len(gpus) < len(options.devices):
        # -P: no code from whatever directory this was started in.
        command = [sys.executable, "-P", "-m", "preloader.serve", "--device", "host"]
        command += ["--data-dir", str(data_dir), "--run-dir", str(run_dir)]
        children.append(Host((*command, *(["--same-group"] if options.same_group else []))))
    if gpus:
        children.append(Gpus(gpus, run_dir / "standby", data_dir, options.dev_dir.absolute()))
    return children


def _take_lock(path: Path) -> int:
    """The right to be this run directory's preloader, for as long as this process lives."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    if not _try_lock(lock):
        pid = os.pread(lock, 20, 0).decode("ascii", "replace").strip()
        _fail(f"another preloader (pid {pid}) serves {path.parent}", "stop it, or use another --run-dir")
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock


def _try_lock(lock: int) -> bool:
    """More than once: a daemon that looks whether somebody has the lock has it itself for that moment."""
    for _ in range(LOCK_TRIES):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(LOCK_PAUSE_S)
    return False


def _memory_file(text: str) -> int:
    """A file that exists nowhere, read from its start: no pipe that could fill up between two processes."""
    fd = os.memfd_create("vouched")
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(text.encode())
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _fail(message: str, hint: str) -> NoReturn:
    print(f"error: {message}\nhint: {hint}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
