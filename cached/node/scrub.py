"""Reads everything on disk again, in the background and at a bounded rate, for what a disk forgets silently.

Owns the order (by digest, in rounds), where a round stands, and its pace. What is found corrupt becomes an
event; what to do about it is the planner's. One small piece at a time, each behind the gate that it is given.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Protocol

import structlog

from cached.config import StoreSettings
from cached.fetch import Mismatch
from cached.metrics import Metrics
from cached.model import CachedError, Digest
from cached.node.core import Core
from cached.node.disk import Disk
from cached.plan import types as t
from cached.store import ScrubMark, Store

BATCH_BYTES = 256 * 1024 * 1024
SETTLE_S = 300.0
"""A start has better things to do with the disk."""
LOOK_AGAIN_S = 3600.0
RETRY_S = 60.0

Gate = Callable[[], Awaitable[None]]
Files = tuple[tuple[str, Digest, int], ...]

log = structlog.get_logger("cached.node")


class Verifier(Protocol):
    """Of the fetch pool, what reads."""

    async def verify(
        self, files: Files, on_progress: Callable[[int], None], rate_bytes_per_s: int | None = None
    ) -> tuple[Mismatch, ...]: ...


async def at_once() -> None:
    """The gate that is always open."""


class Scrubber:
    """One node's background proof."""

    def __init__(
        self,
        settings: StoreSettings,
        store: Store,
        disk: Disk,
        pool: Verifier,
        core: Core,
        metrics: Metrics,
        may_run: Gate = at_once,
    ) -> None:
        self._rate = settings.scrub_bytes_per_s
        self._every_s = settings.scrub_every_s
        self._store = store
        self._disk = disk
        self._pool = pool
        self._core = core
        self._metrics = metrics
        self._may_run = may_run

    async def run(self) -> None:
        """Round after round, for ever; not at all where the rate is 0."""
        mark = await self._disk.call(self._store.scrub_mark)
        self._metrics.set_scrub_round(mark.finished_at)
        if not self._rate:
            return
        await asyncio.sleep(min(SETTLE_S, self._every_s / 10))
        while True:
            wait_s = wait_for_round_s(mark, self._every_s, time.time())
            if wait_s > 0:
                await asyncio.sleep(min(wait_s, LOOK_AGAIN_S))
                continue
            await self._may_run()
            try:
                mark = await self.step(mark, time.time())
            except CachedError as error:
                self._metrics.problem(error.problem.reason)
                log.warning(error.problem.message, reason=error.problem.reason, hint=error.problem.hint)
                await asyncio.sleep(RETRY_S)

    async def step(self, mark: ScrubMark, now: float) -> ScrubMark:
        """Read the next piece, or end the round. Returns where that leaves it. Raises CachedError."""
        files = await self._disk.call(self._store.blobs_after, mark.cursor, BATCH_BYTES)
        began_at = mark.began_at if mark.cursor else now
        if files:
            await self._prove(files)
            after = replace(mark, cursor=files[-1][1], began_at=began_at)
        else:
            after = ScrubMark("", began_at, now)
            self._metrics.set_scrub_round(now)
            log.info("all of the disk was read again", began_at=began_at)
        await self._disk.call(self._store.put_scrub_mark, after)
        return after

    async def _prove(self, files: Files) -> None:
        """Twice, where something differs: it may have been evicted, or fetched anew, while it was read."""
        wrong = await self._read(files)
        if wrong:
            suspects = {mismatch.digest for mismatch in wrong}
            wrong = await self._read(tuple(file for file in files if file[1] in suspects))
        for mismatch in wrong:
            meant = await self._disk.call(self._store.has_blob, mismatch.digest)
            if meant and mismatch.digest not in self._core.state.corrupt:
                self._metrics.scrub_mismatch()
                self._core.post(t.Corrupt(mismatch.digest, f"found by the scrubber: {mismatch.reason}"))

    async def _read(self, files: Files) -> tuple[Mismatch, ...]:
        told_bytes = 0

        def advanced(done_bytes: int) -> None:
            nonlocal told_bytes
            self._metrics.scrubbed(done_bytes - told_bytes)
            told_bytes = done_bytes

        return await self._pool.verify(files, advanced, self._rate)


def wait_for_round_s(mark: ScrubMark, every_s: float, now: float) -> float:
    """How long until there is something to do: nothing within a round, else until the next one is due."""
    if mark.cursor or not mark.began_at:
        return 0.0
    # A clock that was set back must not stop the scrubbing for years.
    return min(every_s, mark.began_at + every_s - now)
