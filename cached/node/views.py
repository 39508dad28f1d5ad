"""What people and programs are shown of the state: rows by ref, and the node's figures.

Owns the words of section "states" and which fact wins when several could be shown. Pure: reads the
planner's state, changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

from cached.model import (
    DISK,
    ArtifactId,
    Claim,
    Device,
    Gpu,
    Inventory,
    ManifestFile,
    Phase,
    Problem,
    Progress,
    Ref,
    RevisionKey,
    is_artifact_id,
)
from cached.plan import types as t
from cached.plan.state import POOLS, State


@dataclass(frozen=True, slots=True)
class ResidencyView:
    device: Device
    step: str
    size_bytes: int
    locked: bool
    hits: int = 0
    last_used_at: float = 0.0


@dataclass(frozen=True, slots=True)
class ModelView:
    """One ref as it stands. ``state`` is one of the disk states; ``problem`` says why it is not verified."""

    ref: Ref
    state: str
    artifact: ArtifactId | None = None
    revision: RevisionKey | None = None
    attested: bool = False
    size_bytes: int = 0
    last_used_at: float = 0.0
    claims: tuple[Claim, ...] = ()
    residencies: tuple[ResidencyView, ...] = ()
    problem: Problem | None = None
    progress: Progress | None = None
    path: str = ""
    files: tuple[ManifestFile, ...] = field(default=())

    @property
    def devices(self) -> tuple[Device, ...]:
        """Where it stands now, the disk first."""
        on_disk = (DISK,) if self.state == "verified" else ()
        return on_disk + tuple(r.device for r in self.residencies if r.step == "resident")


@dataclass(frozen=True, slots=True)
class PlaceView:
    device: Device
    capacity_bytes: int
    used_bytes: int
    claimed_bytes: int
    artifacts: int
    connected: bool
    remarks: tuple[str, ...]
    pid: int
    gpu: Gpu | None = None
    claimed_by: str = ""


class Views:
    """Rows over one state. Made anew for each reading, so that an index is built once, where it is used."""

    def __init__(self, state: State) -> None:
        self._state = state

    @cached_property
    def _claims(self) -> dict[Ref, list[Claim]]:
        claims: dict[Ref, list[Claim]] = {}
        for claim in self._state.claims.values():
            if claim.id not in self._state.members:  # a pool's copies show by where they stand
                claims.setdefault(claim.ref, []).append(claim)
        return claims

    @cached_property
    def _transfers(self) -> dict[Ref, t.Transfer]:
        return {transfer.revision.ref: transfer for transfer in self._state.transfers.values()}

    def refs(self) -> list[Ref]:
        known = {*self._state.notes, *self._claims, *self._transfers, *self._state.withdrawn}
        return sorted(known)

    def models(self) -> list[ModelView]:
        return [self._row(ref) for ref in self.refs()]

    def find(self, text: str) -> ModelView | None:
        """One row, by ref or by artifact id."""
        if is_artifact_id(text):
            refs = [r for r, note in self._state.notes.items() if note.artifact == text]
            return self._row(min(refs)) if refs else None
        ref = Ref(text)
        known = (self._state.notes, self._claims, self._transfers, self._state.withdrawn)
        return self._row(ref) if any(ref in refs for refs in known) else None

    def _row(self, ref: Ref) -> ModelView:
        return replace(self.unclaimed(ref), claims=tuple(self._claims.get(ref, ())))

    def unclaimed(self, ref: Ref) -> ModelView:
        """The ref's row without its claims, of which there may be many: what a grant shows."""
        note = self._state.notes.get(ref)
        proven = self._state.artifacts.get(note.artifact) if note else None
        if note is None or proven is None:
            return self._missing(ref)
        return ModelView(
            ref,
            proven.step.value if proven.step is not t.DiskStep.QUARANTINING else "quarantined",
            note.artifact,
            note.revision,
            note.attested,
            proven.artifact.size_bytes,
            proven.artifact.last_used_at,
            residencies=self._residencies(note.artifact),
            problem=self._residency_problem(note.artifact),
        )

    def _missing(self, ref: Ref) -> ModelView:
        """A ref without a proven artifact: what is known of its way there."""
        transfer = self._transfers.get(ref)
        resolution = self._state.resolutions.get(ref)
        withdrawn = self._state.withdrawn.get(ref)
        if resolution is not None and resolution.problem is not None:
            return ModelView(ref, _step_word(resolution.step), problem=resolution.problem)
        if transfer is None or (transfer.step is t.Step.IDLE and withdrawn is not None):
            return ModelView(ref, "quarantined" if withdrawn else "absent", problem=withdrawn)
        revision = transfer.revision
        return ModelView(
            ref,
            _step_word(transfer.step),
            revision=revision.key,
            attested=revision.attested,
            size_bytes=revision.size_bytes,
            problem=transfer.problem,
        )

    def _residencies(self, artifact: ArtifactId) -> tuple[ResidencyView, ...]:
        found = []
        for device, _ in self._state.devices_of(artifact):
            residency = self._state.residencies[device, artifact]
            size_bytes = sum(size for _, size in residency.items)
            hits, used_at = round(residency.hits), residency.last_used_at
            found.append(
                ResidencyView(device, residency.step.value, size_bytes, residency.locked, hits, used_at)
            )
        return tuple(found)

    def _residency_problem(self, artifact: ArtifactId) -> Problem | None:
        spots = self._state.devices_of(artifact)
        return next((p for s in spots if (p := self._state.residencies[s].problem) is not None), None)

    # --- the node ---------------------------------------------------------------------------

    def places(self) -> list[PlaceView]:
        """The GPUs last, by their numbers."""
        places = [self._place(device) for device in self._state.places]
        return sorted(places, key=lambda place: place.gpu.index if place.gpu is not None else -1)

    def _place(self, device: Device) -> PlaceView:
        place = self._state.places[device]
        if device == DISK:
            claimed = sum(
                self._state.artifacts[a].artifact.size_bytes
                for a in self._state.claimed
                if a in self._state.artifacts
            )
            count = len(self._state.artifacts)
            used_bytes, remarks = place.ledger.used_bytes, _disk_remarks(self._state)
            return PlaceView(device, place.capacity_bytes, used_bytes, claimed, count, True, remarks, 0)
        residents = [s for s, r in self._state.residencies.items() if s[0] == device and r.items]
        claimed = sum(
            sum(size for _, size in self._state.residencies[s].items)
            for s in residents
            if self._state.claims_on(device, s[1])
        )
        inventory = place.inventory
        return PlaceView(
            device,
            place.capacity_bytes,
            place.ledger.used_bytes,
            claimed,
            len(residents),
            inventory is not None,
            _remarks(place.inventory),
            inventory.pid if inventory else 0,
            inventory.gpu if inventory else None,
            (self._state.claimed_gpus or {}).get(device, ""),
        )


def waiting_for(state: State, claim: Claim) -> Progress:
    """What an unanswered claim waits for, as far as the state tells; bytes come from the meters."""
    if claim.revision is None:
        return _phase(Phase.RESOLVING, state.resolutions.get(claim.ref))
    if claim.artifact is None:
        transfer = state.transfers.get(claim.revision)
        running = transfer is not None and transfer.step is t.Step.RUNNING
        return _phase(Phase.FETCHING if running else Phase.QUEUED, transfer)
    if claim.room is not None and not state.lacks(claim, claim.artifact):
        return Progress(Phase.WAITING, message=_room_words(state, claim.room.device))
    place = state.places.get(claim.device)
    away = place is None or (claim.device != DISK and place.inventory is None)
    if away and claim.device not in POOLS:
        return Progress(Phase.WAITING, message=f"no standby for {claim.device} is connected")
    return _phase(Phase.LOADING, state.residencies.get((claim.device, claim.artifact)))


def _room_words(state: State, device: Device) -> str:
    rooms = (state.claims[claim_id].room for claim_id in state.starting)
    if any(room is not None and room.device == device for room in rooms):
        return f"another engine starts with room on {device}, and has not said yet that it is ready"
    return f"room is made on {device}"


def _phase(phase: Phase, record: t.Resolution | t.Transfer | t.Residency | None) -> Progress:
    problem = record.problem if record is not None else None
    total_bytes = record.revision.size_bytes if isinstance(record, t.Transfer) else 0
    return Progress(phase, total_bytes=total_bytes, message=problem.message if problem else "")


def _step_word(step: t.Step) -> str:
    words = {t.Step.RUNNING: "fetching", t.Step.FAILED: "failed", t.Step.REFUSED: "refused"}
    return words.get(step, "absent")


def _disk_remarks(state: State) -> tuple[str, ...]:
    over_bytes = state.disk.ledger.used_bytes - state.disk.capacity_bytes
    if over_bytes <= 0:
        return ()
    may_go = state.idle or state.leaving or state.asides or state.purging
    why = "what nobody claims leaves" if may_go else "all of it is claimed: unpin or stop something"
    return (f"{over_bytes / 1e9:.2f} GB over its capacity; {why}, or free space on the file system",)


def _remarks(inventory: Inventory | None) -> tuple[str, ...]:
    if inventory is None:
        return ()  # that it is not connected says it all
    if inventory.gpu is not None:
        return _gpu_remarks(inventory.gpu)
    remarks = []
    if not inventory.can_lock:
        remarks.append(f"memory cannot be locked: {inventory.cannot_lock_reason}")
    if not inventory.write_protected:
        remarks.append("the standby's view of the store is writable: a root replica could change files")
    return tuple(remarks)


def _gpu_remarks(gpu: Gpu) -> tuple[str, ...]:
    remarks = []
    if gpu.unfit_reason:
        remarks.append(f"unfit, nothing may stand there: {gpu.unfit_reason}")
    if gpu.outside_bytes:
        remarks.append(f"{gpu.outside_bytes / 1e9:.2f} GB were given back and are still mapped by somebody")
    return tuple(remarks)
