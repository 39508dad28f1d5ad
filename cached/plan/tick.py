"""One tick's decisions as they come together: what was decided so far, and what every part of it needs.

Owns the list of actions and who hears of a failure; the policies are in ``decide``, ``gpus`` and ``pools``.
Pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from cached.model import ArtifactId, Claim, ClaimId, ClaimKind, Device, Problem
from cached.plan import types as t
from cached.plan.order import heat
from cached.plan.state import Spot, State

MOST_ROUNDS = 5
"""A prefetch is given up after this many failed transfers; pins go on for ever, ever more slowly."""
OUR_DEATHS = frozenset({"WORKER_DIED", "INGEST_BUSY", "STANDBY_GONE"})
"""Failures that a death of one of our own processes makes: those who wait do not hear of it, as the next
round goes on where it stopped, until it was too many times in a row."""


class Tick:
    """What is known, when, and what was decided from it."""

    def __init__(self, state: State, now: float) -> None:
        self.state = state
        self.now = now
        self.actions: list[t.Action] = []
        self.ended: set[ClaimId] = set()
        self.tainted: set[ArtifactId] = set()
        self.released: set[Spot] = set()
        self.told: dict[Spot, t.Residency] = {}
        self.granted: set[ClaimId] = set()
        # On GPUs: what is granted from there, where copies of pools were placed, which loads begin, and the
        # devices on which none does.
        self.taken: set[Spot] = set()
        self.placed: dict[Spot, list[Claim]] = {}
        self.begun: set[Spot] = set()
        self.still: set[Device] = set()

    def refuse(self, claim: Claim, problem: Problem) -> None:
        if claim.id not in self.ended:
            self.ended.add(claim.id)
            self.actions.append(t.Refuse(claim.id, problem))

    def tell(self, claims: Iterable[ClaimId], record: t.Resolution | t.Transfer | t.Residency) -> bool:
        """Refuse whom a failure concerns; whether somebody is left for whom to try again."""
        problem = record.problem
        assert problem is not None
        left = False
        for claim_id in claims:
            claim = self.state.claims[claim_id]
            final = problem.retry_after_s is None or record.rounds >= MOST_ROUNDS
            hears = final or problem.reason not in OUR_DEATHS
            if (self.waits(claim) and hears) or (claim.kind is ClaimKind.PREFETCH and final):
                self.refuse(claim, problem)
            elif claim_id not in self.ended:
                left = True
        return left and problem.retry_after_s is not None

    def waits(self, claim: Claim) -> bool:
        """Whether it is a lease that was not answered yet."""
        return claim.kind is ClaimKind.LEASE and claim.id not in self.state.answered

    def waiters(self, claims: Iterable[ClaimId]) -> list[Claim]:
        """Those of them whom a pin's residency would answer."""
        found = [self.state.claims[c] for c in claims if c not in self.state.answered and c not in self.ended]
        return [claim for claim in found if claim.kind is not ClaimKind.PIN]

    def grant(self, claim: Claim, device: Device, artifact: ArtifactId) -> None:
        self.granted.add(claim.id)
        self.taken.add((device, artifact))
        self.actions.append(t.Grant(claim.id, device))

    def any_left(self, claims: Iterable[ClaimId]) -> bool:
        """Whether one of them is not ended by what was decided so far."""
        return any(claim_id not in self.ended for claim_id in claims)

    def is_sound(self, artifact: ArtifactId) -> bool:
        return self.state.is_verified(artifact) and artifact not in self.tainted

    def release(self, spot: Spot, why: str, thrown: bool = False) -> None:
        if spot not in self.released:
            self.released.add(spot)
            self.actions.append(t.Release(spot[0], spot[1], why, thrown))

    def cannot_load(self, spot: Spot, problem: Problem) -> None:
        self.actions.append(t.CannotLoad(spot[0], spot[1], problem))
        before = self.state.residencies.get(spot)
        step = t.ResidentStep.REFUSED if problem.retry_after_s is None else t.ResidentStep.FAILED
        rounds = (before.rounds if before else 0) + 1
        self.told[spot] = t.Residency(step, rounds=rounds, retry_at=math.inf, problem=problem)
        self.tell(self.state.unloaded.claims(spot), self.told[spot])

    def record(self, spot: Spot) -> t.Residency | None:
        """What is known of it, with what this tick says that cannot be loaded."""
        return self.told.get(spot) or self.state.residencies.get(spot)

    def coldness(self, spot: Spot) -> tuple[float, float, str]:
        """The smallest of these leaves its device first. That it was loaded counts as a use."""
        residency = self.state.residencies[spot]
        warmth = heat(residency.hits + 1, residency.last_used_at, self.now)
        return warmth, residency.last_used_at, spot[1]
