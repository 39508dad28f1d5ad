"""Grants, tokens and leases: from "it stands there" to a descriptor in the replica's hands.

Owns the one-time tokens and the ends of leases. A token is worth one handoff for a short time; the
lease that it makes ends with its last holder, a TTL lease with its time.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from dataclasses import dataclass, replace
from functools import partial

import structlog

from cached.handoff import Package
from cached.leases import Leases
from cached.model import (
    DISK,
    MAX_TTL_S,
    ArtifactId,
    CachedError,
    Claim,
    ClaimId,
    Device,
    ErrorKind,
    Holder,
    permanent,
    temporary,
)
from cached.node.core import Core
from cached.node.disk import Disk
from cached.node.effects import Effects
from cached.node.views import ModelView
from cached.plan import sharing_problem
from cached.plan import types as t
from cached.standby import Standby, is_gpu
from cached.store import Store

LEASES_EVERY_S = 0.25
TOKEN_LIFE_S = 30.0

log = structlog.get_logger("cached.node")


@dataclass(frozen=True, slots=True)
class Granted:
    """An acquire's end. ``token`` is empty unless a descriptor is to be fetched with it.

    ``device`` is where it is granted from. ``blobs`` is the number of descriptors that the handoff sends of
    the memory, so that a client can look whether it may have so many open before it spends the token.
    """

    token: str
    lease: ClaimId | None
    model: ModelView
    device: Device
    blobs: int = 0


class Grants:
    """What was promised to replicas and is still open."""

    def __init__(self, core: Core, effects: Effects, store: Store, disk: Disk, leases: Leases) -> None:
        self._core = core
        self._effects = effects
        self._store = store
        self._disk = disk
        self._leases = leases
        self._tokens: dict[str, tuple[ClaimId, float]] = {}

    async def run(self) -> None:
        """Look for ended leases and tokens that nobody collected, for ever."""
        while True:
            for claim_id in self._leases.ended():
                log.info("lease ended", lease=claim_id)
                self._note_use(claim_id)
                self._core.end(claim_id)
            self._drop_uncollected(time.monotonic())
            await asyncio.sleep(LEASES_EVERY_S)

    def _note_use(self, claim_id: ClaimId) -> None:
        claim = self._core.state.claims.get(claim_id)
        if claim is not None and claim.artifact is not None:
            self._effects.used(claim.artifact)

    def _drop_uncollected(self, now_s: float) -> None:
        for token, (claim_id, until_s) in list(self._tokens.items()):
            if until_s <= now_s:
                del self._tokens[token]
                log.info("a grant was not collected", lease=claim_id)
                self._core.end(claim_id)

    async def grant(self, claim_id: ClaimId, model: ModelView, ttl_s: int | None, keep: bool) -> Granted:
        """What a granted claim's maker gets. ``model`` is the ref's row; it is shown as of the artifact held.

        Raises CachedError where the claim's artifact was withdrawn in between.
        """
        claim = self._core.state.claims.get(claim_id)
        if claim is None or claim.artifact is None or not self._core.state.is_verified(claim.artifact):
            raise _withdrawn(model.ref)
        path = str(self._store.tree_path(claim.artifact))
        model = replace(model, artifact=claim.artifact, revision=claim.revision, path=path)
        if not keep:
            return Granted("", None, model, claim.device)
        if ttl_s is None:
            blobs = await self._blobs(claim.device, claim.artifact)
            token = secrets.token_urlsafe(32)
            self._tokens[token] = (claim_id, time.monotonic() + TOKEN_LIFE_S)
            return Granted(token, claim_id, model, claim.device, blobs)
        await self._prolong(claim, ttl_s)
        return Granted("", claim_id, model, claim.device)

    async def _blobs(self, device: Device, artifact: ArtifactId) -> int:
        if is_gpu(device):
            return len(await self._standby(device).descriptors(artifact))
        proven = self._core.state.artifacts.get(artifact)
        return 0 if device == DISK or proven is None else len(proven.artifact.blobs)

    def _standby(self, device: Device) -> Standby:
        standby = self._effects.standbys.get(device)
        if standby is None:
            raise _standby_lost(device)
        return standby

    async def _prolong(self, claim: Claim, ttl_s: int) -> float:
        """No promise before it is durable."""
        expires_at = time.time() + ttl_s
        await self._effects.promise(replace(claim, expires_at=expires_at))
        self._core.post(t.Renewed(claim.id, expires_at))
        return expires_at

    async def redeem(self, token: str, uid: int) -> Package:
        """The handoff for a grant's token, once. Raises CachedError for a token that is worth nothing."""
        claim_id, _ = self._tokens.pop(token, (None, 0.0))
        claim = self._core.state.claims.get(claim_id) if claim_id is not None else None
        if claim is None or claim.artifact is None:
            raise permanent(
                ErrorKind.DENIED,
                "BAD_TOKEN",
                "this token was used before, has run out, or was never given",
                f"acquire again and collect within {TOKEN_LIFE_S:.0f} s",
            )
        try:
            return await self._handoff(replace(claim, holder=_seen(claim.holder, uid)), claim.artifact)
        except BaseException:
            self._core.end(claim.id)
            raise

    async def _handoff(self, claim: Claim, artifact: ArtifactId) -> Package:
        assert claim.holder is not None and claim.holder.uid is not None
        blobs: tuple[int, ...] = ()
        if is_gpu(claim.device):
            self._share(claim, artifact, claim.holder.uid)
        if claim.device != DISK:
            blobs = await self._descriptors(claim, artifact, claim.holder.uid)
        if claim.id not in self._core.state.claims:
            raise _standby_lost(claim.device)
        lease_fd = self._leases.create(claim)
        self._core.post(t.Held(claim.id, claim.holder))
        log.info(
            "handed out",
            lease=claim.id,
            ref=claim.ref,
            artifact=artifact,
            device=claim.device,
            uid=claim.holder.uid,
        )
        index = partial(self._store.manifest_bytes, artifact)
        return Package(self._header(claim, artifact), index, lease_fd, blobs)

    async def _descriptors(self, claim: Claim, artifact: ArtifactId, uid: int) -> tuple[int, ...]:
        try:
            return await self._standby(claim.device).descriptors(artifact, uid)
        except CachedError as error:
            gone = error.problem.kind in (ErrorKind.DATA_LOSS, ErrorKind.NOT_FOUND)
            if not gone or not is_gpu(claim.device):
                raise
            # Only that copy is lost, and the standby says so itself next.
            log.error(error.problem.message, reason=error.problem.reason, device=claim.device)
            raise _withdrawn(claim.ref) from error

    def _share(self, claim: Claim, artifact: ArtifactId, uid: int) -> None:
        """Whoever holds a GPU's memory could write to it: only one uid at a time does.

        Raises CachedError (HELD_BY_OTHER_UID) while a lease of another's lives on any of its contents.
        """
        problem = sharing_problem(self._core.state, claim, artifact, uid)
        if problem is not None:
            raise CachedError(problem)
        # Known at once, so that nobody else is given it while the standby is asked.
        assert claim.holder is not None
        self._core.post(t.Held(claim.id, claim.holder))
        self._core.turn(time.time())

    def _header(self, claim: Claim, artifact: ArtifactId) -> dict[str, str | int | bool]:
        note = self._core.state.notes.get(claim.ref)
        return {
            "lease_id": claim.id,
            "id": artifact,
            "ref": claim.ref,
            "revision": claim.revision or "",
            "device": claim.device,
            "attested": note.attested if note is not None else False,
            "path": str(self._store.tree_path(artifact)),
        }

    async def renew(self, lease: ClaimId, ttl_s: int) -> float:
        """Prolong a TTL lease; returns when it now ends (Unix s)."""
        check_ttl(ttl_s)
        return await self._prolong(self._ttl_lease(lease), ttl_s)

    async def release(self, lease: ClaimId) -> None:
        """End a TTL lease."""
        claim = self._ttl_lease(lease)
        await self._effects.forget_claim(claim.id)
        self._core.end(claim.id)

    def _ttl_lease(self, lease: ClaimId) -> Claim:
        claim = self._core.state.claims.get(lease)
        if claim is None or claim.expires_at is None:
            raise permanent(
                ErrorKind.NOT_FOUND,
                "NO_SUCH_LEASE",
                f"there is no lease {lease[:80]!r} with a time to live",
                "it has ended; acquire again",
            )
        return claim


def check_ttl(ttl_s: int) -> None:
    """Refuse a time to live that is none, or too long. Raises CachedError (INVALID)."""
    if not 0 < ttl_s <= MAX_TTL_S:
        raise permanent(
            ErrorKind.INVALID,
            "BAD_TTL",
            f"a lease cannot last {ttl_s} s",
            f"ask for 1 to {MAX_TTL_S} seconds",
        )


def _seen(holder: Holder | None, uid: int) -> Holder:
    return replace(holder or Holder(), uid=uid)


def _withdrawn(ref: str) -> CachedError:
    return temporary("WITHDRAWN", f"{ref} was withdrawn while it was handed out", "acquire again", 1.0)


def _standby_lost(device: Device) -> CachedError:
    return temporary(
        "STANDBY_GONE", f"the standby for {device} went away during the handoff", "acquire again", 1.0
    )
