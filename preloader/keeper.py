"""What stands on one GPU: the descriptors of its memory, and which artifacts they make up.

Owns the sealed blocks and their index, the filler's life, and the account of memory that was given back but
is not free yet. Never calls the driver: the filler makes, fills and proves memory and hands its descriptors
over; whatever becomes of the filler, what was sealed stays. Does what it is told and chooses nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from cached.fds import FramingError
from cached.model import (
    ArtifactId,
    CachedError,
    Device,
    Digest,
    ErrorKind,
    Gpu,
    Inventory,
    Resident,
    permanent,
    temporary,
)
from preloader import log as logs
from preloader.filling import Filler, FillerDied
from preloader.layout import Laid, Layout, bad_layout, laid, read_layout, write_layout
from preloader.standing import ANYBODY, NOBODY, LoadCancelled, OnProgress, close_all, duplicates, not_resident

ATTEMPTS = 2
TURN_EVERY_S = 0.25
PROOF_TURN_S = 120.0
RELEASE_WAIT_S = 10.0
CLOSE_TURN_S = 5.0
TOLD_BYTES = 16 * 1024 * 1024
"""Changes of free memory below this are not worth telling."""
MOST_SLACK_BYTES = 64 * 1024 * 1024
PROVEN_LATER = {"GPU_OUT_OF_MEMORY", "GPU_NOT_READY", "FILLER_DIED", "FILLER_STUCK", "TOO_MANY_FILES"}
"""Why a proof of what was adopted could not be made; any other reason speaks of the memory."""
NEVER = threading.Event()
T = TypeVar("T")

log = logging.getLogger("preloader")


@dataclass(slots=True)
class _Blob:
    """Sealed memory, for as many residents, loads and proofs as ``users`` says. ``uid`` was given it last."""

    laid: Laid
    descriptors: tuple[int, ...]
    uid: int = NOBODY
    users: int = 0


@dataclass(slots=True)
class _Outside:
    """Memory that was given back: the device is still to report ``left_bytes`` of it free."""

    artifact: ArtifactId
    left_bytes: int
    slack_bytes: int


@dataclass(frozen=True, slots=True)
class _Held:
    layout: Layout
    layout_fd: int

    @property
    def digests(self) -> tuple[Digest, ...]:
        return tuple(blob.sha256 for blob in self.layout.blobs)


class Keeper:
    """The residents of one GPU or MIG instance. Every method may be called from any thread."""

    def __init__(
        self,
        device: Device,
        filler: Filler,
        gpu: Gpu,
        used_bytes: int,
        node: int | None = None,
        release_wait_s: float = RELEASE_WAIT_S,
    ) -> None:
        self._device = device
        self._filler = filler
        self._working = threading.Lock()  # who has it, has the filler
        self._changed = threading.Condition()  # guards what follows
        self._version = 0
        self._gpu = self._told = gpu
        self._used_bytes = used_bytes
        self._node = node  # its owner closes it, not before ``close``
        self._release_wait_s = release_wait_s
        self._ended = False
        self._samples = self._known_from = 0
        self._blobs: dict[Digest, _Blob] = {}
        self._residents: dict[ArtifactId, _Held] = {}
        self._outside: list[_Outside] = []

    # --- asked --------------------------------------------------------------------------------

    def inventory(self) -> Inventory:
        with self._changed:
            return Inventory(
                device=self._device,
                pid=os.getpid(),
                limit_bytes=self._gpu.total_bytes,
                can_lock=True,
                cannot_lock_reason="",
                write_protected=True,  # of the store nothing is handed out here
                residents=tuple(_resident(held) for held in self._residents.values()),
                gpu=self._gpu,
            )

    def wait_for_change(self, seen: int, timeout_s: float) -> int:
        with self._changed:
            self._changed.wait_for(lambda: self._version != seen, timeout_s)
            return self._version

    def descriptors(self, artifact: ArtifactId, uid: int) -> tuple[int, tuple[int, ...]]:
        """Who was given it last, and duplicates: layout, blocks of the first blob, of the second, ….

        What another uid was given could have been written to, so it is copied back and proven first; NOBODY
        is no other. Raises CachedError: NOT_FOUND, GPU_UNFIT, DATA_LOSS (then it is resident no more).
        """
        with self._changed:
            foreign = self._foreign(self._standing(artifact), uid)
            if foreign is None:
                return self._handed(artifact, uid)
        with self._turn(PROOF_TURN_S):
            self._prove(foreign)
            with self._changed:
                return self._handed(artifact, uid)

    def _handed(self, artifact: ArtifactId, uid: int) -> tuple[int, tuple[int, ...]]:
        held = self._standing(artifact)
        blobs = [self._blobs[digest] for digest in held.digests]
        copies = duplicates([held.layout_fd, *(fd for blob in blobs for fd in blob.descriptors)])
        for blob in blobs if uid != NOBODY else ():
            blob.uid = uid
        given = {blob.uid for blob in blobs} - {NOBODY} or {NOBODY}
        return given.pop() if len(given) == 1 else ANYBODY, copies

    def node(self) -> int | None:
        """A duplicate of the device's node: its memory lives no longer than somebody has that open."""
        with self._changed:
            return None if self._node is None else duplicates([self._node])[0]

    # --- told ---------------------------------------------------------------------------------

    def load(self, artifact: ArtifactId, on_progress: OnProgress, cancel: threading.Event) -> Resident:
        """Make an artifact resident; harmless where it is already.

        Raises LoadCancelled once ``cancel`` is set, CachedError for what the filler refuses, and GPU_UNFIT,
        FILLER_DIED or TOO_MANY_FILES. Nothing new stays unless it returns.
        """
        with self._turn(cancel=cancel):
            with self._changed:
                self._check_fit()
                if artifact in self._residents:
                    return _resident(self._residents[artifact])
            return self._filled(artifact, on_progress, cancel)

    def release(self, artifact: ArtifactId) -> bool:
        """Give back what no other resident shares, and wait until the device reports it free.

        Raises CachedError (temporary, HELD_OUTSIDE) where somebody still has it mapped after a while; asked
        again, it waits again.
        """
        with self._changed:
            self._await(lambda: self._samples >= self._known_from)
            was_resident = artifact in self._residents
            self._drop([artifact] if was_resident else [])
            self._await(lambda: not self._left_bytes(artifact))
            left_bytes = self._left_bytes(artifact)
        if left_bytes:
            raise temporary(
                "HELD_OUTSIDE",
                f"{left_bytes} bytes of {artifact} were given back and are not free on {self._device} yet",
                "a process that was handed it still has it mapped; it is free once that process ends",
                retry_after_s=5.0,
            )
        return was_resident

    def _await(self, happens: Callable[[], bool]) -> None:
        """For a while, with the condition taken; a process that ends does not wait for it."""
        self._changed.wait_for(lambda: self._ended or happens(), self._release_wait_s)

    def adopt(self, artifact: ArtifactId, uid: int, descriptors: list[int]) -> None:
        """Take back a resident whose descriptors the daemon kept; harmless where it is resident already.

        It is copied back and proven: the driver frees memory whose device no process had open for a moment,
        and the descriptors still look valid. Where a proof cannot be had now, it is made before anybody gets
        the memory. Raises CachedError: INVALID, GPU_UNFIT, DATA_LOSS.
        """
        with contextlib.ExitStack() as unused:
            for fd in descriptors:
                unused.callback(os.close, fd)
            layout = self._adoptable(artifact, descriptors)
            with self._turn(PROOF_TURN_S):
                with self._changed:
                    self._check_fit()
                    if artifact in self._residents:
                        return
                    fresh = self._taken(layout, descriptors[1:])
                try:
                    self._adopted(layout, uid, fresh)
                finally:
                    with self._changed:
                        self._let_go(fresh)

    def update(self, gpu: Gpu, used_bytes: int) -> None:
        """What the device reports now. An unfit one holds nothing any more."""
        self._filler.reap()
        with self._changed:
            freed_bytes, self._used_bytes = self._used_bytes - used_bytes, used_bytes
            self._samples += 1
            self._account(max(0, freed_bytes))
            self._gpu = replace(gpu, outside_bytes=self._left_bytes())
            if gpu.unfit_reason:
                self._drop(list(self._residents))
            if _worth_telling(self._told, self._gpu):
                self._announce()
            self._changed.notify_all()

    def close(self) -> None:
        """The device is gone, or this process ends: nothing stands here any more."""
        with self._changed:
            self._ended = True
            self._node = None
            self._gpu = replace(self._gpu, unfit_reason="its standby has ended")
            self._drop(list(self._residents))
            self._announce()
        self._filler.kill()
        # Not here: where the driver does not let go of it, that takes long.
        threading.Thread(target=self._end_filler, name="end filler", daemon=True).start()

    def _end_filler(self) -> None:
        if self._working.acquire(timeout=CLOSE_TURN_S):  # whoever has it looks often whether to go on
            self._filler.end()

    @contextlib.contextmanager
    def _turn(self, most_s: float = float("inf"), cancel: threading.Event | None = None) -> Iterator[None]:
        deadline = time.monotonic() + most_s
        while not self._working.acquire(timeout=TURN_EVERY_S):
            self._check_going(cancel or NEVER)
            if time.monotonic() > deadline:
                why = f"{self._device} was busy with a load for {most_s:.0f} s"
                raise temporary("GPU_BUSY", why, "try again when the load is done", retry_after_s=5.0)
        try:
            yield
        finally:
            self._working.release()

    # --- one load -----------------------------------------------------------------------------

    def _filled(self, artifact: ArtifactId, on_progress: OnProgress, cancel: threading.Event) -> Resident:
        fresh: set[Digest] = set()

        def heard(message: dict[str, Any], descriptors: list[int]) -> None:
            if "sealed" in message:
                self._sealed(message["sealed"], descriptors, fresh)
            else:
                on_progress(*message["progress"])

        def attempt() -> Resident:
            with self._changed:
                job = {"do": "load", "id": artifact, "have": sorted(self._blobs)}
            done = self._filler.run(job, (), heard, lambda: self._check_going(cancel))
            return self._commit(artifact, done, cancel)

        try:
            return self._survived(attempt)
        finally:
            with self._changed:
                self._let_go(fresh)

    def _sealed(self, entry: Any, descriptors: list[int], fresh: set[Digest]) -> None:
        blob = laid(entry)
        with self._changed:
            if blob.sha256 in self._blobs or len(descriptors) != len(blob.blocks):
                close_all(descriptors)
                raise FramingError(f"{len(descriptors)} descriptors came for blob {blob.sha256}")
            self._blobs[blob.sha256] = _Blob(blob, tuple(descriptors), users=1)
            fresh.add(blob.sha256)

    def _commit(self, artifact: ArtifactId, done: dict[str, Any], cancel: threading.Event) -> Resident:
        with self._changed:
            self._check_going(cancel)
            if not all(digest in self._blobs for digest in done["blobs"]):
                raise FillerDied("what it relied on was released meanwhile")
            return self._keep(artifact, int(done["granularity"]), done["blobs"])

    def _survived(self, attempt: Callable[[], T]) -> T:
        """What it returns, also where the filler dies of it once; what was sealed by then stays."""
        for again in reversed(range(ATTEMPTS)):
            try:
                return attempt()
            except FillerDied as died:
                log.warning("filler ended", extra=logs.fields(device=self._device, why=str(died)))
                if not again or died.again_in_s:
                    raise self._filler_died(died) from died
        raise AssertionError("the last attempt returns or raises")

    # --- proofs -------------------------------------------------------------------------------

    def _prove(self, layout: Layout) -> None:
        """Copy its blobs back and compare; where one is not what it was, what shares it is resident no more.

        Raises CachedError (DATA_LOSS, or that it could not be done).
        """
        digests = tuple(blob.sha256 for blob in layout.blobs)
        with self._changed:
            if not all(digest in self._blobs for digest in digests):
                raise not_resident(layout.artifact)  # any more
            descriptors = tuple(fd for digest in digests for fd in self._use(digest).descriptors)
        job = {"do": "prove", "layout": layout.words()}
        try:
            self._survived(lambda: self._filler.run(job, descriptors, _unheard, self._check_fit))
        except CachedError as error:
            if error.problem.kind is ErrorKind.DATA_LOSS:
                self._withdraw(set(digests), error)
            raise
        finally:
            with self._changed:
                self._let_go(digests)

    def _withdraw(self, digests: set[Digest], error: CachedError) -> None:
        with self._changed:
            lost = [artifact for artifact, held in self._residents.items() if digests & set(held.digests)]
            self._drop(lost)
        said = logs.fields(device=self._device, artifacts=lost, why=error.problem.message)
        log.error("memory is not what it was", extra=said)

    def _filler_died(self, died: FillerDied) -> CachedError:
        return temporary(
            "FILLER_DIED",
            f"the process that fills {self._device} ended before it was done: {died}",
            "its last words are in the preloader's log; look at the driver and at the memory of the host",
            retry_after_s=max(1.0, died.again_in_s),
        )

    # --- adoption -----------------------------------------------------------------------------

    def _adoptable(self, artifact: ArtifactId, descriptors: list[int]) -> Layout:
        if not descriptors:
            raise bad_layout("it did not come")
        layout = read_layout(descriptors[0])
        wanted = 1 + sum(len(blob.blocks) for blob in layout.blobs)
        if (layout.artifact, layout.device) != (artifact, self._device):
            raise bad_layout(f"it is of {layout.artifact} on {layout.device}")
        if len(descriptors) != wanted:
            raise bad_layout(f"{len(descriptors)} descriptors came with it, not {wanted}")
        return layout

    def _taken(self, layout: Layout, descriptors: list[int]) -> set[Digest]:
        """Index its blobs with duplicates; of one that is here already, the first stays."""
        copies = iter(duplicates(descriptors))
        fresh: set[Digest] = set()
        for blob in layout.blobs:
            own = tuple(next(copies) for _ in blob.blocks)
            if blob.sha256 in self._blobs:
                close_all(own)
                continue
            self._blobs[blob.sha256] = _Blob(blob, own, uid=ANYBODY, users=1)
            fresh.add(blob.sha256)
        return fresh

    def _adopted(self, layout: Layout, uid: int, fresh: set[Digest]) -> None:
        new = tuple(blob for blob in layout.blobs if blob.sha256 in fresh)
        proven = self._could_prove(replace(layout, blobs=new)) if new else True
        with self._changed:
            self._check_fit()
            for digest in (blob.sha256 for blob in layout.blobs):
                blob = self._blobs[digest]
                if digest not in fresh:
                    blob.uid = _both(blob.uid, uid)
                elif proven:
                    blob.uid = uid
            self._keep(layout.artifact, layout.granularity_bytes, [blob.sha256 for blob in layout.blobs])

    def _could_prove(self, layout: Layout) -> bool:
        try:
            self._prove(layout)
        except CachedError as error:
            if error.problem.reason not in PROVEN_LATER:
                raise self._lost(layout, error) from error
            said = logs.fields(artifact=layout.artifact, reason=error.problem.reason)
            log.warning("adopted without a proof, which is made before it is handed out", extra=said)
            return False
        return True

    def _lost(self, layout: Layout, error: CachedError) -> CachedError:
        self._check_fit()
        return permanent(
            ErrorKind.DATA_LOSS,
            "GPU_MEMORY_LOST",
            f"what was kept of {layout.artifact} is not on {self._device} any more: {error.problem.message}",
            "it is loaded anew; with persistence mode, memory outlasts a preloader that was killed",
        )

    # --- what is held (all with the condition taken) ------------------------------------------------

    def _check_fit(self) -> None:
        with self._changed:
            if self._gpu.unfit_reason:
                raise temporary(
                    "GPU_UNFIT",
                    f"{self._device} is unfit: {self._gpu.unfit_reason}",
                    "see dmesg and nvidia-smi -q; after a reset of the GPU, or for an XID once the preloader "
                    "was started anew, it is used again",
                    retry_after_s=30.0,
                )

    def _check_going(self, cancel: threading.Event) -> None:
        if cancel.is_set():
            raise LoadCancelled
        self._check_fit()

    def _standing(self, artifact: ArtifactId) -> _Held:
        self._check_fit()
        if artifact not in self._residents:
            raise not_resident(artifact)
        return self._residents[artifact]

    def _foreign(self, held: _Held, uid: int) -> Layout | None:
        """What of it another uid than this one was given, if anything."""
        blobs = tuple(b for b in held.layout.blobs if self._blobs[b.sha256].uid not in (NOBODY, uid))
        return replace(held.layout, blobs=blobs) if blobs and uid != NOBODY else None

    def _keep(self, artifact: ArtifactId, granularity_bytes: int, digests: Sequence[Digest]) -> Resident:
        blobs = tuple(self._blobs[digest].laid for digest in digests)
        layout = Layout(artifact, self._device, granularity_bytes, blobs)
        self._residents[artifact] = held = _Held(layout, write_layout(layout))
        for digest in digests:
            self._use(digest)
        self._known_from = self._samples + 2  # the next sample may have been taken before this
        self._announce()
        return _resident(held)

    def _drop(self, artifacts: list[ArtifactId]) -> None:
        for artifact in artifacts:
            held = self._residents.pop(artifact)
            os.close(held.layout_fd)
            freed_bytes = self._let_go(held.digests)
            if freed_bytes:
                slack_bytes = min(MOST_SLACK_BYTES, freed_bytes // 8)
                self._outside.append(_Outside(artifact, freed_bytes, slack_bytes))
        if artifacts:
            self._announce()

    def _use(self, digest: Digest) -> _Blob:
        blob = self._blobs[digest]
        blob.users += 1
        return blob

    def _let_go(self, digests: Iterable[Digest]) -> int:
        """Close what nobody uses any more; the bytes of it."""
        freed_bytes = 0
        for digest in digests:
            blob = self._blobs[digest]
            blob.users -= 1
            if not blob.users:
                del self._blobs[digest]
                close_all(blob.descriptors)
                freed_bytes += blob.laid.size_bytes
        return freed_bytes

    def _announce(self) -> None:
        self._gpu = self._told = replace(self._gpu, outside_bytes=self._left_bytes())
        self._version += 1
        self._changed.notify_all()

    # --- memory that was given back -------------------------------------------------------------

    def _left_bytes(self, artifact: ArtifactId | None = None) -> int:
        return sum(o.left_bytes for o in self._outside if artifact in (None, o.artifact))

    def _account(self, freed_bytes: int) -> None:
        """Each drop of what is used counts for one release, in their order; and what was given back can be
        no more than what is used and not held here."""
        self._settle(freed_bytes)
        held_bytes = sum(blob.laid.size_bytes for blob in self._blobs.values())
        self._settle(self._left_bytes() - max(0, self._used_bytes - held_bytes))

    def _settle(self, freed_bytes: int) -> None:
        for outside in self._outside:
            settled_bytes = max(0, min(freed_bytes, outside.left_bytes))
            outside.left_bytes -= settled_bytes
            freed_bytes -= settled_bytes
        self._outside = [o for o in self._outside if o.left_bytes > o.slack_bytes]


def _resident(held: _Held) -> Resident:
    return Resident(held.layout.artifact, sum(blob.size_bytes for blob in held.layout.blobs), True)


def _both(given: int, uid: int) -> int:
    """Who has been given a blob that two were adopted with."""
    if uid in (NOBODY, given):
        return given
    return uid if given == NOBODY else ANYBODY


def _worth_telling(told: Gpu, now: Gpu) -> bool:
    if abs(told.free_bytes - now.free_bytes) >= TOLD_BYTES:
        return True
    return replace(told, free_bytes=0) != replace(now, free_bytes=0)


def _unheard(message: dict[str, Any], descriptors: list[int]) -> None:
    close_all(descriptors)
