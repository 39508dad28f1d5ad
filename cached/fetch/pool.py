"""The standing pool of fetch workers, as the daemon sees it.

Owns the workers' processes: how many, when they start and end, and what their deaths mean. Lives on the
event loop and does nothing there but pass lines: no hashing, no disk, no waiting but for pipes.
Killing a worker is cancelling its job; whoever fetches next goes on where it stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Never

import msgspec

from cached.config import SourceSettings, TransferSettings, source_for
from cached.durable import FsyncFailed
from cached.fetch.flights import Flight, Flights, Usage
from cached.fetch.share import Caps, Limit, Running, divide
from cached.fetch.wire import (
    MAX_LINE_BYTES,
    Advanced,
    Failed,
    Fetch,
    Fetched,
    FetchJob,
    Mismatch,
    Order,
    Pace,
    Reply,
    Request,
    Resolve,
    Resolved,
    Sealed,
    Verified,
    Verify,
    Wanted,
    decode_reply,
    encode,
)
from cached.model import Blob, CachedError, Digest, Manifest, Ref, Revision, RevisionKey, temporary

RESOLVE_WORKERS = 2
VERIFY_WORKERS = 1
SCRUB_WORKERS = 1
IDLE_S = 60.0
KILL_WAIT_S = 10.0
LAST_WORDS_S = 1.0
DIVIDE_EVERY_S = 0.25
RETRY_DIED_S = 1.0
MAX_UNHEARD_BYTES = 64 * 1024
RETRY_SLOW_S = 30.0
STDERR_PIECES = 8
STDERR_PIECE_BYTES = 1024


class FetchPool:
    """For one event loop. Jobs wait for a free worker; cancelling the task that waits kills the worker."""

    def __init__(
        self,
        settings: TransferSettings,
        python: str = sys.executable,
        sources: tuple[SourceSettings, ...] = (),
    ) -> None:
        self._settings = settings
        self._sources = sources
        self._python = python
        self._workers: set[_Worker] = set()
        self._fetching = _Lane(settings.workers)
        self._resolving = _Lane(RESOLVE_WORKERS)
        self._verifying = _Lane(VERIFY_WORKERS)
        self._flights = Flights()
        self._flying: dict[Flight, _Worker] = {}
        self._caps = _caps_of(settings, sources)
        self._background_share = 1.0
        self._next_division: asyncio.TimerHandle | None = None
        self._scrubbing = _Lane(SCRUB_WORKERS)

    @property
    def busy(self) -> int:
        """Jobs that have a worker right now."""
        return sum(lane.busy for lane in self._lanes)

    @property
    def _lanes(self) -> tuple[_Lane, ...]:
        return self._fetching, self._resolving, self._verifying, self._scrubbing

    def worker_pids(self) -> tuple[int, ...]:
        """The processes there are, idle ones included."""
        return tuple(worker.pid for worker in self._workers)

    async def resolve(self, ref: Ref) -> Revision:
        """What the origin of ``ref`` has now. Raises CachedError."""
        most_s = self._settings.resolve_timeout_s
        async with self._borrow(self._resolving) as worker:
            request = Resolve(ref, self._settings, source_for(self._sources, ref))
            try:
                # An answer that comes a byte at a time meets every timeout between two reads, and these
                # few workers are all that resolve.
                async with asyncio.timeout(most_s):
                    last = await worker.ask(request, f"resolving {ref}", _ignore)
            except TimeoutError as error:
                raise _too_slow(ref, most_s) from error
        match last:
            case Resolved(revision=revision):
                return revision
            case Failed():
                raise _error_of(last)
        _unexpected(last)

    async def fetch(
        self,
        job: FetchJob,
        on_progress: Callable[[int, int], None],
        on_blob: Callable[[int, Blob], Awaitable[None]],
    ) -> Manifest:
        """Bring a revision to disk, proven.

        ``on_progress(done bytes, bytes received from the origin)`` a few times a second; ``on_blob(index,
        blob)`` is awaited for each file that was sealed, one after the other, and not for those that share
        their content with one before. Raises CachedError, FsyncFailed, and what ``on_blob`` raises.
        """

        async def on_reply(reply: Reply) -> None:
            usage = self._heard(flight)
            match reply:
                case Advanced(done_bytes=done_bytes, origin_bytes=origin_bytes):
                    usage.origin_bytes = origin_bytes
                    on_progress(done_bytes, origin_bytes)
                case Wanted(digest=digest):
                    self._tell([(flight, self._flights.claim(flight, digest))])
                    if flight.revision.key in self._flights.urgent():
                        self._divide()  # what it now waits for is urgent as well
                case Sealed(index=index, blob=blob):
                    await on_blob(index, blob)
                    self._tell(self._flights.committed(flight, blob))

        ref = job.revision.ref
        with self.enlist(job.revision, job.background) as flight:
            async with self._borrow(self._fetching) as worker:
                with self._aloft(flight, worker) as pace:
                    request = Fetch(job, self._settings, source_for(self._sources, ref), pace)
                    last = await worker.ask(request, f"fetching {ref}", on_reply)
                if isinstance(last, Failed):
                    # Raised here, so that the worker and its locks are gone before anybody tries again.
                    raise _error_of(last)
        match last:
            case Fetched(manifest=manifest):
                return manifest
        _unexpected(last)

    # --- transfers beside each other --------------------------------------------------------

    @contextlib.contextmanager
    def enlist(self, revision: Revision, background: bool) -> Iterator[Flight]:
        """A fetch of ``revision`` begins. Entered before anybody looks at what the store has of it, so that
        nothing is missed of what others commit meanwhile; ``fetch`` does it by itself where nobody did."""
        known = self._flights.get(revision.key)
        if known is not None:
            yield known
            return
        flight = self._flights.begin(revision, background)
        try:
            yield flight
        finally:
            self._tell(self._flights.end(flight))

    def set_background(self, key: RevisionKey, background: bool) -> None:
        """Nobody waits any longer for a fetch that runs, or somebody does now."""
        flight = self._flights.get(key)
        if flight is not None:
            flight.background = background
            self._divide()

    def set_background_share(self, share: float) -> None:
        """How much of its speed (0 to 1) what nobody waits for may have from now."""
        if share != self._background_share:
            self._background_share = share
            self._divide()

    @contextlib.contextmanager
    def _aloft(self, flight: Flight, worker: _Worker) -> Iterator[Pace]:
        """Among those that share the line, once its worker is heard of. Gives the pace to begin with."""
        self._flying[flight] = worker
        try:
            flight.pace = self._paces((*self._sharing(), flight))[flight]
            if self._next_division is None:
                self._look_later()
            yield flight.pace
        finally:
            del self._flying[flight]
            self._divide()

    def _sharing(self) -> tuple[Flight, ...]:
        return tuple(flight for flight in self._flying if flight.usage is not None)

    def _heard(self, flight: Flight) -> Usage:
        """Its worker has begun: a new process takes a while, in which others need not stand back yet."""
        if flight.usage is None:
            flight.usage = Usage(asyncio.get_running_loop().time())
            self._divide()
        return flight.usage

    def _look_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._next_division = loop.call_later(DIVIDE_EVERY_S, self._look) if self._flying else None

    def _look(self) -> None:
        now_s = asyncio.get_running_loop().time()
        for flight in self._flying:
            if flight.usage is not None:
                flight.usage.look(now_s)
        self._divide()
        self._look_later()

    def _divide(self) -> None:
        paces = self._paces(self._sharing())
        # Who gets less hears it first.
        for flight, pace in sorted(paces.items(), key=lambda entry: not entry[1].background):
            if pace != flight.pace and self._flying[flight].tell(pace):
                flight.pace = pace

    def _paces(self, flights: tuple[Flight, ...]) -> dict[Flight, Pace]:
        urgent = self._flights.urgent()
        running = {one: self._running(one, one.revision.key not in urgent) for one in flights}
        return divide(running, self._caps, self._background_share)

    def _running(self, flight: Flight, background: bool) -> Running:
        usage, pace = flight.usage, flight.pace
        return Running(
            source_for(self._sources, flight.revision.ref).prefix,
            background,
            self._settings.connections,
            # What a held one reads says nothing of what it could.
            None if pace is None or pace.connections == 0 else pace.rate_bytes_per_s,
            None if usage is None else usage.most_bytes_per_s(asyncio.get_running_loop().time()),
            None if usage is None else usage.best_bytes_per_s(),
        )

    def _tell(self, orders: list[tuple[Flight, Order]]) -> None:
        for flight, order in orders:
            # Who has no worker yet asks once it has, and is told then.
            if flight in self._flying:
                self._flying[flight].tell(order)

    async def verify(
        self,
        files: tuple[tuple[str, Digest, int], ...],
        on_progress: Callable[[int], None],
        rate_bytes_per_s: int | None = None,
    ) -> tuple[Mismatch, ...]:
        """Read (path, sha256, size in bytes) again; those that are not so. Raises CachedError.

        What has a rate has a worker of its own: nobody who waits for a proof waits behind it.
        """

        async def on_reply(reply: Reply) -> None:
            if isinstance(reply, Advanced):
                on_progress(reply.done_bytes)

        lane = self._verifying if rate_bytes_per_s is None else self._scrubbing
        async with self._borrow(lane) as worker:
            request = Verify(files, rate_bytes_per_s)
            last = await worker.ask(request, f"verifying {len(files)} files", on_reply)
        match last:
            case Verified(mismatches=mismatches):
                return mismatches
            case Failed():
                raise _error_of(last)
        _unexpected(last)

    async def close(self) -> None:
        """Kill what is left. Jobs that still run fail as if their workers had died."""
        for lane in self._lanes:
            lane.forget_idle()
        await asyncio.gather(*(worker.kill() for worker in tuple(self._workers)))

    @contextlib.asynccontextmanager
    async def _borrow(self, lane: _Lane) -> AsyncIterator[_Worker]:
        """A worker for one request; it is killed unless that ended well."""
        async with lane.slots:
            lane.busy += 1
            try:
                worker = lane.take_idle() or await self._start()
                try:
                    yield worker
                except BaseException:
                    await worker.kill()
                    raise
                lane.put_idle(worker)
            finally:
                lane.busy -= 1

    async def _start(self) -> _Worker:
        # -P: no code from whatever directory the daemon was started in.
        command = (self._python, "-P", "-m", "cached.fetch.worker", str(os.getpid()))
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                limit=MAX_LINE_BYTES,
                # Out of the terminal's group: Ctrl-C is the daemon's to hear, and it ends its workers itself.
                start_new_session=True,
            )
        except OSError as error:
            raise temporary(
                "WORKER_NOT_STARTED",
                f"no fetch worker could be started with {self._python}: {error.strerror}",
                "see whether processes, memory or descriptors ran out on this node",
                RETRY_DIED_S,
            ) from error
        worker = _Worker(process)
        self._workers.add(worker)
        worker.ended.add_done_callback(lambda _: self._workers.discard(worker))
        return worker


@dataclass(slots=True)
class _Lane:
    """A bounded number of workers for one kind of request."""

    most: int
    busy: int = 0
    slots: asyncio.Semaphore = field(init=False)
    _idle: list[_Worker] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.slots = asyncio.Semaphore(self.most)

    def take_idle(self) -> _Worker | None:
        while self._idle:
            worker = self._idle.pop()
            worker.cancel_retirement()
            if worker.alive:
                return worker
        return None

    def put_idle(self, worker: _Worker) -> None:
        self._idle.append(worker)
        worker.retire_later(lambda: self._idle.remove(worker))

    def forget_idle(self) -> None:
        for worker in self._idle:
            worker.cancel_retirement()
        self._idle.clear()


class _Worker:
    """One process, from its start to its reaping."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin and process.stdout and process.stderr
        self._process = process
        self._stdin, self._stdout, self._stderr = process.stdin, process.stdout, process.stderr
        self._complaints: deque[bytes] = deque(maxlen=STDERR_PIECES)
        self._retirement: asyncio.TimerHandle | None = None
        # Killing by number looks for the process's end first, and so takes its status from the event loop.
        self._pidfd = _pidfd_of(process.pid)
        self.ended = asyncio.create_task(self._attend())

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    async def _attend(self) -> None:
        """Listen to stderr, which would block the worker if nobody did, and reap the process."""
        while piece := await self._stderr.read(STDERR_PIECE_BYTES):
            self._complaints.append(piece)
        await self._process.wait()
        if self._pidfd is not None:
            os.close(self._pidfd)

    async def ask(self, request: Request, doing: str, on_reply: Callable[[Reply], Awaitable[None]]) -> Reply:
        """The closing reply to ``request``. Raises CachedError, as ``WORKER_DIED`` (temporary)."""
        try:
            self._stdin.write(encode(request))
            await self._stdin.drain()
            while line := await self._stdout.readline():
                reply = decode_reply(line)
                if not isinstance(reply, Advanced | Wanted | Sealed):
                    return reply
                await on_reply(reply)
        except (ConnectionError, msgspec.DecodeError) as error:
            # A line that broke off midway, or a pipe that did: either way the process is done for.
            raise await self._died(doing) from error
        raise await self._died(doing)

    def tell(self, order: Order) -> bool:
        """Say something to the fetch that runs. False where the process does not listen: what changes all the
        time is then not worth its memory."""
        late = self._stdin.transport.get_write_buffer_size() > MAX_UNHEARD_BYTES
        if self._stdin.is_closing() or (late and isinstance(order, Pace)):
            return False
        self._stdin.write(encode(order))
        return True

    async def _died(self, doing: str) -> CachedError:
        # It is at its end already; its own status says more than that of a kill.
        await asyncio.wait([self.ended], timeout=LAST_WORDS_S)
        await self.kill()
        code = self._process.returncode
        how = f"was killed by {_signal_name(-code)}" if code and code < 0 else f"exited with status {code}"
        said = b"".join(self._complaints).decode("utf-8", "replace").strip().splitlines()
        return temporary(
            "WORKER_DIED",
            f"the worker that was {doing} {how}" + (f": {said[-1][:300]}" if said else ""),
            "it is tried again and goes on where it stopped; if that repeats, see whether memory ran out",
            RETRY_DIED_S,
        )

    async def kill(self) -> None:
        """End the process now; afterwards its locks are free."""
        if self._pidfd is not None and not self.ended.done():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        # A process that hangs in the kernel (a dead share) cannot be waited for without end.
        await asyncio.wait([self.ended], timeout=KILL_WAIT_S)

    def retire_later(self, forget: Callable[[], None]) -> None:
        def retire() -> None:
            forget()
            self._stdin.close()  # the worker ends by itself

        self._retirement = asyncio.get_running_loop().call_later(IDLE_S, retire)

    def cancel_retirement(self) -> None:
        if self._retirement is not None:
            self._retirement.cancel()


def _pidfd_of(pid: int) -> int | None:
    """A handle on the process that no later process with the same number can be mistaken for."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None  # it ended at once


def _caps_of(settings: TransferSettings, sources: tuple[SourceSettings, ...]) -> Caps:
    limits = {source.prefix: Limit(source.rate_bytes_per_s, source.connections) for source in sources}
    of_sources = {prefix: limit for prefix, limit in limits.items() if limit != Limit()}
    return Caps(Limit(settings.rate_bytes_per_s, settings.max_connections), of_sources)


async def _ignore(reply: Reply) -> None:
    """Resolving has no progress to tell."""


def _error_of(failed: Failed) -> Exception:
    return FsyncFailed(failed.problem.message) if failed.fsync else CachedError(failed.problem)


def _too_slow(ref: Ref, most_s: float) -> CachedError:
    return temporary(
        "ORIGIN_TOO_SLOW",
        f"{ref}: the origin did not say within {most_s:g} s which files it has",
        "see whether it is overloaded; if it has very many files, raise [transfer] resolve_timeout_s",
        RETRY_SLOW_S,
    )


def _unexpected(reply: Reply) -> Never:
    raise AssertionError(f"a worker closed a request with {type(reply).__name__}")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
