"""Turns what happened into what is known: ``apply(state, event, now)``.

Owns every change of a State. Decides nothing: no fetch, eviction, load or refusal begins here.
Pure but for the state that it is given.
"""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from cached.model import (
    DISK,
    ORIGIN_CHANGED,
    Artifact,
    ArtifactId,
    Aside,
    Claim,
    ClaimId,
    ClaimKind,
    Device,
    ErrorKind,
    Gpu,
    Inventory,
    Note,
    Problem,
    Ref,
    Resident,
    Revision,
    RevisionKey,
    note_of,
)
from cached.plan import types as t
from cached.plan.order import heat
from cached.plan.state import POOLS, Place, Proven, Spot, State, aside_item, is_gpu, member_id, transfer_items

FIRST_BACKOFF_S = 1.0
LAST_BACKOFF_S = 300.0
ORIGIN_SETTLES_S = 30.0
SETTLES_S = 1.0
"""A GPU's figures come a few times a second; for so long they may be older than a load or a release."""
FORGIVEN_S = 3600.0
"""For each of these that an artifact stood on a GPU, one time that it was thrown out is forgotten."""
_FAILED = (t.ResidentStep.FAILED, t.ResidentStep.REFUSED)


def backoff_s(rounds: int) -> float:
    """Seconds to wait after ``rounds`` failures in a row: doubling, bounded."""
    return min(LAST_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(max(0, rounds - 1), 20))


def apply(state: State, event: t.Event, now: float) -> None:
    """Work one event into the state. ``now`` is in Unix seconds."""
    _work_in(state, event, now)
    _watch_level(state)


def _watch_level(state: State) -> None:
    disk, rules = state.disk, state.rules
    used_bytes = disk.ledger.used_bytes
    if used_bytes > rules.high_watermark * disk.capacity_bytes:
        disk.draining = True
    elif used_bytes <= rules.low_watermark * disk.capacity_bytes:
        disk.draining = False


def _work_in(state: State, event: t.Event, now: float) -> None:
    match event:
        case t.Recovered():
            _recovered(state, event, now)
        case t.CapacitySet(device, capacity_bytes):
            _capacity_set(state, device, capacity_bytes)
        case t.ClaimMade(claim):
            _claim_made(state, claim)
        case t.ClaimEnded(claim_id):
            _claim_ended(state, claim_id, now)
        case t.Renewed(claim_id, expires_at):
            if claim_id in state.claims:
                state.refile(claim_id, expires_at=expires_at)
        case t.Held(claim_id, holder):
            if claim_id in state.claims:
                state.refile(claim_id, holder=holder)
        case t.Used(artifact):
            _used(state, artifact, now)
        case t.Resolved(revision):
            _resolved(state, revision, now)
        case t.ResolveFailed(ref, problem):
            _resolve_failed(state, ref, problem, now)
        case t.Fetched():
            _fetched(state, event, now)
        case t.FetchFailed(key, problem):
            _fetch_failed(state, key, problem, now)
        case t.FetchStopped(key):
            _idle(state, key, now)
        case t.Discarded(key):
            _discarded(state, key)
        case t.Evicted(artifact):
            _evicted(state, artifact)
        case t.EvictAsked(artifact):
            if state.is_verified(artifact) and artifact not in state.claimed:
                state.evict_asked[artifact] = None
        case t.Corrupt(digest, reason):
            state.corrupt[digest] = reason
        case t.Quarantined():
            _quarantined(state, event, now)
        case t.Purged(aside):
            state.purging.discard(aside)
            state.disk.ledger.remove([aside_item(state.asides.pop(aside))])
        case t.StandbySeen(inventory, capacity_bytes):
            _standby_seen(state, inventory, capacity_bytes, now)
        case t.GpuTold(device, gpu):
            _gpu_told(state, device, gpu)
        case t.GpusClaimed(by):
            _gpus_claimed(state, dict(by), now)
        case t.HolderReady(claim_id):
            state.starting.pop(claim_id, None)
        case t.StandbyGone(device):
            _standby_gone(state, device, now)
        case t.Loaded(device, resident):
            _loaded(state, device, resident, now)
        case t.LoadFailed(device, artifact, problem):
            _load_failed(state, device, artifact, problem, now)
        case t.Released(device, artifact):
            _released(state, device, artifact, now)
        case t.HeldOutside(device, artifact, problem):
            _held_outside(state, device, artifact, problem)
        case t.Started(action):
            _started(state, action, now)
        case _:
            assert_never(event)


# --- start ----------------------------------------------------------------------------------


def _recovered(state: State, event: t.Recovered, now: float) -> None:
    state.began_at = now
    for artifact in event.artifacts:
        _add_artifact(state, artifact)
    for note in event.notes:
        _add_note(state, note)
    for revision in event.leftovers:
        _add_leftover(state, revision, event.ran_at.get(revision.key, now))
    for aside in event.asides:
        _add_aside(state, aside)
    for claim in event.claims:
        _restore_claim(state, claim)


def _capacity_set(state: State, device: Device, capacity_bytes: int) -> None:
    place = state.places.setdefault(device, Place(0))
    grown = capacity_bytes > place.capacity_bytes
    place.capacity_bytes = capacity_bytes
    if device == DISK and grown:
        # What was too large for the disk may not be any more: a pin must not wait for somebody to ask again.
        for key in list(state.idle_transfers):
            problem = state.transfers[key].problem
            if problem is not None and problem.reason == "DISK_CAPACITY":
                _retry_fetch(state, key)


def _restore_claim(state: State, claim: Claim) -> None:
    note = state.notes.get(claim.ref)
    revision = note.revision if note is not None else None
    if claim.kind is ClaimKind.LEASE:
        # A lease was answered before the restart. It holds its artifact, not what the ref means today.
        if claim.artifact in state.artifacts:
            state.answered.add(claim.id)
            state.file(claim)
            if claim.room is not None:  # whether it is ready by now is written nowhere
                state.starting[claim.id] = claim.made_at + state.rules.starting_s
    elif claim.kind is ClaimKind.PIN:
        # A pin that was met must not depend on its origin to be restored.
        state.file(replace(claim, revision=revision, artifact=None, fresh=revision is None))
    else:
        state.file(replace(claim, revision=None if claim.fresh else revision, artifact=None))


def _add_artifact(state: State, artifact: Artifact) -> None:
    if artifact.id not in state.artifacts:
        state.disk.ledger.add(artifact.blobs)
    before = state.artifacts.get(artifact.id, Proven(artifact))
    state.put_artifact(replace(before, artifact=artifact, step=t.DiskStep.VERIFIED))


def _add_note(state: State, note: Note) -> None:
    if note.artifact not in state.artifacts:
        return
    before = state.notes.get(note.ref)
    state.put_note(note)
    if before is not None and before.revision != note.revision:
        _move_pins(state, before, note)


def _move_pins(state: State, before: Note, note: Note) -> None:
    """A pin holds what its ref means: once a newer revision is proven, it holds that one."""
    for claim_id in list(state.claimed.get(before.artifact, ())):
        claim = state.claims[claim_id]
        if claim.kind is ClaimKind.PIN and claim.ref == note.ref:
            state.refile(claim_id, revision=note.revision, artifact=None)


# --- claims ---------------------------------------------------------------------------------


def _claim_made(state: State, claim: Claim) -> None:
    assert claim.id not in state.claims, claim.id
    note = state.notes.get(claim.ref)
    if note is not None and not claim.fresh and claim.revision is None:
        claim = replace(claim, revision=note.revision)
    _ask_again(state, claim)
    state.file(claim)


def _ask_again(state: State, claim: Claim) -> None:
    """Somebody new asks: what failed before deserves another try at once."""
    resolution = state.resolutions.get(claim.ref)
    if resolution is not None and resolution.step in (t.Step.FAILED, t.Step.REFUSED):
        del state.resolutions[claim.ref]
    artifact = state.proven.get(claim.revision) if claim.revision else None
    if artifact is not None:
        _retry_load(state, claim.device, artifact)
        if claim.kind is ClaimKind.PIN:
            state.thrown.pop((claim.device, artifact), None)


def _retry_load(state: State, device: Device, artifact: ArtifactId) -> None:
    residency = state.residencies.get((device, artifact))
    if residency is not None and residency.step in _FAILED:
        del state.residencies[device, artifact]


def _retry_loads(state: State, artifact: ArtifactId) -> None:
    for device, _ in state.devices_of(artifact):
        _retry_load(state, device, artifact)


def _retry_fetch(state: State, key: RevisionKey) -> None:
    transfer = state.transfers.get(key)
    if transfer is not None and transfer.step in (t.Step.FAILED, t.Step.REFUSED):
        state.put_transfer(replace(transfer, step=t.Step.IDLE, retry_at=0.0, problem=None))


def _claim_ended(state: State, claim_id: ClaimId, now: float) -> None:
    claim = state.claims.get(claim_id)
    if claim is None:
        return
    if claim_id in state.answered and claim.artifact is not None:
        _used(state, claim.artifact, now)  # until this moment
        _used_on(state, (claim.device, claim.artifact), now, hits=0)
    state.unfile(claim)
    state.answered.discard(claim_id)
    state.starting.pop(claim_id, None)
    is_member = state.members.pop(claim_id, None) is not None
    if claim.kind is ClaimKind.PIN and claim.device in POOLS:
        for member in [m for m, pool in state.members.items() if pool == claim_id]:
            _claim_ended(state, member, now)
    if claim.kind is ClaimKind.PIN and claim.artifact is not None and not is_member:
        _forget_failures(state, claim.artifact)
    if claim.revision is not None:
        _forget_unstarted(state, claim.revision)
    if claim.revision is None and claim.ref not in state.unresolved:
        _forget_resolution(state, claim.ref)


def _forget_failures(state: State, artifact: ArtifactId) -> None:
    """Why it is not where nobody wants it any more is no news."""
    for spot in state.devices_of(artifact):
        if spot not in state.on:
            _retry_load(state, *spot)


def _forget_unstarted(state: State, key: RevisionKey) -> None:
    transfer = state.transfers.get(key)
    if transfer is None or key in state.unfetched or key in state.running:
        return
    if not transfer.reserved:
        state.drop_transfer(key)


def _forget_resolution(state: State, ref: Ref) -> None:
    resolution = state.resolutions.get(ref)
    if resolution is not None and resolution.step is not t.Step.RUNNING:
        del state.resolutions[ref]


def _used(state: State, artifact_id: ArtifactId, now: float) -> None:
    proven = state.artifacts.get(artifact_id)
    if proven is not None:
        used = replace(proven.artifact, last_used_at=max(now, proven.artifact.last_used_at))
        state.put_artifact(replace(proven, artifact=used))


def _used_on(state: State, spot: Spot, now: float, hits: int) -> None:
    """Somebody took it from this device (one of ``hits``), or had it until now."""
    residency = state.residencies.get(spot)
    if residency is not None and residency.step is t.ResidentStep.RESIDENT:
        counted = heat(residency.hits, residency.last_used_at, now) + hits
        state.residencies[spot] = replace(residency, hits=counted, last_used_at=now)


# --- resolution and transfer ----------------------------------------------------------------


def _resolved(state: State, revision: Revision, now: float) -> None:
    state.resolutions.pop(revision.ref, None)
    waiting = state.unresolved.claims(revision.ref)
    proven = state.proven.get(revision.key)
    if proven is not None:
        rate = state.artifacts[proven].rate_bytes_per_s
        _add_note(state, note_of(revision, proven, now, rate))
    elif waiting and revision.key not in state.transfers:
        state.put_transfer(t.Transfer(revision, t.Step.IDLE))
    _retry_fetch(state, revision.key)
    for claim_id in waiting:
        if proven is not None:
            _retry_load(state, state.claims[claim_id].device, proven)
        state.refile(claim_id, revision=revision.key)


def _resolve_failed(state: State, ref: Ref, problem: Problem, now: float) -> None:
    before = state.resolutions.get(ref)
    rounds = (before.rounds if before else 0) + 1
    step, retry_at = _after_failure(problem, rounds, now)
    state.resolutions[ref] = t.Resolution(step, rounds, retry_at, problem)
    if ref not in state.unresolved:
        del state.resolutions[ref]


def _after_failure(problem: Problem, rounds: int, now: float) -> tuple[t.Step, float]:
    if problem.retry_after_s is None:
        return t.Step.REFUSED, 0.0
    return t.Step.FAILED, now + max(backoff_s(rounds), problem.retry_after_s)


def _fetched(state: State, event: t.Fetched, now: float) -> None:
    current = state.artifacts.get(event.artifact.id)
    if current is not None and current.step is not t.DiskStep.VERIFIED:
        # The same content was being taken down while this copy of it was committed: which came last
        # is not known here, so it is fetched again; what is on disk is found and not transferred.
        _idle(state, event.revision, now)
        return
    transfer = state.drop_transfer(event.revision)
    _add_artifact(state, event.artifact)
    state.disk.ledger.remove(transfer_items(transfer))
    # A load that failed may have met the copy that was here before.
    _retry_loads(state, event.artifact.id)
    _add_note(state, event.note)
    state.withdrawn.pop(event.note.ref, None)
    for claim_id in state.unfetched.claims(event.revision):
        state.refile(claim_id)


def _fetch_failed(state: State, key: RevisionKey, problem: Problem, now: float) -> None:
    transfer = state.transfers[key]
    rounds = transfer.rounds + 1
    step, retry_at = _after_failure(problem, rounds, now)
    ran_at = now if transfer.step in (t.Step.RUNNING, t.Step.STOPPING) else transfer.ran_at
    state.put_transfer(
        replace(transfer, step=step, rounds=rounds, retry_at=retry_at, problem=problem, ran_at=ran_at)
    )
    if problem.reason == ORIGIN_CHANGED:
        _resolve_pins_anew(state, transfer.revision, problem, now)


def _resolve_pins_anew(state: State, revision: Revision, problem: Problem, now: float) -> None:
    """The revision can never be had again: pins want what the origin has now, once it has settled."""
    waiting = [state.claims[claim_id] for claim_id in state.unfetched.claims(revision.key)]
    pins = [claim for claim in waiting if claim.kind is ClaimKind.PIN]
    # Whoever asks already has not met this change: the pins join them.
    asked = revision.ref in state.unresolved or revision.ref in state.resolutions
    for pin in pins:
        state.refile(pin.id, revision=None, fresh=True)
    if pins and not asked:
        later = replace(problem, retry_after_s=ORIGIN_SETTLES_S)
        state.resolutions[revision.ref] = t.Resolution(t.Step.FAILED, 1, now + ORIGIN_SETTLES_S, later)


def _idle(state: State, key: RevisionKey, now: float) -> None:
    state.put_transfer(replace(state.transfers[key], step=t.Step.IDLE, ran_at=now))


def _discarded(state: State, key: RevisionKey) -> None:
    transfer = state.drop_transfer(key)
    state.disk.ledger.remove(transfer_items(transfer))
    if key in state.unfetched:
        state.put_transfer(t.Transfer(transfer.revision, t.Step.IDLE))


# --- taking down ----------------------------------------------------------------------------


def _take_down(state: State, artifact_id: ArtifactId, step: t.DiskStep) -> tuple[Ref, ...]:
    state.put_artifact(replace(state.artifacts[artifact_id], step=step))
    state.evict_asked.pop(artifact_id, None)
    return state.forget_artifact(artifact_id)


def _evicted(state: State, artifact_id: ArtifactId) -> None:
    # Counted until here: its room is there only once it is gone.
    proven = state.drop_artifact(artifact_id)
    state.disk.ledger.remove(proven.artifact.blobs if proven else ())
    _retry_loads(state, artifact_id)
    for spot in [spot for spot in state.thrown if spot[1] == artifact_id]:
        del state.thrown[spot]


def _withdraw(state: State, action: t.Quarantine) -> None:
    problem = Problem(
        ErrorKind.DATA_LOSS,
        "CORRUPT",
        action.reason,
        "the content is quarantined and fetched anew where it is claimed; check the disk if it happens again",
    )
    for artifact_id in action.artifacts:
        for ref in _take_down(state, artifact_id, t.DiskStep.QUARANTINING):
            state.withdrawn[ref] = problem


def _quarantined(state: State, event: t.Quarantined, now: float) -> None:
    for artifact_id in event.artifacts:
        if state.is_verified(artifact_id):
            # It was committed while the content was being put away, and went with it.
            _take_down(state, artifact_id, t.DiskStep.QUARANTINING)
        # Counted until here: its good contents may stay as leftovers, and never without being counted.
        _evicted(state, artifact_id)
        for claim_id in list(state.claimed.get(artifact_id, ())):
            if claim_id not in state.answered:
                state.refile(claim_id, revision=None, artifact=None, fresh=True)
    for revision in event.leftovers:
        _add_leftover(state, revision, now)
    if event.aside is not None:
        _add_aside(state, event.aside)


def _add_aside(state: State, aside: Aside) -> None:
    if aside.name not in state.asides:
        state.asides[aside.name] = aside
        state.disk.ledger.add([aside_item(aside)])


def _add_leftover(state: State, revision: Revision, ran_at: float) -> None:
    """Count what lies on disk of it, unless its transfer counts it already."""
    transfer = state.transfers.get(revision.key, t.Transfer(revision, t.Step.IDLE))
    if not transfer.reserved:
        transfer = replace(transfer, revision=revision, reserved=True, ran_at=ran_at)
        state.put_transfer(transfer)
        state.disk.ledger.add(transfer_items(transfer))


# --- devices --------------------------------------------------------------------------------


def _resident(state: State, device: Device, resident: Resident, now: float) -> t.Residency:
    """The record of what a standby tells. It counts as its contents where they are known, else as itself."""
    proven = state.artifacts.get(resident.artifact)
    items = state.items_on(device, resident.artifact) if proven else ()
    before = state.residencies.get((device, resident.artifact))
    if before is None or before.step is not t.ResidentStep.RESIDENT:
        used_at = proven.artifact.last_used_at if proven else 0.0
        before = t.Residency(t.ResidentStep.RESIDENT, last_used_at=used_at, since=now)
    return replace(before, locked=resident.locked, items=items or ((resident.artifact, resident.size_bytes),))


def _standby_seen(state: State, inventory: Inventory, capacity_bytes: int, now: float) -> None:
    device = inventory.device
    under_way = _under_way(state, inventory)
    told = {(device, r.artifact): _resident(state, device, r, now) for r in inventory.residents}
    _clear_device(state, device)
    place = state.places[device] = Place(capacity_bytes, inventory=inventory)
    state.residencies.update(told)
    state.residencies.update(under_way)
    if is_gpu(device):
        _retry_pools(state)
    for spot, residency in state.residencies.items():
        if spot[0] == device:
            place.ledger.add(residency.items)
    _refile_device(state, device)


def _gpu_told(state: State, device: Device, gpu: Gpu) -> None:
    place = state.places.get(device)
    if place is not None and place.inventory is not None:
        unfit_before = place.unfit_reason
        place.inventory = replace(place.inventory, gpu=gpu)
        if place.unfit_reason != unfit_before:
            _retry_device(state, device)
            _refile_device(state, device)


def _gpus_claimed(state: State, by: dict[Device, str], now: float) -> None:
    before, state.claimed_gpus = state.claimed_gpus, by
    changed = {device for device in {*by, *(before or ())} if (before or {}).get(device) != by.get(device)}
    for device in changed:
        state.claimed_since[device] = now if before is not None else 0.0
        _retry_device(state, device)
    state.claimed_since = {device: state.claimed_since[device] for device in by}


def _retry_device(state: State, device: Device) -> None:
    """What may stand on this device has changed: what was told of it before holds no longer."""
    for spot, residency in list(state.residencies.items()):
        if spot[0] == device and residency.step in _FAILED:
            del state.residencies[spot]
    _retry_pools(state)


def _retry_pools(state: State) -> None:
    for spot in [spot for spot in state.residencies if spot[0] in POOLS]:
        del state.residencies[spot]


def _under_way(state: State, inventory: Inventory) -> dict[Spot, t.Residency]:
    """What a standby that tells again does not settle: loads and releases, which end with their own events,
    and failures that wait to be tried again."""
    place = state.places.get(inventory.device)
    if place is None or place.inventory is None:
        return {}
    told = {resident.artifact for resident in inventory.residents}
    return {
        spot: residency
        for spot, residency in state.residencies.items()
        if spot[0] == inventory.device
        and residency.step is not t.ResidentStep.RESIDENT
        and not (residency.step in _FAILED and spot[1] in told)
    }


def _standby_gone(state: State, device: Device, now: float) -> None:
    _clear_device(state, device)
    place = state.places[device]
    state.places[device] = Place(place.capacity_bytes, gone_at=now)
    _refile_device(state, device)


def _clear_device(state: State, device: Device) -> None:
    for spot in [spot for spot in state.residencies if spot[0] == device]:
        del state.residencies[spot]


def _refile_device(state: State, device: Device) -> None:
    """File anew the claims that stand on the device and no longer do, or do now."""
    for claim in list(state.claims.values()):
        _refile_if_moved(state, claim, device)


def _refile_spot(state: State, device: Device, artifact: ArtifactId) -> None:
    for claim_id in list(state.claimed.get(artifact, ())):
        _refile_if_moved(state, state.claims[claim_id], device)


def _refile_if_moved(state: State, claim: Claim, device: Device) -> None:
    if claim.device != device and device not in claim.prefers:
        return
    if claim.revision is not None and claim.artifact is not None:
        filed = state.unloaded.holds((claim.device, claim.artifact), claim.id)
        if filed != state.lacks(claim, claim.artifact):
            state.refile(claim.id)


def _loaded(state: State, device: Device, resident: Resident, now: float) -> None:
    residency = state.residencies.get((device, resident.artifact))
    if residency is None or residency.step is not t.ResidentStep.LOADING:
        return
    state.residencies[device, resident.artifact] = replace(
        residency, step=t.ResidentStep.RESIDENT, locked=resident.locked, rounds=0, last_used_at=now, since=now
    )
    _unsettle(state.places[device], now)
    state.places[device].taken_bytes += sum(size for _, size in residency.items)
    _refile_spot(state, device, resident.artifact)


def _unsettle(place: Place, now: float) -> None:
    """What is free there has changed: figures that come soon may be older."""
    if now >= place.settles_at:
        place.taken_bytes = 0
    place.settles_at = now + SETTLES_S


def _load_failed(state: State, device: Device, artifact: ArtifactId, problem: Problem, now: float) -> None:
    residency = state.residencies.get((device, artifact))
    if residency is None or residency.step is not t.ResidentStep.LOADING:
        return
    state.places[device].ledger.remove(residency.items)
    _unsettle(state.places[device], now)
    if artifact not in state.artifacts:
        del state.residencies[device, artifact]
        return
    rounds = residency.rounds + 1
    step, retry_at = _after_failure(problem, rounds, now)
    after = t.ResidentStep.REFUSED if step is t.Step.REFUSED else t.ResidentStep.FAILED
    state.residencies[device, artifact] = t.Residency(after, False, rounds, retry_at, problem)


def _released(state: State, device: Device, artifact: ArtifactId, now: float) -> None:
    residency = state.residencies.get((device, artifact))
    if residency is not None and residency.step is t.ResidentStep.RELEASING:
        del state.residencies[device, artifact]
        place = state.places[device]
        place.ledger.remove(residency.items)
        _unsettle(place, now)


def _held_outside(state: State, device: Device, artifact: ArtifactId, problem: Problem) -> None:
    residency = state.residencies.get((device, artifact))
    if residency is not None and residency.step is t.ResidentStep.RELEASING:
        state.residencies[device, artifact] = replace(residency, problem=problem)


# --- actions that have begun ----------------------------------------------------------------


def _started(state: State, action: t.Action, now: float) -> None:
    match action:
        case t.Resolve(ref):
            before = state.resolutions.get(ref, t.Resolution(t.Step.IDLE))
            state.resolutions[ref] = replace(before, step=t.Step.RUNNING, problem=None)
        case t.Fetch(revision, background):
            _fetch_started(state, revision, background)
        case t.Rank(key, background):
            state.put_transfer(replace(state.transfers[key], background=background))
        case t.StopFetch(key):
            state.put_transfer(replace(state.transfers[key], step=t.Step.STOPPING))
        case t.Discard(key):
            state.put_transfer(replace(state.transfers[key], step=t.Step.DISCARDING, problem=None))
        case t.Evict(artifact):
            _take_down(state, artifact, t.DiskStep.EVICTING)
        case t.Quarantine(_, digest):
            _withdraw(state, action)
            state.corrupt.pop(digest)
        case t.Purge(aside):
            state.purging.add(aside)
        case t.Load(device, artifact):
            _load_started(state, device, artifact)
        case t.Release():
            _release_started(state, action, now)
        case t.Place(claim_id, device):
            _placed(state, claim_id, device)
        case t.Unplace(claim_id, device):
            _unplaced(state, claim_id, device, now)
        case t.CannotFetch(key, problem):
            _fetch_failed(state, key, problem, now)
        case t.CannotLoad(device, artifact, problem):
            _cannot_load(state, device, artifact, problem, now)
        case t.Grant(claim_id, device):
            _granted(state, claim_id, device, now)
        case t.Refuse(claim_id) | t.Expire(claim_id):
            _claim_ended(state, claim_id, now)
        case t.Refresh(ref):
            # The claim that the shell makes for it follows at once; until then the note counts as new.
            state.notes[ref] = replace(state.notes[ref], resolved_at=now)
        case _:
            assert_never(action)


def _fetch_started(state: State, revision: Revision, background: bool) -> None:
    transfer = state.transfers[revision.key]
    if not transfer.reserved:
        state.disk.ledger.add(transfer_items(transfer))
    state.put_transfer(
        replace(transfer, step=t.Step.RUNNING, reserved=True, problem=None, background=background)
    )


def _load_started(state: State, device: Device, artifact: ArtifactId) -> None:
    items = state.items_on(device, artifact)
    before = state.residencies.get((device, artifact))
    state.places[device].ledger.add(items)
    state.residencies[device, artifact] = t.Residency(
        t.ResidentStep.LOADING, rounds=before.rounds if before else 0, items=items
    )


def _release_started(state: State, release: t.Release, now: float) -> None:
    spot = release.device, release.artifact
    residency = state.residencies[spot]
    state.residencies[spot] = replace(residency, step=t.ResidentStep.RELEASING)
    if release.thrown:
        before = state.thrown.get(spot, t.Thrown(0, now))
        forgiven = int((now - residency.since) / FORGIVEN_S)
        state.thrown[spot] = t.Thrown(max(0, before.times - forgiven) + 1, now)
    # Claims that stood on it now lack it again.
    _refile_spot(state, *spot)


def _placed(state: State, pool: ClaimId, device: Device) -> None:
    claim = state.claims[pool]
    member = replace(claim, id=member_id(pool, device), device=device)
    state.members[member.id] = pool
    state.file(member)
    assert claim.artifact is not None
    refused = state.residencies.get((device, claim.artifact))
    if refused is not None and refused.step is t.ResidentStep.REFUSED:
        _retry_load(state, device, claim.artifact)
    state.residencies.pop((claim.device, claim.artifact), None)


def _cannot_load(state: State, device: Device, artifact: ArtifactId, problem: Problem, now: float) -> None:
    before = state.residencies.get((device, artifact))
    rounds = (before.rounds if before else 0) + 1
    step, retry_at = _after_failure(problem, rounds, now)
    after = t.ResidentStep.REFUSED if step is t.Step.REFUSED else t.ResidentStep.FAILED
    state.residencies[device, artifact] = t.Residency(after, False, rounds, retry_at, problem)


def _unplaced(state: State, pool: ClaimId, device: Device, now: float) -> None:
    claim = state.claims[pool]
    _claim_ended(state, member_id(pool, device), now)
    assert claim.artifact is not None
    state.residencies.pop((claim.device, claim.artifact), None)


def _granted(state: State, claim_id: ClaimId, device: Device, now: float) -> None:
    claim = state.claims[claim_id]
    assert claim.artifact is not None
    _used(state, claim.artifact, now)
    _used_on(state, (device, claim.artifact), now, hits=1)
    if claim.kind is ClaimKind.LEASE:
        state.answered.add(claim_id)
        state.refile(claim_id, device=device)
        if claim.room is not None:
            state.starting[claim_id] = now + state.rules.starting_s
    else:
        _claim_ended(state, claim_id, now)
