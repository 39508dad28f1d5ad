"""The store, from the event loop: one thread of its own, so that calls wait in line and never the loop.

Owns that thread, and tells of a disk that cannot be trusted any more, whoever asked. Knows nothing of what
the calls do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from cached.durable import FsyncFailed

P = ParamSpec("P")
T = TypeVar("T")


class Disk:
    """Runs the store's calls one after the other."""

    def __init__(self, lost: Callable[[FsyncFailed], None]) -> None:
        """``lost`` hears of a failed fsync before the caller does."""
        self._lost = lost
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")

    async def call(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``work`` when its turn comes. What has begun is always waited for, also when cancelled:
        nobody may believe that a change of the disk did not happen while it still does."""
        future = asyncio.wrap_future(self._thread.submit(lambda: work(*args, **kwargs)))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            self._check(future)
            raise
        except FsyncFailed:
            self._check(future)
            raise

    def _check(self, future: asyncio.Future[T]) -> None:
        error = None if future.cancelled() else future.exception()
        if isinstance(error, FsyncFailed):
            self._lost(error)

    def close(self) -> None:
        """Wait for what is in line, and end."""
        self._thread.shutdown(wait=True)
