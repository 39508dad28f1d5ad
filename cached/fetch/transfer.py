"""One fetch, inside a worker: threads that bring ranges, threads that prove files, one that reports.

Owns the order of the work. Chunks are taken in file order by ``connections`` downloaders, each with one
reused buffer; every open file has an owner that follows the downloaders, reads back what is in place
in order, hashes it, and seals the file once it is proven. Decides nothing about the store, retries
what the origin may mend, and stops everything at the first error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from cached.config import TransferSettings
from cached.durable import FsyncFailed, Partial, world_error
from cached.fetch.gate import Gate, GateClosedError
from cached.fetch.kernel import Writeback
from cached.fetch.pace import Came, patiently
from cached.fetch.part import (
    Buffers,
    Filling,
    Part,
    Stream,
    chunk_count,
    discard,
    part_paths,
    read_tensors,
)
from cached.fetch.todo import Todo
from cached.fetch.wire import MAX_MANIFEST_TENSORS, FetchJob
from cached.model import (
    Blob,
    CachedError,
    Digest,
    ErrorKind,
    Manifest,
    ManifestFile,
    Problem,
    Tensor,
    artifact_id,
    permanent,
)
from cached.sources import RangesIgnoredError, Reader, Source

SPARE_BUFFERS = 2
"""More than there are downloaders, so that these go on while the proof catches up."""
READ_BACK_BYTES = 1024 * 1024
PROGRESS_S = 0.1
SYNC_S = 5.0
"""What a power cut may cost of a transfer: what came in this time."""


class _StoppedError(Exception):
    """Another thread failed or all is done: this one has nothing more to do."""


class _ReplacedError(Exception):
    """Another thread, of the right priority, goes on with this one's work."""


class _Task(NamedTuple):
    """What a downloader has in hand."""

    part: Part
    reader: Reader
    what: Filling | Stream


class Transfer:
    """Runs once. After ``run`` raised, the process has to end: threads of it may still be at work, and
    the partial blobs stay open and locked until then, so that no descriptor changes its meaning under them.
    """

    def __init__(
        self,
        job: FetchJob,
        source: Source,
        settings: TransferSettings,
        sealed: Callable[[int, Blob], None],
        advanced: Callable[[int, int], None],
        gate: Gate,
        todo: Todo,
    ) -> None:
        """``sealed`` is called from any thread, one at a time for one file; ``advanced`` from ``run``'s.
        ``gate`` and ``todo``, which is empty yet, are told of what changes outside."""
        assert len(job.have) == len(job.revision.files)
        self._job = job
        self._files = job.revision.files
        self._ingest_dir = Path(job.ingest_dir)
        self._source = source
        self._settings = settings
        self._sealed = sealed
        self._advanced = advanced
        self._gate = gate
        self._todo = todo
        # One lock for everything below; it is held for moments, never while disk or origin are asked.
        self._changed = threading.Condition()
        self._buffers = Buffers(settings.connections + SPARE_BUFFERS)
        self._successors: deque[Callable[[], None]] = deque()
        self._open: list[tuple[Part, Reader]] = []
        self._blobs: list[Blob | None] = list(job.have)
        self._tensors: dict[int, tuple[Tensor, ...]] = {}
        self._done_bytes = 0
        self._origin_bytes = 0
        self._owners_left = 0
        self._chunks = 0
        self._error: BaseException | None = None
        self._stop = threading.Event()

    def run(self) -> Manifest:
        """Fetch, prove and seal every file. Raises CachedError, FsyncFailed."""
        copies = self._plan()
        for index, blob in enumerate(self._job.have):
            if blob is not None:
                self._tensors[index] = self._tensors_of_committed(index, blob)
        threads = self._start_threads()
        while not self._stop.wait(PROGRESS_S):
            self._advanced(self._done_bytes, self._origin_bytes)
            while self._successors:
                threads.append(self._start_thread(self._successors.popleft()))
        if self._error is not None:
            self._advanced(self._done_bytes, self._origin_bytes)
            raise self._error
        for thread in threads:
            thread.join()
        self._take_copies(copies)
        self._advanced(self._done_bytes, self._origin_bytes)
        return self._manifest()

    # --- what there is to do ----------------------------------------------------------------

    def _plan(self) -> dict[int, int]:
        """Queue every content once; the answer says which file has the same content as which earlier one."""
        copies: dict[int, int] = {}
        first: dict[tuple[Digest | None, str], int] = {}
        for index, spec in enumerate(self._files):
            blob = self._job.have[index]
            # The suffix decides what is checked of a content besides its digest.
            content = (spec.sha256, PurePosixPath(spec.path).suffix)
            if blob is not None:
                _check_size(spec.path, spec.size_bytes, blob)
                self._done_bytes += spec.size_bytes
            elif spec.sha256 is not None and content in first:
                copies[index] = first[content]
            else:
                self._todo.add(index, spec.sha256)
                self._chunks += chunk_count(spec.size_bytes)
                first[content] = index
        return copies

    def _start_threads(self) -> list[threading.Thread]:
        self._owners_left = min(self._settings.connections, len(self._todo))
        if self._owners_left == 0:
            self._stop.set()
            return []
        jobs = [self._own_files] * self._owners_left
        jobs += [self._download] * min(self._settings.connections, self._chunks)
        return [self._start_thread(job) for job in jobs]

    def _start_thread(self, job: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=self._guarded, args=(job,), daemon=True)
        thread.start()
        return thread

    def _guarded(self, job: Callable[[], None]) -> None:
        try:
            with self._gate.working():
                job()
        except _ReplacedError:
            # Threads start with the priority of whoever starts them: run()'s was never lowered.
            self._successors.append(job)
        except (_StoppedError, GateClosedError):
            pass
        except BaseException as error:  # whatever it is, run() raises it, and the process ends
            with self._changed:
                self._error = self._error or error
                self._finish()

    def _finish(self) -> None:
        self._stop.set()
        self._changed.notify_all()
        self._gate.close()
        self._todo.close()

    def _check_priority(self) -> None:
        if self._gate.is_too_low():
            raise _ReplacedError

    # --- downloaders ------------------------------------------------------------------------

    def _download(self) -> None:
        while True:
            self._check_priority()
            task = self._take()
            if isinstance(task.what, Stream):
                self._download_whole(task.part, task.reader, task.what)
            else:
                self._download_chunk(task.part, task.reader, task.what)

    def _take(self) -> _Task:
        """The first chunk that nobody has in hand, of the file that has the fewest in hand, so that several
        files are proven at once; of a file without ranges, all of them."""
        with self._changed:
            while not self._stop.is_set():
                waiting = [entry for entry in self._open if entry[0].missing and not entry[0].streaming]
                buffer = self._buffers.take() if waiting else None
                if buffer is not None:
                    part, reader = min(waiting, key=lambda entry: entry[0].in_hand)
                    return _Task(part, reader, self._begin(part, buffer))
                self._changed.wait()
        raise _StoppedError

    def _begin(self, part: Part, buffer: memoryview) -> Filling | Stream:
        if part.sequential:
            part.streaming = True
            wanted = set(part.missing)
            part.in_hand += len(wanted)
            part.missing.clear()
            return Stream(part, wanted, buffer)
        part.in_hand += 1
        chunk = part.missing.pop(0)
        # What comes in order is proven as it comes; its owner does the rest.
        proves = chunk == part.proven and not part.proving
        part.proving = part.proving or proves
        return Filling(part, chunk, buffer, proves)

    def _download_chunk(self, part: Part, reader: Reader, filling: Filling) -> None:
        start = filling.position

        def attempt() -> None:
            # Goes on where the attempt before broke off, or where the connection was given up.
            while filling.position < filling.stop:
                bounds = (filling.position, filling.stop)
                for count in self._pieces(part, reader, filling, bounds, may_leave=True):
                    filling.add(count)
                    self._count(count)

        try:
            patiently(lambda: self._gate.forgiving(attempt), self._settings.attempts, self._pause)
        except RangesIgnoredError:
            self._count(start - filling.position)
            self._change_to_sequential(part, filling)
        else:
            self._record(filling)

    def _change_to_sequential(self, part: Part, filling: Filling) -> None:
        with self._changed:
            part.sequential = True
            part.in_hand -= 1
            if filling.proves:
                filling.give_up()
                part.proving = False
            self._free(filling.buffer, *part.give_back(filling.chunk))

    def _download_whole(self, part: Part, reader: Reader, stream: Stream) -> None:
        def attempt() -> None:
            self._count(-stream.begin())
            for count in self._pieces(part, reader, stream, (0, part.spec.size_bytes), may_leave=False):
                filling = stream.add(count)
                if filling is None:
                    continue
                self._count(count)
                if filling.position == filling.stop:
                    self._record(filling)
                    stream.buffer = self._another_buffer()
                    if not stream.wanted and filling.stop < part.spec.size_bytes:
                        return

        patiently(lambda: self._gate.forgiving(attempt), self._settings.attempts, self._pause)
        with self._changed:
            part.streaming = False
            self._free(stream.buffer)

    def _another_buffer(self) -> memoryview:
        with self._changed:
            while not self._stop.is_set():
                if (buffer := self._buffers.take()) is not None:
                    return buffer
                self._changed.wait()
        raise _StoppedError

    def _free(self, *buffers: memoryview) -> None:
        """Under the lock."""
        for buffer in buffers:
            self._buffers.give(buffer)
        self._changed.notify_all()

    def _pieces(
        self, part: Part, reader: Reader, into: Filling | Stream, bounds: tuple[int, int], may_leave: bool
    ) -> Iterator[int]:
        """What the origin gives, to the end; or less, where leaving is possible and the gate wants it."""
        with self._gate.connection(), contextlib.closing(reader.read(*bounds, into.space)) as counts:
            began_s = time.monotonic()
            came = Came(part.spec.path)
            for count in counts:
                came.add(count, time.monotonic() - began_s)
                with self._changed:
                    self._origin_bytes += count
                leave = self._gate.passed(count, may_leave)
                # With its pause: what is paced has to come in small pieces, or nobody sees how fast it is.
                part.piece_took(time.monotonic() - began_s)
                yield count
                if leave:
                    return
                began_s = time.monotonic()

    def _pause(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise _StoppedError

    def _count(self, done_bytes: int) -> None:
        with self._changed:
            self._done_bytes += done_bytes

    def _record(self, filling: Filling) -> None:
        """The chunk is in place. Whoever proves it gets its buffer, if that can be soon."""
        part, chunk, digest = filling.part, filling.chunk, filling.digest
        part.writeback.begin(*part.bounds(chunk))
        part.partial.record(f"{chunk} {digest}")
        with self._changed:
            part.recorded[chunk] = digest
            part.in_hand -= 1
            if filling.proves:
                part.proven, part.proving = part.proven + 1, False
            if not filling.proves and part.may_hold(chunk):
                part.held[chunk] = filling.buffer
                self._changed.notify_all()
            else:
                self._free(filling.buffer)

    # --- owners -----------------------------------------------------------------------------

    def _own_files(self) -> None:
        while (found := self._todo.take()) is not None:
            index, blob = found
            if blob is None:
                self._own(index)
            else:
                self._adopt(index, blob)
            self._check_priority()
        with self._changed:
            self._owners_left -= 1
            if self._owners_left == 0:
                self._finish()

    def _adopt(self, index: int, blob: Blob) -> None:
        """Another transfer brought this content, and the store has it."""
        spec = self._files[index]
        _check_size(spec.path, spec.size_bytes, blob)
        self._tensors[index] = self._tensors_of_committed(index, blob)
        self._blobs[index] = blob
        self._count(spec.size_bytes)

    def _own(self, index: int) -> None:
        spec = self._files[index]
        paths = part_paths(self._ingest_dir, index)
        # The page cache is for what is read soon; the rest of it others on this node need more.
        partial = Partial.open(*paths, spec.size_bytes, direct=not self._job.read_soon)
        writeback = Writeback(paths[0])
        reader = self._source.open(self._job.revision.ref, spec)
        part = Part.resume(index, spec, partial, writeback)
        with self._changed:
            self._done_bytes += part.recorded_bytes
            self._open.append((part, reader))
            self._open.sort(key=lambda opened: opened[0].index)
            self._changed.notify_all()
        try:
            blob = self._prove(part)
            self._tensors[index] = read_tensors(partial.read_into, spec.size_bytes, spec.path, index)
            partial.record(f"done {blob.sha256}")
            partial.seal()
        except (CachedError, FsyncFailed) as error:
            # Nobody may resume what is wrong, or cannot be read back.
            if isinstance(error, FsyncFailed) or _is_bad(error.problem):
                discard(self._ingest_dir, index)
            raise
        with self._changed:
            self._open.remove((part, reader))
        if not self._job.read_soon:
            partial.forget_cache()
        for resource in (reader, writeback, partial):
            resource.close()
        self._blobs[index] = blob
        self._sealed(index, blob)

    def _prove(self, part: Part) -> Blob:
        """Follow the downloaders, and prove what they did not."""
        refetched: Counter[int] = Counter()
        # Reused; what is never read back costs no memory, as it is never touched.
        view = memoryview(bytearray(READ_BACK_BYTES))
        synced_at_s = time.monotonic()
        while not part.is_proven:
            if self._may_prove(part):
                self._prove_next(part, refetched, view)
            if time.monotonic() - synced_at_s > SYNC_S:
                part.partial.sync()
                synced_at_s = time.monotonic()
        return part.finish()

    def _may_prove(self, part: Part) -> bool:
        """Wait until the next chunk is this thread's to prove; False after a while, or when all is proven."""
        with self._changed:
            while not part.is_proven:
                if self._stop.is_set():
                    raise _StoppedError
                if part.may_prove:
                    part.proving = True
                    return True
                if not self._changed.wait(SYNC_S):
                    break
        return False

    def _prove_next(self, part: Part, refetched: Counter[int], view: memoryview) -> None:
        """By what is in memory still, else by what the disk gives back; where that is wrong, the chunk is
        fetched again: a journal may claim what a power cut undid."""
        chunk = part.proven
        with self._changed:
            buffer = part.held.pop(chunk, None)
        if buffer is not None:
            part.proof.take(buffer[: part.size_of(chunk)])
        elif not part.read_back(chunk, view):
            refetched[chunk] += 1
            if refetched[chunk] > self._settings.attempts:
                raise _does_not_keep(part, chunk)
            with self._changed:
                part.proving = False
                self._done_bytes -= part.size_of(chunk)
                self._free(*part.give_back(chunk))
            return
        with self._changed:
            part.proven, part.proving = chunk + 1, False
            self._free(*([] if buffer is None else [buffer]))

    # --- the end ----------------------------------------------------------------------------

    def _tensors_of_committed(self, index: int, blob: Blob) -> tuple[Tensor, ...]:
        # The store's layout: ingest/<key> lies beside blobs/.
        path = self._ingest_dir.parents[1] / "blobs" / "sha256" / blob.sha256[:2] / blob.sha256
        shown = self._files[index].path
        if not shown.endswith(".safetensors"):
            return ()
        try:
            with path.open("rb", buffering=0) as file:
                return read_tensors(_reader_of(file.fileno()), blob.size_bytes, shown, index)
        except OSError as error:
            raise world_error(error, path) from error

    def _take_copies(self, copies: dict[int, int]) -> None:
        for index, first in copies.items():
            blob = self._blobs[first]
            assert blob is not None
            _check_size(self._files[index].path, self._files[index].size_bytes, blob)
            self._blobs[index] = blob
            self._done_bytes += blob.size_bytes
            tensors = self._tensors[first]
            self._tensors[index] = tuple(dataclasses.replace(tensor, file=index) for tensor in tensors)

    def _manifest(self) -> Manifest:
        files = []
        for spec, blob in zip(self._files, self._blobs, strict=True):
            assert blob is not None
            files.append(ManifestFile(spec.path, blob))
        tensors = tuple(tensor for index in sorted(self._tensors) for tensor in self._tensors[index])
        if len(tensors) > MAX_MANIFEST_TENSORS:
            raise permanent(
                ErrorKind.FAILED,
                "TOO_MANY_TENSORS",
                f"{self._job.revision.ref} has {len(tensors)} tensors; {MAX_MANIFEST_TENSORS} are the most",
                "split the model over several folders",
            )
        revision = self._job.revision
        name = artifact_id((file.path, file.blob.size_bytes, file.blob.sha256) for file in files)
        attested, commit = revision.attested, revision.commit
        return Manifest(name, revision.ref, revision.key, attested, tuple(files), tensors, commit)


def _reader_of(fd: int) -> Callable[[memoryview, int], int]:
    return lambda view, offset: os.preadv(fd, [view], offset)


def _check_size(path: str, size_bytes: int, blob: Blob) -> None:
    if blob.size_bytes != size_bytes:
        raise permanent(
            ErrorKind.DATA_LOSS,
            "SIZE_MISMATCH",
            f"{path} was listed with {size_bytes} bytes, and the content with the sha256 {blob.sha256} "
            f"has {blob.size_bytes}",
            "the origin's SHA256SUMS is wrong: write it anew",
        )


def _is_bad(problem: Problem) -> bool:
    return problem.kind is ErrorKind.DATA_LOSS or problem.reason == "STORE_IO"


def _does_not_keep(part: Part, chunk: int) -> CachedError:
    return permanent(
        ErrorKind.FAILED,
        "STORE_IO",
        f"{part.spec.path}: chunk {chunk} reads back other bytes than were written, again and again",
        "the disk or the memory of this node is broken: see the kernel's log",
    )
