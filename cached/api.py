"""The gRPC face: protobuf in and out, bad input refused, errors as statuses with reason, hint and retry time.

Owns the two servicers and the translation between protobuf and the words of ``model``; protobuf types go
no further. Decides nothing and keeps nothing: every call is the node's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from cached.model import (
    CachedError,
    Claim,
    ClaimId,
    ClaimKind,
    Device,
    ErrorKind,
    Holder,
    Phase,
    Problem,
    Progress,
    Room,
    is_artifact_id,
    parse_device,
    parse_ref,
    permanent,
)
from cached.node import Node
from cached.node.grants import Granted
from cached.node.pins import is_of_file
from cached.node.service import Proof
from cached.node.views import ModelView, PlaceView
from cached.v1 import model_cache_pb2 as pb
from cached.v1 import model_cache_pb2_grpc as pb_grpc
from cached.v1 import operator_pb2 as op
from cached.v1 import operator_pb2_grpc as op_grpc

MAX_WORD_CHARS = 256
MAX_MESSAGE_CHARS = 2000
MAX_PREFERS = 8
MAX_ROOM_BYTES = 2**60
WATCH_EVERY_S = 0.25

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]

_STATUS = {
    ErrorKind.FAILED: grpc.StatusCode.UNKNOWN,
    ErrorKind.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    ErrorKind.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorKind.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    ErrorKind.DATA_LOSS: grpc.StatusCode.DATA_LOSS,
    ErrorKind.NO_ROOM: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ErrorKind.DENIED: grpc.StatusCode.PERMISSION_DENIED,
    ErrorKind.DEADLINE: grpc.StatusCode.DEADLINE_EXCEEDED,
    ErrorKind.PRECONDITION: grpc.StatusCode.FAILED_PRECONDITION,
}
_PHASE = {
    Phase.RESOLVING: pb.PHASE_RESOLVING,
    Phase.QUEUED: pb.PHASE_QUEUED,
    Phase.FETCHING: pb.PHASE_FETCHING,
    Phase.LOADING: pb.PHASE_LOADING,
    Phase.WAITING: pb.PHASE_WAITING,
}


class ModelCache(pb_grpc.ModelCacheServicer):
    """For replicas, and on the operators' socket for operators: tenants do not see each other, and get of
    an origin that is the operators' only what is here."""

    def __init__(self, node: Node, for_operators: bool) -> None:
        self._node = node
        self._shows_holders = for_operators
        self._may_ask_anything = for_operators

    async def Acquire(self, request: pb.AcquireRequest, context: Context) -> AsyncIterator[pb.AcquireEvent]:
        async for step in _checked(self._acquire(request), context):
            match step:
                case Progress():
                    yield pb.AcquireEvent(progress=_progress(step))
                case Granted(token, lease, view, device, blobs):
                    model = _model(view, self._shows_holders)
                    grant = pb.Grant(
                        token=token, lease_id=lease or "", model=model, blobs=blobs, device=device
                    )
                    yield pb.AcquireEvent(grant=grant)

    async def _acquire(self, request: pb.AcquireRequest) -> AsyncGenerator[Progress | Granted]:
        timed = request.lease == pb.LEASE_MODE_TTL
        if request.lease not in pb.LeaseMode.values():
            raise permanent(
                ErrorKind.INVALID,
                "BAD_LEASE_MODE",
                f"this daemon knows no lease mode {request.lease}",
                "ask for one of " + ", ".join(pb.LeaseMode.keys()),
            )
        if request.ttl_s and not timed:
            raise permanent(
                ErrorKind.INVALID, "BAD_TTL", "ttl_s goes with LEASE_MODE_TTL only", "leave one of them out"
            )
        ref = parse_ref(request.ref)
        self._node.check_access(ref, request.fresh, self._may_ask_anything)
        steps = self._node.acquire(
            ref,
            parse_device(request.device),
            _declared(request.holder),
            request.fresh,
            request.ttl_s if timed else None,
            request.lease != pb.LEASE_MODE_NONE,
            _prefers(request),
            _room(request),
        )
        async with contextlib.aclosing(steps):
            async for step in steps:
                yield step

    async def Renew(self, request: pb.RenewRequest, context: Context) -> pb.RenewResponse:
        renewed = self._node.renew(ClaimId(request.lease_id), request.ttl_s)
        return pb.RenewResponse(expires_at=await _answer(renewed, context))

    async def Release(self, request: pb.ReleaseRequest, context: Context) -> pb.ReleaseResponse:
        await _answer(self._node.release(ClaimId(request.lease_id)), context)
        return pb.ReleaseResponse()

    async def Ready(self, request: pb.ReadyRequest, context: Context) -> pb.ReadyResponse:
        self._node.holder_ready(ClaimId(request.lease_id))
        return pb.ReadyResponse()

    async def Get(self, request: pb.GetRequest, context: Context) -> pb.Model:
        async def look() -> ModelView:
            return await self._node.model_files(_ref_or_id(request.ref))

        return _model(await _answer(look(), context), self._shows_holders)

    async def List(self, request: pb.ListRequest, context: Context) -> pb.ListResponse:
        models = [_model(view, self._shows_holders) for view in self._node.models()]
        return pb.ListResponse(models=models)

    async def Watch(self, request: pb.WatchRequest, context: Context) -> AsyncIterator[pb.Model]:
        async for view in _checked(self._watch(request.ref), context):
            yield _model(view, self._shows_holders)

    async def _watch(self, text: str) -> AsyncGenerator[ModelView]:
        ref, last = _ref_or_id(text), None
        while True:
            view = self._node.model(ref)
            if view != last:
                last = view
                yield view
            await asyncio.sleep(WATCH_EVERY_S)


class Operator(op_grpc.OperatorServicer):
    """For operators."""

    def __init__(self, node: Node, version: str, data_dir: str, run_dir: str) -> None:
        self._node = node
        self._version = version
        self._data_dir = data_dir
        self._run_dir = run_dir

    async def Prefetch(self, request: op.PrefetchRequest, context: Context) -> AsyncIterator[op.ClaimEvent]:
        async def steps() -> AsyncGenerator[Progress | ModelView]:
            asked = self._node.prefetch(parse_ref(request.ref), request.wait)
            async with contextlib.aclosing(asked):
                async for step in asked:
                    yield step

        async for step in _checked(steps(), context):
            yield _claim_event(step)

    async def Pin(self, request: op.PinRequest, context: Context) -> AsyncIterator[op.ClaimEvent]:
        async def steps() -> AsyncGenerator[Progress | ModelView]:
            ref, device = parse_ref(request.ref), parse_device(request.device)
            copies = request.copies or 1
            asked = self._node.pin(ref, device, request.wait, copies, request.priority, request.unclaimed)
            async with contextlib.aclosing(asked):
                async for step in asked:
                    yield step

        async for step in _checked(steps(), context):
            yield _claim_event(step)

    async def Swap(self, request: op.SwapRequest, context: Context) -> AsyncIterator[op.ClaimEvent]:
        async def steps() -> AsyncGenerator[Progress | ModelView]:
            out, ref = parse_ref(request.out), parse_ref(request.ref)
            asked = self._node.swap(out, ref, parse_device(request.device), request.wait)
            async with contextlib.aclosing(asked):
                async for step in asked:
                    yield step

        async for step in _checked(steps(), context):
            yield _claim_event(step)

    async def Unpin(self, request: op.UnpinRequest, context: Context) -> op.UnpinResponse:
        async def unpin() -> int:
            return await self._node.unpin(parse_ref(request.ref))

        return op.UnpinResponse(pins=await _answer(unpin(), context))

    async def Evict(self, request: op.EvictRequest, context: Context) -> op.EvictResponse:
        async def evict() -> op.EvictResponse:
            artifact, freed_bytes = await self._node.evict(_ref_or_id(request.ref))
            return op.EvictResponse(id=artifact, freed_bytes=freed_bytes)

        return await _answer(evict(), context)

    async def Verify(self, request: op.VerifyRequest, context: Context) -> AsyncIterator[op.VerifyEvent]:
        async def steps() -> AsyncGenerator[Progress | Proof]:
            asked = self._node.verify(_ref_or_id(request.ref) if request.ref else None)
            async with contextlib.aclosing(asked):
                async for step in asked:
                    yield step

        async for step in _checked(steps(), context):
            match step:
                case Progress():
                    yield op.VerifyEvent(progress=_progress(step))
                case Proof(artifact, ref, size_bytes, reason):
                    ok, words = reason is None, reason or ""
                    yield op.VerifyEvent(
                        verified=op.Verified(id=artifact, ref=ref, ok=ok, bytes=size_bytes, reason=words)
                    )

    async def Status(self, request: op.StatusRequest, context: Context) -> op.NodeStatus:
        counts, (transfers, loads) = self._node.counts(), self._node.moving
        return op.NodeStatus(
            version=self._version,
            data_dir=self._data_dir,
            run_dir=self._run_dir,
            uptime_s=self._node.uptime_s,
            places=[_place(place) for place in self._node.places()],
            models=len(self._node.models()),
            leases=counts[ClaimKind.LEASE],
            pins=counts[ClaimKind.PIN],
            prefetches=counts[ClaimKind.PREFETCH],
            transfers=transfers,
            loads=loads,
            origin_bytes=self._node.origin_bytes,
            pid=os.getpid(),
        )


# --- errors ---------------------------------------------------------------------------------


async def _answer(work: Awaitable[T], context: Context) -> T:
    try:
        return await work
    except CachedError as error:
        await _abort(error.problem, context)


async def _checked(steps: AsyncGenerator[T], context: Context) -> AsyncIterator[T]:
    """The steps, with an error among them turned into the call's status."""
    # Closed at once: a caller that is gone must not leave its claim to the garbage collector.
    async with contextlib.aclosing(steps):
        try:
            async for step in steps:
                yield step
        except CachedError as error:
            await _abort(error.problem, context)


async def _abort(problem: Problem, context: Context) -> NoReturn:
    status = rpc_status.to_status(to_status(problem))
    # aio's abort takes no Status (grpc#24604): the same, spelled out.
    await context.abort(status.code, status.details, status.trailing_metadata)
    raise AssertionError("abort returns")


def to_status(problem: Problem) -> status_pb2.Status:
    """A problem as google.rpc.Status: code, message, reason, hint, and when to try again."""
    details = [_any(error_details_pb2.ErrorInfo(reason=problem.reason, domain="cached"))]
    details.append(_any(error_details_pb2.LocalizedMessage(locale="en", message=problem.hint)))
    if problem.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(int(problem.retry_after_s * 1000))
        details.append(_any(error_details_pb2.RetryInfo(retry_delay=delay)))
    code = _STATUS[problem.kind].value[0]
    return status_pb2.Status(code=code, message=problem.message[:MAX_MESSAGE_CHARS], details=details)


def _any(message: Any) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


# --- in -------------------------------------------------------------------------------------


def _ref_or_id(text: str) -> str:
    return text if is_artifact_id(text) else parse_ref(text)


def _prefers(request: pb.AcquireRequest) -> tuple[Device, ...]:
    if len(request.prefers) > MAX_PREFERS:
        raise permanent(
            ErrorKind.INVALID,
            "TOO_MANY_DEVICES",
            f"{len(request.prefers)} devices are preferred; at most {MAX_PREFERS} are looked at",
            "name the best of them",
        )
    return tuple(map(parse_device, request.prefers))


def _room(request: pb.AcquireRequest) -> Room | None:
    if not request.room_bytes:
        return None
    if request.room_bytes > MAX_ROOM_BYTES or not request.room_device:
        raise permanent(
            ErrorKind.INVALID,
            "BAD_ROOM",
            f"{request.room_bytes} bytes on {request.room_device!r} are no room that could be made",
            f"name one GPU in room_device (cuda:<uuid> or cuda:<number>), and at most {MAX_ROOM_BYTES} bytes",
        )
    return Room(parse_device(request.room_device), request.room_bytes)


def _declared(holder: pb.Holder) -> Holder:
    pid = holder.pid if 0 <= holder.pid < 2**31 else 0
    return Holder(None, pid, _word(holder.host), _word(holder.command), _word(holder.pod))


def _word(text: str) -> str:
    """What a client declares, made fit for a log line: printable and short."""
    return " ".join("".join(c if c.isprintable() else " " for c in text[:MAX_WORD_CHARS]).split())


# --- out ------------------------------------------------------------------------------------


def _progress(progress: Progress) -> pb.Progress:
    eta_s = progress.eta_s
    return pb.Progress(
        phase=_PHASE[progress.phase],
        bytes_done=progress.done_bytes,
        bytes_total=progress.total_bytes,
        rate_bytes_per_s=progress.rate_bytes_per_s,
        eta_s=-1.0 if eta_s is None else eta_s,
        message=progress.message,
    )


def _claim_event(step: Progress | ModelView) -> op.ClaimEvent:
    match step:
        case Progress():
            return op.ClaimEvent(progress=_progress(step))
        case ModelView():
            return op.ClaimEvent(done=_model(step, shows_holders=True))


def _model(view: ModelView, shows_holders: bool) -> pb.Model:
    return pb.Model(
        ref=view.ref,
        id=view.artifact or "",
        revision=view.revision or "",
        state=view.state,
        attested=view.attested,
        bytes=view.size_bytes,
        devices=view.devices,
        claims=[_claim(claim, shows_holders) for claim in view.claims],
        path=view.path,
        reason=view.problem.message if view.problem else "",
        hint=view.problem.hint if view.problem else "",
        progress=_progress(view.progress) if view.progress else None,
        residencies=[
            pb.Residency(
                device=r.device,
                state=r.step,
                bytes=r.size_bytes,
                locked=r.locked,
                hits=r.hits,
                last_used_at=r.last_used_at,
            )
            for r in view.residencies
        ],
        files=[pb.File(path=f.path, bytes=f.blob.size_bytes, sha256=f.blob.sha256) for f in view.files],
        last_used_at=view.last_used_at,
    )


def _claim(claim: Claim, shows_holders: bool) -> pb.Claim:
    return pb.Claim(
        id=claim.id if shows_holders else "",
        kind=claim.kind.value,
        device=claim.device,
        made_at=claim.made_at,
        expires_at=claim.expires_at or 0.0,
        holder=_holder(claim.holder) if claim.holder and shows_holders else None,
        copies=claim.copies if claim.kind is ClaimKind.PIN else 0,
        priority=claim.priority,
        unclaimed=claim.unclaimed,
        of_file=is_of_file(claim),
    )


def _holder(holder: Holder) -> pb.Holder:
    uid = -1 if holder.uid is None else holder.uid
    return pb.Holder(pid=holder.pid, host=holder.host, command=holder.command, pod=holder.pod, uid=uid)


def _place(place: PlaceView) -> op.Place:
    shown = op.Place(
        device=place.device,
        capacity_bytes=place.capacity_bytes,
        used_bytes=place.used_bytes,
        claimed_bytes=place.claimed_bytes,
        connected=place.connected,
        remarks=place.remarks,
        pid=place.pid,
        claimed_by=place.claimed_by,
    )
    if place.gpu is not None:
        shown.index, shown.name, shown.unfit_reason = place.gpu.index, place.gpu.name, place.gpu.unfit_reason
        shown.total_bytes, shown.free_bytes = place.gpu.total_bytes, place.gpu.free_bytes
        shown.outside_bytes = place.gpu.outside_bytes
    return shown
