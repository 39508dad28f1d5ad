"""Fetches beside each other, with real workers and a real origin: who gets the line, and what comes once."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from benchmarks.origin import Fault, Origin
from cached.config import SourceSettings, TransferSettings
from cached.fetch import FetchJob, FetchPool
from cached.fetch.gate import Gate
from cached.fetch.kernel import set_priority
from cached.fetch.todo import Todo
from cached.fetch.transfer import Transfer
from cached.fetch.wire import Pace
from cached.model import CHUNK_BYTES, Blob, CachedError, Manifest, Revision, parse_ref
from cached.sources import Origins

LINE = 40_000_000
"""What the origin gives, where it is limited: little enough for everything else to be no limit."""


@dataclass
class Fetching:
    """One fetch, as its maker sees it. ``at`` is when how many bytes had come from the origin."""

    revision: Revision
    task: asyncio.Task[Manifest]
    at: list[tuple[float, int]] = field(default_factory=list)

    def received(self, since_s: float, until_s: float) -> int:
        """Bytes that came in that time."""
        before = max((count for at, count in self.at if at <= since_s), default=0)
        return max((count for at, count in self.at if at <= until_s), default=0) - before

    async def until(self, count: int) -> None:
        async with asyncio.timeout(20):
            while not self.at or self.at[-1][1] < count:
                assert not self.task.done()
                await asyncio.sleep(0.01)


class Together:
    """An origin, a pool, and a store that is only a folder of blobs."""

    def __init__(self, origin: Origin, data_dir: Path, pool: FetchPool) -> None:
        self.origin, self.data_dir, self.pool = origin, data_dir, pool

    def put(self, name: str, files: dict[str, bytes]) -> str:
        folder = self.origin.root / name
        folder.mkdir()
        for path, data in files.items():
            (folder / path).write_bytes(data)
        sums = (f"{hashlib.sha256(data).hexdigest()}  {path}\n" for path, data in files.items())
        (folder / "SHA256SUMS").write_text("".join(sums))
        return f"{self.origin.url}{name}/"

    async def start(self, ref: str, background: bool) -> Fetching:
        revision = await self.pool.resolve(parse_ref(ref))
        at: list[tuple[float, int]] = []
        task = asyncio.create_task(self._fetch(revision, background, at))
        return Fetching(revision, task, at)

    async def _fetch(self, revision: Revision, background: bool, at: list[tuple[float, int]]) -> Manifest:
        ingest_dir = self.data_dir / "ingest" / revision.key
        ingest_dir.mkdir(parents=True, exist_ok=True)

        async def commit(index: int, blob: Blob) -> None:
            target = self.data_dir / "blobs" / "sha256" / blob.sha256[:2] / blob.sha256
            target.parent.mkdir(parents=True, exist_ok=True)
            (ingest_dir / f"{index}.part").rename(target)

        job = FetchJob(revision, str(ingest_dir), (None,) * len(revision.files), background)
        return await self.pool.fetch(job, lambda _, count: at.append((time.monotonic(), count)), commit)

    def file_bytes(self) -> int:
        """What the origin sent of files."""
        return sum(count for path, count in self.origin.sent.items() if not path.endswith("SHA256SUMS"))

    def pid_of(self, fetching: Fetching) -> int:
        for pid in self.pool.worker_pids():
            for link in Path(f"/proc/{pid}/fd").iterdir():
                if link.is_symlink() and fetching.revision.key in str(link.readlink()):
                    return pid
        raise AssertionError("no worker has a file of it open")


Make = Callable[..., Together]


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    (tmp_path / "origin").mkdir()
    pools: list[FetchPool] = []
    with Origin(tmp_path / "origin") as origin:

        def make_one(sources: tuple[SourceSettings, ...] = (), **settings: int) -> Together:
            pools.append(FetchPool(TransferSettings(attempts=1, **settings), sources=sources))  # type: ignore[arg-type]
            return Together(origin, tmp_path / "data", pools[-1])

        yield make_one
        for pool in pools:
            await pool.close()


def content(seed: int, size_bytes: int) -> bytes:
    return random.Random(seed).randbytes(size_bytes)


# --- the line -------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
async def test_a_waiter_takes_the_line_within_a_second_and_the_prefetch_goes_on(
    make: Make, ranges: bool
) -> None:
    here = make()
    big, small = content(1, 3 * CHUNK_BYTES), content(2, 3 * LINE // 2)
    if not ranges:
        here.origin.faults["p/big"] = Fault("no_ranges")
    prefetched, waited = here.put("p", {"big": big}), here.put("w", {"small": small})
    here.origin.rate.bytes_per_s = LINE
    prefetch = await here.start(prefetched, background=True)
    await prefetch.until(LINE // 4)
    waiter = await here.start(waited, background=False)
    # The worker's process is not there at once; from its first bytes on it has the line to itself.
    await waiter.until(1)
    began_s = time.monotonic()
    await asyncio.wait_for(waiter.task, 20)
    ended_s = time.monotonic()
    assert ended_s - began_s < 1 + 1.25 * len(small) / LINE
    assert prefetch.received(began_s + 1, ended_s) < 0.2 * waiter.received(began_s + 1, ended_s)
    manifest = await asyncio.wait_for(prefetch.task, 20)
    assert manifest.files[0].blob.sha256 == hashlib.sha256(big).hexdigest()
    # One attempt was all it had, and what it had it kept: but for what was on its way to it when it left.
    if ranges:
        assert prefetch.at[-1][1] == len(big)
        assert here.origin.sent["p/big"] <= len(big) + 4 * CHUNK_BYTES
    else:
        # An origin without ranges shows that late: chunks that were in others' hands come twice.
        assert prefetch.at[-1][1] <= 2 * len(big)


async def test_somebody_who_comes_to_wait_for_a_prefetch_hurries_it(make: Make) -> None:
    here = make()
    one, other = (here.put(name, {"x": content(ord(name), 2 * LINE)}) for name in "ab")
    here.origin.rate.bytes_per_s = LINE
    fetches = [await here.start(ref, background=True) for ref in (one, other)]
    for fetch in fetches:
        await fetch.until(1)
    here.pool.set_background(fetches[0].revision.key, False)
    pid = here.pid_of(fetches[0])
    began_s = time.monotonic()
    await asyncio.sleep(1.6)
    since_s, until_s = began_s + 1, time.monotonic()
    assert fetches[1].received(since_s, until_s) < 0.2 * fetches[0].received(since_s, until_s)
    if may_raise():
        assert nices(pid) == {os.getpriority(os.PRIO_PROCESS, 0)}
    assert max(nices(here.pid_of(fetches[1]))) == 10
    # And not any more, when he has gone.
    here.pool.set_background(fetches[0].revision.key, True)
    await asyncio.gather(*(fetch.task for fetch in fetches))
    assert here.file_bytes() <= 3 * LINE + 8 * CHUNK_BYTES


def may_raise() -> bool:
    """Whether the kernel gives a lowered thread its priority back here."""
    answers: list[bool] = []

    def body() -> None:
        set_priority(threading.get_native_id(), background=True)
        answers.append(set_priority(threading.get_native_id(), background=False))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    return answers[0]


def nices(pid: int) -> set[int]:
    """Of all of a process's threads."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return {os.getpriority(os.PRIO_PROCESS, int(thread.name)) for thread in threads}


async def test_rates_and_connections_are_kept_over_all_workers(make: Make) -> None:
    here = make(rate_bytes_per_s=8_000_000, max_connections=3)
    refs = [here.put(name, {"x": content(ord(name), 4_000_000)}) for name in "abc"]
    began_s = time.monotonic()
    fetches = [await here.start(ref, background=False) for ref in refs]
    await asyncio.gather(*(fetch.task for fetch in fetches))
    took_s = time.monotonic() - began_s
    assert 12 / 8 * 0.8 < took_s < 8


async def test_a_source_keeps_to_its_own_rate_and_leaves_the_others_alone(make: Make) -> None:
    origin_url = make().origin.url
    limited = SourceSettings(f"{origin_url}slow/", rate_bytes_per_s=2_000_000, connections=1)
    here = make(sources=(limited,))
    refs = [here.put(name, {"x": content(ord(name[0]), 5_000_000)}) for name in ("slow", "fast")]
    slow, fast = [await here.start(ref, background=False) for ref in refs]
    await slow.until(1)
    began_s = time.monotonic()
    await fast.task
    assert not slow.task.done()
    await slow.task
    assert time.monotonic() - began_s > 5 / 2 * 0.8


def test_where_no_priority_can_be_raised_other_threads_take_over(tmp_path: Path) -> None:
    """Files that are begun after somebody came to wait are proven by threads that were never lowered."""
    folder = tmp_path / "m"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number:02}").write_bytes(content(number, 500_000))
    ingest_dir = tmp_path / "data" / "ingest" / "key"
    ingest_dir.mkdir(parents=True)
    revision = Origins(2, 5.0).resolve(parse_ref(f"file://{folder}"))
    lowered: set[int] = set()
    sealed_by: list[int] = []

    def prioritise(thread_id: int, background: bool) -> bool:
        if background:
            lowered.add(thread_id)
        return background

    gate = Gate(Pace(2_000_000, 2, True), prioritise)

    def sealed(index: int, blob: Blob) -> None:
        sealed_by.append(threading.get_native_id())
        if len(sealed_by) == 2:
            gate.change(Pace(2_000_000, 2, False))

    job = FetchJob(revision, str(ingest_dir), (None,) * 12, True)
    source = Origins(2, 5.0).source_for(revision.ref)
    settings = TransferSettings(connections=2)
    Transfer(job, source, settings, sealed, lambda done, came: None, gate, Todo()).run()
    assert len(sealed_by) == 12
    # Two owners, of which each had at most one file in hand.
    assert set(sealed_by[:2]) <= lowered
    assert not set(sealed_by[4:]) & lowered


# --- one content ----------------------------------------------------------------------------


async def test_contents_that_several_want_come_once(make: Make) -> None:
    """In crossing orders, so that each waits for what the other brings."""
    here = make(workers=4)
    shared = [content(seed, 3_000_000 + seed) for seed in range(6)]
    here.origin.rate.bytes_per_s = LINE
    refs = []
    for name, order in (("a", (0, 1, 2, 3, 4, 5)), ("b", (5, 4, 3, 2, 1, 0)), ("c", (3, 0, 4, 1, 5, 2))):
        files = {f"{place}.dat": shared[which] for place, which in enumerate(order)}
        refs.append(here.put(name, {**files, "own.dat": name.encode()}))
    fetches = [await here.start(ref, background=name == 1) for name, ref in enumerate(refs)]
    manifests = await asyncio.wait_for(asyncio.gather(*(fetch.task for fetch in fetches)), 30)
    for fetch, manifest in zip(fetches, manifests, strict=True):
        assert [f.blob.sha256 for f in manifest.files] == [f.sha256 for f in fetch.revision.files]
    assert here.file_bytes() == sum(map(len, shared)) + 3


async def test_what_a_killed_fetch_had_in_hand_is_fetched_by_who_waited_for_it(make: Make) -> None:
    here = make(workers=2)
    data = content(1, LINE)
    here.origin.rate.bytes_per_s = LINE
    refs = [here.put(name, {"x": data, "y": name.encode()}) for name in "ab"]
    first = await here.start(refs[0], background=True)
    await first.until(1)
    second = await here.start(refs[1], background=False)
    await second.until(1)  # its own small file: now it waits for the other one
    await first.until(LINE // 8)  # which is waited for as well now, so that it gets on
    os.kill(here.pid_of(first), signal.SIGKILL)
    with pytest.raises(CachedError, match="SIGKILL"):
        await first.task
    manifest = await asyncio.wait_for(second.task, 20)
    assert manifest.files[0].blob.sha256 == hashlib.sha256(data).hexdigest()
    assert here.origin.sent["b/x"] == len(data)
