"""The ``preloader`` command: a parent that keeps one standby process alive for each device.

Owns the children's lives: starts them, starts them again when they end, ends them when it is told to. Holds
no model, knows no driver, stays small; what a child tells of what it has locked is handed to its successor.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NoReturn

from preloader import log as logs

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 5.0
HEALTHY_AFTER_S = 10.0
END_TIMEOUT_S = 5.0
LOOK_EVERY_S = 1.0
LOCK_TRIES = 5
LOCK_PAUSE_S = 0.02
MAX_SOCKET_PATH_CHARS = 100
"""The kernel takes 107 bytes; the rest is for a temporary name."""

log = logging.getLogger("preloader")


@dataclass(slots=True)
class Child:
    """One device's standby, over all the processes that it will be."""

    device: str
    command: tuple[str, ...]
    process: subprocess.Popen[bytes] | None = None
    vouched: set[str] = field(default_factory=set)
    started_at: float = 0.0
    start_at: float = 0.0
    pause_s: float = FIRST_PAUSE_S
    unread: bytes = b""

    def start(self, now: float) -> IO[bytes]:
        """Start a process; returns the pipe that it talks through."""
        vouched = _memory_file("".join(f"{digest}\n" for digest in sorted(self.vouched)))
        try:
            self.process = subprocess.Popen(
                (*self.command, "--vouched-fd", str(vouched)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=(vouched,),
                start_new_session=True,  # a terminal's Ctrl-C is for the parent
            )
        finally:
            os.close(vouched)
        self.started_at, self.unread = now, b""
        assert self.process.stdout is not None
        return self.process.stdout

    def heard(self, data: bytes) -> None:
        """What it locked and unlocked."""
        *lines, self.unread = (self.unread + data).split(b"\n")
        for line in lines:
            digest = line[1:].decode("ascii", "replace")
            if line.startswith(b"+"):
                self.vouched.add(digest)
            else:
                self.vouched.discard(digest)

    def ended(self, now: float) -> None:
        """Its process is gone: when to try again."""
        assert self.process is not None
        status = _reap(self.process)
        if now - self.started_at >= HEALTHY_AFTER_S:
            self.pause_s = FIRST_PAUSE_S
        self.start_at = now + self.pause_s
        said = logs.fields(device=self.device, status=status, again_in_s=self.pause_s)
        log.warning("standby ended", extra=said)
        self.pause_s = min(LONGEST_PAUSE_S, self.pause_s * 2)
        self.process = None


class Parent:
    """Every device's child, until a signal says otherwise."""

    def __init__(self, children: list[Child]) -> None:
        self._children = children
        self._selector = selectors.DefaultSelector()
        self._stopping = False

    def run(self) -> None:
        """Keep the children alive until SIGTERM or SIGINT; then end them."""
        self._listen_to_signals()
        try:
            while not self._stopping:
                self._start_due(time.monotonic())
                for key, _ in self._selector.select(LOOK_EVERY_S if self._all_run() else FIRST_PAUSE_S / 4):
                    self._read(key)
        finally:
            self._end_children()

    def _all_run(self) -> bool:
        return all(child.process for child in self._children)

    def _start_due(self, now: float) -> None:
        for child in self._children:
            if child.process is None and child.start_at <= now:
                self._selector.register(child.start(now), selectors.EVENT_READ, child)

    def _read(self, key: selectors.SelectorKey) -> None:
        data = os.read(key.fd, 65536)
        child: Child | None = key.data
        if child is None:
            self._stopping = True
        elif data:
            child.heard(data)
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

    def _end_children(self) -> None:
        running = [child.process for child in self._children if child.process]
        for process in running:
            process.terminate()
        for process in running:
            _reap(process)


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
    log.info("preloader runs", extra=logs.fields(pid=os.getpid(), devices=options.devices))
    Parent([_child(device, options) for device in options.devices]).run()
    for device in options.devices:
        for name in (f"{device}.sock", f"{device}.fds.sock"):
            (sockets / name).unlink(missing_ok=True)
    os.close(lock)
    log.info("preloader ended")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="preloader", description="Keeps models in memory for the daemon.")
    serve = parser.add_subparsers(required=True, metavar="serve").add_parser(
        "serve", help="run the standbys", description="Runs one standby process for each device."
    )
    run_dir, data_dir = (
        _default("CACHED_RUN_DIR", "/run/cached"),
        _default("CACHED_DATA_DIR", "/var/lib/cached"),
    )
    serve.add_argument("--run-dir", type=Path, default=run_dir, help="sockets (default %(default)s)")
    serve.add_argument("--data-dir", type=Path, default=data_dir, help="the store (default %(default)s)")
    serve.add_argument("--devices", type=_devices, default=["host"], help="comma-separated; only host so far")
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
        if device != "host":
            raise argparse.ArgumentTypeError(f"{device!r} is not supported by this version; use host")
    return devices


def _child(device: str, options: argparse.Namespace) -> Child:
    # -P: no code from whatever directory this was started in.
    command = [sys.executable, "-P", "-m", "preloader.serve", "--device", device]
    command += ["--data-dir", str(options.data_dir.absolute()), "--run-dir", str(options.run_dir.absolute())]
    return Child(device, (*command, *(["--same-group"] if options.same_group else [])))


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


def _reap(process: subprocess.Popen[bytes]) -> int:
    """Wait for the end, bounded; its exit status (negative: the signal)."""
    try:
        status = process.wait(END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        status = process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    return status


def _fail(message: str, hint: str) -> NoReturn:
    print(f"error: {message}\nhint: {hint}", file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    main()
