"""Filling and proving pieces of memory, chunk by chunk, in several threads.

Owns the threads' work and the words for a chunk that is wrong. Knows no device and no artifact; what becomes
of a piece that is proven is its owner's business.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from cached.model import CHUNK_BYTES, Blob
from preloader.artifact import lost
from preloader.memory import Piece

LOOK_EVERY_S = 0.25
MAX_PROVERS = 4


class Task(Protocol):
    """A chunk's worth of work."""

    @property
    def size_bytes(self) -> int: ...

    def run(self) -> None:
        """Raises CachedError (DATA_LOSS) for what is wrong or cannot be read."""


T = TypeVar("T", bound=Task)


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk of a piece to bring in and to prove."""

    piece: Piece
    blob: Blob
    name: str
    index: int

    @property
    def offset(self) -> int:
        return self.index * CHUNK_BYTES

    @property
    def size_bytes(self) -> int:
        return min(CHUNK_BYTES, self.blob.size_bytes - self.offset)

    def run(self) -> None:
        try:
            found = self.piece.fill(self.offset, self.size_bytes)
        except OSError as error:
            what = f"cannot be read: {error.strerror}"
            raise lost("BLOB_UNREADABLE", self.name, self.blob, what) from error
        wanted = self.blob.chunks[self.index]
        if found != wanted:
            where = f"chunk {self.index} (bytes {self.offset} to {self.offset + self.size_bytes})"
            what = f"{where} has xxh3_128 {found} where {wanted} was proven"
            raise lost("CHUNK_MISMATCH", self.name, self.blob, what)


class Work(Generic[T]):
    """Tasks for several threads, until none is left, one fails, or it is stopped.

    Each thread does its part within a ``lane`` of its own. ``on_done`` hears, from any thread but one at a
    time, of each task that is done.
    """

    def __init__(
        self,
        tasks: Iterable[T],
        done_bytes: int = 0,
        lane: Callable[[], AbstractContextManager[None]] = nullcontext,
        on_done: Callable[[T], None] = lambda task: None,
        threads: int = 0,
    ) -> None:
        self.done_bytes = done_bytes
        self._threads = threads or threads_up_to(MAX_PROVERS)
        self._lane = lane
        self._on_done = on_done
        self._lock = threading.Lock()
        self._tasks = iter(tasks)

    def run(self, look: Callable[[], None] = lambda: None) -> None:
        """Do everything; ``look`` is called a few times a second meanwhile, and what it raises ends the work.

        Raises what a task raised. Whichever way it ends, no thread is left in the middle of anything.
        """
        with ThreadPoolExecutor(self._threads, "prove") as pool:
            futures = [pool.submit(self._part) for _ in range(self._threads)]
            try:
                while not _all_done(futures):
                    look()
            finally:
                self._stop()  # the pool then ends within a chunk, before anything is given back

    def _part(self) -> None:
        try:
            with self._lane():
                while (task := self._next()) is not None:
                    task.run()
                    self._tell(task)
        except BaseException:
            self._stop()
            raise

    def _next(self) -> T | None:
        with self._lock:
            return next(self._tasks, None)

    def _tell(self, task: T) -> None:
        with self._lock:
            self.done_bytes += task.size_bytes
            self._on_done(task)

    def _stop(self) -> None:
        with self._lock:
            self._tasks = iter(())


def threads_up_to(most: int) -> int:
    """As many as can run at once here, within that bound."""
    return min(most, len(os.sched_getaffinity(0)))


def _all_done(futures: list[Future[None]]) -> bool:
    """Wait a moment for the threads. Raises what one of them raised."""
    done, running = wait(futures, LOOK_EVERY_S, FIRST_EXCEPTION)
    for future in done:
        future.result()
    return not running
