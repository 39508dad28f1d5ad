"""A simulated node around the planner: an origin, a disk, one standby, and a shell that runs the actions.

Owns the truth that a State is held against, and counts everything anew from that truth or from the
claims: nothing here uses the planner's ledgers or indexes to say what they should be. No I/O, no clock.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from cached.model import (
    DISK,
    HOST,
    ORIGIN_CHANGED,
    Artifact,
    ArtifactId,
    Aside,
    Claim,
    ClaimId,
    ClaimKind,
    Device,
    Digest,
    ErrorKind,
    FileSpec,
    Inventory,
    Note,
    Problem,
    Ref,
    Resident,
    Revision,
    RevisionKey,
    artifact_id,
    revision_key,
)
from cached.plan import State, apply, evict_problem, plan
from cached.plan import types as t
from cached.plan.order import worth
from cached.plan.state import POOLS, Queue
from cached.plan.words import STANDBY_WAIT_S

DISK_BYTES = 100
HOST_BYTES = 60
RULES = t.Rules(high_watermark=0.9, low_watermark=0.6, quarantine_keep_s=2000.0, leftovers_keep_s=1000.0)
ONLY_FULL = replace(RULES, high_watermark=1.0, low_watermark=1.0)
"""Nothing leaves before the disk is full."""
START = 1_000_000.0

TEMPORARY = Problem(ErrorKind.UNAVAILABLE, "ORIGIN_AWAY", "the origin is away", "wait", 1.0)
CHANGED = Problem(ErrorKind.FAILED, ORIGIN_CHANGED, "a file was changed after it was listed", "ask again")
PERMANENT = Problem(ErrorKind.NOT_FOUND, "NO_SUCH_FILE", "the file is not there", "mend the ref")

SIZES = {"a": 30, "b": 30, "c": 10, "d": 40, "e": 20, "f": 120, "g": 70}
"""Bytes of each content; ``f`` fits nowhere, ``g`` only on disk."""


def digest(content: str) -> Digest:
    return Digest(hashlib.sha256(content.encode()).hexdigest())


NO_TENSORS = {digest("c")}
BYTES_OF = {digest(name): size for name, size in SIZES.items()}


def make_revision(ref: str, contents: str, unattested: str = "") -> Revision:
    """A revision whose files hold ``contents``, a letter each; the origin vouches but for ``unattested``."""
    files = tuple(
        FileSpec(f"{i}.bin", SIZES[c], None if c in unattested else digest(c), version=c)
        for i, c in enumerate(contents)
    )
    return Revision(Ref(ref), revision_key(Ref(ref), files), files)


def artifact_of(revision: Revision, at: float = START) -> Artifact:
    """What fetching it makes."""
    files = [(f.path, f.size_bytes, digest(f.version)) for f in revision.files]
    blobs = tuple({digest(f.version): f.size_bytes for f in revision.files}.items())
    images = tuple(item for item in blobs if item[0] not in NO_TENSORS)
    return Artifact(artifact_id(files), blobs, at, images)


def note_of(revision: Revision, at: float = START) -> Note:
    return Note(revision.ref, revision.key, artifact_of(revision).id, revision.attested, at)


ORIGIN = {
    Ref("a"): (make_revision("a", "a"), make_revision("a", "bc")),
    Ref("ac"): (make_revision("ac", "ac"),),
    Ref("dc"): (make_revision("dc", "dc"), make_revision("dc", "dca")),
    Ref("ec"): (make_revision("ec", "ec", unattested="ec"), make_revision("ec", "cb", unattested="c")),
    Ref("also-a"): (make_revision("also-a", "a"),),
    Ref("dd"): (make_revision("dd", "dd"),),
    Ref("f"): (make_revision("f", "f"),),
    Ref("g"): (make_revision("g", "g"),),
}
REFS = tuple(ORIGIN)
REVISIONS = {revision.key: revision for versions in ORIGIN.values() for revision in versions}

StoreWork = t.Evict | t.Discard | t.Quarantine | t.Purge
Work = t.Resolve | t.Fetch | t.Load | t.Release | StoreWork


class World:
    """The node. Methods are what can happen; ``tick`` plans, checks each action, and starts it."""

    def __init__(
        self, keep_leftovers: bool = True, rules: t.Rules = RULES, disk_bytes: int = DISK_BYTES
    ) -> None:
        self.keep_leftovers = keep_leftovers
        self.rules = rules
        self.capacity_bytes = disk_bytes
        self.now = START
        self.made = 0
        self.version: Counter[Ref] = Counter()
        self.refused: dict[ClaimId, Problem] = {}
        self.granted: set[ClaimId] = set()
        # The disk.
        self.blobs: set[Digest] = set()
        self.manifests: dict[ArtifactId, Artifact] = {}
        self.notes: dict[Ref, Note] = {}
        self.ingests: dict[RevisionKey, Revision] = {}
        self.ran_at: dict[RevisionKey, float] = {}
        self.asides: dict[str, Aside] = {}
        self.pending: list[StoreWork] = []
        self.kept: list[tuple[tuple[ArtifactId, ...], tuple[Revision, ...], Aside | None]] = []
        # Memory, and whether the daemon hears its standby.
        self.memory: dict[Device, set[ArtifactId]] = defaultdict(set)
        self.sizes: dict[ArtifactId, Artifact] = {}
        self.connected: set[Device] = set()
        self.gone_at: dict[Device, float] = defaultdict(lambda: START)
        self.boot()

    # --- the shell --------------------------------------------------------------------------

    def boot(self) -> None:
        self.state = State(fetch_slots=2, resolve_slots=2, load_slots=1, rules=self.rules)
        self.works: list[Work] = []
        self.corrupt: set[Digest] = set()
        self.happen(t.CapacitySet(DISK, self.capacity_bytes))
        self.happen(t.CapacitySet(HOST, HOST_BYTES))

    def happen(self, event: t.Event) -> None:
        apply(self.state, event, self.now)

    def tick(self) -> None:
        """Plan and start until nothing is planned; every plan must be pure and silent once started."""
        for _ in range(20):
            actions = plan(self.state, self.now)
            assert actions == plan(self.state, self.now), "planning changed the state"
            refreshed = [self.start(action) for action in actions]
            again = plan(self.state, self.now)
            assert again == [], f"planned {actions}, and once that was started {again}"
            self.check()
            self.check_level()
            refs = [ref for ref in refreshed if ref is not None]
            if not refs:
                return
            for ref in refs:
                self.claim(ClaimKind.PREFETCH, ref, DISK, fresh=True)
        raise AssertionError("the planner does not come to rest")

    def start(self, action: t.Action) -> Ref | None:
        """Check an action against the truth, then begin it. Returns the ref to ask again for, if any."""
        self.check_action(action)
        self.happen(t.Started(action))
        match action:
            case t.Evict() | t.Discard() | t.Quarantine() | t.Purge():
                self.pending.append(action)
                self.works.append(action)
            case t.Fetch(revision):
                self.run_store()  # the store works in order, and a fetch begins with it
                self.ingests.setdefault(revision.key, revision)
                self.works.append(action)
            case t.Resolve() | t.Load() | t.Release():
                self.works.append(action)
            case t.Grant(claim_id, _):
                self.granted.add(claim_id)
            case t.Refuse(claim_id, problem):
                self.refused[claim_id] = problem
            case t.Refresh(ref):
                return ref
            case _:
                pass
        return None

    # --- claims -----------------------------------------------------------------------------

    def claim(
        self,
        kind: ClaimKind,
        ref: Ref,
        device: Device,
        fresh: bool = False,
        ttl_s: float | None = None,
        **more: Any,
    ) -> ClaimId:
        self.made += 1
        claim_id = ClaimId(f"{kind.value}-{self.made}")
        expires_at = None if ttl_s is None else self.now + ttl_s
        claim = Claim(claim_id, kind, ref, device, self.now, fresh=fresh, expires_at=expires_at)
        self.happen(t.ClaimMade(replace(claim, **more)))
        return claim_id

    def ask_evict(self, artifact: ArtifactId) -> None:
        if evict_problem(self.state, artifact) is None:
            self.happen(t.EvictAsked(artifact))

    def resize(self, capacity_bytes: int) -> None:
        """Somebody else fills the file system, or makes room on it."""
        self.capacity_bytes = capacity_bytes
        self.happen(t.CapacitySet(DISK, capacity_bytes))

    def furnish(self, refs: Iterable[Ref]) -> None:
        """Begin with as many of these as fit on disk, the first one the coldest."""
        for at, ref in enumerate(refs):
            revision = ORIGIN[ref][0]
            artifact = artifact_of(revision, START - 100 + at)
            contents = {d for d, _ in artifact.blobs}
            if sum(BYTES_OF[d] for d in self.blobs | contents) <= self.capacity_bytes:
                self.blobs |= contents
                self.manifests[artifact.id] = artifact
                self.notes[ref] = note_of(revision, START - 100 + at)
        self.restart()

    def restart(self) -> None:
        """The daemon dies: works in flight are lost, what is durable is found again."""
        claims = [
            claim
            for claim in self.state.claims.values()
            if claim.id not in self.state.members
            and (claim.kind is not ClaimKind.LEASE or claim.id in self.state.answered)
        ]
        self.pending.clear()
        self.kept.clear()
        self.connected.clear()
        self.sweep()
        self.boot()
        leftovers = tuple(self.ingests.values())
        found = t.Recovered(
            tuple(self.manifests.values()),
            tuple(self.notes.values()),
            tuple(claims),
            leftovers,
            tuple(self.asides.values()),
            self.ran_at,
        )
        self.happen(found)

    # --- the disk ---------------------------------------------------------------------------

    def run_store(self) -> None:
        """Do what the store's one thread was given, in order."""
        for work in self.pending:
            match work:
                case t.Evict(artifact, drop):
                    self.take_down(artifact)
                    self.drop(drop)
                case t.Discard(key, drop):
                    self.ingests.pop(key, None)
                    self.drop(drop)
                    self.sweep()  # the planner does not know the digests of unattested contents
                case t.Quarantine(artifacts, bad):
                    self.quarantine(artifacts, bad)
                case t.Purge(aside):
                    del self.asides[aside]
        self.pending.clear()

    def tell_store_works(self) -> None:
        """What the store has done is told before anything that it does later."""
        for work in list(self.works):
            if isinstance(work, StoreWork) and not any(work is other for other in self.pending):
                self.works.remove(work)
                self.finish_store(work)

    def drop(self, contents: Iterable[Digest]) -> None:
        self.blobs -= set(contents) - self.owned()

    def owned(self) -> set[Digest]:
        return {d for artifact in self.manifests.values() for d, _ in artifact.blobs}

    def take_down(self, artifact: ArtifactId) -> list[Note]:
        self.manifests.pop(artifact, None)
        notes = [note for note in self.notes.values() if note.artifact == artifact]
        for note in notes:
            del self.notes[note.ref]
        return notes

    def quarantine(self, artifacts: tuple[ArtifactId, ...], bad: Digest) -> None:
        having = {a.id for a in self.manifests.values() if any(d == bad for d, _ in a.blobs)}
        down = tuple(sorted(having | set(artifacts)))
        notes = [note for artifact in down for note in self.take_down(artifact)]
        aside = None
        if bad in self.blobs:
            aside = Aside(f"{bad}.{len(self.asides)}-{self.now}", BYTES_OF[bad], self.now)
            self.asides[aside.name] = aside
        self.blobs.discard(bad)
        self.corrupt.discard(bad)
        kept = tuple(attest(REVISIONS[note.revision]) for note in notes) if self.keep_leftovers else ()
        for revision in kept:
            self.ingests.setdefault(revision.key, revision)
        self.kept.append((down, kept, aside))
        self.sweep()

    def sweep(self) -> None:
        """Remove contents that no artifact and no ingest names."""
        named = self.owned() | {
            f.sha256 for revision in self.ingests.values() for f in revision.files if f.sha256
        }
        self.blobs &= named

    def disk_bytes(self) -> int:
        """Bytes on disk, with what transfers have set aside."""
        contents: dict[str, int] = {d: BYTES_OF[d] for d in self.blobs}
        for revision in self.ingests.values():
            contents |= {revision.content_key(i): f.size_bytes for i, f in enumerate(revision.files)}
        return sum(contents.values()) + sum(aside.size_bytes for aside in self.asides.values())

    # --- outcomes ---------------------------------------------------------------------------

    def finish(self, index: int, outcome: str) -> None:
        """A work in flight ends: ``ok``, ``temporary`` or ``permanent``. Store works end in order."""
        work = self.works[index % len(self.works)]
        if isinstance(work, StoreWork):
            work = next(w for w in self.works if isinstance(w, StoreWork))
        self.works.remove(work)
        problem = {"temporary": TEMPORARY, "permanent": PERMANENT}.get(outcome)
        match work:
            case t.Resolve(ref):
                self.happen(t.ResolveFailed(ref, problem) if problem else t.Resolved(self.current(ref)))
            case t.Fetch(revision):
                changed = None if revision.key == self.current(revision.ref).key else CHANGED
                self.finish_fetch(revision, problem or changed)
            case t.Load(device, artifact):
                self.finish_load(device, artifact, problem)
            case t.Release(device, artifact):
                self.finish_release(device, artifact, problem)
            case t.Evict() | t.Discard() | t.Quarantine() | t.Purge():
                self.run_store()
                self.finish_store(work)

    def current(self, ref: Ref) -> Revision:
        """What the origin has now."""
        return ORIGIN[ref][self.version[ref] % len(ORIGIN[ref])]

    def finish_fetch(self, revision: Revision, problem: Problem | None) -> None:
        key = revision.key
        if problem is None:
            if any(isinstance(work, t.Quarantine) for work in self.pending):
                self.run_store()  # a commit that slips in before a quarantine has a test of its own
            self.tell_store_works()
            artifact, note = artifact_of(revision, self.now), note_of(revision, self.now)
            del self.ingests[key]
            self.blobs |= {d for d, _ in artifact.blobs}
            self.manifests[artifact.id], self.notes[revision.ref] = artifact, note
            self.happen(t.Fetched(key, artifact, note))
            return
        self.ran_at[key] = self.now
        first = revision.files[0].sha256
        if first is not None:
            self.blobs.add(first)
        stopped = self.state.transfers[key].step is t.Step.STOPPING
        self.happen(t.FetchStopped(key) if stopped else t.FetchFailed(key, problem))

    def finish_load(self, device: Device, artifact: ArtifactId, problem: Problem | None) -> None:
        on_disk = artifact in self.manifests and {d for d, _ in self.manifests[artifact].blobs} <= self.blobs
        rotten = on_disk and self.corrupt & {d for d, _ in self.manifests[artifact].blobs}
        if problem is None and on_disk and not rotten:
            self.memory[device].add(artifact)
            self.sizes[artifact] = self.manifests[artifact]
            self.happen(t.Loaded(device, self.resident(artifact)))
        else:
            self.happen(t.LoadFailed(device, artifact, problem or PERMANENT))

    def finish_release(self, device: Device, artifact: ArtifactId, problem: Problem | None) -> None:
        self.memory[device].discard(artifact)
        self.happen(t.Released(device, artifact))

    def finish_store(self, work: StoreWork) -> None:
        match work:
            case t.Evict(artifact):
                self.happen(t.Evicted(artifact))
            case t.Discard(key):
                self.happen(t.Discarded(key))
            case t.Quarantine():
                self.happen(t.Quarantined(*self.kept.pop(0)))
            case t.Purge(aside):
                self.happen(t.Purged(aside))

    def rot(self, bad: Digest) -> None:
        self.corrupt.add(bad)
        self.happen(t.Corrupt(bad, "its bytes changed"))

    # --- the standby ------------------------------------------------------------------------

    def resident(self, artifact: ArtifactId) -> Resident:
        return Resident(artifact, self.sizes[artifact].size_bytes, locked=True)

    def see_standby(self, ahead: bool = False, device: Device = HOST) -> None:
        """It connects, or tells again. ``ahead``: it tells of works whose own answers are still to come."""
        told = set(self.memory[device])
        for work in self.calls(device) if ahead else ():
            if isinstance(work, t.Release):
                told.discard(work.artifact)
            elif work.artifact in self.manifests and not self.corrupt:
                self.sizes[work.artifact] = self.manifests[work.artifact]
                told.add(work.artifact)
        residents = tuple(self.resident(artifact) for artifact in sorted(told))
        self.connected.add(device)
        self.happen(t.StandbySeen(self.inventory(device, residents), self.room_of(device)))

    def inventory(self, device: Device, residents: tuple[Resident, ...]) -> Inventory:
        return Inventory(device, 7, HOST_BYTES, True, "", True, residents)

    def room_of(self, device: Device) -> int:
        return HOST_BYTES

    def calls(self, device: Device) -> list[t.Load | t.Release]:
        return [w for w in self.works if isinstance(w, t.Load | t.Release) and w.device == device]

    def lose_standby(self, died: bool, late: bool, device: Device = HOST) -> None:
        """``died``: its memory is gone too. ``late``: its calls fail after it is known to be gone."""
        calls = self.calls(device)
        self.works = [w for w in self.works if w not in calls]
        if died:
            self.memory[device].clear()
        self.connected.discard(device)
        self.gone_at[device] = self.now
        self.happen(t.StandbyGone(device))
        for call in calls:
            if isinstance(call, t.Release):
                self.memory[device].discard(call.artifact)
            elif late:
                self.happen(t.LoadFailed(device, call.artifact, TEMPORARY))

    # --- what must hold of an action --------------------------------------------------------

    def check_action(self, action: t.Action) -> None:
        state = self.state
        match action:
            case t.Evict(artifact, drop, why):
                self.check_victim(artifact, why)
                assert not self.claims_of(artifact), f"evicts the claimed {artifact}"
                assert not self.has_resident(artifact), "evicts a resident"
                assert set(drop) == self.only_of_artifact(artifact)
                self.check_alone()
            case t.Discard(key, drop):
                assert not self.wanting(key), "discards what is wanted"
                assert set(drop) == self.only_of_transfer(key)
                self.check_alone()
            case t.Purge(aside):
                oldest_at = min(other.at for other in state.asides.values())
                assert state.asides[aside].at == oldest_at, "purges what is younger than another"
                self.check_alone()
            case t.Release(device, artifact):
                proven = artifact in state.artifacts and state.is_verified(artifact)
                tainted = self.corrupt & {d for d, _ in self.blobs_of(artifact)}
                if proven and not tainted:
                    self.check_release(device, artifact)
            case t.Load(device, artifact):
                assert device in self.connected and state.is_verified(artifact)
                assert not self.corrupt & {d for d, _ in self.blobs_of(artifact)}, "loads corrupt content"
                assert action not in self.works, "loads twice"
                assert sum(isinstance(w, t.Load) for w in self.calls(device)) < state.load_slots
            case t.Fetch(revision):
                assert not any(isinstance(w, t.Fetch) and w.revision == revision for w in self.works)
                assert sum(isinstance(w, t.Fetch) for w in self.works) < state.fetch_slots
                assert self.wanting(revision.key), "fetches what nobody wants"
            case t.Rank(key, background):
                waited_for = any(c.kind is ClaimKind.LEASE for c in self.wanting(key))
                assert background is not waited_for
                assert any(isinstance(w, t.Fetch) and w.revision.key == key for w in self.works)
            case t.StopFetch(key):
                waited_for = [c for c in self.wanting(key) if c.kind is ClaimKind.LEASE]
                assert not waited_for, f"stops what {waited_for} wait for"
            case t.Grant(claim_id, device):
                self.check_grant(state.claims[claim_id], device)
            case t.Refuse(claim_id, problem):
                self.check_refusal(state.claims[claim_id], problem)
            case _:
                pass

    def has_resident(self, artifact: ArtifactId) -> bool:
        return any(artifact in self.memory[device] for device in self.connected)

    def check_release(self, device: Device, artifact: ArtifactId) -> None:
        claims = [c for c in self.claims_of(artifact) if c.device == device]
        assert not claims, f"releases what {claims} stand on"
        others = [w for w in self.calls(device) if isinstance(w, t.Release)]
        assert not [w for w in others if self.state.is_verified(w.artifact)], "a second release"

    def check_alone(self) -> None:
        works = [w for w in self.works if isinstance(w, t.Evict | t.Discard | t.Purge)]
        assert not works, f"{works} are still in flight"

    def check_victim(self, artifact: ArtifactId, why: str) -> None:
        """There is a reason to evict, nothing that serves nobody would do, and it is missed the least."""
        if "operator" in why:
            return
        if "watermark" in why:
            used_bytes = union_bytes(self.standing())
            assert used_bytes > self.rules.low_watermark * self.capacity_bytes, (
                "evicts below the low watermark"
            )
        assert not self.state.asides and not self.unwanted_leftovers(), "evicts before what serves nobody"
        mine = self.score(artifact)
        better = [other for other in self.idle_artifacts() if self.score(other) > mine]
        assert not better, f"evicts {artifact} ({mine}) before {better}"

    def score(self, artifact: ArtifactId) -> float:
        freed_bytes = sum(BYTES_OF[d] for d in self.only_of_artifact(artifact))
        last_used_at = self.state.artifacts[artifact].artifact.last_used_at
        return max(0.0, self.now - last_used_at) * worth(freed_bytes, 0.0)

    def idle_artifacts(self) -> list[ArtifactId]:
        """What may be evicted."""
        return [
            a
            for a in self.state.artifacts
            if self.state.is_verified(a)
            and not self.claims_of(a)
            and not self.corrupt & {d for d, _ in self.blobs_of(a)}
        ]

    def unwanted_leftovers(self) -> list[RevisionKey]:
        idle = (t.Step.IDLE, t.Step.FAILED, t.Step.REFUSED)
        transfers = self.state.transfers.items()
        return [k for k, x in transfers if x.reserved and x.step in idle and not self.wanting(k)]

    def check_level(self) -> None:
        """At rest: above the high watermark, whatever may leave is leaving; and old things are gone."""
        used_bytes, rules = union_bytes(self.standing()), self.rules
        draining = self.state.disk.draining
        assert draining or used_bytes <= rules.high_watermark * self.capacity_bytes
        assert not draining or used_bytes > rules.low_watermark * self.capacity_bytes
        moving = any(isinstance(w, StoreWork | t.Release | t.Load) for w in self.works)
        stopping = any(isinstance(w, t.Fetch) and not self.wanting(w.revision.key) for w in self.works)
        if moving or stopping:
            return
        if draining:
            held = union_bytes(self.kept_on_disk())
            idle = [dict(self.blobs_of(a)) for a in self.idle_artifacts()]
            assert union_bytes([*idle, *self.kept_on_disk()]) == held, "what could leave stays"
        old = [a for a in self.state.asides.values() if a.at + rules.quarantine_keep_s <= self.now]
        left = [self.state.transfers[k].ran_at for k in self.unwanted_leftovers()]
        assert not old and all(at + rules.leftovers_keep_s > self.now for at in left), (
            "it is kept for too long"
        )
        assert not draining or not (self.state.asides or left), "what serves nobody stays"

    def kept_on_disk(self) -> list[dict[str, int]]:
        """What claims hold of the disk."""
        held = [dict(self.blobs_of(a)) for a in self.state.artifacts if self.claims_of(a)]
        wanted = [x for k, x in self.state.transfers.items() if x.reserved and self.wanting(k)]
        return held + [keys_of(x.revision) for x in wanted]

    def check_grant(self, claim: Claim, device: Device) -> None:
        assert claim.artifact is not None and claim.kind is not ClaimKind.PIN
        contents = {d for d, _ in self.blobs_of(claim.artifact)}
        assert claim.artifact in self.manifests and contents <= self.blobs, "grants what is not on disk"
        assert not contents & self.corrupt, "grants what is known to be corrupt"
        if device != DISK:
            loading = t.Load(device, claim.artifact) in self.works
            there = loading or claim.artifact in self.memory[device]
            assert device in self.connected and there, "grants absent memory"

    def check_refusal(self, claim: Claim, problem: Problem) -> None:
        assert claim.kind is not ClaimKind.PIN and claim.id not in self.state.answered
        if problem.reason == "NO_STANDBY":
            device = next(d for d in (claim.device, *self.rooms_of(claim)) if d in problem.message)
            assert device not in self.connected
            since = max(self.gone_at[device], claim.made_at if device in self.state.places else START)
            assert self.now >= since + STANDBY_WAIT_S
        elif problem.reason in ("DISK_CAPACITY", "DEVICE_CAPACITY") and claim.kind is ClaimKind.LEASE:
            assert self.cannot_fit(claim, problem), f"refused {claim}, which fits: {problem.message}"

    def rooms_of(self, claim: Claim) -> tuple[Device, ...]:
        return () if claim.room is None else (claim.room.device,)

    # --- counted anew -----------------------------------------------------------------------

    def claims_of(self, artifact: ArtifactId) -> list[Claim]:
        return [c for c in self.state.claims.values() if c.artifact == artifact]

    def wanting(self, key: RevisionKey) -> list[Claim]:
        return [c for c in self.state.claims.values() if c.revision == key and c.artifact is None]

    def blobs_of(self, artifact: ArtifactId) -> tuple[tuple[Digest, int], ...]:
        proven = self.state.artifacts.get(artifact)
        return proven.artifact.blobs if proven else ()

    def standing(self, but: RevisionKey | ArtifactId | None = None) -> list[dict[str, int]]:
        """What counts on disk: artifacts until they are gone, and what is set aside."""
        found: list[dict[str, int]] = [
            dict(p.artifact.blobs) for p in self.state.artifacts.values() if p.artifact.id != but
        ]
        transfers = [x for x in self.state.transfers.values() if x.reserved and x.revision.key != but]
        asides = {f"quarantine/{a.name}": a.size_bytes for a in self.state.asides.values()}
        return found + [keys_of(x.revision) for x in transfers] + [{k: v} for k, v in asides.items()]

    def only_of_artifact(self, artifact: ArtifactId) -> set[Digest]:
        others = {key for contents in self.standing(artifact) for key in contents}
        return {d for d, _ in self.blobs_of(artifact) if d not in others}

    def only_of_transfer(self, key: RevisionKey) -> set[Digest]:
        others = {k for contents in self.standing(key) for k in contents}
        files = self.state.transfers[key].revision.files
        return {f.sha256 for f in files if f.sha256 and f.sha256 not in others}

    def cannot_fit(self, claim: Claim, problem: Problem) -> bool:
        """Whether what others claim leaves no room for what this claim lacks."""
        if problem.reason == "DISK_CAPACITY":
            assert claim.revision is not None
            need = keys_of(self.state.transfers[claim.revision].revision)
            held = self.claimed_on_disk(claim.revision)
            return union_bytes([need, *held]) > self.capacity_bytes
        assert claim.artifact is not None
        return not self.fits_in_memory(claim.device, claim.artifact, claim.priority)

    def fits_in_memory(self, device: Device, artifact: ArtifactId, priority: int) -> bool:
        need = dict(self.blobs_of(artifact))
        return union_bytes([need, *self.claimed_in_memory(artifact)]) <= HOST_BYTES

    def claimed_on_disk(self, but: RevisionKey) -> list[dict[str, int]]:
        state = self.state
        held: list[dict[str, int]] = [
            dict(p.artifact.blobs)
            for p in state.artifacts.values()
            if self.claims_of(p.artifact.id) and p.step is t.DiskStep.VERIFIED
        ]
        for transfer in state.transfers.values():
            key = transfer.revision.key
            kept = transfer.reserved and transfer.step is not t.Step.DISCARDING
            if kept and key != but and self.wanting(key):
                held.append(keys_of(transfer.revision))
        return held

    def claimed_in_memory(self, but: ArtifactId) -> list[dict[str, int]]:
        return [
            dict(residency.items)
            for (device, artifact), residency in self.state.residencies.items()
            if artifact != but
            and device == HOST
            and (
                residency.step is t.ResidentStep.LOADING
                or any(c.device == device for c in self.claims_of(artifact))
            )
        ]

    # --- what must hold at any time ---------------------------------------------------------

    def check(self) -> None:
        self.check_ledgers()
        self.check_claims()
        self.check_records()

    def check_ledgers(self) -> None:
        state = self.state
        counted = state.disk.ledger
        assert counted.used_bytes == union_bytes(self.standing())
        assert contents_of(counted) == Counter(key for s in self.standing() for key in s)
        if not any(isinstance(w, t.Quarantine) for w in self.works):  # it moves what is counted later
            assert self.disk_bytes() <= counted.used_bytes
            assert set(self.asides) == set(state.asides) - {w.aside for w in self.done(t.Purge)}
        for device in state.places:
            if device != DISK:
                self.check_memory(device)

    def items_of(self, device: Device, artifact: ArtifactId) -> dict[str, int]:
        """What an artifact that is on disk takes there."""
        return dict(self.blobs_of(artifact))

    def held_items(self, device: Device, artifact: ArtifactId) -> dict[str, int]:
        """What a resident takes there."""
        return dict(self.sizes[artifact].blobs)

    def check_memory(self, device: Device) -> None:
        state = self.state
        residencies = [dict(r.items) for spot, r in state.residencies.items() if spot[0] == device]
        in_memory = state.places[device].ledger
        assert in_memory.used_bytes == union_bytes(residencies)
        assert contents_of(in_memory) == Counter(key for r in residencies for key in r)
        known = all(key in BYTES_OF for r in residencies for key in r)
        # An orphan's contents are not known, so what it shares counts twice until it is released.
        assert in_memory.used_bytes <= self.room_of(device) or not known
        loading = {w.artifact for w in self.calls(device) if isinstance(w, t.Load)}
        held = [self.held_items(device, a) for a in self.memory[device]]
        assert union_bytes(held + [self.items_of(device, a) for a in loading]) <= self.room_of(device)

    def done(self, kind: type[t.Purge]) -> list[t.Purge]:
        """Works that the store has done and not yet told of."""
        told = [w for w in self.works if isinstance(w, kind)]
        return [w for w in told if not any(w is other for other in self.pending)]

    def check_claims(self) -> None:
        """The indexes are what the claims and facts say."""
        state, claims = self.state, list(self.state.claims.values())
        check_queue(state.unresolved, [(c.ref, c) for c in claims if c.revision is None])
        unfetched = [(c.revision, c) for c in claims if c.revision is not None and c.artifact is None]
        check_queue(state.unfetched, unfetched)
        bound = [(c.artifact, c) for c in claims if c.revision is not None and c.artifact is not None]
        pooled = [c for _, c in bound if c.kind is ClaimKind.PIN and c.device in POOLS]
        assert set(state.pools) == {c.id for c in pooled}
        absent = [((c.device, a), c) for a, c in bound if c not in pooled and not self.is_met(c, a)]
        check_queue(state.unloaded, absent)
        lacking = {c.id for _, c in absent}
        ready = {
            c.id
            for _, c in bound
            if c.kind is not ClaimKind.PIN and c.id not in state.answered and c.id not in lacking
        }
        assert set(state.ready) == ready
        holders: dict[ArtifactId, set[ClaimId]] = {}
        for artifact, claim in bound:
            holders.setdefault(artifact, set()).add(claim.id)
        assert {artifact: set(ids) for artifact, ids in state.claimed.items()} == holders
        on: dict[tuple[Device, ArtifactId], set[ClaimId]] = {}
        for artifact, claim in bound:
            on.setdefault((claim.device, artifact), set()).add(claim.id)
        assert {spot: set(ids) for spot, ids in state.on.items()} == on
        assert set(state.timed) == {c.id for c in claims if c.expires_at is not None}
        assert state.answered <= {c.id for c in claims if c.kind is ClaimKind.LEASE}
        for artifact, claim in bound:
            assert claim.id in state.answered or artifact in state.artifacts, "bound to nothing"

    def is_met(self, claim: Claim, artifact: ArtifactId) -> bool:
        """Whether it stands where the claim could be met from."""
        prefers = () if claim.id in self.state.answered else claim.prefers
        return any(d == DISK or self.gives(d, artifact) for d in (*prefers, claim.device))

    def gives(self, device: Device, artifact: ArtifactId) -> bool:
        return self.stands(device, artifact)

    def stands(self, device: Device, artifact: ArtifactId) -> bool:
        residency = self.state.residencies.get((device, artifact))
        return residency is not None and residency.step is t.ResidentStep.RESIDENT

    def check_records(self) -> None:
        """No record outlives its reason, and none is missing."""
        state = self.state
        idle = (t.Step.IDLE, t.Step.FAILED, t.Step.REFUSED)
        active = {k for k, x in state.transfers.items() if x.step not in idle}
        assert set(state.running) == active and set(state.idle_transfers) == set(state.transfers) - active
        for key, transfer in state.transfers.items():
            assert transfer.reserved or self.wanting(key), "a leak"
        for claim in state.claims.values():
            lacks = claim.revision is not None and claim.artifact is None
            assert not lacks or claim.revision in state.transfers, "nothing to fetch for a claim"
        for ref, resolution in state.resolutions.items():
            asked = any(c.ref == ref and c.revision is None for c in state.claims.values())
            assert resolution.step is t.Step.RUNNING or asked, "a leak"
        assert set(state.idle) == {
            a for a in state.artifacts if state.is_verified(a) and not self.claims_of(a)
        }
        held = {a for a in state.artifacts if state.is_verified(a) and self.claims_of(a)}
        assert state.held == {a: sum(size for _, size in self.blobs_of(a)) for a in held}
        assert state.held_bytes == sum(state.held.values())
        assert set(state.leaving) == {a for a in state.artifacts if not state.is_verified(a)}
        for artifact, found in state.artifacts.items():
            assert set(found.refs) == {n.ref for n in state.notes.values() if n.artifact == artifact}
            assert set(found.keys) == {k for k, a in state.proven.items() if a == artifact}
        for note in state.notes.values():
            assert state.is_verified(note.artifact) and state.proven[note.revision] == note.artifact
        for proven in state.proven.values():
            assert state.is_verified(proven)
        for artifact in state.evict_asked:
            assert state.is_verified(artifact) and not self.claims_of(artifact), "a leak"
        for (_, artifact), residency in state.residencies.items():
            failed = residency.step in (t.ResidentStep.FAILED, t.ResidentStep.REFUSED)
            releasing = residency.step is t.ResidentStep.RELEASING
            assert failed == (not residency.items) and (residency.problem is None or failed or releasing)
            assert not failed or residency.problem is not None
            assert not failed or artifact in state.artifacts, "a leak"
        for artifact, found in state.artifacts.items():
            if found.step is t.DiskStep.VERIFIED:
                contents = {d for d, _ in found.artifact.blobs}
                assert artifact in self.manifests and contents <= self.blobs, "the disk has lost it"

    # --- the end ----------------------------------------------------------------------------

    def calm_down(self) -> None:
        """Faults are over: all that is in flight ends well, and time passes until nothing is waited for."""
        self.mend()
        self.tick()
        for _ in range(40):
            for _ in range(200):
                if not self.works:
                    break
                self.finish(0, "ok")
                self.tick()
            assert not self.works, "work without end"
            self.now += 301.0
            self.tick()
        assert not self.works or all(isinstance(w, t.Resolve | t.Fetch | t.Load) for w in self.works)

    def connect(self) -> None:
        self.see_standby()

    def mend(self) -> None:
        if HOST not in self.connected:
            self.see_standby()

    def check_met(self) -> None:
        """Every claim is met, or gone with its answer, or is a pin whose recorded problem is true."""
        assert not self.asides and not self.unwanted_leftovers()
        for claim in self.state.claims.values():
            if claim.kind is ClaimKind.PIN:
                self.check_pin(claim)
            else:
                assert claim.id in self.state.answered, f"{claim} was never answered"

    def check_pin(self, pin: Claim) -> None:
        state, problem = self.state, None
        if pin.revision is None:
            problem = state.resolutions[pin.ref].problem
        elif pin.artifact is None:
            problem = state.transfers[pin.revision].problem
        elif pin.id not in state.pools and not self.is_met(pin, pin.artifact):
            residency = state.residencies.get((pin.device, pin.artifact))
            problem = residency.problem if residency else None
        else:
            return
        assert problem is not None, f"{pin} is not met, and nothing says why"
        self.check_problem(pin, problem)

    def check_problem(self, pin: Claim, problem: Problem) -> None:
        """What is told of a pin in calm is true."""
        if problem.reason in ("DISK_CAPACITY", "DEVICE_CAPACITY"):
            assert self.cannot_fit(pin, problem), f"{pin} would fit: {problem.message}"
        else:
            assert problem == PERMANENT, f"{pin} is not tried again after {problem}"


def attest(revision: Revision) -> Revision:
    """The revision with every digest filled in, as it is known once fetched."""
    return replace(revision, files=tuple(replace(f, sha256=digest(f.version)) for f in revision.files))


def keys_of(revision: Revision) -> dict[str, int]:
    return {revision.content_key(i): f.size_bytes for i, f in enumerate(revision.files)}


def union_bytes(sets: Iterable[Mapping[Any, int]]) -> int:
    union: dict[str, int] = {}
    for contents in sets:
        union |= contents
    return sum(union.values())


def contents_of(ledger: object) -> Counter[str]:
    """The references that a ledger counts, per content."""
    return Counter({key: count for (key, _), count in ledger._contents.items() if count})  # type: ignore[attr-defined]


def check_queue(queue: Queue, pairs: list[tuple]) -> None:  # type: ignore[type-arg]
    """A queue files exactly these claims under these keys, and knows which of them leases wait for."""
    assert set(queue.in_order()) == {key for key, _ in pairs} and len(queue) == len(set(queue.in_order()))
    for key in queue.in_order():
        mine = [claim for k, claim in pairs if k == key]
        assert sorted(queue.claims(key)) == sorted(c.id for c in mine)
        assert queue.urgent(key) == any(c.kind is ClaimKind.LEASE for c in mine)
