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

from cached.config import TransferSettings
from cached.durable import FsyncFailed, Partial, world_error
from cached.fetch.kernel import Writeback, stand_back
from cached.fetch.pace import RateLimit, patiently
from cached.fetch.part import (
    Filling,
    Part,
    Proof,
    chunk_count,
    discard,
    part_paths,
    read_tensors,
)
from cached.fetch.wire import MAX_MANIFEST_TENSORS, FetchJob
from cached.model import (
    CHUNK_BYTES,
    Blob,
    CachedError,
    Digest,
    ErrorKind,
    Manifest,
    ManifestFile,
    Tensor,
    artifact_id,
    permanent,
)
from cached.sources import RangesIgnoredError, Reader, Source

BUFFER_BYTES = 256 * 1024
"""Larger buffered writes are sometimes ten times slower, and this still fits a core's cache."""
PROGRESS_S = 0.1


class _StoppedError(Exception):
    """Another thread failed or all is done: this one has nothing more to do."""


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
    ) -> None:
        """``sealed`` is called from any thread, one at a time for one file; ``advanced`` from ``run``'s."""
        assert len(job.have) == len(job.revision.files)
        self._job = job
        self._files = job.revision.files
        self._ingest_dir = Path(job.ingest_dir)
        self._source = source
        self._settings = settings
        self._sealed = sealed
        self._advanced = advanced
        self._limit = RateLimit(settings.rate_bytes_per_s)
        # One lock for everything below; it is held for moments, never while disk or origin are asked.
        self._changed = threading.Condition()
        self._todo: deque[int] = deque()
        self._open: list[tuple[Part, Reader]] = []
        self._blobs: list[Blob | None] = list(job.have)
        self._tensors: dict[int, tuple[Tensor, ...]] = {}
        self._done_bytes = 0
        self._origin_bytes = 0
        self._owners_left = 0
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
                self._todo.append(index)
                first[content] = index
        return copies

    def _start_threads(self) -> list[threading.Thread]:
        chunks = sum(chunk_count(self._files[index].size_bytes) for index in self._todo)
        self._owners_left = min(self._settings.connections, len(self._todo))
        if self._owners_left == 0:
            self._stop.set()
            return []
        jobs = [self._own_files] * self._owners_left
        jobs += [self._download] * min(self._settings.connections, chunks)
        threads = [threading.Thread(target=self._guarded, args=(job,), daemon=True) for job in jobs]
        for thread in threads:
            thread.start()
        return threads

    def _guarded(self, job: Callable[[memoryview], None]) -> None:
        if self._job.background:
            stand_back()
        try:
            job(memoryview(bytearray(BUFFER_BYTES)))
        except _StoppedError:
            pass
        except BaseException as error:  # whatever it is, run() raises it, and the process ends
            with self._changed:
                self._error = self._error or error
                self._finish()

    def _finish(self) -> None:
        self._stop.set()
        self._changed.notify_all()

    # --- downloaders ------------------------------------------------------------------------

    def _download(self, view: memoryview) -> None:
        while True:
            part, reader, chunks = self._take()
            if part.sequential:
                self._download_whole(part, reader, set(chunks), view)
            else:
                self._download_chunk(part, reader, chunks[0], view)

    def _take(self) -> tuple[Part, Reader, list[int]]:
        """The first chunk that nobody has in hand; of a file without ranges, all of them."""
        with self._changed:
            while not self._stop.is_set():
                for part, reader in self._open:
                    if not part.missing or part.streaming:
                        continue
                    taken = list(part.missing) if part.sequential else part.missing[:1]
                    part.streaming = part.sequential
                    del part.missing[: len(taken)]
                    return part, reader, taken
                self._changed.wait()
        raise _StoppedError

    def _download_chunk(self, part: Part, reader: Reader, chunk: int, view: memoryview) -> None:
        filling = Filling(part, chunk)
        start = filling.position

        def attempt() -> None:
            # Goes on where the attempt before broke off.
            for piece in self._pieces(reader, filling.position, filling.stop, view):
                filling.add(piece)
                self._count(len(piece))

        try:
            patiently(attempt, self._settings.attempts, self._pause)
        except RangesIgnoredError:
            self._count(start - filling.position)
            self._change_to_sequential(part, chunk)
        else:
            self._record(filling)

    def _change_to_sequential(self, part: Part, chunk: int) -> None:
        with self._changed:
            part.sequential = True
            part.give_back(chunk)
            self._changed.notify_all()

    def _download_whole(self, part: Part, reader: Reader, wanted: set[int], view: memoryview) -> None:
        def attempt() -> None:
            self._stream(part, reader, wanted, view)

        patiently(attempt, self._settings.attempts, self._pause)
        with self._changed:
            part.streaming = False
            self._changed.notify_all()

    def _stream(self, part: Part, reader: Reader, wanted: set[int], view: memoryview) -> None:
        """Read the file from its start, and write those chunks of it that are wanted.

        The others are in place or in another thread's hand, and must not be written beside it.
        """
        filling: Filling | None = None
        position = 0
        try:
            for piece in self._pieces(reader, 0, part.spec.size_bytes, view):
                while piece:
                    chunk = position // CHUNK_BYTES
                    head = piece[: part.bounds(chunk)[1] - position]
                    piece, position = piece[len(head) :], position + len(head)
                    if chunk not in wanted:
                        continue
                    filling = filling or Filling(part, chunk)
                    filling.add(head)
                    self._count(len(head))
                    if filling.position == filling.stop:
                        self._record(filling)
                        wanted.discard(chunk)
                        filling = None
                if not wanted and position < part.spec.size_bytes:
                    return
        finally:
            if filling is not None:
                self._count(part.bounds(filling.chunk)[0] - filling.position)

    def _pieces(self, reader: Reader, start: int, stop: int, view: memoryview) -> Iterator[memoryview]:
        with contextlib.closing(reader.read(start, stop, view)) as counts:
            for count in counts:
                self._origin_bytes_came(count)
                yield view[:count]

    def _origin_bytes_came(self, count: int) -> None:
        with self._changed:
            self._origin_bytes += count
        wait_s = self._limit.book(count, time.monotonic())
        if wait_s > 0 or self._stop.is_set():
            self._pause(wait_s)

    def _pause(self, seconds: float) -> None:
        if self._stop.wait(seconds):
            raise _StoppedError

    def _count(self, done_bytes: int) -> None:
        with self._changed:
            self._done_bytes += done_bytes

    def _record(self, filling: Filling) -> None:
        filling.part.record(filling.chunk, filling.digest)
        with self._changed:
            self._changed.notify_all()

    # --- owners -----------------------------------------------------------------------------

    def _own_files(self, view: memoryview) -> None:
        while not self._stop.is_set():
            with self._changed:
                if not self._todo:
                    self._owners_left -= 1
                    if self._owners_left == 0:
                        self._finish()
                    return
                index = self._todo.popleft()
            self._own(index, view)

    def _own(self, index: int, view: memoryview) -> None:
        spec = self._files[index]
        paths = part_paths(self._ingest_dir, index)
        partial = Partial.open(*paths, spec.size_bytes)
        writeback = Writeback(paths[0])
        reader = self._source.open(self._job.revision.ref, spec)
        part = Part.resume(index, spec, partial)
        with self._changed:
            self._done_bytes += part.recorded_bytes
            self._open.append((part, reader))
            self._open.sort(key=lambda opened: opened[0].index)
            self._changed.notify_all()
        try:
            blob = self._prove(part, writeback, view)
            self._tensors[index] = read_tensors(partial.read_into, spec.size_bytes, spec.path, index)
            partial.record(f"done {blob.sha256}")
            partial.seal()
        except (CachedError, FsyncFailed) as error:
            if isinstance(error, FsyncFailed) or error.problem.kind is ErrorKind.DATA_LOSS:
                discard(self._ingest_dir, index)
            raise
        with self._changed:
            self._open.remove((part, reader))
        if self._job.background:
            partial.forget_cache()
        for resource in (reader, writeback, partial):
            resource.close()
        self._blobs[index] = blob
        self._sealed(index, blob)

    def _prove(self, part: Part, writeback: Writeback, view: memoryview) -> Blob:
        proof = Proof(part, view)
        refetched: Counter[int] = Counter()
        chunk = 0
        while chunk < len(part.recorded):
            self._wait_for(part, chunk)
            if proof.take(chunk):
                writeback.begin(*part.bounds(chunk))
                chunk += 1
                continue
            # A journal may claim what a power cut undid; bytes fetched just now must read back the same.
            refetched[chunk] += 1
            if refetched[chunk] > self._settings.attempts:
                raise _does_not_keep(part, chunk)
            with self._changed:
                self._done_bytes -= part.size_of(chunk)
                part.give_back(chunk)
                self._changed.notify_all()
        return proof.finish()

    def _wait_for(self, part: Part, chunk: int) -> None:
        with self._changed:
            while part.recorded[chunk] is None:
                if self._stop.is_set():
                    raise _StoppedError
                self._changed.wait()

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
        return Manifest(name, revision.ref, revision.key, revision.attested, tuple(files), tensors)


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


def _does_not_keep(part: Part, chunk: int) -> CachedError:
    return permanent(
        ErrorKind.FAILED,
        "STORE_IO",
        f"{part.spec.path}: chunk {chunk} reads back other bytes than were written, again and again",
        "the disk or the memory of this node is broken: see the kernel's log",
    )
