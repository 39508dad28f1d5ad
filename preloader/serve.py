"""The host's standby: locked page cache behind the Standby service, in a process of its own.

Owns the process's set-up: the lock that only one standby of the host has, what a predecessor had locked, the
end when its parent ends. Does what it is told; what is resident is the loader's business.

Started by the preloader's parent as ``python -m preloader.serve``, with a pipe as standard input that never
brings anything: its end is the parent's end, and then this process's. On standard output it says which
contents it has locked (``+digest``, ``-digest``), for a successor.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import logging
import os
import sys
import time
from pathlib import Path

from cached.model import HOST, Device, Digest, is_digest
from preloader import log as logs
from preloader.child import allow_open_files
from preloader.groups import own_groups
from preloader.loader import Loader
from preloader.memory.host import HostMemory, lock_allowance
from preloader.services import serve

PREDECESSOR_TIMEOUT_S = 10.0
MAX_VOUCHED_BYTES = 16 * 1024 * 1024

log = logging.getLogger("preloader")


def main() -> None:
    options = _arguments()
    logs.configure(sys.stderr)
    # Sockets come into being as 0600: only who may be root here, or this user, talks to a standby.
    os.umask(0o177)
    allow_open_files()
    sockets: Path = options.run_dir / "standby"
    _await_predecessor(sockets / f"{options.device}.lock")
    memory = _memory(options)
    loader = Loader(options.data_dir, memory)
    stop = serve(loader, sockets / options.device)
    said = logs.fields(device=options.device, pid=os.getpid(), cannot_lock=memory.cannot_lock_reason)
    log.info("standby serves", extra=said)
    _await_parents_end()
    stop()
    os._exit(0)  # nothing here needs an orderly end, and threads may be in the middle of anything


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="preloader.serve", description=__doc__)
    parser.add_argument("--device", type=Device, choices=[HOST], required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--same-group", action="store_true")
    parser.add_argument("--vouched-fd", type=int, help="a file of digests that a predecessor had locked")
    return parser.parse_args()


def _memory(options: argparse.Namespace) -> HostMemory:
    allowance, why_not = lock_allowance()
    return HostMemory(
        own_groups(),
        allowance,
        why_not,
        same_group=options.same_group,
        vouched=_read_vouched(options.vouched_fd),
        tell=_tell_parent,
    )


def _read_vouched(fd: int | None) -> list[Digest]:
    if fd is None:
        return []
    with os.fdopen(fd, "rb") as file:
        words = file.read(MAX_VOUCHED_BYTES).decode("ascii", "replace").split()
    return [Digest(word) for word in words if is_digest(word)]


def _tell_parent(digest: Digest, vouched: bool) -> None:
    with contextlib.suppress(BrokenPipeError):  # no parent: this process is about to end too
        os.write(sys.stdout.fileno(), f"{'+' if vouched else '-'}{digest}\n".encode())


def _await_predecessor(path: Path) -> None:
    """Wait until no other standby of this device is left; none starts before this one's memory is gone."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + PREDECESSOR_TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.02)
    sys.exit(f"error: another standby still has {path} after {PREDECESSOR_TIMEOUT_S:.0f} s")


def _await_parents_end() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass


if __name__ == "__main__":
    main()
