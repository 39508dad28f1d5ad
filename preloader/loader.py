"""From disk to memory: opens an artifact's blobs, has memory hold them, proves every chunk, then announces.

Owns what is resident, which residents share which blob, and the order: locked or filled first, then proven,
then announced. Does what it is told and chooses nothing; a blob is held once whoever shares it, and what was
not proven to its last chunk does not stay.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cached.model import (
    CHUNK_BYTES,
    MAX_FILES,
    ArtifactId,
    Blob,
    CachedError,
    Digest,
    ErrorKind,
    Resident,
    artifact_id,
    is_digest,
    permanent,
    temporary,
)
from preloader.memory import Memory, Piece
from preloader.view import open_view

MAX_MANIFEST_BYTES = 256 * 1024 * 1024
LOOK_EVERY_S = 0.25
MAX_PROVERS = 4

OnProgress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


class LoadCancelled(Exception):
    """Whoever asked for the load no longer wants it; nothing of it stays."""


@dataclass(slots=True)
class _Held:
    """One blob in memory, for as many residents, loads and handoffs under way as ``users`` says."""

    blob: Blob
    name: str
    piece: Piece
    users: int = 1
    proven: bool = False


@dataclass(frozen=True, slots=True)
class _Chunk:
    held: _Held
    index: int

    @property
    def offset(self) -> int:
        return self.index * CHUNK_BYTES

    @property
    def size_bytes(self) -> int:
        return min(CHUNK_BYTES, self.held.blob.size_bytes - self.offset)


class Loader:
    """The residents of one device. Every method may be called from any thread; one load runs at a time."""

    def __init__(self, data_dir: Path, memory: Memory) -> None:
        self._data_dir = data_dir
        self._memory = memory
        self._loading = threading.Lock()
        self._changed = threading.Condition()  # guards what follows
        self._version = 0
        self._held: dict[Digest, _Held] = {}
        self._residents: dict[ArtifactId, tuple[Digest, ...]] = {}

    # --- asked ------------------------------------------------------------------------------

    def residents(self) -> tuple[Resident, ...]:
        with self._changed:
            return tuple(self._resident(artifact) for artifact in self._residents)

    def write_protected(self) -> bool:
        """Whether every blob that is held was opened so that nobody can write to it."""
        with self._changed:
            return all(held.piece.write_protected for held in self._held.values())

    def wait_for_change(self, seen: int, timeout_s: float) -> int:
        """The version of what is resident, once it differs from ``seen`` or the time is up."""
        with self._changed:
            self._changed.wait_for(lambda: self._version != seen, timeout_s)
            return self._version

    def descriptors(self, artifact: ArtifactId) -> tuple[int, ...]:
        """A duplicate of each distinct blob's descriptor, in the manifest's order; the caller closes them.

        What is not locked is proven again first. Raises CachedError: NOT_FOUND where it is not resident,
        DATA_LOSS where it is no longer what it was; then it is resident no more.
        """
        with self._changed:
            if artifact not in self._residents:
                raise _not_resident(artifact)
            digests = self._residents[artifact]
            helds = [self._use(digest) for digest in digests]
        try:
            self._prove_unlocked(artifact, helds)
            return _duplicates([held.piece.fd for held in helds])
        finally:
            self._let_go(digests)

    # --- told -------------------------------------------------------------------------------

    def load(self, artifact: ArtifactId, on_progress: OnProgress, cancel: threading.Event) -> Resident:
        """Make an artifact resident; harmless where it is already.

        Raises LoadCancelled once ``cancel`` is set, CachedError otherwise: NOT_FOUND (no such artifact),
        DATA_LOSS (the file, the chunk and both values), NO_ROOM (the arithmetic). Nothing stays unless it
        returns.
        """
        self._take_turn(cancel)
        try:
            with self._changed:
                if artifact in self._residents:
                    return self._resident(artifact)
            try:
                return self._attempt(artifact, on_progress, cancel)
            except CachedError as error:
                if error.problem.reason != "CHARGED_ELSEWHERE":
                    raise
            # Now memory knows which pages to have given up and read again on our own account.
            return self._attempt(artifact, on_progress, cancel)
        finally:
            self._loading.release()

    def release(self, artifact: ArtifactId) -> bool:
        """Give back what no other resident shares. False where it was not resident."""
        with self._changed:
            digests = self._residents.pop(artifact, None)
            if digests is None:
                return False
            self._announce()
        self._let_go(digests)
        return True

    # --- one load -----------------------------------------------------------------------------

    def _take_turn(self, cancel: threading.Event) -> None:
        while not self._loading.acquire(timeout=LOOK_EVERY_S):
            if cancel.is_set():
                raise LoadCancelled

    def _attempt(self, artifact: ArtifactId, on_progress: OnProgress, cancel: threading.Event) -> Resident:
        helds: list[_Held] = []
        try:
            with open_view(self._data_dir) as view:
                for blob, name in self._admitted(view, artifact):
                    helds.append(self._hold(view, blob, name))
            self._prove(helds, on_progress, cancel)
            self._memory.audit()
            return self._commit(artifact, helds, cancel)
        except BaseException:
            self._let_go(tuple(held.blob.sha256 for held in helds))
            raise

    def _admitted(self, view: int, artifact: ArtifactId) -> list[tuple[Blob, str]]:
        """Each distinct blob with the name of its first file, once memory has room for those that are new."""
        named: dict[Digest, tuple[Blob, str]] = {}
        for name, blob in _parse_manifest(_read_manifest(view, artifact), artifact):
            named.setdefault(blob.sha256, (blob, name))
        with self._changed:
            new_bytes = sum(b.size_bytes for d, (b, _) in named.items() if d not in self._held)
        self._memory.admit(new_bytes)
        return list(named.values())

    def _hold(self, view: int, blob: Blob, name: str) -> _Held:
        # Only loads add to what is held, and there is one at a time: what is absent here stays absent.
        with self._changed:
            if blob.sha256 in self._held:
                return self._use(blob.sha256)
        held = _Held(blob, name, self._memory.hold(blob, _open_blob(view, blob, name)))
        with self._changed:
            self._held[blob.sha256] = held
        return held

    def _commit(self, artifact: ArtifactId, helds: list[_Held], cancel: threading.Event) -> Resident:
        with self._changed:
            if cancel.is_set():
                raise LoadCancelled
            for held in [h for h in helds if not h.proven]:
                held.piece.keep()
                held.proven = True
            self._residents[artifact] = tuple(held.blob.sha256 for held in helds)
            self._announce()
            return self._resident(artifact)

    # --- proving ------------------------------------------------------------------------------

    def _prove(self, helds: list[_Held], on_progress: OnProgress, cancel: threading.Event) -> None:
        """Fill and prove every chunk that is not known to stand, looking after the load meanwhile."""
        fresh = [held for held in helds if not (held.proven and held.piece.locked)]
        total = sum(held.blob.size_bytes for held in helds)
        work = _Work(fresh, total - sum(held.blob.size_bytes for held in fresh))
        with ThreadPoolExecutor(_provers(), "prove") as pool:
            futures = [pool.submit(work.run) for _ in range(_provers())]
            try:
                while not _all_done(futures):
                    on_progress(work.done_bytes, total)
                    self._memory.audit()
                    if cancel.is_set():
                        raise LoadCancelled
            finally:
                work.stop()  # the pool then ends within a chunk, before anything is given back
        on_progress(total, total)

    def _prove_unlocked(self, artifact: ArtifactId, helds: list[_Held]) -> None:
        loose = [held for held in helds if not held.piece.locked]
        if not loose:
            return
        work = _Work(loose, 0)
        try:
            with ThreadPoolExecutor(_provers(), "prove") as pool:
                for future in [pool.submit(work.run) for _ in range(_provers())]:
                    future.result()
        except CachedError:
            self.release(artifact)
            raise

    # --- what is held (all but _let_go with the condition taken) ----------------------------------

    def _resident(self, artifact: ArtifactId) -> Resident:
        helds = [self._held[digest] for digest in self._residents[artifact]]
        size_bytes = sum(held.blob.size_bytes for held in helds)
        return Resident(artifact, size_bytes, all(held.piece.locked for held in helds))

    def _announce(self) -> None:
        self._version += 1
        self._changed.notify_all()

    def _use(self, digest: Digest) -> _Held:
        held = self._held[digest]
        held.users += 1
        return held

    def _let_go(self, digests: tuple[Digest, ...]) -> None:
        with self._changed:
            for digest in digests:
                self._held[digest].users -= 1
            unused = [self._held.pop(digest) for digest in digests if not self._held[digest].users]
            for held in unused:
                held.piece.close()


class _Work:
    """Chunks to fill and prove, for several threads, until none is left, one is wrong, or it is stopped."""

    def __init__(self, helds: list[_Held], done_bytes: int) -> None:
        self.done_bytes = done_bytes
        self._lock = threading.Lock()
        self._chunks: Iterator[_Chunk] = (_Chunk(h, i) for h in helds for i in range(len(h.blob.chunks)))

    def run(self) -> None:
        """One thread's part. Raises CachedError (DATA_LOSS) for what is wrong or cannot be read."""
        try:
            while (chunk := self._next()) is not None:
                _prove_chunk(chunk)
                with self._lock:
                    self.done_bytes += chunk.size_bytes
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        with self._lock:
            self._chunks = iter(())

    def _next(self) -> _Chunk | None:
        with self._lock:
            return next(self._chunks, None)


def _prove_chunk(chunk: _Chunk) -> None:
    piece, blob = chunk.held.piece, chunk.held.blob
    try:
        piece.fill(chunk.offset, chunk.size_bytes)
        found = piece.digest(chunk.offset, chunk.size_bytes)
    except OSError as error:
        raise _lost("BLOB_UNREADABLE", chunk.held.name, blob, f"cannot be read: {error.strerror}") from error
    wanted = blob.chunks[chunk.index]
    if found != wanted:
        where = f"chunk {chunk.index} (bytes {chunk.offset} to {chunk.offset + chunk.size_bytes})"
        what = f"{where} has xxh3_128 {found} where {wanted} was proven"
        raise _lost("CHUNK_MISMATCH", chunk.held.name, blob, what)


def _provers() -> int:
    return min(MAX_PROVERS, os.cpu_count() or 1)


def _all_done(futures: list[Future[None]]) -> bool:
    """Wait a moment for the threads. Raises what one of them raised."""
    done, running = wait(futures, LOOK_EVERY_S, FIRST_EXCEPTION)
    for future in done:
        future.result()
    return not running


def _duplicates(fds: list[int]) -> tuple[int, ...]:
    copies: list[int] = []
    try:
        for fd in fds:
            copies.append(os.dup(fd))
    except OSError as error:
        for copy in copies:
            os.close(copy)
        raise temporary(
            "TOO_MANY_FILES",
            f"{len(fds)} descriptors cannot be duplicated: {error.strerror}",
            "raise the preloader's limit on open files (RLIMIT_NOFILE)",
            retry_after_s=5.0,
        ) from error
    return tuple(copies)


# --- reading the store ---------------------------------------------------------------------------


def _read_manifest(view: int, artifact: ArtifactId) -> bytes:
    name = f"artifacts/{artifact.removeprefix('sha256:')}.json"
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=view)
    except FileNotFoundError as error:
        raise permanent(
            ErrorKind.NOT_FOUND,
            "NO_ARTIFACT",
            f"the store has no artifact {artifact}",
            "fetch it first; daemon and preloader need the same --data-dir",
        ) from error
    except OSError as error:
        raise _denied(name, error) from error
    with os.fdopen(fd, "rb") as file:
        data = file.read(MAX_MANIFEST_BYTES + 1)
    if len(data) > MAX_MANIFEST_BYTES:
        raise _bad_manifest(artifact, f"it is larger than {MAX_MANIFEST_BYTES} bytes")
    return data


def _parse_manifest(data: bytes, artifact: ArtifactId) -> list[tuple[str, Blob]]:
    """(path, blob) of every file. Raises CachedError (DATA_LOSS) unless it is this artifact's manifest."""
    try:
        files = [_parse_file(entry) for entry in json.loads(data)["files"][: MAX_FILES + 1]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _bad_manifest(artifact, f"it is malformed ({error!r})") from error
    found = artifact_id((path, blob.size_bytes, blob.sha256) for path, blob in files)
    if len(files) > MAX_FILES or found != artifact:
        raise _bad_manifest(artifact, f"its files make up {found}")
    return files


def _parse_file(entry: dict[str, Any]) -> tuple[str, Blob]:
    blob = entry["blob"]
    parsed = Blob(Digest(blob["sha256"]), int(blob["size_bytes"]), tuple(map(str, blob["chunks"])))
    if not is_digest(parsed.sha256) or len(parsed.chunks) != -(-parsed.size_bytes // CHUNK_BYTES):
        raise ValueError(f"a file of {parsed.size_bytes} bytes with {len(parsed.chunks)} chunk digests")
    return str(entry["path"]), parsed


def _open_blob(view: int, blob: Blob, name: str) -> int:
    """The blob's descriptor, read-only, once it was seen to have the right size."""
    path = f"blobs/sha256/{blob.sha256[:2]}/{blob.sha256}"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=view)
    except FileNotFoundError as error:
        raise _lost("BLOB_MISSING", name, blob, "is not in the store") from error
    except OSError as error:
        raise _denied(path, error) from error
    size_bytes = os.fstat(fd).st_size
    if size_bytes != blob.size_bytes:
        os.close(fd)
        raise _lost("BLOB_SIZE", name, blob, f"has {size_bytes} bytes where {blob.size_bytes} were proven")
    return fd


def _lost(reason: str, name: str, blob: Blob, what: str) -> CachedError:
    hint = "the daemon quarantines it and fetches it anew; look at the disk's health"
    return permanent(ErrorKind.DATA_LOSS, reason, f"{name} (blob {blob.sha256}) {what}", hint)


def _bad_manifest(artifact: ArtifactId, why: str) -> CachedError:
    hint = "restart the daemon, which takes it down and fetches it anew"
    return permanent(ErrorKind.DATA_LOSS, "BAD_MANIFEST", f"the manifest of {artifact}: {why}", hint)


def _denied(path: str, error: OSError) -> CachedError:
    hint = "run the preloader as a user that may read the store, with enough open files allowed"
    return permanent(ErrorKind.DENIED, "STORE_DENIED", f"{path} cannot be opened: {error.strerror}", hint)


def _not_resident(artifact: ArtifactId) -> CachedError:
    return permanent(ErrorKind.NOT_FOUND, "NOT_RESIDENT", f"{artifact} is not resident", "load it first")
