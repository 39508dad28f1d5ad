"""When to go on: the rate that a worker's threads share, the attempts at an origin and the waits between.

Owns the arithmetic and the rule of what is worth another attempt. Neither sleeps nor reads a clock:
time, chance and the way to pause arrive as arguments.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import TypeVar

from cached.model import CachedError, ErrorKind, Problem, temporary

BACKOFF_FIRST_S = 0.2
BACKOFF_MOST_S = 10.0
RETRY_AFTER_MOST_S = 30.0
SLOW_S = 60.0
SLOW_BYTES_PER_S = 1024
"""Who brings less for that long is given up, as one who brings nothing is by its timeout."""
GIVEN_UP_RETRY_S = 2.0
"""When a whole fetch may be tried again after one range used up its attempts."""

T = TypeVar("T")


class RateLimit:
    """A shared allowance in bytes per second; None has no limit. Thread-safe."""

    def __init__(self, bytes_per_s: int | None) -> None:
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at_s = 0.0

    def book(self, size_bytes: int, now_s: float) -> float:
        """Book ``size_bytes`` and say for how many seconds the caller must now pause."""
        if self._bytes_per_s is None:
            return 0.0
        with self._lock:
            # An allowance that was not used is gone: after a pause nobody may flood the network.
            self._free_at_s = max(self._free_at_s, now_s) + size_bytes / self._bytes_per_s
            return max(0.0, self._free_at_s - now_s)

    def change(self, bytes_per_s: int | None, now_s: float) -> None:
        """Go on at another rate. What is booked and not yet earned stays so, in bytes."""
        with self._lock:
            ahead_bytes = max(0.0, self._free_at_s - now_s) * (self._bytes_per_s or 0)
            self._bytes_per_s = bytes_per_s
            self._free_at_s = now_s + (ahead_bytes / bytes_per_s if bytes_per_s else 0.0)


class Came:
    """What one connection brings, by the time that was spent waiting for it: our own pauses do not count."""

    __slots__ = ("_bytes", "_path", "_waited_s")

    def __init__(self, path: str) -> None:
        self._path = path
        self._bytes = 0
        self._waited_s = 0.0

    def add(self, size_bytes: int, waited_s: float) -> None:
        """Raises CachedError (``ORIGIN_TOO_SLOW``) where it is next to nothing for its place in the line."""
        self._bytes += size_bytes
        self._waited_s += waited_s
        if self._waited_s < SLOW_S:
            return
        if self._bytes < SLOW_BYTES_PER_S * self._waited_s:
            raise temporary(
                "ORIGIN_TOO_SLOW",
                f"{self._path}: {self._bytes} bytes came in {self._waited_s:.0f} s",
                "see the origin's load, and what is between it and this node; it is asked again",
                0.0,
            )
        self._bytes, self._waited_s = 0, 0.0


def backoff_s(attempt: int, retry_after_s: float, chance: float) -> float:
    """The wait after attempt number ``attempt`` (from 1) failed; ``chance`` is uniform in [0, 1).

    Doubles each time, spread to between half and one and a half of it; at least what the origin asked
    for, where that is bearable.
    """
    doubled = min(BACKOFF_FIRST_S * 2.0 ** (attempt - 1), BACKOFF_MOST_S)
    return max(doubled * (0.5 + chance), min(retry_after_s, RETRY_AFTER_MOST_S))


def patiently(call: Callable[[], T], attempts: int, pause: Callable[[float], None]) -> T:
    """What ``call`` answers, at the latest at the last of ``attempts``; ``pause(seconds)`` in between.

    Raises the last CachedError, saying how often it was tried, and at once one that asking again
    cannot mend.
    """
    for attempt in range(1, attempts):
        try:
            return call()
        except CachedError as error:
            if not _worth_another(error.problem):
                raise
            pause(backoff_s(attempt, error.problem.retry_after_s or 0.0, random.random()))
    try:
        return call()
    except CachedError as error:
        if not _worth_another(error.problem):
            raise
        raise _given_up(error.problem, attempts) from error


def _worth_another(problem: Problem) -> bool:
    # A full disk, say, is temporary too, but not the origin's affair.
    return problem.temporary and problem.kind is ErrorKind.UNAVAILABLE


def _given_up(problem: Problem, attempts: int) -> CachedError:
    message = f"{problem.message} (tried {attempts} times)"
    retry_after_s = max(problem.retry_after_s or 0.0, GIVEN_UP_RETRY_S)
    return temporary(problem.reason, message, problem.hint, retry_after_s, problem.kind)
