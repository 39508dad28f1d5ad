"""How much the store may take: measured again and again, for others fill the same file system.

Owns the arithmetic of the disk's capacity and the loop that measures. Decides nothing about content: a
capacity that has moved becomes an event, and what has to leave is the planner's to say.
"""

from __future__ import annotations

import asyncio
import contextlib

import structlog

from cached.config import StoreSettings
from cached.metrics import Metrics
from cached.model import DISK, CachedError
from cached.node.core import Core
from cached.node.disk import Disk
from cached.plan import types as t
from cached.store import Room, Store

MEASURE_EVERY_S = 28.0
MEASURE_PAUSE_S = 2.0
"""Between two measurements at least the pause, however much comes and goes; at most both together."""
UNMOVED = 1 / 400
"""A change of less than this share of the file system is none."""

log = structlog.get_logger("cached.node")


def kept_free_bytes(settings: StoreSettings, room: Room) -> int:
    """What of the file system stays free, whoever fills the rest."""
    return max(int(settings.keep_free * room.total_bytes), settings.keep_free_bytes)


def capacity_bytes(settings: StoreSettings, room: Room) -> int:
    """What the store may take: what it has and what is free, but for what has to stay free; never more than
    the operator's bound."""
    fits_bytes = max(0, room.own_bytes + room.free_bytes - kept_free_bytes(settings, room))
    return min(fits_bytes, settings.capacity_bytes or fits_bytes)


class Capacity:
    """Keeps the planner's figure true. ``poke`` after anything that came to disk or left it."""

    def __init__(
        self,
        settings: StoreSettings,
        store: Store,
        disk: Disk,
        core: Core,
        metrics: Metrics,
        every_s: float = MEASURE_EVERY_S,
        pause_s: float = MEASURE_PAUSE_S,
    ) -> None:
        self._settings = settings
        self._store = store
        self._disk = disk
        self._core = core
        self._metrics = metrics
        self._every_s, self._pause_s = every_s, pause_s
        self._poked = asyncio.Event()
        self._told_bytes: int | None = None

    def poke(self) -> None:
        self._poked.set()

    async def run(self) -> None:
        """Measure for ever."""
        while True:
            await asyncio.sleep(self._pause_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._every_s):
                    await self._poked.wait()
            self._poked.clear()
            try:
                await self.measure()
            except CachedError as error:
                self._metrics.problem(error.problem.reason)
                log.warning(error.problem.message, reason=error.problem.reason, hint=error.problem.hint)

    async def measure(self) -> None:
        """Look once; tell the planner where it matters."""
        room = await self._disk.call(self._store.room)
        now_bytes = capacity_bytes(self._settings, room)
        self._metrics.set_file_system(room.total_bytes, room.free_bytes)
        if self._told_bytes is None or self._has_moved(now_bytes, room):
            self._tell(now_bytes, room)

    def _has_moved(self, now_bytes: int, room: Room) -> bool:
        assert self._told_bytes is not None
        return abs(now_bytes - self._told_bytes) > room.total_bytes * UNMOVED

    def _tell(self, now_bytes: int, room: Room) -> None:
        say = log.warning if room.own_bytes > now_bytes else log.info
        say(
            "the store is over its capacity" if room.own_bytes > now_bytes else "the store's capacity",
            capacity_bytes=now_bytes,
            own_bytes=room.own_bytes,
            free_bytes=room.free_bytes,
            keep_free_bytes=kept_free_bytes(self._settings, room),
        )
        self._told_bytes = now_bytes
        self._core.post(t.CapacitySet(DISK, now_bytes))
