"""How a model's readiness changes, as the daemon tells it.

Owns that record, and the waiting for a daemon that restarts meanwhile. gRPC is imported with the first use.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cached.client.errors import UNREACHABLE, CachedError
from cached.client.stopping import Stop

if TYPE_CHECKING:
    from cached.v1 import model_cache_pb2 as pb

PAUSE_S = 1.0


@dataclass(frozen=True, slots=True)
class Change:
    """A model as it stands now. ``id`` is empty until it is proven, ``reason`` unless it cannot be served.

    ``state`` is absent, fetching, verified, evicting, failed, refused or quarantined; ``devices`` are those
    it can be handed out from: ``disk``, ``host``, ``cuda:GPU-…``.
    """

    ref: str
    state: str
    id: str
    revision: str
    devices: tuple[str, ...]
    reason: str = ""


def watch(
    ref: str,
    *,
    away_s: float = 600.0,
    run_dir: str | os.PathLike[str] | None = None,
    address: str | None = None,
) -> Generator[Change]:
    """How ``ref`` stands now, and then whenever that changes, without an end.

    A daemon that restarts is waited for ``away_s`` seconds, then CachedError is raised. The iterator keeps a
    gRPC channel open until it is closed or dropped: do not fork meanwhile.
    """
    return _changes(ref, away_s, run_dir, address, Stop())


async def watch_async(
    ref: str,
    *,
    away_s: float = 600.0,
    run_dir: str | os.PathLike[str] | None = None,
    address: str | None = None,
) -> AsyncIterator[Change]:
    """``watch`` in a thread of its own, which ends with the iterator."""
    stop = Stop()
    changes = _changes(ref, away_s, run_dir, address, stop)
    pool = ThreadPoolExecutor(1, thread_name_prefix="cached-watch")
    try:
        while True:
            change = await asyncio.get_running_loop().run_in_executor(pool, next, changes, None)
            if change is None:
                return
            yield change
    finally:
        stop.set()
        pool.submit(changes.close)
        pool.shutdown(wait=False)


def _changes(
    ref: str, away_s: float, run_dir: str | os.PathLike[str] | None, address: str | None, stop: Stop
) -> Generator[Change]:
    from cached.client import rpc

    where = rpc.resolve_address(run_dir, address)
    last: Change | None = None
    seen_at = time.monotonic()
    while not stop.is_set():
        try:
            for model in _models(where, ref, stop):
                seen_at = time.monotonic()
                change = _change(model, ref)
                if change != last:
                    last = change
                    yield change
        except CachedError as error:
            if error.reason != UNREACHABLE or time.monotonic() - seen_at > away_s:
                if stop.is_set():
                    return
                raise
        stop.wait(PAUSE_S)


def _models(address: str, ref: str, stop: Stop) -> Iterator[pb.Model]:
    from cached.client import rpc
    from cached.v1 import model_cache_pb2 as pb
    from cached.v1.model_cache_pb2_grpc import ModelCacheStub

    with rpc.connect(address) as channel:
        call = ModelCacheStub(channel).Watch(pb.WatchRequest(ref=ref))
        with stop.ends(call.cancel):
            yield from call


def _change(model: pb.Model, ref: str) -> Change:
    return Change(
        ref=model.ref or ref,
        state=model.state,
        id=model.id,
        revision=model.revision,
        devices=tuple(model.devices),
        reason=model.reason,
    )
