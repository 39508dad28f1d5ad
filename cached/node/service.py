"""What can be asked of a node: acquire, prefetch, pin, evict, verify, look.

Owns the lives of claims from their making to their end. It is the face that ``api``,
``handoff`` and ``web`` see. Decides nothing about content: claims go to the planner.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from cached.config import Settings, source_for
from cached.durable import Fs
from cached.fetch import FetchPool
from cached.handoff import Package
from cached.leases import Leases
from cached.metrics import Metrics
from cached.model import (
    DISK,
    ArtifactId,
    CachedError,
    Claim,
    ClaimId,
    ClaimKind,
    Device,
    ErrorKind,
    Holder,
    Phase,
    Progress,
    Ref,
    Room,
    permanent,
)
from cached.node.capacity import Capacity
from cached.node.claimed import ClaimedGpus
from cached.node.core import Core
from cached.node.devices import meant, one_device, one_gpu
from cached.node.disk import Disk
from cached.node.effects import Effects, refresh_claim
from cached.node.grants import Granted, Grants, check_ttl
from cached.node.pins import Pins, pin_of, pins_of_file
from cached.node.pressure import Pressure, own_group
from cached.node.scrub import Scrubber
from cached.node.standbys import Standbys
from cached.node.views import ModelView, PlaceView, Views, waiting_for
from cached.plan import STANDBY_WAIT_S, State, access_problem, evict_problem
from cached.plan import types as t
from cached.store import Scan, Store

PROGRESS_EVERY_S = 0.25
METRICS_EVERY_S = 1.0
CALM_WAIT_S = 600.0
"""The most that the scrubber waits before a piece, for a node that is under pressure."""
PRESSURE_EVERY_S = 1.0
EVICT_WAIT_S = 60.0

log = structlog.get_logger("cached.node")


@dataclass(frozen=True, slots=True)
class Proof:
    """One artifact, read again. ``reason`` says what differed, None if nothing did."""

    artifact: ArtifactId
    ref: Ref
    size_bytes: int
    reason: str | None


class Node:
    """One node's cache. Made by the composition root, within a running event loop."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        pool: FetchPool,
        metrics: Metrics,
        fs: Fs,
        config_file: str = "",
    ) -> None:
        self._settings = settings
        self._store = store
        self._pool = pool
        self._metrics = metrics
        self._disk = Disk(lambda error: self._core.fail(error))
        self._effects = Effects(store, self._disk, pool, metrics)
        self._core = Core(State(settings.transfer.workers, rules=_rules(settings)), self._effects.start)
        self._effects.core = self._core
        self._capacity = Capacity(settings.store, store, self._disk, self._core, metrics)
        self._effects.capacity = self._capacity
        self._scrubber = Scrubber(settings.store, store, self._disk, pool, self._core, metrics, self._calm)
        run_dir = Path(settings.run_dir)
        self._leases = Leases(run_dir / "leases", fs)
        self._grants = Grants(self._core, self._effects, store, self._disk, self._leases)
        self._standbys = Standbys(run_dir, self._core, self._effects, metrics, settings.standby)
        self._claimed = ClaimedGpus(settings.standby.pod_resources, self._core, metrics)
        self._pins = Pins(self._core, self._effects, config_file)
        group = own_group(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
        self.pressure = Pressure(settings.pressure, own_dir=group)
        self._began = time.monotonic()
        self._recovered = False

    # --- life -------------------------------------------------------------------------------

    async def start(self) -> None:
        """Recover what is on disk and in replicas' hands, then begin to plan."""
        scan = await self._disk.call(self._store.scan, time.time())
        leases = self._leases.restore(lambda words: log.error(words))
        self._report(scan)
        self._effects.durable.update(claim.id for claim in scan.claims)
        await self._capacity.measure()
        self._core.post(
            t.Recovered(
                scan.artifacts,
                scan.notes,
                (*scan.claims, *pins_of_file(self._settings.pin), *leases),
                tuple(i.revision for i in scan.ingests),
                scan.asides,
                {i.revision.key: i.ran_at for i in scan.ingests},
            )
        )
        self._recovered = True
        self._core.spawn(self._core.run(), "core")
        self._core.spawn(self._standbys.run(), "standbys")
        if self._settings.standby.pod_resources != "":
            self._core.spawn(self._claimed.run(), "claimed GPUs")
        self._core.spawn(self._grants.run(), "leases")
        self._core.spawn(self._capacity.run(), "capacity")
        self._core.spawn(self._scrubber.run(), "scrubber")
        self._core.spawn(self._measure(), "metrics")
        self._core.spawn(self._heed_pressure(), "pressure")

    def _report(self, scan: Scan) -> None:
        for words in scan.problems:
            log.error(words)
        for gone in scan.quarantined:
            log.error(
                "corrupt content found at start", artifact=gone.artifact, ref=gone.ref, reason=gone.reason
            )
            self._metrics.quarantined()

    async def failed(self) -> None:
        """Waits until the node cannot go on, and raises why."""
        await asyncio.shield(self._core.failed)

    async def close(self) -> None:
        """Park: stop moving, keep everything. Leases and residents live on."""
        await self._core.stop()
        for standby in self._effects.standbys.values():
            await standby.close()
        await self._pool.close()
        self._leases.close()
        await asyncio.get_running_loop().run_in_executor(None, self._disk.close)

    async def _measure(self) -> None:
        while True:
            counts = self.counts()
            self._metrics.set_claims(
                leases=counts[ClaimKind.LEASE],
                pins=counts[ClaimKind.PIN],
                prefetches=counts[ClaimKind.PREFETCH],
            )
            disk, asides = self._core.state.disk, self._core.state.asides.values()
            self._metrics.set_over_capacity(max(0, disk.ledger.used_bytes - disk.capacity_bytes))
            self._metrics.set_quarantine(sum(aside.size_bytes for aside in asides))
            for place in self.places():
                if place.connected:
                    self._metrics.set_device(
                        place.device, place.used_bytes, place.capacity_bytes, place.artifacts
                    )
                if place.gpu is not None:
                    gpu = place.gpu
                    unfit = bool(gpu.unfit_reason)
                    self._metrics.set_gpu(place.device, gpu.free_bytes, gpu.outside_bytes, unfit)
            await asyncio.sleep(METRICS_EVERY_S)

    async def _heed_pressure(self) -> None:
        if not self.pressure.available():
            log.warning(
                "the kernel does not tell of pressure (PSI): background work does not stand back for it"
            )
            return
        while True:
            before = self.pressure.background_share()
            self.pressure.look(time.monotonic())
            share = self.pressure.background_share()
            if share != before:
                log.info("background work goes at another speed", share=share)
            self._metrics.set_background_share(share)
            self._pool.set_background_share(share)
            await asyncio.sleep(PRESSURE_EVERY_S)

    async def _calm(self) -> None:
        """Until nothing presses, but not for ever: a node that is always busy is read again, too."""
        until = time.monotonic() + CALM_WAIT_S
        while self.pressure.background_share() < 1.0 and time.monotonic() < until:
            await asyncio.sleep(PRESSURE_EVERY_S)

    # --- acquire ----------------------------------------------------------------------------

    def check_access(self, ref: Ref, fresh: bool, by_operator: bool) -> None:
        """Raises CachedError (DENIED) where the ref's ``[[source]]`` table does not let it be had: by a
        replica what operators did not bring, by anybody what no digest vouches for where one has to."""
        source = source_for(self._settings.source, ref)
        access = t.Access(
            source.prefix, source.access == "operators" and not by_operator, source.require_digest
        )
        problem = access_problem(self._core.state, ref, fresh, access)
        if problem is not None:
            raise CachedError(problem)

    async def acquire(
        self,
        ref: Ref,
        device: Device,
        holder: Holder,
        fresh: bool,
        ttl_s: int | None,
        keep: bool,
        prefers: tuple[Device, ...] = (),
        room: Room | None = None,
    ) -> AsyncGenerator[Progress | Granted]:
        """Claim, wait, grant. ``keep`` False waits only; ``ttl_s`` makes a lease that ends by itself.

        ``prefers`` and ``room`` are a claim's. Closing the iterator before it has granted ends the claim.
        """
        if ttl_s is not None:
            check_ttl(ttl_s)
        if room is not None:
            room = replace(room, device=await self._meant(one_gpu, room.device))
        claim = self._new_claim(ClaimKind.LEASE, ref, await self._meant(one_device, device), fresh, holder)
        claim = replace(claim, prefers=tuple(self._known(prefers)), room=room)
        began, warm = time.monotonic(), any(self._is_warm(ref, d) for d in (claim.device, *claim.prefers))
        granted = False
        try:
            async with contextlib.aclosing(self._wait(claim)) as waiting:
                async for progress in waiting:
                    yield progress
            self._metrics.acquired(warm)
            self._metrics.phase_took("total", time.monotonic() - began)
            view = Views(self._core.state).unclaimed(ref)
            grant = await self._grants.grant(claim.id, view, ttl_s, keep)
            granted = True
            if not grant.token:  # else "handed out" follows
                artifact = grant.model.artifact
                log.info("granted", lease=claim.id, ref=ref, artifact=artifact, device=grant.device)
            yield grant
        finally:
            if not granted or not keep:
                self._core.end(claim.id)

    async def _meant(self, means: Callable[[State, Device], Device], device: Device) -> Device:
        """What a device's name means. A daemon that has just begun is given the time to find its GPUs."""
        while True:
            try:
                return means(self._core.state, device)
            except CachedError as error:
                young = self.uptime_s < STANDBY_WAIT_S and error.problem.kind is ErrorKind.NOT_FOUND
                if not young:
                    raise
            await asyncio.sleep(PROGRESS_EVERY_S)

    def _known(self, devices: tuple[Device, ...]) -> Iterator[Device]:
        """Each as it is named here; of what is only preferred, a number that nothing has yet is left out."""
        for device in devices:
            try:
                yield one_device(self._core.state, device)
            except CachedError as error:
                if error.problem.kind is not ErrorKind.NOT_FOUND:
                    raise

    def _is_warm(self, ref: Ref, device: Device) -> bool:
        note = self._core.state.notes.get(ref)
        return note is not None and (device == DISK or self._core.state.is_resident(device, note.artifact))

    async def _wait(self, claim: Claim) -> AsyncGenerator[Progress]:
        """Progress until the claim is granted. Raises the CachedError that refuses it."""
        future = self._core.claim(claim)
        self._core.turn(time.time())  # what stands there already is granted here and now
        shown: Progress | None = None
        while True:
            if future.done() or (await asyncio.wait([future], timeout=PROGRESS_EVERY_S))[0]:
                future.result()
                return
            progress = self._progress(claim.id)
            if progress is not None and progress != shown:
                shown = progress
                yield progress

    def _progress(self, claim_id: ClaimId) -> Progress | None:
        claim = self._core.state.claims.get(claim_id)
        if claim is None:
            return None
        meter = self._effects.fetching.get(claim.revision) if claim.revision and not claim.artifact else None
        if claim.artifact is not None:
            meter = self._effects.loading.get((claim.device, claim.artifact))
        return meter.progress() if meter is not None else waiting_for(self._core.state, claim)

    async def redeem(self, token: str, uid: int) -> Package:
        """The handoff for a grant's token, once; see Grants.redeem."""
        return await self._grants.redeem(token, uid)

    async def renew(self, lease: ClaimId, ttl_s: int) -> float:
        """Prolong a TTL lease; returns when it now ends (Unix s)."""
        return await self._grants.renew(lease, ttl_s)

    async def release(self, lease: ClaimId) -> None:
        """End a TTL lease."""
        await self._grants.release(lease)

    def holder_ready(self, lease: ClaimId) -> None:
        """The lease's holder has what memory it needs. Harmless where it holds nothing."""
        self._core.post(t.HolderReady(lease))

    # --- operators --------------------------------------------------------------------------

    async def prefetch(self, ref: Ref, wait: bool) -> AsyncGenerator[Progress | ModelView]:
        """Fetch and prove, also if nobody waits any more; leaves no claim behind."""
        self._core.check_room()
        claim = self._new_claim(ClaimKind.PREFETCH, ref, DISK, fresh=True)
        await self._effects.promise(claim)
        self._core.post(t.ClaimMade(claim))
        async with contextlib.aclosing(self._until_there(ref, DISK, wait)) as steps:
            async for step in steps:
                yield step

    async def pin(
        self,
        ref: Ref,
        device: Device,
        wait: bool,
        copies: int = 1,
        priority: int = 0,
        unclaimed: bool = False,
    ) -> AsyncGenerator[Progress | ModelView]:
        """Keep there until unpinned. What is here already is kept from this moment; the origin is asked
        beside that for what is newer."""
        device = await self._meant(meant, device)
        await self._pins.make(pin_of(ref, device, copies, priority, unclaimed))
        async with contextlib.aclosing(self._once_kept(ref, device, wait)) as steps:
            async for step in steps:
                yield step

    async def swap(
        self, out: Ref, ref: Ref, device: Device, wait: bool
    ) -> AsyncGenerator[Progress | ModelView]:
        """Pin ``ref`` on a device and unpin ``out`` there, as one plan. Before it is here nothing is changed:
        with ``wait`` it is fetched first, else refused."""
        device = await self._meant(one_device, device)
        if ref not in self._core.state.notes:
            if not wait:
                raise _not_swapped(ref)
            async with contextlib.aclosing(self._until_there(ref, DISK, wait)) as steps:
                async for step in steps:
                    if isinstance(step, Progress):
                        yield step
        await self._pins.swap(out, pin_of(ref, device))
        async with contextlib.aclosing(self._once_kept(ref, device, wait)) as steps:
            async for step in steps:
                yield step

    async def _once_kept(self, ref: Ref, device: Device, wait: bool) -> AsyncGenerator[Progress | ModelView]:
        if not wait:
            self._core.post(t.ClaimMade(refresh_claim(ref, DISK)))
        async with contextlib.aclosing(self._until_there(ref, device, wait)) as steps:
            async for step in steps:
                yield step

    async def _until_there(
        self, ref: Ref, device: Device, wait: bool
    ) -> AsyncGenerator[Progress | ModelView]:
        if wait:
            claim = self._new_claim(ClaimKind.LEASE, ref, device, fresh=True)
            try:
                async for progress in self._wait(claim):
                    yield progress
            finally:
                self._core.end(claim.id)
        self._core.turn(time.time())
        yield self.model(ref)

    async def unpin(self, ref: Ref) -> int:
        """Ends the ref's pins, but for the configuration file's; returns how many there were."""
        return await self._pins.end(ref)

    async def evict(self, text: str) -> tuple[ArtifactId, int]:
        """Release idle residents and remove from disk. Returns the id and the bytes that it had.

        Raises FAILED naming the holders where it is claimed, NOT_FOUND where it is not here.
        """
        view = self.model(text)
        artifact = view.artifact
        if artifact is None:
            raise _not_here(text)
        problem = evict_problem(self._core.state, artifact)
        if problem is not None:
            raise CachedError(problem)
        self._core.post(t.EvictAsked(artifact))
        deadline = time.monotonic() + EVICT_WAIT_S
        while artifact in self._core.state.artifacts:
            await asyncio.sleep(0.02)
            problem = evict_problem(self._core.state, artifact)
            if problem is not None:
                raise CachedError(problem)
            if time.monotonic() > deadline:
                raise permanent(
                    ErrorKind.DEADLINE,
                    "EVICT_SLOW",
                    f"{artifact} is still being taken down after {EVICT_WAIT_S:.0f} s",
                    "look at the daemon's log; it goes on by itself",
                )
        return artifact, view.size_bytes

    async def verify(self, text: str | None) -> AsyncGenerator[Progress | Proof]:
        """Read every byte of one or all artifacts again, one after the other."""
        for view in [self.model(text)] if text is not None else Views(self._core.state).models():
            if view.artifact is not None and self._core.state.is_verified(view.artifact):
                async for step in self._verify_one(view, view.artifact):
                    yield step
            elif text is not None:
                raise _not_here(text)

    async def _verify_one(self, view: ModelView, artifact: ArtifactId) -> AsyncGenerator[Progress | Proof]:
        done_bytes = 0

        def update(now_done: int) -> None:
            nonlocal done_bytes
            done_bytes = now_done

        task = asyncio.create_task(self._effects.prove(artifact, update))
        try:
            while not (await asyncio.wait([task], timeout=PROGRESS_EVERY_S))[0]:
                yield Progress(Phase.FETCHING, done_bytes, view.size_bytes, message="reading")
            yield Proof(artifact, view.ref, view.size_bytes, task.result())
        finally:
            task.cancel()

    # --- looking ----------------------------------------------------------------------------

    def models(self) -> list[ModelView]:
        return [self._with_path(view) for view in Views(self._core.state).models()]

    def model(self, text: str) -> ModelView:
        """One row by ref or artifact id. Raises NOT_FOUND."""
        view = Views(self._core.state).find(text)
        if view is None:
            raise _not_here(text)
        return self._with_path(view)

    async def model_files(self, text: str) -> ModelView:
        """One row with its files. Raises NOT_FOUND."""
        view = self.model(text)
        if view.artifact is None or not self._core.state.is_verified(view.artifact):
            return view
        manifest = await self._disk.call(self._store.manifest, view.artifact)
        return replace(view, files=manifest.files)

    def places(self) -> list[PlaceView]:
        return Views(self._core.state).places()

    def counts(self) -> dict[ClaimKind, int]:
        state = self._core.state
        kinds = [claim.kind for claim in state.claims.values() if claim.id not in state.members]
        return {kind: kinds.count(kind) for kind in ClaimKind}

    @property
    def moving(self) -> tuple[int, int]:
        """Transfers and loads that run now."""
        return len(self._effects.fetching), len(self._effects.loading)

    @property
    def origin_bytes(self) -> int:
        """Bytes received from origins since the start."""
        return self._effects.origin_bytes

    @property
    def uptime_s(self) -> float:
        return time.monotonic() - self._began

    @property
    def ready(self) -> bool:
        return self._recovered and not self._core.failed.done()

    def _with_path(self, view: ModelView) -> ModelView:
        meter = self._effects.fetching.get(view.revision) if view.revision is not None else None
        progress = meter.progress() if meter is not None else None
        path = self._path(view.artifact) if view.artifact is not None else ""
        return replace(view, path=path, progress=progress)

    def _path(self, artifact: ArtifactId) -> str:
        return str(self._store.tree_path(artifact))

    def _new_claim(
        self, kind: ClaimKind, ref: Ref, device: Device, fresh: bool, holder: Holder | None = None
    ) -> Claim:
        name = ClaimId(f"{kind.value}-{uuid.uuid4().hex}")
        return Claim(name, kind, ref, device, time.time(), fresh, holder)


def _rules(settings: Settings) -> t.Rules:
    store, standby = settings.store, settings.standby
    return t.Rules(
        store.high_watermark,
        store.low_watermark,
        store.quarantine_keep_s,
        store.leftovers_keep_s,
        gpu_reserve_bytes=standby.gpu_reserve_bytes,
        claimed_grace_s=standby.claimed_grace_s,
        starting_s=standby.starting_s,
    )


def _not_swapped(ref: Ref) -> CachedError:
    return permanent(
        ErrorKind.PRECONDITION,
        "NOT_HERE",
        f"{ref} is not on this node, so whether it fits is not known",
        "swap with --wait, which fetches it first, or 'cachectl prefetch' it",
    )


def _not_here(text: str) -> CachedError:
    return permanent(
        ErrorKind.NOT_FOUND,
        "NOT_HERE",
        f"{text} is not on this node",
        "'cachectl ls' shows what is; 'cachectl prefetch REF' brings it",
    )
