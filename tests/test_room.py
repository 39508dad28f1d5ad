"""How much the store may take: the arithmetic, and the loop that keeps the planner's figure true."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

from cached.config import StoreSettings
from cached.durable import RealFs, world_error
from cached.metrics import Metrics
from cached.model import DISK
from cached.node.capacity import Capacity, capacity_bytes
from cached.node.core import Core
from cached.node.disk import Disk
from cached.plan import State
from cached.store import Room, Store

GB = 10**9


def test_what_has_to_stay_free_is_kept_free_whoever_fills_the_rest() -> None:
    settings = StoreSettings(keep_free=0.25)
    assert capacity_bytes(settings, Room(0, 100 * GB, 100 * GB)) == 75 * GB
    assert capacity_bytes(settings, Room(30 * GB, 100 * GB, 70 * GB)) == 75 * GB, "our own counts as ours"
    assert capacity_bytes(settings, Room(30 * GB, 100 * GB, 40 * GB)) == 45 * GB, "others took 30"
    assert capacity_bytes(settings, Room(30 * GB, 100 * GB, 5 * GB)) == 10 * GB, "we have to give way"
    assert capacity_bytes(settings, Room(1 * GB, 100 * GB, 5 * GB)) == 0


def test_the_operators_bound_only_lowers_it() -> None:
    bounded = StoreSettings(capacity_bytes=40 * GB, keep_free=0.25)
    assert capacity_bytes(bounded, Room(0, 100 * GB, 100 * GB)) == 40 * GB
    assert capacity_bytes(bounded, Room(0, 100 * GB, 50 * GB)) == 25 * GB


def test_the_larger_of_share_and_bytes_stays_free() -> None:
    for keep_bytes, expected in ((10 * GB, 75 * GB), (60 * GB, 40 * GB)):
        settings = StoreSettings(keep_free=0.25, keep_free_bytes=keep_bytes)
        assert capacity_bytes(settings, Room(0, 100 * GB, 100 * GB)) == expected


class Neighbour(RealFs):
    """A real file system on which somebody else may take up room."""

    free_bytes = 50 * GB
    broken = False

    def disk_bytes(self, path: Path) -> tuple[int, int]:
        if self.broken:
            raise world_error(OSError(errno.EIO, "the disk is sick"), path)
        return 100 * GB, self.free_bytes


async def test_the_planner_hears_of_what_matters_only(tmp_path: Path) -> None:
    fs = Neighbour()
    store = Store.open(tmp_path / "data", fs)
    store.scan(1.0)
    core = Core(State(fetch_slots=1), lambda action: None)
    disk = Disk(core.fail)
    capacity = Capacity(StoreSettings(), store, disk, core, Metrics("1"))

    async def told(free_bytes: int) -> int:
        fs.free_bytes = free_bytes
        await capacity.measure()
        core.turn(2.0)
        return core.state.places[DISK].capacity_bytes

    assert await told(50 * GB) == 30 * GB
    assert await told(50 * GB - GB // 5) == 30 * GB, "a little less is the same"
    assert await told(49 * GB) == 29 * GB
    assert await told(50 * GB) == 30 * GB
    assert await told(1 * GB) == 0
    disk.close()
    store.close()


async def test_it_is_measured_again_after_a_poke_and_never_fails_for_good(tmp_path: Path) -> None:
    fs = Neighbour()
    store = Store.open(tmp_path / "data", fs)
    store.scan(1.0)
    core = Core(State(fetch_slots=1), lambda action: None)
    disk, metrics = Disk(core.fail), Metrics("1")
    capacity = Capacity(StoreSettings(), store, disk, core, metrics, every_s=30.0, pause_s=0.01)
    running = asyncio.create_task(capacity.run())
    for free_bytes in (60 * GB, 40 * GB):
        fs.free_bytes = free_bytes
        capacity.poke()
        async with asyncio.timeout(5):
            while core.state.places[DISK].capacity_bytes != free_bytes - 20 * GB:
                await asyncio.sleep(0.01)
                core.turn(2.0)
    fs.broken = True
    capacity.poke()
    async with asyncio.timeout(5):
        while not metrics.registry.get_sample_value("cached_problems_total", {"reason": "STORE_IO"}):
            await asyncio.sleep(0.01)
    assert not running.done()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    disk.close()
    store.close()
