"""What a running fetch has to heed: its rate, its connections, and whether somebody waits for it.

Owns the pauses of the threads that read from origins, the connections they may have at once, and the priority
of all of a fetch's threads. Told by the thread that reads the pool's orders; every change counts at once,
also for who pauses already. Knows no file and no origin.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TypeVar

from cached.fetch.kernel import set_priority
from cached.fetch.pace import RateLimit
from cached.fetch.wire import Pace
from cached.model import CachedError

MOMENT_S = 0.2
"""For how long a hold is sat out: longer than a change of mind, shorter than an origin's patience."""
LONGEST_WAIT_S = 60.0

T = TypeVar("T")


class GateClosedError(Exception):
    """The fetch is over: nobody needs to go on."""


class Gate:
    """For one fetch. ``prioritise(thread id, background)`` says whether the kernel let it."""

    def __init__(self, pace: Pace, prioritise: Callable[[int, bool], bool] = set_priority) -> None:
        self._changed = threading.Condition()
        self._pace = pace
        self._prioritise = prioritise
        self._limit = RateLimit(pace.rate_bytes_per_s)
        self._queue: deque[object] = deque()
        self._active = 0
        self._leaving = 0
        self._held_at_s = time.monotonic()
        self._holds = int(pace.connections == 0)
        self._closed = False
        self._threads: dict[int, bool] = {}

    @property
    def background(self) -> bool:
        """Whether nobody waits for the fetch, by what is known now."""
        return self._pace.background

    def change(self, pace: Pace) -> None:
        """Go on at another pace from now."""
        now_s = time.monotonic()
        with self._changed:
            if pace.connections == 0 and self._pace.connections > 0:
                self._held_at_s = now_s
                self._holds += 1
            if pace.rate_bytes_per_s != self._pace.rate_bytes_per_s:
                self._limit.change(pace.rate_bytes_per_s, now_s)
            self._pace = pace
            for thread_id in self._threads:
                self._set_priority(thread_id)
            self._changed.notify_all()

    def close(self) -> None:
        """Send everybody away who waits here."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # --- priority ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """The calling thread works for the fetch, and has its priority."""
        thread_id = threading.get_native_id()
        with self._changed:
            self._threads[thread_id] = False
            self._set_priority(thread_id)
        try:
            yield
        finally:
            with self._changed:
                del self._threads[thread_id]

    def _set_priority(self, thread_id: int) -> None:
        low = self._threads[thread_id]
        if low != self._pace.background and self._prioritise(thread_id, self._pace.background):
            self._threads[thread_id] = self._pace.background

    def is_too_low(self) -> bool:
        """Whether the calling thread stays at low priority although somebody waits: as the kernel lets
        nobody raise it, another one has to go on with its work."""
        return self._threads[threading.get_native_id()] and not self._pace.background

    # --- rate and connections ---------------------------------------------------------------

    def passed(self, size_bytes: int, can_go_on_later: bool) -> bool:
        """Bytes came: pause for as long as the rate wants it. Whether the connection is to be given up, as
        there are too many or the fetch is held; never asked of who could only begin again.

        Raises GateClosedError.
        """
        with self._changed:
            rate = self._pace.rate_bytes_per_s
            owed = self._limit.book(size_bytes, time.monotonic()) * (rate or 0)
            while owed > 0 and rate is not None and not self._closed:
                if can_go_on_later and self._pace.connections == 0:
                    break
                began_s = time.monotonic()
                self._changed.wait(min(owed / rate, LONGEST_WAIT_S))
                # A change of the rate wakes everybody, so that all of this time went at the rate before.
                owed -= (time.monotonic() - began_s) * rate
                rate = self._pace.rate_bytes_per_s
            self._check_open()
            return can_go_on_later and self._must_leave()

    def _must_leave(self) -> bool:
        """A short hold is waited for first."""
        while self._pace.connections == 0:
            left_s = self._held_at_s + MOMENT_S - time.monotonic()
            if left_s <= 0:
                break
            self._changed.wait(left_s)
            self._check_open()
        if self._active - self._leaving <= self._pace.connections:
            return False
        self._leaving += 1
        return True

    @contextlib.contextmanager
    def connection(self) -> Iterator[None]:
        """One of the fetch's connections, in order of arrival. Raises GateClosedError."""
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            try:
                while self._queue[0] is not ticket or self._active >= self._pace.connections:
                    self._check_open()
                    self._changed.wait()
                self._check_open()
                self._active += 1
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._active -= 1
                self._leaving = max(0, self._leaving - 1)
                self._changed.notify_all()

    def forgiving(self, call: Callable[[], T]) -> T:
        """What ``call`` answers. Where it broke while it was held, it is called again once it is not: an
        origin that was read too slowly may well hang up, and is none the worse for it. Raises CachedError."""
        while True:
            holds = self._holds - int(self._pace.connections == 0)
            try:
                return call()
            except CachedError as error:
                if not error.problem.temporary or holds == self._holds:
                    raise
            self._wait_until_released()

    def _wait_until_released(self) -> None:
        with self._changed:
            while self._pace.connections == 0:
                self._check_open()
                self._changed.wait()

    def _check_open(self) -> None:
        if self._closed:
            raise GateClosedError
