"""What the planner knows: claims, facts about disk and memory, and indexes that keep a tick cheap.

Owns the shape of the state and the filing of claims under what each still lacks. Pure: no clock,
no I/O. Only ``apply`` changes a state; ``decide`` and the views read it.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from cached.model import (
    ANY_GPU,
    DISK,
    EVERY_GPU,
    Artifact,
    ArtifactId,
    Aside,
    Claim,
    ClaimId,
    ClaimKind,
    Device,
    Digest,
    Inventory,
    Note,
    Problem,
    Ref,
    RevisionKey,
)
from cached.plan.ledger import Item, Ledger
from cached.plan.order import Idle
from cached.plan.types import (
    DiskStep,
    Residency,
    ResidentStep,
    Resolution,
    Rules,
    Step,
    Thrown,
    Transfer,
)

K = TypeVar("K")
Spot = tuple[Device, ArtifactId]
"""One artifact on one device."""
POOLS = (ANY_GPU, EVERY_GPU)


def is_gpu(device: Device) -> bool:
    """Whether it is one GPU or MIG instance (and no pool of them)."""
    return device.startswith("cuda:") and device not in POOLS


def is_moving(residency: Residency) -> bool:
    """Whether it is on its way out, and its room is counted on. (What somebody else has mapped is not.)"""
    return residency.step is ResidentStep.RELEASING and residency.problem is None


def is_standing(residency: Residency) -> bool:
    """Whether the device has it, will have it, or had it a moment ago."""
    return residency.step in (ResidentStep.LOADING, ResidentStep.RESIDENT) or is_moving(residency)


def member_id(pool: ClaimId, device: Device) -> ClaimId:
    """The claim that stands for a pool's copy on a device."""
    return ClaimId(f"{pool}/{device}")


class Queue(Generic[K]):
    """Claims that lack the same thing, by what they lack; what a lease waits for comes first, then what
    claims of a higher priority want."""

    __slots__ = ("_claims", "_leases", "_ranked")

    def __init__(self) -> None:
        self._claims: dict[K, dict[ClaimId, Claim]] = {}
        self._leases: dict[K, int] = {}
        self._ranked = 0

    def add(self, key: K, claim: Claim) -> None:
        self._claims.setdefault(key, {})[claim.id] = claim
        self._ranked += claim.priority != 0
        if claim.kind is ClaimKind.LEASE:
            self._leases[key] = self._leases.get(key, 0) + 1

    def remove(self, key: K, claim: Claim) -> None:
        del self._claims[key][claim.id]
        self._ranked -= claim.priority != 0
        if not self._claims[key]:
            del self._claims[key]
        if claim.kind is ClaimKind.LEASE:
            self._leases[key] -= 1
            if not self._leases[key]:
                del self._leases[key]

    def claims(self, key: K) -> tuple[ClaimId, ...]:
        return tuple(self._claims.get(key, ()))

    def holds(self, key: K, claim: ClaimId) -> bool:
        return claim in self._claims.get(key, ())

    def urgent(self, key: K, ended: Container[ClaimId] = ()) -> bool:
        """Whether a lease that is not among ``ended`` waits for it."""
        claims = self._claims[key].values() if key in self._leases else ()
        return any(claim.kind is ClaimKind.LEASE and claim.id not in ended for claim in claims)

    def in_order(self, ended: Container[ClaimId] = ()) -> Iterator[K]:
        """Keys that leases wait for, then the others by priority, each in order of arrival."""
        urgent = {key: None for key in self._leases if self.urgent(key, ended)}
        yield from urgent
        rest = [key for key in self._claims if key not in urgent]
        yield from sorted(rest, key=self._rank) if self._ranked else rest

    def _rank(self, key: K) -> int:
        return -max(claim.priority for claim in self._claims[key].values())

    def __contains__(self, key: object) -> bool:
        return key in self._claims

    def __len__(self) -> int:
        return len(self._claims)


@dataclass(slots=True)
class Place:
    """One device's budget. ``inventory`` is None for the disk and while no standby is connected.

    ``draining`` (the disk's) is true from above the high watermark until the low one is reached. Until
    ``settles_at`` a GPU's figures may be older than its last load or release; ``taken_bytes`` is what the
    loads since they were last settled took.
    """

    capacity_bytes: int
    ledger: Ledger = field(default_factory=Ledger)
    inventory: Inventory | None = None
    gone_at: float = 0.0
    draining: bool = False
    settles_at: float = 0.0
    taken_bytes: int = 0

    @property
    def unfit_reason(self) -> str:
        """Why nothing may stand on this GPU; empty where it may."""
        if self.inventory is None:
            return "no standby is connected"
        return self.inventory.gpu.unfit_reason if self.inventory.gpu else "its standby tells no figures"


@dataclass(frozen=True, slots=True)
class Proven:
    """An artifact that is (or was a moment ago) on disk and proven; by which names it is known, and how fast
    it came (0: not measured)."""

    artifact: Artifact
    step: DiskStep = DiskStep.VERIFIED
    refs: tuple[Ref, ...] = ()
    keys: tuple[RevisionKey, ...] = ()
    rate_bytes_per_s: float = 0.0


class State:
    """Everything that is decided upon. Made empty; filled by events."""

    def __init__(
        self, fetch_slots: int, resolve_slots: int = 2, load_slots: int = 1, rules: Rules | None = None
    ) -> None:
        self.rules = rules or Rules()
        self.began_at = 0.0
        self.fetch_slots = fetch_slots
        self.resolve_slots = resolve_slots
        self.load_slots = load_slots
        self.claims: dict[ClaimId, Claim] = {}
        self.answered: set[ClaimId] = set()
        self.artifacts: dict[ArtifactId, Proven] = {}
        self.notes: dict[Ref, Note] = {}
        self.proven: dict[RevisionKey, ArtifactId] = {}
        self.resolutions: dict[Ref, Resolution] = {}
        self.transfers: dict[RevisionKey, Transfer] = {}
        self.places: dict[Device, Place] = {DISK: Place(0)}
        self.residencies: dict[Spot, Residency] = {}
        self.corrupt: dict[Digest, str] = {}
        self.asides: dict[str, Aside] = {}
        self.purging: set[str] = set()
        self.withdrawn: dict[Ref, Problem] = {}
        self.evict_asked: dict[ArtifactId, None] = {}
        self.thrown: dict[Spot, Thrown] = {}
        # Which GPUs the orchestrator has given to whom (None: none ever told), and since when; 0 where that
        # was before it first told.
        self.claimed_gpus: dict[Device, str] | None = None
        self.claimed_since: dict[Device, float] = {}
        # Leases that had room made and are starting, with when that is over; and each placed copy of a
        # pool's pin: a claim that only the planner has.
        self.starting: dict[ClaimId, float] = {}
        self.members: dict[ClaimId, ClaimId] = {}
        # Indexes, kept by the methods below.
        self.claimed: dict[ArtifactId, dict[ClaimId, None]] = {}
        self.on: dict[Spot, dict[ClaimId, None]] = {}
        self.pools: dict[ClaimId, None] = {}
        self.rooms: dict[ClaimId, None] = {}
        self.idle = Idle()
        self.held: dict[ArtifactId, int] = {}
        self.held_bytes = 0
        self.leaving: dict[ArtifactId, None] = {}
        self.unresolved: Queue[Ref] = Queue()
        self.unfetched: Queue[RevisionKey] = Queue()
        self.unloaded: Queue[Spot] = Queue()
        self.ready: dict[ClaimId, None] = {}
        self.timed: dict[ClaimId, None] = {}
        self.running: dict[RevisionKey, None] = {}
        self.idle_transfers: dict[RevisionKey, None] = {}

    @property
    def disk(self) -> Place:
        return self.places[DISK]

    # --- claims -----------------------------------------------------------------------------

    def file(self, claim: Claim) -> None:
        """Put a claim under the first thing that it lacks, binding it to what is known by now."""
        if claim.revision is not None and claim.artifact is None and claim.revision in self.proven:
            claim = replace(claim, artifact=self.proven[claim.revision])
        self.claims[claim.id] = claim
        if claim.expires_at is not None:
            self.timed[claim.id] = None
        if claim.room is not None and claim.id not in self.answered:
            self.rooms[claim.id] = None
        if claim.revision is None:
            self.unresolved.add(claim.ref, claim)
        elif claim.artifact is None:
            self.unfetched.add(claim.revision, claim)
        else:
            self.claimed.setdefault(claim.artifact, {})[claim.id] = None
            self._file_artifact(claim.artifact)
            self.evict_asked.pop(claim.artifact, None)
            self._file_on_device(claim, claim.artifact)

    def _file_on_device(self, claim: Claim, artifact: ArtifactId) -> None:
        self.on.setdefault((claim.device, artifact), {})[claim.id] = None
        if claim.kind is ClaimKind.PIN and claim.device in POOLS:
            self.pools[claim.id] = None
        elif self.lacks(claim, artifact):
            self.unloaded.add((claim.device, artifact), claim)
        elif claim.kind is not ClaimKind.PIN and claim.id not in self.answered:
            self.ready[claim.id] = None

    def lacks(self, claim: Claim, artifact: ArtifactId) -> bool:
        """Whether the artifact stands nowhere that the claim could be met from."""
        return not self.stands(self.best(claim, artifact), artifact)

    def best(self, claim: Claim, artifact: ArtifactId) -> Device:
        """Where a claim is met from: the first that it prefers of those that have it, else its device."""
        prefers = claim.prefers if claim.id not in self.answered else ()
        return next((device for device in prefers if self.stands(device, artifact)), claim.device)

    def unfile(self, claim: Claim) -> None:
        """Take a claim out of every index; the inverse of ``file``."""
        self.ready.pop(claim.id, None)
        self.timed.pop(claim.id, None)
        self.rooms.pop(claim.id, None)
        self.pools.pop(claim.id, None)
        if claim.revision is None:
            self.unresolved.remove(claim.ref, claim)
        elif claim.artifact is None:
            self.unfetched.remove(claim.revision, claim)
        else:
            self._unfile_on_device(claim, claim.artifact)
        del self.claims[claim.id]

    def _unfile_on_device(self, claim: Claim, artifact: ArtifactId) -> None:
        spot = (claim.device, artifact)
        if self.unloaded.holds(spot, claim.id):
            self.unloaded.remove(spot, claim)
        del self.on[spot][claim.id]
        if not self.on[spot]:
            del self.on[spot]
        holders = self.claimed[artifact]
        del holders[claim.id]
        if not holders:
            del self.claimed[artifact]
            self._file_artifact(artifact)

    def refile(self, claim_id: ClaimId, **changes: object) -> None:
        claim = self.claims[claim_id]
        self.unfile(claim)
        self.file(replace(claim, **changes))  # type: ignore[arg-type]

    def claims_on(self, device: Device, artifact: ArtifactId) -> list[Claim]:
        """The claims that want this artifact on this very device."""
        return [self.claims[claim_id] for claim_id in self.on.get((device, artifact), ())]

    # --- facts ------------------------------------------------------------------------------

    def is_resident(self, device: Device, artifact: ArtifactId) -> bool:
        residency = self.residencies.get((device, artifact))
        return residency is not None and residency.step is ResidentStep.RESIDENT

    def stands(self, device: Device, artifact: ArtifactId) -> bool:
        """Whether a bound claim can be met from there: it is resident, and the device is not unfit."""
        if device == DISK:
            return True
        fit = not is_gpu(device) or (device in self.places and not self.places[device].unfit_reason)
        return fit and self.is_resident(device, artifact)

    def is_verified(self, artifact: ArtifactId) -> bool:
        proven = self.artifacts.get(artifact)
        return proven is not None and proven.step is DiskStep.VERIFIED

    def devices_of(self, artifact: ArtifactId) -> list[Spot]:
        """Where something is known of it; also of pools, that it cannot be placed."""
        return [(d, artifact) for d in (*self.places, *POOLS) if (d, artifact) in self.residencies]

    def items_on(self, device: Device, artifact: ArtifactId) -> tuple[Item, ...]:
        """What a proven artifact takes there: its contents, on a GPU those that have tensors."""
        known = self.artifacts[artifact].artifact
        return known.images if is_gpu(device) else known.blobs

    def put_transfer(self, transfer: Transfer) -> None:
        """Replace a transfer's record; keeps the indexes of running and idle ones."""
        key = transfer.revision.key
        self.transfers[key] = transfer
        active = transfer.step in (Step.RUNNING, Step.STOPPING, Step.DISCARDING)
        (self.running if active else self.idle_transfers)[key] = None
        (self.idle_transfers if active else self.running).pop(key, None)

    def drop_transfer(self, key: RevisionKey) -> Transfer:
        self.running.pop(key, None)
        self.idle_transfers.pop(key, None)
        return self.transfers.pop(key)

    def put_artifact(self, proven: Proven) -> None:
        """Replace an artifact's record; keeps the indexes of what may leave and what does."""
        artifact = proven.artifact.id
        self.artifacts[artifact] = proven
        self._file_artifact(artifact)

    def drop_artifact(self, artifact: ArtifactId) -> Proven | None:
        proven = self.artifacts.pop(artifact, None)
        self._file_artifact(artifact)
        return proven

    def _file_artifact(self, artifact: ArtifactId) -> None:
        """Under what it is: held by a claim, idle, leaving, or gone."""
        proven = self.artifacts.get(artifact)
        verified = proven is not None and proven.step is DiskStep.VERIFIED
        self.held_bytes -= self.held.pop(artifact, 0)
        self.leaving.pop(artifact, None)
        if proven is None or artifact in self.claimed or not verified:
            self.idle.remove(artifact)
        else:
            self.idle.put(proven.artifact, proven.rate_bytes_per_s)
        if proven is not None and verified and artifact in self.claimed:
            self.held[artifact] = proven.artifact.size_bytes
            self.held_bytes += self.held[artifact]
        if proven is not None and not verified:
            self.leaving[artifact] = None

    def put_note(self, note: Note) -> None:
        """Note a resolution to an artifact that is here, in the place of what the ref meant before."""
        before = self.notes.get(note.ref)
        if before is not None and before.artifact != note.artifact:
            other = self.artifacts[before.artifact]
            refs = tuple(ref for ref in other.refs if ref != note.ref)
            self.artifacts[before.artifact] = replace(other, refs=refs)
        self.notes[note.ref] = note
        self.proven[note.revision] = note.artifact
        proven = self.artifacts[note.artifact]
        self.put_artifact(
            replace(
                proven,
                refs=tuple(dict.fromkeys((*proven.refs, note.ref))),
                keys=tuple(dict.fromkeys((*proven.keys, note.revision))),
                rate_bytes_per_s=note.rate_bytes_per_s or proven.rate_bytes_per_s,
            )
        )

    def forget_artifact(self, artifact: ArtifactId) -> tuple[Ref, ...]:
        """Forget every resolution that led to it; returns the refs that did."""
        proven = self.artifacts[artifact]
        for ref in proven.refs:
            del self.notes[ref]
        for key in proven.keys:
            del self.proven[key]
        self.artifacts[artifact] = replace(proven, refs=(), keys=())
        return proven.refs


def transfer_items(transfer: Transfer) -> list[Item]:
    """The contents that a transfer brings to disk."""
    revision = transfer.revision
    return [(revision.content_key(i), f.size_bytes) for i, f in enumerate(revision.files)]


def aside_item(aside: Aside) -> Item:
    """A quarantined content, which counts beside the sound one of the same name."""
    return f"quarantine/{aside.name}", aside.size_bytes
