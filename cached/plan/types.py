"""The planner's vocabulary: what can happen (events), what can be done (actions), what is known (records).

Owns these types and nothing else; frozen, so that a plan can be compared, logged and replayed.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from cached.model import (
    Artifact,
    ArtifactId,
    Aside,
    Claim,
    ClaimId,
    Device,
    Digest,
    Gpu,
    Holder,
    Inventory,
    Note,
    Problem,
    Ref,
    Resident,
    Revision,
    RevisionKey,
)

# --- records --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rules:
    """When what nobody claims leaves without being asked to.

    The disk: above ``high_watermark`` (a share of the capacity) until ``low_watermark`` is reached;
    quarantined contents and the leftovers of transfers after a while. A GPU: when less than
    ``gpu_reserve_bytes`` is free, and ``claimed_grace_s`` after nothing entitles it to stand there any more.
    Nothing moves on a GPU while a lease that had room made there starts, at most ``starting_s``.
    """

    high_watermark: float = 0.95
    low_watermark: float = 0.85
    quarantine_keep_s: float = 7 * 86400.0
    leftovers_keep_s: float = 86400.0
    gpu_reserve_bytes: int = 1 << 30
    claimed_grace_s: float = 10.0
    starting_s: float = 600.0


class Step(enum.Enum):
    """Where one piece of work (a resolution, a transfer, a load) stands."""

    IDLE = "idle"
    RUNNING = "running"
    STOPPING = "stopping"
    DISCARDING = "discarding"
    FAILED = "failed"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Resolution:
    """A ref on its way to a revision. ``rounds`` counts failures in a row."""

    step: Step
    rounds: int = 0
    retry_at: float = 0.0
    problem: Problem | None = None


@dataclass(frozen=True, slots=True)
class Transfer:
    """A revision on its way to disk, or its leftovers there; ``reserved`` while its bytes are counted,
    ``ran_at`` when it last brought something. ``background`` is what a running one was last told: that
    nobody waits for it."""

    revision: Revision
    step: Step
    reserved: bool = False
    rounds: int = 0
    retry_at: float = 0.0
    problem: Problem | None = None
    background: bool = False
    ran_at: float = 0.0


class ResidentStep(enum.Enum):
    LOADING = "loading"
    RESIDENT = "resident"
    RELEASING = "releasing"
    FAILED = "failed"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Residency:
    """One artifact on one device. A problem beside RELEASING says who still has the memory mapped.

    ``hits`` counts the grants from here, decayed up to ``last_used_at`` (see ``order.heat``); it became
    resident at ``since``.
    """

    step: ResidentStep
    locked: bool = False
    rounds: int = 0
    retry_at: float = 0.0
    problem: Problem | None = None
    items: tuple[tuple[str, int], ...] = ()
    """What it counts as in the device's ledger; empty where it counts nothing."""
    hits: float = 0.0
    last_used_at: float = 0.0
    since: float = 0.0


@dataclass(frozen=True, slots=True)
class Thrown:
    """How often in a row an artifact had to leave a device for what others took there, and when last."""

    times: int
    at: float


@dataclass(frozen=True, slots=True)
class Access:
    """What the configuration says of a ref, for who asks. ``prefix`` names the table that says it;
    ``only_what_is_here`` where nothing may be fetched for him."""

    prefix: str
    only_what_is_here: bool
    require_digest: bool


class DiskStep(enum.Enum):
    """Where a proven artifact stands."""

    VERIFIED = "verified"
    EVICTING = "evicting"
    QUARANTINING = "quarantining"


# --- events ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a start found on disk. ``ran_at`` says when a leftover last grew; now, where it does not."""

    artifacts: tuple[Artifact, ...]
    notes: tuple[Note, ...]
    claims: tuple[Claim, ...]
    leftovers: tuple[Revision, ...]
    asides: tuple[Aside, ...] = ()
    ran_at: Mapping[RevisionKey, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CapacitySet:
    device: Device
    capacity_bytes: int


@dataclass(frozen=True, slots=True)
class ClaimMade:
    claim: Claim


@dataclass(frozen=True, slots=True)
class ClaimEnded:
    claim: ClaimId


@dataclass(frozen=True, slots=True)
class Renewed:
    claim: ClaimId
    expires_at: float


@dataclass(frozen=True, slots=True)
class Held:
    """A lease's holder was seen."""

    claim: ClaimId
    holder: Holder


@dataclass(frozen=True, slots=True)
class Used:
    """Somebody used the artifact at this moment."""

    artifact: ArtifactId


@dataclass(frozen=True, slots=True)
class Resolved:
    revision: Revision


@dataclass(frozen=True, slots=True)
class ResolveFailed:
    ref: Ref
    problem: Problem


@dataclass(frozen=True, slots=True)
class Fetched:
    revision: RevisionKey
    artifact: Artifact
    note: Note


@dataclass(frozen=True, slots=True)
class FetchFailed:
    revision: RevisionKey
    problem: Problem


@dataclass(frozen=True, slots=True)
class FetchStopped:
    """A transfer was cancelled; what it wrote is still there."""

    revision: RevisionKey


@dataclass(frozen=True, slots=True)
class Discarded:
    revision: RevisionKey


@dataclass(frozen=True, slots=True)
class Evicted:
    artifact: ArtifactId


@dataclass(frozen=True, slots=True)
class EvictAsked:
    """An operator wants it gone; forgotten when a claim comes in between."""

    artifact: ArtifactId


@dataclass(frozen=True, slots=True)
class Corrupt:
    """A content on disk is not what its digest says."""

    digest: Digest
    reason: str


@dataclass(frozen=True, slots=True)
class Quarantined:
    """``leftovers``: the contents that were not corrupt, kept for fetching the rest anew; ``aside``: the one
    that was, None where there was nothing left of it."""

    artifacts: tuple[ArtifactId, ...]
    leftovers: tuple[Revision, ...]
    aside: Aside | None = None


@dataclass(frozen=True, slots=True)
class Purged:
    aside: str


@dataclass(frozen=True, slots=True)
class StandbySeen:
    """A standby is connected and told what it holds, or told again."""

    inventory: Inventory
    capacity_bytes: int


@dataclass(frozen=True, slots=True)
class GpuTold:
    """A connected GPU's figures, or its health, have changed."""

    device: Device
    gpu: Gpu


@dataclass(frozen=True, slots=True)
class GpusClaimed:
    """Which GPUs the orchestrator has given to whom (``pod namespace/name``): all that it has given."""

    by: Mapping[Device, str]


@dataclass(frozen=True, slots=True)
class HolderReady:
    """A lease's holder has taken the memory that it needs: plans on its device go on."""

    claim: ClaimId


@dataclass(frozen=True, slots=True)
class StandbyGone:
    device: Device


@dataclass(frozen=True, slots=True)
class Loaded:
    device: Device
    resident: Resident


@dataclass(frozen=True, slots=True)
class LoadFailed:
    device: Device
    artifact: ArtifactId
    problem: Problem


@dataclass(frozen=True, slots=True)
class Released:
    device: Device
    artifact: ArtifactId


@dataclass(frozen=True, slots=True)
class HeldOutside:
    """A release was begun and the device's memory is not free yet: somebody has it mapped."""

    device: Device
    artifact: ArtifactId
    problem: Problem


# --- actions --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Resolve:
    ref: Ref


@dataclass(frozen=True, slots=True)
class Fetch:
    """``background``: nobody waits for it."""

    revision: Revision
    background: bool


@dataclass(frozen=True, slots=True)
class Rank:
    """Somebody waits by now for a transfer that runs (``background`` is False), or nobody any more."""

    revision: RevisionKey
    background: bool


@dataclass(frozen=True, slots=True)
class StopFetch:
    revision: RevisionKey


@dataclass(frozen=True, slots=True)
class Discard:
    """Remove a transfer's leftovers, and the committed contents that nothing else needs."""

    revision: RevisionKey
    drop: tuple[Digest, ...]


@dataclass(frozen=True, slots=True)
class Evict:
    """Take an artifact down, and the contents that nothing else needs."""

    artifact: ArtifactId
    drop: tuple[Digest, ...]
    why: str


@dataclass(frozen=True, slots=True)
class Quarantine:
    artifacts: tuple[ArtifactId, ...]
    digest: Digest
    reason: str


@dataclass(frozen=True, slots=True)
class Purge:
    """Remove a content from quarantine; the record of why it went there stays."""

    aside: str
    why: str


@dataclass(frozen=True, slots=True)
class Load:
    device: Device
    artifact: ArtifactId


@dataclass(frozen=True, slots=True)
class Release:
    """``thrown``: pins want it there and it leaves for what others need; see ``Thrown``."""

    device: Device
    artifact: ArtifactId
    why: str
    thrown: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """A pool's pin gets a copy on this device. For the planner only; nothing to do."""

    claim: ClaimId
    device: Device


@dataclass(frozen=True, slots=True)
class Unplace:
    """A pool's pin wants no copy on this device any more. For the planner only; nothing to do."""

    claim: ClaimId
    device: Device
    why: str


@dataclass(frozen=True, slots=True)
class CannotFetch:
    """The disk cannot take this revision now."""

    revision: RevisionKey
    problem: Problem


@dataclass(frozen=True, slots=True)
class CannotLoad:
    """The device cannot take this artifact now."""

    device: Device
    artifact: ArtifactId
    problem: Problem


@dataclass(frozen=True, slots=True)
class Grant:
    """The claim's artifact stands on ``device``: a lease is handed out from there, a prefetch is done."""

    claim: ClaimId
    device: Device


@dataclass(frozen=True, slots=True)
class Refuse:
    """Tell the claim's maker why not; the claim ends."""

    claim: ClaimId
    problem: Problem


@dataclass(frozen=True, slots=True)
class Expire:
    claim: ClaimId


@dataclass(frozen=True, slots=True)
class Refresh:
    """A noted resolution was used that is old: ask the origin in the background."""

    ref: Ref


Action = (
    Resolve
    | Fetch
    | Rank
    | StopFetch
    | Discard
    | Evict
    | Quarantine
    | Purge
    | Load
    | Release
    | Place
    | Unplace
    | CannotFetch
    | CannotLoad
    | Grant
    | Refuse
    | Expire
    | Refresh
)


@dataclass(frozen=True, slots=True)
class Started:
    """The shell has begun an action; until its outcome comes, the planner counts on it."""

    action: Action


Event = (
    Recovered
    | CapacitySet
    | ClaimMade
    | ClaimEnded
    | Renewed
    | Held
    | Used
    | Resolved
    | ResolveFailed
    | Fetched
    | FetchFailed
    | FetchStopped
    | Discarded
    | Evicted
    | EvictAsked
    | Corrupt
    | Quarantined
    | Purged
    | StandbySeen
    | GpuTold
    | GpusClaimed
    | HolderReady
    | StandbyGone
    | Loaded
    | LoadFailed
    | Released
    | HeldOutside
    | Started
)
