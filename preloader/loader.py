"""From disk to host memory: has an artifact's blobs held there, has every chunk proven, then announces.

Owns what is resident, which residents share which blob, and the order: locked or filled first, then proven,
then announced. Does what it is told and chooses nothing; a blob is held once whoever shares it, and what was
not proven to its last chunk does not stay.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cached.model import (
    ArtifactId,
    Blob,
    CachedError,
    Digest,
    ErrorKind,
    Inventory,
    Resident,
    permanent,
)
from preloader.artifact import Content, open_blob, read_contents
from preloader.memory import Piece
from preloader.memory.host import HostMemory
from preloader.proving import LOOK_EVERY_S, Chunk, Work
from preloader.standing import (
    LoadCancelled,
    OnProgress,
    close_all,
    duplicates,
    not_resident,
)
from preloader.view import can_protect, open_view


@dataclass(slots=True)
class _Held:
    """One blob in memory, for as many residents, loads and handoffs under way as ``users`` says."""

    blob: Blob
    name: str
    piece: Piece
    users: int = 1
    proven: bool = False


class Loader:
    """The residents of the host. Every method may be called from any thread; one load runs at a time."""

    def __init__(self, data_dir: Path, memory: HostMemory) -> None:
        self._data_dir = data_dir
        self._memory = memory
        self._loading = threading.Lock()
        self._changed = threading.Condition()  # guards what follows
        self._version = 0
        self._held: dict[Digest, _Held] = {}
        self._residents: dict[ArtifactId, tuple[Digest, ...]] = {}

    # --- asked ------------------------------------------------------------------------------

    def inventory(self) -> Inventory:
        why_not = self._memory.cannot_lock_reason
        return Inventory(
            device=self._memory.device,
            pid=os.getpid(),
            limit_bytes=self._memory.limit_bytes(),
            can_lock=not why_not,
            cannot_lock_reason=why_not,
            write_protected=self.write_protected() and can_protect(self._data_dir),
            residents=self.residents(),
        )

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

    def descriptors(self, artifact: ArtifactId, uid: int) -> tuple[int, tuple[int, ...]]:
        """``uid``, and a duplicate of each distinct blob's descriptor, in the manifest's order; the caller
        closes them. Whoever has them can change nothing, so the uid makes no difference.

        What is not locked is proven again first. Raises CachedError: NOT_FOUND where it is not resident,
        DATA_LOSS where it is no longer what it was; then it is resident no more.
        """
        with self._changed:
            if artifact not in self._residents:
                raise not_resident(artifact)
            digests = self._residents[artifact]
            helds = [self._use(digest) for digest in digests]
        try:
            self._prove_unlocked(artifact, helds)
            return uid, duplicates([fd for held in helds for fd in held.piece.fds])
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

    def node(self) -> None:
        """There is none: the pages are files' own."""

    def adopt(self, artifact: ArtifactId, uid: int, descriptors: list[int]) -> None:
        """Never: the store has it, and the page cache too. Raises CachedError (PRECONDITION)."""
        close_all(descriptors)
        raise permanent(
            ErrorKind.PRECONDITION,
            "NOT_ADOPTED",
            f"{self._memory.device} takes no descriptors back",
            "have it loaded: its pages are locked and proven again without reading the disk",
        )

    # --- one load -----------------------------------------------------------------------------

    def _take_turn(self, cancel: threading.Event) -> None:
        while not self._loading.acquire(timeout=LOOK_EVERY_S):
            if cancel.is_set():
                raise LoadCancelled

    def _attempt(self, artifact: ArtifactId, on_progress: OnProgress, cancel: threading.Event) -> Resident:
        helds: list[_Held] = []
        try:
            with open_view(self._data_dir) as view:
                for content in self._admitted(view, artifact):
                    helds.append(self._hold(view, content.blob, content.name))
            self._prove(helds, on_progress, cancel)
            self._memory.audit()
            return self._commit(artifact, helds, cancel)
        except BaseException:
            self._let_go(tuple(held.blob.sha256 for held in helds))
            raise

    def _admitted(self, view: int, artifact: ArtifactId) -> list[Content]:
        """Each distinct content, once memory has room for those that are new."""
        contents = read_contents(view, artifact)
        blobs = [content.blob for content in contents]
        with self._changed:
            new_bytes = sum(blob.size_bytes for blob in blobs if blob.sha256 not in self._held)
        self._memory.admit(new_bytes)
        return contents

    def _hold(self, view: int, blob: Blob, name: str) -> _Held:
        # Only loads add to what is held, and there is one at a time: what is absent here stays absent.
        with self._changed:
            if blob.sha256 in self._held:
                return self._use(blob.sha256)
        held = _Held(blob, name, self._memory.hold(blob, open_blob(view, blob, name)))
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
        work = Work(_chunks(fresh), total - sum(held.blob.size_bytes for held in fresh))

        def look() -> None:
            on_progress(work.done_bytes, total)
            self._memory.audit()
            if cancel.is_set():
                raise LoadCancelled

        work.run(look)
        on_progress(total, total)

    def _prove_unlocked(self, artifact: ArtifactId, helds: list[_Held]) -> None:
        loose = [held for held in helds if not held.piece.locked]
        if not loose:
            return
        try:
            Work(_chunks(loose)).run()
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


def _chunks(helds: list[_Held]) -> Iterator[Chunk]:
    return (Chunk(h.piece, h.blob, h.name, i) for h in helds for i in range(len(h.blob.chunks)))
