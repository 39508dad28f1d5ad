"""A process that the parent keeps alive, and that tells it things in lines of its standard output.

Owns that life: starting it, pausing longer each time that it ends early, ending it. What it is started with
and what its lines mean is for each kind of child to say.
"""

from __future__ import annotations

import logging
import resource
import subprocess
from typing import IO, TypedDict

from preloader import log as logs

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 5.0
HEALTHY_AFTER_S = 10.0
END_TIMEOUT_S = 5.0
MAX_LINE_BYTES = 1024 * 1024

log = logging.getLogger("preloader")


class _Talking(TypedDict):
    stdin: int
    stdout: int
    start_new_session: bool


TALKING = _Talking(
    stdin=subprocess.PIPE,  # whose end is the parent's end
    stdout=subprocess.PIPE,
    start_new_session=True,  # a terminal's Ctrl-C is for the parent
)


class Child:
    """One child, over all the processes that it will be."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.process: subprocess.Popen[bytes] | None = None
        self.start_at = 0.0
        self._started_at = 0.0
        self._read_at = 0.0
        self._pause_s = FIRST_PAUSE_S
        self._unread = b""

    # --- for each kind to say -----------------------------------------------------------------

    def spawn(self) -> subprocess.Popen[bytes]:
        """A new process, with ``TALKING``."""
        raise NotImplementedError

    def heard(self, line: bytes) -> None:
        """A line that it told."""
        raise NotImplementedError

    def look(self, now: float) -> None:
        """Called about once a second while there is a process."""

    # --- its life -----------------------------------------------------------------------------

    def start(self, now: float) -> IO[bytes] | None:
        """Start a process; returns the pipe that it talks through, None where there can be no process now."""
        try:
            self.process = self.spawn()
        except OSError as error:  # too many open files, too many processes; what stands is to outlast that
            self._try_later(now)
            said = logs.fields(child=self.name, error=str(error), again_in_s=self.start_at - now)
            log.error("child does not start", extra=said)
            return None
        self._started_at = self._read_at = now
        self._unread = b""
        assert self.process.stdout is not None
        return self.process.stdout

    def read(self, data: bytes, now: float) -> None:
        self._read_at = now
        *lines, self._unread = (self._unread + data).split(b"\n")
        assert len(self._unread) <= MAX_LINE_BYTES
        for line in lines:
            self.heard(line)

    def silent_s(self, now: float) -> float:
        return now - self._read_at

    def ended(self, now: float) -> None:
        """Its process is gone: when to try again."""
        status = self._reap()
        if now - self._started_at >= HEALTHY_AFTER_S:
            self._pause_s = FIRST_PAUSE_S
        self._try_later(now)
        said = logs.fields(child=self.name, status=status, again_in_s=self.start_at - now)
        log.warning("child ended", extra=said)

    def _try_later(self, now: float) -> None:
        self.start_at = now + self._pause_s
        self._pause_s = min(LONGEST_PAUSE_S, self._pause_s * 2)

    def close(self) -> None:
        """End its process, if there is one, for good."""
        if self.process is not None:
            self.process.terminate()
            self._reap()

    def _reap(self) -> int | None:
        """Wait for the end, bounded; its exit status (negative: the signal; None: nothing could end it)."""
        process, self.process = self.process, None
        assert process is not None
        try:
            process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            try:
                process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                log.error("a child cannot be ended", extra=logs.fields(child=self.name, pid=process.pid))
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        return process.returncode


def allow_open_files() -> None:
    """As many as this process may have: each blob and each block of memory is one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
