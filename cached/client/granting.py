"""The gRPC part of an acquire: from a ref to a grant.

Owns the call's request and reading its stream. Protobuf types end here, and so does gRPC: when a grant is
returned its channel is closed.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cached.client import rpc
from cached.client.devices import Wish
from cached.client.errors import CachedError
from cached.client.progress import Progress
from cached.client.stopping import Stop
from cached.v1 import model_cache_pb2 as pb
from cached.v1.model_cache_pb2_grpc import ModelCacheStub

MAX_COMMAND_CHARS = 200
MAX_NAME_CHARS = 253
READY_S = 10.0


@dataclass(frozen=True, slots=True)
class Grant:
    """What waiting has earned: a token for the handoff, and what it is for.

    ``device`` is where it is granted from; ``blobs`` is the number of descriptors that memory comes in;
    ``path`` is the directory as the daemon sees it.
    """

    token: str
    lease_id: str
    id: str
    ref: str
    revision: str
    attested: bool
    path: str
    device: str
    blobs: int


def make_request(ref: str, wish: Wish, fresh: bool, env: Mapping[str, str]) -> pb.AcquireRequest:
    """An acquire of ``ref`` by this process, which declares who it is."""
    # In a pod, the host's name is the pod's; elsewhere it says nothing new.
    pod = env.get("POD_NAME") or (env.get("HOSTNAME", "") if "KUBERNETES_SERVICE_HOST" in env else "")
    holder = pb.Holder(
        pid=os.getpid(),
        host=_plain(socket.gethostname(), MAX_NAME_CHARS),
        command=_plain(" ".join(sys.orig_argv), MAX_COMMAND_CHARS),
        pod=_plain(pod, MAX_NAME_CHARS),
    )
    return pb.AcquireRequest(
        ref=ref,
        device=wish.device,
        prefers=wish.prefers,
        fresh=fresh,
        holder=holder,
        room_device=wish.room_device,
        room_bytes=wish.room_bytes,
    )


def wait_for_grant(
    address: str,
    request: pb.AcquireRequest,
    timeout_s: float,
    on_progress: Callable[[Progress], None],
    stop: Stop,
) -> Grant:
    """Wait until the model stands where it was asked for. Raises CachedError, also where ``stop`` is set."""
    last = Progress("waiting")
    grant: pb.Grant | None = None
    try:
        with rpc.connect(address) as channel:
            # Read to its end, also past the grant: breaking a stream off would cancel it at the daemon.
            call = ModelCacheStub(channel).Acquire(request, timeout=timeout_s)
            with stop.ends(call.cancel):
                for event in call:
                    if event.WhichOneof("event") == "grant":
                        grant = event.grant
                    else:
                        last = _progress(event.progress)
                        on_progress(last)
    except CachedError as error:
        raise _late(request, last) if error.reason == "DEADLINE_EXCEEDED" else error from None
    if grant is None:
        raise CachedError(
            "INTERNAL", "NO_GRANT", f"the daemon ended the acquire of {request.ref} without a grant"
        )
    return _granted(grant, request)


def tell_ready(address: str, lease_id: str) -> None:
    """Tell the daemon that a lease's holder has the memory that it needs. Raises CachedError."""
    with rpc.connect(address) as channel:
        ModelCacheStub(channel).Ready(pb.ReadyRequest(lease_id=lease_id), timeout=READY_S)


def _granted(grant: pb.Grant, request: pb.AcquireRequest) -> Grant:
    model = grant.model
    return Grant(
        token=grant.token,
        lease_id=grant.lease_id,
        id=model.id,
        ref=model.ref or request.ref,
        revision=model.revision,
        attested=model.attested,
        path=model.path,
        device=grant.device or request.device,
        blobs=grant.blobs,
    )


def _progress(progress: pb.Progress) -> Progress:
    return Progress(
        phase=pb.Phase.Name(progress.phase).removeprefix("PHASE_").lower(),
        done_bytes=progress.bytes_done,
        total_bytes=progress.bytes_total,
        rate_bytes_per_s=progress.rate_bytes_per_s,
        eta_s=progress.eta_s if progress.eta_s >= 0 else None,
        message=progress.message,
    )


def _late(request: pb.AcquireRequest, last: Progress) -> CachedError:
    message = f"{request.ref} did not stand on {request.device} in the time given; it was {last.words()}"
    hint = "allow more time (timeout_s), or prefetch or pin it beforehand"
    return CachedError("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", message, hint)


def _plain(text: str, most_chars: int) -> str:
    """Printable and bounded; what a file system or a command line has that is no text becomes '?'."""
    return "".join(c if c.isprintable() else "?" for c in text[:most_chars])
