"""The scrubber: in rounds, in small pieces, over restarts; what it finds and what it does not mind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from cached.config import StoreSettings
from cached.durable import RealFs
from cached.fetch import Mismatch
from cached.fetch.verify import verify
from cached.metrics import Metrics
from cached.model import DISK, Digest, temporary
from cached.node import scrub
from cached.node.core import Core
from cached.node.disk import Disk
from cached.node.scrub import Files, Scrubber, wait_for_round_s
from cached.plan import State
from cached.plan import types as t
from cached.store import ScrubMark, Store
from cached.store.layout import Layout
from tests.storekit import SmallModel, fetch, sha256

A = SmallModel("a", {"model.bin": b"weights of a", "tokenizer": b"words"})
B = SmallModel("b", {"model.bin": b"weights of b"})
ALL = sorted({*A.digests, *B.digests})


class Reader:
    """Reads at once and in this process; ``meanwhile`` happens before each reading."""

    def __init__(self) -> None:
        self.read: list[Digest] = []
        self.rates: set[int | None] = set()
        self.meanwhile: Callable[[], None] = lambda: None

    async def verify(
        self, files: Files, on_progress: Callable[[int], None], rate_bytes_per_s: int | None = None
    ) -> tuple[Mismatch, ...]:
        self.meanwhile()
        self.read += [digest for _, digest, _ in files]
        self.rates.add(rate_bytes_per_s)
        return verify(files, on_progress)


class Bench:
    """A store with two models, and a scrubber over it."""

    def __init__(self, root: Path) -> None:
        self.fs = RealFs()
        self.at = Layout(root)
        self.store = Store.open(root, self.fs)
        self.store.scan(1.0)
        self.artifacts = [fetch(self.store, self.fs, model) for model in (A, B)]
        self.started: list[t.Action] = []
        self.core = Core(State(fetch_slots=1), self.started.append)
        self.core.post(t.CapacitySet(DISK, 10**6), t.Recovered(tuple(self.artifacts), (), (), ()))
        self.core.turn(2.0)
        self.disk, self.reader, self.metrics = Disk(self.core.fail), Reader(), Metrics("1")
        self.scrubber = self.make(scrub.at_once)

    def make(self, may_run: scrub.Gate, every_s: float = 7 * 86400.0, rate: int = 20_000_000) -> Scrubber:
        settings = StoreSettings(scrub_every_s=every_s, scrub_bytes_per_s=rate)
        return Scrubber(settings, self.store, self.disk, self.reader, self.core, self.metrics, may_run)

    def figure(self, name: str) -> float | None:
        return self.metrics.registry.get_sample_value(name)

    def damage(self, content: bytes) -> None:
        path = self.at.blob(sha256(content))
        path.chmod(0o644)
        path.write_bytes(content[:-1] + b"?")

    def found(self) -> list[Digest]:
        """What the planner is told to be corrupt."""
        self.core.turn(3.0)
        return [action.digest for action in self.started if isinstance(action, t.Quarantine)]


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path / "data")
    yield bench
    bench.disk.close()
    bench.store.close()


async def test_a_round_reads_everything_once_and_then_waits(bench: Bench) -> None:
    mark = await bench.scrubber.step(ScrubMark(), 100.0)
    assert mark == ScrubMark(ALL[-1], 100.0, 0.0)
    mark = await bench.scrubber.step(mark, 150.0)
    assert mark == ScrubMark("", 100.0, 150.0) == bench.store.scrub_mark()
    assert bench.reader.read == ALL and bench.reader.rates == {20_000_000}
    assert bench.figure("cached_scrubbed_bytes_total") == sum(len(c) for m in (A, B) for c in m.contents)
    assert bench.figure("cached_scrub_last_round_timestamp_seconds") == 150.0
    assert wait_for_round_s(mark, 1000.0, 400.0) == 700.0
    assert wait_for_round_s(mark, 1000.0, 1200.0) <= 0.0
    assert wait_for_round_s(mark, 1000.0, 1.0) == 1000.0, "a clock that was set back"
    assert bench.found() == []


async def test_a_round_goes_on_where_a_restart_interrupted_it(bench: Bench, tmp_path: Path) -> None:
    bench.store.put_scrub_mark(ScrubMark(ALL[0], 50.0, 7.0))
    bench.store.close()
    bench.store = Store.open(tmp_path / "data", bench.fs)
    assert bench.store.scan(60.0).problems == ()
    mark = bench.store.scrub_mark()
    assert mark == ScrubMark(ALL[0], 50.0, 7.0) and wait_for_round_s(mark, 1000.0, 60.0) == 0.0
    again = await bench.make(scrub.at_once).step(mark, 70.0)
    assert bench.reader.read == ALL[1:] and again.began_at == 50.0
    (tmp_path / "data" / "scrub.json").write_bytes(b'{"cur')
    assert bench.store.scrub_mark() == ScrubMark()


async def test_pieces_are_small_and_one_content_is_a_piece_however_large(bench: Bench) -> None:
    (one,) = bench.store.blobs_after("", 1)
    assert one == (str(bench.at.blob(ALL[0])), ALL[0], bench.fs.size_bytes(bench.at.blob(ALL[0])))
    two = bench.store.blobs_after("", one[2] + bench.store.blobs_after(ALL[0], 1)[0][2])
    assert [digest for _, digest, _ in two] == ALL[:2]
    assert bench.store.blobs_after(ALL[-1], 10**9) == ()


async def test_what_is_corrupt_becomes_an_event(bench: Bench) -> None:
    bench.damage(b"weights of b")
    bench.at.blob(sha256(b"words")).unlink()
    await bench.scrubber.step(ScrubMark(), 100.0)
    assert sorted(bench.found()) == sorted([sha256(b"weights of b"), sha256(b"words")])
    quarantine = next(a for a in bench.started if isinstance(a, t.Quarantine))
    assert quarantine.reason.startswith("found by the scrubber: ")
    assert bench.figure("cached_scrub_mismatches_total") == 2


async def test_what_is_evicted_meanwhile_is_no_error(bench: Bench) -> None:
    bench.reader.meanwhile = lambda: bench.store.evict(B.id, B.digests)
    mark = await bench.scrubber.step(ScrubMark(), 100.0)
    assert mark.cursor == ALL[-1]
    assert bench.found() == [] and bench.figure("cached_scrub_mismatches_total") == 0


async def test_it_waits_at_the_gate_and_goes_on_after_a_failure(bench: Bench) -> None:
    opened, waiting = asyncio.Event(), asyncio.Event()

    async def gate() -> None:
        waiting.set()
        await opened.wait()

    def fail() -> None:
        raise temporary("WORKER_DIED", "it died", "wait", 1.0)

    running = asyncio.create_task(bench.make(gate, every_s=1.0).run())
    async with asyncio.timeout(10):
        await waiting.wait()
        assert bench.reader.read == []
        bench.reader.meanwhile = fail
        opened.set()
        while not bench.metrics.registry.get_sample_value("cached_problems_total", {"reason": "WORKER_DIED"}):
            await asyncio.sleep(0.01)
    assert not running.done() and bench.store.scrub_mark() == ScrubMark()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_rate_of_nothing_reads_nothing(bench: Bench) -> None:
    bench.store.put_scrub_mark(ScrubMark("", 3.0, 4.0))
    async with asyncio.timeout(5):
        await bench.make(scrub.at_once, rate=0).run()
    assert bench.reader.read == []
    assert bench.figure("cached_scrub_last_round_timestamp_seconds") == 4.0
