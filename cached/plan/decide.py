"""All policy: ``plan(state, now)`` compares claims with facts and says what to do next.

Owns every decision: what to resolve, fetch first, stop, evict, load where, release, grant, refuse; what
concerns GPUs is in ``gpus`` and ``pools``.
Pure: reads the state, changes nothing, imports no clock, no I/O and no logging. Once its actions
have been applied as started, it plans nothing more until something happens or time passes.
"""

from __future__ import annotations

import math
from dataclasses import replace

from cached.model import (
    DISK,
    HOST,
    ArtifactId,
    ClaimKind,
    Device,
    Digest,
    ErrorKind,
    Problem,
    Ref,
    RevisionKey,
    is_digest,
)
from cached.plan import types as t
from cached.plan.gpus import Gpus
from cached.plan.ledger import Item, Ledger
from cached.plan.order import worth
from cached.plan.state import POOLS, Place, Spot, State, is_gpu, is_moving, is_standing, transfer_items
from cached.plan.tick import Tick
from cached.plan.words import ROOM_RETRY_S, STANDBY_WAIT_S, claim_words, gb, no_standby_problem

REFRESH_AFTER_S = 300.0
"""How old a noted resolution may be before its use makes the daemon ask the origin in the background."""
RAISE_IT = "free space on the file system, or raise [store] capacity_bytes or lower keep_free"


def plan(state: State, now: float) -> list[t.Action]:
    """What to do now. ``now`` is in Unix seconds."""
    return _Draft(state, now).decide()


class _Draft(Tick):
    """One tick's decisions, with what they already use up."""

    def __init__(self, state: State, now: float) -> None:
        super().__init__(state, now)
        self.gpus = Gpus(self)
        self.used: set[ArtifactId] = set()
        self.disk = state.disk.ledger.draft()
        self.making_room = False
        self.starting: set[RevisionKey] = set()
        self.moving: set[Device] = set()

    def decide(self) -> list[t.Action]:
        self._expire()
        self._quarantine()
        self._answer()
        self._resolve()
        self._fetch()
        self._withdraw_residents()
        self.gpus.relieve()
        self.gpus.load()
        self.gpus.vacate()
        self._load()
        self._evict_asked()
        self._tidy()
        self._drain()
        return self.actions

    # --- claims -----------------------------------------------------------------------------

    def _expire(self) -> None:
        for claim_id in self.state.timed:
            claim = self.state.claims[claim_id]
            if claim.expires_at is not None and claim.expires_at <= self.now:
                self.ended.add(claim_id)
                if claim.artifact is not None and claim_id in self.state.answered:
                    self.used.add(claim.artifact)
                self.actions.append(t.Expire(claim_id))

    def _answer(self) -> None:
        refreshed: set[str] = set()
        self.gpus.refuse_rooms()
        # Whoever needs no room goes first: what he is given makes none.
        for claim_id in sorted(self.state.ready, key=lambda c: c in self.state.rooms):
            claim = self.state.claims[claim_id]
            if claim_id in self.ended or claim.artifact is None or not self.is_sound(claim.artifact):
                continue
            if claim.room is not None and not self.gpus.has_room(claim, claim.room):
                continue
            self.grant(claim, self.state.best(claim, claim.artifact), claim.artifact)
            self.used.add(claim.artifact)
            if claim.kind is ClaimKind.PREFETCH:
                self.ended.add(claim_id)
            note = self.state.notes.get(claim.ref)
            if note is None or note.artifact in self.tainted or note.ref in refreshed:
                continue
            if note.resolved_at + REFRESH_AFTER_S <= self.now:
                refreshed.add(note.ref)
                self.actions.append(t.Refresh(note.ref))
        # What was given out may have been what somebody's room was to be made of.
        self.gpus.refuse_rooms()

    # --- resolution -------------------------------------------------------------------------

    def _resolve(self) -> None:
        resolutions = self.state.resolutions
        slots = self.state.resolve_slots - sum(r.step is t.Step.RUNNING for r in resolutions.values())
        for ref in self.state.unresolved.in_order(self.ended):
            record = resolutions.get(ref)
            if record is not None and record.step is t.Step.RUNNING:
                continue
            if record is not None and record.problem is not None:
                again = self.tell(self.state.unresolved.claims(ref), record)
                if not again or record.retry_at > self.now:
                    continue
            if slots > 0 and self.any_left(self.state.unresolved.claims(ref)):
                slots -= 1
                self.actions.append(t.Resolve(ref))

    # --- transfers --------------------------------------------------------------------------

    def _fetch(self) -> None:
        slots = self.state.fetch_slots - len(self.state.running)
        self._stop_unclaimed()
        self._rank()
        for key in [key for key in self.state.unfetched.in_order(self.ended) if self._wants_fetch(key)]:
            if slots > 0:
                slots -= self._start(self.state.transfers[key])
            elif self.state.unfetched.urgent(key, self.ended):
                self._preempt()
            if self.making_room:
                # Whoever is first in line for room gets it; what is behind would eat it up.
                return

    def _wants_fetch(self, key: RevisionKey) -> bool:
        transfer = self.state.transfers[key]
        if transfer.problem is None:
            return transfer.step is t.Step.IDLE and self._wanted(key)
        again = self.tell(self.state.unfetched.claims(key), transfer)
        return again and transfer.retry_at <= self.now

    def _stop_unclaimed(self) -> None:
        for key in self.state.running:
            if self.state.transfers[key].step is t.Step.RUNNING and not self._wanted(key):
                self.actions.append(t.StopFetch(key))

    def _rank(self) -> None:
        """Tell running transfers when somebody comes to wait for them, and when nobody does any more."""
        for key in self.state.running:
            transfer = self.state.transfers[key]
            background = not self.state.unfetched.urgent(key, self.ended)
            running = transfer.step is t.Step.RUNNING and self._wanted(key)
            if running and background != transfer.background:
                self.actions.append(t.Rank(key, background))

    def _wanted(self, key: RevisionKey) -> bool:
        return self.any_left(self.state.unfetched.claims(key))

    def _preempt(self) -> None:
        """Stop the newest background transfer for one that somebody waits for; it resumes later."""
        transfers = [self.state.transfers[key] for key in self.state.running]
        stopping = any(isinstance(a, t.StopFetch) for a in self.actions)
        if stopping or any(r.step is not t.Step.RUNNING for r in transfers):
            return
        background = [r for r in transfers if not self.state.unfetched.urgent(r.revision.key, self.ended)]
        if background:
            self.actions.append(t.StopFetch(background[-1].revision.key))

    def _start(self, transfer: t.Transfer) -> int:
        """Fetch it, or make room for it, or say that it cannot fit. Returns the slots taken."""
        key = transfer.revision.key
        items = transfer_items(transfer)
        need_bytes = 0 if transfer.reserved else self.disk.missing_bytes(items)
        capacity_bytes = self.state.disk.capacity_bytes
        if self.disk.used_bytes + need_bytes <= capacity_bytes:
            if not transfer.reserved:
                self.disk.add(items)
            self.starting.add(key)
            background = not self.state.unfetched.urgent(key, self.ended)
            self.actions.append(t.Fetch(transfer.revision, background))
            return 1
        if not self._surely_fits(transfer):
            claimed = self._claimed_on_disk(but=transfer)
            if claimed.missing_bytes(items) + claimed.used_bytes > capacity_bytes:
                self._cannot_fetch(transfer, self._no_room_on_disk(transfer, claimed))
                return 0
        self._make_room_on_disk(f"room for {gb(transfer.revision.size_bytes)} of {transfer.revision.ref}")
        return 0

    def _surely_fits(self, transfer: t.Transfer) -> bool:
        """Whether it fits even if all that is claimed, and every transfer, shared nothing: known without a
        walk over what is claimed."""
        others = (x for x in self.state.transfers.values() if x.reserved or x.revision.key in self.starting)
        most_bytes = sum(x.revision.size_bytes for x in others if x is not transfer)
        most_bytes += self.state.held_bytes + transfer.revision.size_bytes
        return most_bytes <= self.state.disk.capacity_bytes

    def _cannot_fetch(self, transfer: t.Transfer, problem: Problem) -> None:
        key = transfer.revision.key
        self.actions.append(t.CannotFetch(key, problem))
        failed = replace(transfer, problem=problem, rounds=transfer.rounds + 1)
        self.tell(self.state.unfetched.claims(key), failed)

    def _claimed_on_disk(self, but: t.Transfer | None = None) -> Ledger:
        """What may not be evicted: claimed artifacts, transfers that are wanted and reserved."""
        ledger = Ledger()
        for artifact_id in self.state.claimed:
            if self.is_sound(artifact_id) and self._claimed(artifact_id):
                ledger.add(self.state.artifacts[artifact_id].artifact.blobs)
        for key, transfer in self.state.transfers.items():
            kept = transfer.reserved and transfer.step is not t.Step.DISCARDING
            if (kept or key in self.starting) and transfer is not but and self._wanted(key):
                ledger.add(transfer_items(transfer))
        return ledger

    def _claimed(self, artifact_id: ArtifactId) -> bool:
        return self.any_left(self.state.claimed.get(artifact_id, ()))

    def _no_room_on_disk(self, transfer: t.Transfer, claimed: Ledger) -> Problem:
        need_bytes = sum(dict(transfer_items(transfer)).values())
        capacity_bytes = self.state.disk.capacity_bytes
        never = need_bytes > capacity_bytes
        return Problem(
            ErrorKind.NO_ROOM,
            "DISK_CAPACITY",
            f"{transfer.revision.ref} needs {gb(need_bytes)} on disk; the capacity is "
            f"{gb(capacity_bytes)}, of which {gb(claimed.used_bytes)} are claimed by others",
            f"{RAISE_IT}, or take a smaller model"
            if never
            else f"unpin or stop something ('cachectl ls' shows the claims), or {RAISE_IT}",
            None if never else ROOM_RETRY_S,
        )

    def _make_room_on_disk(self, why: str) -> None:
        """Begin with one thing that may go, for whoever is first in line."""
        self.making_room = True
        if not self._disk_in_motion() and all(map(self._wanted, self.state.running)):
            self._let_one_go(why)

    def _let_one_go(self, why: str) -> None:
        """First what serves nobody: quarantined contents, leftovers; then the artifact missed least."""
        aside = self._oldest_aside()
        if aside is not None:
            self.actions.append(t.Purge(aside, why))
        elif (unwanted := self._unwanted_leftover()) is not None:
            self._discard(unwanted)
        elif (victim := self._victim()) is not None:
            self._take_down(victim, why)

    def _oldest_aside(self) -> str | None:
        return min(self.state.asides, key=lambda name: (self.state.asides[name].at, name), default=None)

    def _unwanted_leftover(self, ran_until: float = math.inf) -> RevisionKey | None:
        """A transfer that holds room, has not run since then, and that nobody wants."""
        for key in self.state.idle_transfers:
            transfer = self.state.transfers[key]
            if transfer.reserved and transfer.ran_at <= ran_until and not self._wanted(key):
                return key
        return None

    def _victim(self) -> ArtifactId | None:
        """The unclaimed artifact with the highest score (see ``order``)."""
        freed = {a for claim_id in self.ended if (a := self.state.claims[claim_id].artifact) is not None}
        freed = {a for a in freed if self.is_sound(a) and not self._claimed(a)}
        best = min((*self.state.idle.coldest(self.tainted), *freed), key=self._score, default=None)
        if best is None or not self._score(best)[1]:
            return best
        # The coldest free nothing by themselves. One that does will do, or one of several that do together;
        # what claims hold anyway is not worth taking anything down for.
        kept = self._claimed_on_disk()
        every = (a for a in (*self.state.idle, *freed) if self.is_sound(a))
        helpful = (a for a in every if kept.missing_bytes(self.state.artifacts[a].artifact.blobs))
        return min(helpful, key=self._score, default=None)

    def _score(self, artifact_id: ArtifactId) -> tuple[float, bool, float, str]:
        """The smallest of these goes first: the score, whether it frees nothing, and what breaks a tie."""
        proven = self.state.artifacts[artifact_id]
        freed_bytes = self.disk.freed_bytes(proven.artifact.blobs)
        # What is given out or given back in this plan is used now, and not when it was before.
        used_at = self.now if artifact_id in self.used else proven.artifact.last_used_at
        score = max(0.0, self.now - used_at) * worth(freed_bytes, proven.rate_bytes_per_s)
        return -score, freed_bytes == 0, used_at, artifact_id

    def _discard(self, key: RevisionKey) -> None:
        transfer = self.state.transfers[key]
        drop = tuple(Digest(k) for k in self.disk.only_in(transfer_items(transfer)) if is_digest(k))
        self.actions.append(t.Discard(key, drop))

    def _take_down(self, artifact_id: ArtifactId, why: str) -> None:
        """Evict it, after releasing it from devices."""
        spots = self.state.devices_of(artifact_id)
        busy = [s for s in spots if is_standing(self.state.residencies[s])]
        for spot in busy:
            if self.state.residencies[spot].step is t.ResidentStep.RESIDENT:
                self.release(spot, why)
        if not busy:
            blobs = self.state.artifacts[artifact_id].artifact.blobs
            drop = tuple(Digest(k) for k in self.disk.only_in(blobs))
            self.actions.append(t.Evict(artifact_id, drop, why))

    # --- devices ----------------------------------------------------------------------------

    def _load(self) -> None:
        ledgers = {d: place.ledger.draft() for d, place in self.state.places.items() if d != DISK}
        loading = [s for s, r in self.state.residencies.items() if r.step is t.ResidentStep.LOADING]
        slots = {d: self.state.load_slots - sum(s[0] == d for s in loading) for d in ledgers}
        self.moving = {s[0] for s, r in self.state.residencies.items() if is_moving(r)}
        self.moving |= {device for device, _ in self.released}
        for spot in list(self.state.unloaded.in_order(self.ended)):
            place = self.state.places.get(spot[0])
            if spot[0] in POOLS:
                self.gpus.pools.answer(spot)
            elif place is None or place.inventory is None:
                self._no_standby(spot, place)
            elif is_gpu(spot[0]):
                continue
            elif self._wants_load(spot) and slots[spot[0]] > 0 and spot[0] not in self.moving:
                slots[spot[0]] -= self._load_one(spot, place, ledgers[spot[0]])

    def _wants_load(self, spot: Spot) -> bool:
        if not self.is_sound(spot[1]):
            return False
        residency = self.state.residencies.get(spot)
        if residency is None:
            return self.any_left(self.state.unloaded.claims(spot))
        if residency.problem is None:
            return False
        again = self.tell(self.state.unloaded.claims(spot), residency)
        return again and residency.retry_at <= self.now

    def _no_standby(self, spot: Spot, place: Place | None) -> None:
        for claim_id in self.state.unloaded.claims(spot):
            claim = self.state.claims[claim_id]
            # One that was never seen since the start is hardly coming now.
            since = max(claim.made_at, place.gone_at) if place else self.state.began_at
            if self.waits(claim) and since + STANDBY_WAIT_S <= self.now:
                self.refuse(claim, no_standby_problem(spot[0]))

    def _load_one(self, spot: Spot, place: Place, ledger: Ledger) -> int:
        """Load it, or make room for it, or say that it cannot fit. Returns the slots taken."""
        device, artifact_id = spot
        items = list(self.state.items_on(device, artifact_id))
        if ledger.used_bytes + ledger.missing_bytes(items) <= place.capacity_bytes:
            ledger.add(items)
            self.actions.append(t.Load(device, artifact_id))
            return 1
        claimed = self.claimed_on(device, artifact_id)
        if claimed.used_bytes + claimed.missing_bytes(items) > place.capacity_bytes:
            problem = _no_room_on_device(device, artifact_id, items, place.capacity_bytes, claimed.used_bytes)
            self.cannot_load(spot, problem)
            return 0
        self.moving.add(device)
        idle = [s for s in self._residents(device) if not self._claimed_there(s)]
        if idle:
            self.release(min(idle, key=self.coldness), f"room for {artifact_id}")
        return 0

    def _residents(self, device: Device) -> list[Spot]:
        steps = self.state.residencies.items()
        return [s for s, r in steps if s[0] == device and r.step is t.ResidentStep.RESIDENT]

    def claimed_on(self, device: Device, but: ArtifactId) -> Ledger:
        """What may not be released: loading or claimed residents of the device, without this one."""
        ledger = Ledger()
        for spot, residency in self.state.residencies.items():
            claimed = self._claimed_there(spot) or residency.step is t.ResidentStep.LOADING
            if spot[0] == device and spot[1] != but and claimed:
                ledger.add(residency.items)
        for action in self.actions:
            if isinstance(action, t.Load) and action.device == device:
                ledger.add(self.state.items_on(action.device, action.artifact))
        return ledger

    def _claimed_there(self, spot: Spot) -> bool:
        return self.any_left(claim.id for claim in self.state.claims_on(*spot))

    def _withdraw_residents(self) -> None:
        """Memory of what is not (or no longer) proven on disk is given back."""
        for spot, residency in self.state.residencies.items():
            if residency.step is t.ResidentStep.RESIDENT and not self.is_sound(spot[1]):
                self.release(spot, "it is not proven on disk")

    # --- taking down ------------------------------------------------------------------------

    def _quarantine(self) -> None:
        for digest, reason in self.state.corrupt.items():
            hit = [
                artifact_id
                for artifact_id, proven in self.state.artifacts.items()
                if proven.step is t.DiskStep.VERIFIED and any(d == digest for d, _ in proven.artifact.blobs)
            ]
            hit = [artifact_id for artifact_id in hit if artifact_id not in self.tainted]
            self.tainted.update(hit)
            self.actions.append(t.Quarantine(tuple(hit), digest, reason))

    def _evict_asked(self) -> None:
        if not self.state.evict_asked or self.making_room or self._disk_in_motion():
            return
        self._take_down(next(iter(self.state.evict_asked)), "an operator asked for it")

    def _tidy(self) -> None:
        """What is kept only for a while leaves when its time is over."""
        rules, state = self.state.rules, self.state
        aside = self._oldest_aside()
        if aside is not None and state.asides[aside].at + rules.quarantine_keep_s > self.now:
            aside = None
        leftover = self._unwanted_leftover(self.now - rules.leftovers_keep_s)
        if (aside is None and leftover is None) or self._disk_in_motion():
            return
        if aside is not None:
            self.actions.append(t.Purge(aside, "it has been in quarantine for long enough"))
        elif leftover is not None:
            self._discard(leftover)

    def _drain(self) -> None:
        """Above the high watermark, make room before anybody has to wait for it."""
        high_bytes = self.state.rules.high_watermark * self.state.disk.capacity_bytes
        draining = self.state.disk.draining or self.disk.used_bytes > high_bytes
        if draining and not self.making_room and not self._disk_in_motion():
            self._let_one_go("the disk is above its high watermark")

    def _disk_in_motion(self) -> bool:
        """One eviction at a time: whether something is being taken down, or leaves a device for that."""
        state = self.state
        discarding = any(state.transfers[key].step is t.Step.DISCARDING for key in state.running)
        releasing = any(is_moving(r) for r in state.residencies.values())
        planned = any(isinstance(a, _TAKES_DOWN) for a in self.actions)
        return bool(state.leaving or state.purging) or discarding or releasing or planned


_TAKES_DOWN = (t.Quarantine, t.Purge, t.Discard, t.Evict, t.Release)


def _no_room_on_device(
    device: Device, artifact_id: ArtifactId, items: list[Item], capacity_bytes: int, claimed_bytes: int
) -> Problem:
    need_bytes = sum(dict(items).values())
    never = need_bytes > capacity_bytes
    raise_it = "raise [standby] host_capacity_bytes" if device == HOST else "use a larger device"
    return Problem(
        ErrorKind.NO_ROOM,
        "DEVICE_CAPACITY",
        f"{artifact_id} needs {gb(need_bytes)} on {device}; the capacity is {gb(capacity_bytes)}, "
        f"of which {gb(claimed_bytes)} are claimed by others",
        raise_it if never else f"unpin or stop something on {device} ('cachectl ls' shows it), or {raise_it}",
        None if never else ROOM_RETRY_S,
    )


def access_problem(state: State, ref: Ref, fresh: bool, access: t.Access) -> Problem | None:
    """Why a ref is not for who asks: it would have to be fetched and may not be for him, or no digest
    vouches for what is here and one has to. None where it is."""
    note = state.notes.get(ref)
    if access.only_what_is_here and (fresh or note is None):
        return Problem(
            ErrorKind.DENIED,
            "OPERATORS_ONLY",
            f"{ref} is not here, and replicas may not have it fetched"
            if note is None
            else f"{ref} is here, and replicas may not have its origin asked for what is newer",
            f"have an operator prefetch or pin it; or let replicas: access of source {access.prefix!r}",
        )
    if access.require_digest and note is not None and not note.attested and not fresh:
        return Problem(
            ErrorKind.DENIED,
            "NOT_ATTESTED",
            f"{ref} is here, and no digest of its origin's vouches for it",
            "have the origin publish digests (a SHA256SUMS beside the files, say) and prefetch it anew, or "
            f"take require_digest off source {access.prefix!r}",
        )
    return None


def host_swap_problem(state: State, out: ArtifactId | None, artifact: ArtifactId) -> Problem | None:
    """Why ``artifact`` could not be pinned on the host in the place of ``out``, as gpus.swap_problem."""
    place, spot = state.places.get(HOST), (HOST, artifact)
    if place is None or place.inventory is None:
        return no_standby_problem(HOST)
    if artifact not in state.artifacts or state.is_resident(*spot):
        return None
    draft = _Draft(state, math.inf)
    gone = state.claims_on(HOST, out) if out is not None else ()
    draft.ended.update(claim.id for claim in gone if claim.kind is ClaimKind.PIN)
    items, claimed = list(state.items_on(*spot)), draft.claimed_on(*spot)
    if claimed.used_bytes + claimed.missing_bytes(items) <= place.capacity_bytes:
        return None
    return _no_room_on_device(HOST, artifact, items, place.capacity_bytes, claimed.used_bytes)


def is_read_soon(state: State, key: RevisionKey) -> bool:
    """Whether somebody reads a revision's files as soon as they are there: a replica that waits for them,
    or a standby that is to load them."""
    claims = (state.claims[claim] for claim in state.unfetched.claims(key))
    return any(claim.device != DISK or claim.holder is not None for claim in claims)


def evict_problem(state: State, artifact_id: ArtifactId) -> Problem | None:
    """Why an operator's eviction is refused: the claims on it, with their holders; None if it is not."""
    claims = [state.claims[c] for c in state.claimed.get(artifact_id, ()) if c not in state.members]
    if not claims:
        return None
    return Problem(
        ErrorKind.FAILED,
        "CLAIMED",
        f"{claims[0].ref} is claimed by " + "; ".join(claim_words(c) for c in claims[:20]),
        "end the holders, or 'cachectl unpin' the pin, then evict again",
    )
