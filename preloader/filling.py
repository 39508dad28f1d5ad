"""One GPU's filler process, as the parent sees it: started when there is something to do, killed to cancel.

Owns that process's life and the exchange with it. Knows nothing of what it is told and tells; the process
does all that needs the driver, so that the parent never does.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import subprocess
import time
from collections.abc import Callable
from typing import Any

from cached.fds import FramingError
from cached.model import CachedError, temporary
from preloader import wire
from preloader.standing import too_many_files

LOOK_EVERY_S = 0.25
SILENT_S = 60.0
"""A filler that does something says so several times a second; this is for the driver's slow beginnings."""
STUCK_S = 120.0
"""One that says so and gets nowhere waits for a disk or a driver that hangs: no thread of it did a chunk."""
MESSAGE_TIMEOUT_S = 30.0
END_TIMEOUT_S = 5.0
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0

Heard = Callable[[dict[str, Any], list[int]], None]
"""Called with each message but the last, and its descriptors, which are then the callee's."""


class FillerDied(Exception):
    """It ended, or was ended for its silence, before it was done. ``again_in_s``: no start before that."""

    def __init__(self, why: str, again_in_s: float = 0.0) -> None:
        super().__init__(why)
        self.again_in_s = again_in_s


class Filler:
    """One device's filler, over all the processes that it will be. One job at a time."""

    def __init__(self, command: tuple[str, ...], environment: dict[str, str]) -> None:
        self._command = command
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._deaths = 0
        self._start_at = 0.0

    def run(
        self, job: dict[str, Any], descriptors: tuple[int, ...], heard: Heard, go_on: Callable[[], None]
    ) -> dict[str, Any]:
        """Have a job done; its last message. Raises FillerDied, CachedError for what the filler refused, and
        what ``go_on``, called several times a second, or ``heard`` raises: that ends the filler."""
        try:
            answer = self._exchange(job, descriptors, heard, go_on)
        except (OSError, FramingError) as error:
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                self.end()  # no fault of its own, but what it was sending is lost
                raise too_many_files(str(error)) from error
            raise self._died(str(error)) from error
        except FillerDied:
            raise
        except BaseException:
            self.end()
            raise
        self._deaths = 0
        if "error" in answer:
            raise CachedError(wire.parse_problem(answer["error"]))
        return answer

    def reap(self) -> None:
        """Take note of a process that ended by itself, having had nothing to do for a while."""
        process = self._process
        if process is not None:
            process.poll()

    def kill(self) -> None:
        """End a job that another thread waits for."""
        process = self._process
        if process is not None:
            process.kill()

    def end(self) -> None:
        """Kill the process, if there is one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None:
            self._process.kill()
            try:
                self._process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                return  # the driver does not let go of it; ``reap`` looks again
            self._process = None

    # --- one job ------------------------------------------------------------------------------

    def _exchange(
        self, job: dict[str, Any], descriptors: tuple[int, ...], heard: Heard, go_on: Callable[[], None]
    ) -> dict[str, Any]:
        connection = self._connected()
        wire.send(connection, job, descriptors)
        told, moved_at = None, time.monotonic()
        while True:
            self._await_message(connection, go_on)
            message, received = wire.receive(connection)
            if "done" in message or "error" in message:
                return message
            heard(message, received)
            if message.get("progress") != told:
                told, moved_at = message.get("progress"), time.monotonic()
            elif time.monotonic() - moved_at > STUCK_S:
                raise _stuck(told)

    def _await_message(self, connection: socket.socket, go_on: Callable[[], None]) -> None:
        poll = select.poll()  # which, unlike select, takes descriptors of any number
        poll.register(connection, select.POLLIN)
        deadline = time.monotonic() + SILENT_S
        go_on()  # also where messages come as often as we look
        while not poll.poll(LOOK_EVERY_S * 1000):
            go_on()
            if time.monotonic() > deadline:
                raise self._died(f"it was silent for {SILENT_S:.0f} s")

    def _connected(self) -> socket.socket:
        if self._process is not None and self._process.poll() is not None:
            self.end()
        if self._connection is None:
            self._connection = self._started()
        return self._connection

    def _started(self) -> socket.socket:
        pause_s = self._start_at - time.monotonic()
        if pause_s > 0:
            raise FillerDied("it ended again and again", pause_s)
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                (*self._command, "--socket-fd", "0"),
                stdin=theirs.fileno(),  # not passed as it is: with many blocks open its number is a large one
                stdout=subprocess.DEVNULL,
                env={**os.environ, **self._environment},
                start_new_session=True,  # a terminal's Ctrl-C is for the parent
            )
        ours.settimeout(MESSAGE_TIMEOUT_S)
        return ours

    def _died(self, why: str) -> FillerDied:
        process = self._process
        self.end()
        if process is not None and process.returncode is not None:
            why = f"{why} (exit status {process.returncode})"
        self._deaths += 1
        pause_s = 0.0  # after the first
        if self._deaths > 1:
            pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(self._deaths - 2, 10))
        self._start_at = time.monotonic() + pause_s
        return FillerDied(why, pause_s)


def _stuck(told: list[int] | None) -> CachedError:
    return temporary(
        "FILLER_STUCK",
        f"nothing moved for {STUCK_S:.0f} s (bytes done, in all: {told}), so it was ended",
        "look at the disk with iostat and at the driver with dmesg",
        retry_after_s=30.0,
    )
