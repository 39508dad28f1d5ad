"""Carries the planner's actions out, and turns their outcomes into events.

Owns the tasks of resolutions, transfers, evictions and loads, and the meters of what moves.
Decides nothing; an outcome is never logged and forgotten, it becomes an event.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Callable
from typing import assert_never

import structlog

from cached.fetch import FetchJob, FetchPool, Mismatch
from cached.metrics import Metrics, Outcome
from cached.model import (
    DISK,
    ArtifactId,
    Blob,
    CachedError,
    Claim,
    ClaimId,
    ClaimKind,
    Device,
    Digest,
    ErrorKind,
    Manifest,
    Note,
    Phase,
    Problem,
    Ref,
    Revision,
    RevisionKey,
    note_of,
    temporary,
)
from cached.node.capacity import Capacity
from cached.node.core import Core
from cached.node.disk import Disk
from cached.node.meter import Meter
from cached.plan import is_read_soon
from cached.plan import types as t
from cached.standby import Standby, is_gpu
from cached.store import Store

BUSY_TRIES = 20
BUSY_PAUSE_S = 0.5
RELEASE_TRIES = 10
HELD_PAUSE_S = 1.0
"""Between two looks whether a GPU's memory, which somebody still has mapped, is free by now."""
USE_EVERY_S = 1.0
MEASURED_BYTES = 8 * 1024 * 1024
"""What comes in less says more about the way to an origin than about its rate."""

log = structlog.get_logger("cached.node")


class Effects:
    """What the node does. ``core`` and ``capacity`` are set once they exist: they know each other."""

    core: Core
    capacity: Capacity

    def __init__(self, store: Store, disk: Disk, pool: FetchPool, metrics: Metrics) -> None:
        self._store = store
        self._disk = disk
        self._pool = pool
        self._metrics = metrics
        self.standbys: dict[Device, Standby] = {}
        self.fetching: dict[RevisionKey, Meter] = {}
        self.loading: dict[tuple[Device, ArtifactId], Meter] = {}
        self._fetches: dict[RevisionKey, asyncio.Task[None]] = {}
        self._loads: dict[tuple[Device, ArtifactId], asyncio.Task[None]] = {}
        self._committing: set[RevisionKey] = set()
        self._background: dict[RevisionKey, bool] = {}
        self.durable: set[ClaimId] = set()
        self._using: dict[ArtifactId, bool] = {}
        self.origin_bytes = 0

    def start(self, action: t.Action) -> None:
        """Begin an action; its outcome comes back as an event."""
        match action:
            case t.Resolve(ref):
                self.core.spawn(self._resolve(ref), f"resolve {ref}")
            case t.Fetch(revision, background):
                self._background[revision.key] = background
                task = self.core.spawn(self._fetch(revision), f"fetch {revision.ref}")
                self._fetches[revision.key] = task
            case t.Rank(key, background):
                self._background[key] = background  # it may not have begun yet
                self._pool.set_background(key, background)
            case t.StopFetch(key):
                self._stop_fetch(key)
            case t.Discard(key, drop):
                self.core.spawn(self._discard(key, drop), f"discard {key}")
            case t.Evict(artifact, drop, why):
                self.core.spawn(self._evict(artifact, drop, why), f"evict {artifact}")
            case t.Quarantine():
                self.core.spawn(self._quarantine(action), f"quarantine {action.digest}")
            case t.Purge(aside, why):
                self.core.spawn(self._purge(aside, why), f"purge {aside}")
            case t.Load(device, artifact):
                task = self.core.spawn(self._load(device, artifact), f"load {artifact} on {device}")
                self._loads[device, artifact] = task
            case t.Release(device, artifact, why):
                self.core.spawn(self._release(device, artifact, why), f"release {artifact} from {device}")
            case t.Place(claim, device):
                log.info("a copy is placed", claim=claim, device=device)
            case t.Unplace(claim, device, why):
                log.info("a copy moves away", claim=claim, device=device, why=why)
            case t.CannotFetch(_, problem) | t.CannotLoad(_, _, problem):
                self._tell(problem)
            case t.Grant(claim):
                self._granted(claim)
            case t.Refuse(claim, problem):
                self.core.answer(claim, problem)
                self.core.spawn(self.forget_claim(claim), f"refuse {claim}")
            case t.Expire(claim):
                log.info("a lease's time is up", lease=claim)
                self.core.spawn(self.forget_claim(claim), f"expire {claim}")
            case t.Refresh(ref):
                self.core.post(t.ClaimMade(refresh_claim(ref, DISK)))
            case _:
                assert_never(action)

    def _stop_fetch(self, key: RevisionKey) -> None:
        if key not in self.fetching:
            # A task that is cancelled before its first step never runs, and would never say that it ended.
            self._fetches.pop(key).cancel()
            self._background.pop(key, None)
            self.core.post(t.FetchStopped(key))
        elif key not in self._committing:
            self._fetches[key].cancel()

    def _tell(self, problem: Problem, **ids: str) -> None:
        self._metrics.problem(problem.reason)
        log.warning(problem.message, reason=problem.reason, hint=problem.hint, **ids)

    # --- resolution and transfer ------------------------------------------------------------

    async def _resolve(self, ref: Ref) -> None:
        began = time.monotonic()
        try:
            revision = await self._pool.resolve(ref)
        except CachedError as error:
            self._tell(error.problem, ref=ref)
            self.core.post(t.ResolveFailed(ref, error.problem))
            return
        self._metrics.phase_took("resolve", time.monotonic() - began)
        known = self.core.state.proven.get(revision.key)
        self.core.post(t.Resolved(revision))
        if known is not None:
            rate = self.core.state.artifacts[known].rate_bytes_per_s
            await self._note(note_of(revision, known, time.time(), rate))

    async def _note(self, note: Note) -> None:
        """Write down what a ref resolved to. No promise: where that fails, the origin is asked again."""
        try:
            await self._disk.call(self._store.put_note, note)
        except CachedError as error:
            self._tell(error.problem, ref=note.ref)

    async def _fetch(self, revision: Revision) -> None:
        key, began = revision.key, time.monotonic()
        self.fetching[key] = Meter(Phase.FETCHING, revision.size_bytes, began)
        self._metrics.set_transfers_in_progress(len(self.fetching))
        outcome: Outcome = "failed"
        try:
            await self._transfer(revision, self._background[key])
            outcome = "done"
            self._metrics.phase_took("fetch", time.monotonic() - began)
        except asyncio.CancelledError:
            outcome = "cancelled"
            self.core.post(t.FetchStopped(key))
        except CachedError as error:
            outcome = "failed" if error.problem.temporary else "refused"
            self._tell(error.problem, ref=revision.ref, revision=key)
            self.core.post(t.FetchFailed(key, error.problem))
        finally:
            self.fetching.pop(key)
            self._fetches.pop(key, None)
            self._background.pop(key, None)
            self._committing.discard(key)
            self._metrics.transfer_ended(outcome)
            self._metrics.set_transfers_in_progress(len(self.fetching))

    async def _transfer(self, revision: Revision, background: bool) -> None:
        key = revision.key
        log.info("fetching", ref=revision.ref, revision=key, size_bytes=revision.size_bytes)

        async def committed(index: int, blob: Blob) -> None:
            await self._disk.call(self._store.commit_blob, key, index, blob)

        began, came_bytes, progress = time.monotonic(), 0, self._progress(key)

        def advanced(done_bytes: int, origin_bytes: int) -> None:
            nonlocal came_bytes
            came_bytes = origin_bytes
            progress(done_bytes, origin_bytes)

        with self._pool.enlist(revision, background):
            ingest = await self._disk.call(self._store.begin_fetch, revision, time.time())
            self.core.post(*(t.Quarantined((), (), aside) for aside in ingest.asides))
            read_soon = is_read_soon(self.core.state, key)
            job = FetchJob(revision, str(ingest.directory), ingest.have, background, read_soon)
            manifest = await self._pool.fetch(job, advanced, committed)
        rate = rate_of(came_bytes, time.monotonic() - began)
        # From here the artifact will be there: stopping now would only make the facts harder to tell.
        self._committing.add(key)
        now = time.time()
        artifact = await self._disk.call(self._store.commit_artifact, manifest, revision, now, rate)
        note = note_of(revision, artifact.id, now, rate)
        log.info("proven", ref=revision.ref, artifact=artifact.id, size_bytes=artifact.size_bytes)
        self.core.post(t.Fetched(key, artifact, note))
        self.capacity.poke()

    def _progress(self, key: RevisionKey) -> Callable[[int, int], None]:
        meter, seen_bytes = self.fetching[key], 0

        def update(done_bytes: int, origin_bytes: int) -> None:
            nonlocal seen_bytes
            meter.update(done_bytes, time.monotonic())
            self._metrics.received(origin_bytes - seen_bytes)
            self.origin_bytes += origin_bytes - seen_bytes
            seen_bytes = origin_bytes

        return update

    # --- taking down ------------------------------------------------------------------------

    async def _evict(self, artifact: ArtifactId, drop: tuple[Digest, ...], why: str) -> None:
        size_bytes = self.core.state.artifacts[artifact].artifact.size_bytes
        log.info("evicting", artifact=artifact, size_bytes=size_bytes, why=why)
        await self._disk.call(self._store.evict, artifact, drop)
        self._metrics.evicted(size_bytes)
        self.core.post(t.Evicted(artifact))
        self.capacity.poke()

    async def _discard(self, key: RevisionKey, drop: tuple[Digest, ...]) -> None:
        # A worker that was just killed may not have let go of its file yet.
        for _ in range(BUSY_TRIES):
            try:
                await self._disk.call(self._store.discard, key, drop)
                break
            except CachedError as error:
                if not error.problem.temporary:
                    raise
                await asyncio.sleep(BUSY_PAUSE_S)
        else:
            raise RuntimeError(f"the leftovers of {key} are still being written to by an unknown process")
        log.info("discarded leftovers", revision=key)
        self.core.post(t.Discarded(key))
        self.capacity.poke()

    async def _quarantine(self, action: t.Quarantine) -> None:
        log.error("corrupt content", digest=action.digest, reason=action.reason, artifacts=action.artifacts)
        down = await self._disk.call(
            self._store.quarantine, action.artifacts, action.digest, action.reason, time.time()
        )
        self._metrics.quarantined()
        # All that went with the content, also what was committed since it was planned.
        self.core.post(t.Quarantined(down.artifacts, down.leftovers, down.aside))
        self.capacity.poke()

    async def _purge(self, aside: str, why: str) -> None:
        size_bytes = self.core.state.asides[aside].size_bytes
        log.warning("removing quarantined content", name=aside, size_bytes=size_bytes, why=why)
        await self._disk.call(self._store.purge, aside)
        self.core.post(t.Purged(aside))
        self.capacity.poke()

    # --- devices ----------------------------------------------------------------------------

    async def _load(self, device: Device, artifact: ArtifactId) -> None:
        spot, began = (device, artifact), time.monotonic()
        known = self.core.state.artifacts[artifact].artifact
        size_bytes = sum(size for _, size in known.images) if is_gpu(device) else known.size_bytes
        meter = self.loading[spot] = Meter(Phase.LOADING, size_bytes, began)
        outcome: Outcome = "failed"
        try:
            standby = self._standby(device)
            resident = await standby.load(artifact, lambda done, _: meter.update(done, time.monotonic()))
            await self._keep(standby, artifact)
            outcome = "done"
            self._metrics.phase_took("load", time.monotonic() - began)
            log.info("resident", artifact=artifact, device=device, locked=resident.locked)
            self.core.post(t.Loaded(device, resident))
        except CachedError as error:
            outcome = "failed" if error.problem.temporary else "refused"
            self._tell(error.problem, artifact=artifact, device=device)
            if error.problem.kind is ErrorKind.DATA_LOSS:
                await self._prove_suspect(artifact)
            self.core.post(t.LoadFailed(device, artifact, error.problem))
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        finally:
            self.loading.pop(spot)
            self._loads.pop(spot, None)
            self._metrics.load_ended(device, outcome)

    async def _keep(self, standby: Standby, artifact: ArtifactId) -> None:
        """Have duplicates of what was loaded; without them it does not stand for us, and may take no room."""
        try:
            await standby.descriptors(artifact)
        except CachedError:
            with contextlib.suppress(CachedError):
                await standby.release(artifact)
            raise

    async def _prove_suspect(self, artifact: ArtifactId) -> None:
        """See whether the disk is wrong too. A proof that breaks off says nothing."""
        try:
            await self.prove(artifact, lambda _: None)
        except CachedError as error:
            self._tell(error.problem, artifact=artifact)

    def _standby(self, device: Device) -> Standby:
        """Raises CachedError where it went away after the load was planned, which the planner learns next."""
        standby = self.standbys.get(device)
        if standby is None:
            hint = "see that the preloader runs with the same run directory"
            raise temporary("STANDBY_GONE", f"the standby for {device} is gone", hint, BUSY_PAUSE_S)
        return standby

    async def stop_loads(self, device: Device) -> None:
        """A standby is gone: what it was loading is too."""
        tasks = [task for spot, task in self._loads.items() if spot[0] == device]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _release(self, device: Device, artifact: ArtifactId, why: str) -> None:
        log.info("releasing", artifact=artifact, device=device, why=why)
        standby, tries, told = self.standbys.get(device), 0, ""
        while standby is not None and self.standbys.get(device) is standby:
            try:
                await standby.release(artifact)
                standby.forget(artifact)
                self.core.post(t.Released(device, artifact))
                return
            except CachedError as error:
                problem, tries = error.problem, tries + 1
            if problem.reason != told:
                told = problem.reason
                self._tell(problem, artifact=artifact, device=device)
            if is_gpu(device):
                # However long somebody has it mapped, or the device is ill: it is not free, and shown so.
                self.core.post(t.HeldOutside(device, artifact, problem))
                await asyncio.sleep(HELD_PAUSE_S)
            elif tries < RELEASE_TRIES:
                await asyncio.sleep(BUSY_PAUSE_S)
            else:
                raise RuntimeError(f"the standby of {device} does not release {artifact}")
        # Its end was an event, and took every residency along; a successor's are not meant.

    # --- claims -----------------------------------------------------------------------------

    def _granted(self, claim_id: ClaimId) -> None:
        claim = self.core.state.claims.get(claim_id)
        self.core.answer(claim_id)
        if claim is None:  # a prefetch: it ends with its proof
            self.core.spawn(self.forget_claim(claim_id), f"forget {claim_id}")
        elif claim.artifact is not None:
            self.used(claim.artifact)

    def used(self, artifact: ArtifactId) -> None:
        """Write down that it was in use until now: at once, and then now and then, for nobody waits for it,
        and all that want the disk's thread would wait behind it."""
        begun = artifact in self._using
        self._using[artifact] = True
        if not begun:
            self.core.spawn(self._use(artifact), f"use {artifact}")

    async def _use(self, artifact: ArtifactId) -> None:
        """No promise: where that fails, it counts as colder."""
        while self._using[artifact]:
            self._using[artifact] = False
            try:
                await self._disk.call(self._store.touch, artifact, time.time())
            except CachedError as error:
                self._tell(error.problem, artifact=artifact)
            await asyncio.sleep(USE_EVERY_S)
        del self._using[artifact]

    async def promise(self, claim: Claim) -> None:
        """Write a claim down; once this returns, it survives everything."""
        self.durable.add(claim.id)
        await self._disk.call(self._store.put_claim, claim)

    async def forget_claim(self, claim_id: ClaimId) -> None:
        """Remove a claim's record, if it has one."""
        if claim_id in self.durable:
            self.durable.discard(claim_id)
            await self._disk.call(self._store.delete_claim, claim_id)

    # --- proving ----------------------------------------------------------------------------

    async def prove(self, artifact: ArtifactId, on_progress: Callable[[int], None]) -> str | None:
        """Read every byte of an artifact again. Returns what differed; that is an event as well.

        None too for what is taken down meanwhile: a file that is missing for that reason is not corrupt.
        """
        try:
            manifest = await self._disk.call(self._store.manifest, artifact)
            wrong = await self._wrong_in(manifest, on_progress)
        except CachedError:
            if self.core.state.is_verified(artifact):
                raise
            return None
        if not self.core.state.is_verified(artifact):
            return None
        names = {f.blob.sha256: f.path for f in manifest.files}
        for mismatch in wrong:
            reason = f"{names[mismatch.digest]} of {manifest.ref}: {mismatch.reason}"
            self.core.post(t.Corrupt(mismatch.digest, reason))
        return "; ".join(f"{names[m.digest]}: {m.reason}" for m in wrong) or None

    async def _wrong_in(self, manifest: Manifest, on_progress: Callable[[int], None]) -> tuple[Mismatch, ...]:
        """What differs, twice: it may have been evicted and fetched again while it was read."""
        # Through the tree: what is read is what a replica would open.
        tree = self._store.tree_path(manifest.id)
        once = {f.blob.sha256: f for f in manifest.files}
        files = {d: (str(tree / f.path), d, f.blob.size_bytes) for d, f in once.items()}
        wrong = await self._pool.verify(tuple(files.values()), on_progress)
        if wrong:
            wrong = await self._pool.verify(tuple(files[m.digest] for m in wrong), lambda _: None)
        return wrong


def rate_of(came_bytes: int, took_s: float) -> float:
    """Bytes per second that an origin gave; 0 where that cannot be told."""
    return came_bytes / took_s if came_bytes >= MEASURED_BYTES and took_s > 0 else 0.0


def refresh_claim(ref: Ref, device: Device) -> Claim:
    """A claim that only asks the origin again and brings what is new; it does not survive a restart."""
    name = ClaimId(f"refresh-{uuid.uuid4().hex}")
    return Claim(name, ClaimKind.PREFETCH, ref, device, time.time(), fresh=True)
