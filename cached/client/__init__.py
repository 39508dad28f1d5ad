"""What a replica imports: ``acquire``, and the model that it returns.

Owns the waiting: one acquire from the first try to the handoff, over restarts of the daemon. Imports nothing
of the daemon's; gRPC only once something is acquired, torch only once a tensor is asked for, CUDA only where
a GPU is meant.
"""

from __future__ import annotations

import asyncio
import functools
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from cached.client import devices, handoff
from cached.client.devices import DISK, HOST, Wish
from cached.client.errors import UNREACHABLE, CachedError
from cached.client.files import Files, not_visible
from cached.client.handoff import File, Handoff
from cached.client.model import Model, Order
from cached.client.progress import Progress
from cached.client.stopping import Stop
from cached.client.watching import Change, watch, watch_async

if TYPE_CHECKING:
    from cached.client.granting import Grant
    from cached.client.tensors import Memory

__all__ = [
    "CachedError",
    "Change",
    "File",
    "Model",
    "Progress",
    "acquire",
    "acquire_async",
    "watch",
    "watch_async",
]

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 1.0
_TRY_AGAIN = (UNREACHABLE, "HANDOFF_NOT_READY", "BAD_TOKEN", "STANDBY_GONE", "WITHDRAWN")
"""What a daemon or a standby that restarts, before or after the grant, looks like from here; or content that
was found corrupt at this moment, and is fetched anew."""


def acquire(
    ref: str,
    *,
    on: str = DISK,
    timeout_s: float = 600.0,
    fresh: bool = False,
    run_dir: str | os.PathLike[str] | None = None,
    address: str | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    private: Sequence[str] = (),
    room_bytes: int = 0,
    room_on: str = "",
) -> Model:
    """Wait until ``ref`` is local, proven, and stands on ``on``; keep it by a lease.

    ``on`` is ``disk`` or ``host``, whose pages are mapped; ``auto``, the best there is at this moment of this
    process's GPU, the host and the disk; or ``cuda``, ``cuda:N`` as torch counts, ``cuda:GPU-<uuid>``: the
    tensors are on that GPU, shared with other replicas where the model stands there, else copied from the
    host's memory into this process's own. ``Model.device`` says which it was. With ``auto`` and ``cuda`` the
    CUDA driver is initialised in this process, so fork before that, or spawn.

    ``private`` has globs of the names of tensors that will be written to: they are copied into this process's
    own memory. ``room_bytes`` are to be free on ``room_on`` (the GPU of ``on``, else the first one) before
    the model is granted, and nothing is loaded there until ``Model.ready``. ``fresh`` asks the origin even if
    the ref's content is known. ``run_dir`` and ``address`` say where the daemon is, else ``CACHED_ADDRESS``,
    ``CACHED_RUN_DIR``, ``/run/cached``. A daemon that is not there yet, or restarts, is waited for.

    Raises CachedError after ``timeout_s`` seconds at the latest. Leaves no gRPC channel open, so that the
    process may fork.
    """
    run = None if run_dir is None else os.fspath(run_dir)
    order = Order(
        ref, on, timeout_s, run, address, (private,) if isinstance(private, str) else tuple(private)
    )
    wish = devices.wish(on, room_bytes, room_on)
    return _acquire(order, wish, fresh, on_progress or _ignore, Stop())


async def acquire_async(
    ref: str,
    *,
    on: str = DISK,
    timeout_s: float = 600.0,
    fresh: bool = False,
    run_dir: str | os.PathLike[str] | None = None,
    address: str | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    private: Sequence[str] = (),
    room_bytes: int = 0,
    room_on: str = "",
) -> Model:
    """``acquire`` in a thread of its own; cancelling it ends the claim. ``on_progress`` runs in the loop."""
    loop = asyncio.get_running_loop()
    run = None if run_dir is None else os.fspath(run_dir)
    order = Order(
        ref, on, timeout_s, run, address, (private,) if isinstance(private, str) else tuple(private)
    )

    def tell(progress: Progress) -> None:
        if on_progress is not None:
            loop.call_soon_threadsafe(on_progress, progress)

    stop, at = Stop(), devices.current()

    def work() -> Model:
        return _acquire(order, devices.wish(on, room_bytes, room_on, at), fresh, tell, stop)

    pool = ThreadPoolExecutor(1, thread_name_prefix="cached-acquire")
    model = loop.run_in_executor(pool, work)
    pool.shutdown(wait=False)
    try:
        return await asyncio.shield(model)
    except asyncio.CancelledError:
        stop.set()
        model.add_done_callback(_close)
        raise


def _close(work: asyncio.Future[Model]) -> None:
    """What came in the moment of cancelling is nobody's."""
    if not work.cancelled() and work.exception() is None:
        work.result().close()


def _again(order: Order, id: str) -> Model:
    """The model that was pickled in another process."""
    wish = devices.wish(order.on)
    model = _acquire(order, wish, fresh=False, tell=_ignore, stop=Stop())
    if model.id != id:
        model.close()
        message = f"{order.ref} is {model.id} by now, and the model that was pickled is {id}"
        hint = "acquire it by a revision that does not change, or in each process by itself"
        raise CachedError("FAILED_PRECONDITION", "MODEL_MOVED", message, hint)
    return model


def _acquire(order: Order, wish: Wish, fresh: bool, tell: Callable[[Progress], None], stop: Stop) -> Model:
    from cached.client import granting, rpc  # late: gRPC is not free to import

    where = rpc.resolve_address(order.run_dir, order.address)
    deadline = time.monotonic() + order.timeout_s
    pause_s = FIRST_PAUSE_S
    while True:
        request = granting.make_request(order.ref, wish, fresh, os.environ)
        try:
            grant = granting.wait_for_grant(where, request, deadline - time.monotonic(), tell, stop)
            socket_path = rpc.handoff_path(where, order.run_dir)
            tell_ready = functools.partial(granting.tell_ready, where, grant.lease_id)
            return _take(grant, wish, order, socket_path, deadline - time.monotonic(), tell_ready)
        except CachedError as error:
            less = wish.after(error.reason)
            if less is None and (error.reason not in _TRY_AGAIN or time.monotonic() + pause_s >= deadline):
                raise
            tell(Progress("waiting", message=error.message))
        if less is not None:
            wish = less
        else:
            stop.wait(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _take(
    grant: Grant,
    wish: Wish,
    order: Order,
    socket_path: Path,
    timeout_s: float,
    tell_ready: Callable[[], None],
) -> Model:
    """Exchange a grant for the model."""
    handoff.check_room(grant.blobs)
    taken = handoff.redeem(socket_path, grant.token, max(timeout_s, FIRST_PAUSE_S))
    path = _local_path(grant)
    try:
        _check(taken, grant, path)
    except CachedError:
        taken.close()
        raise
    try:
        memory = _memory(taken, wish, grant.device, path)
    except BaseException:
        os.close(taken.lease_fd)
        raise
    return Model(
        taken.index,
        taken.lease_fd,
        path=path,
        ref=grant.ref,
        revision=grant.revision,
        attested=grant.attested,
        device=grant.device,
        lease_id=grant.lease_id,
        memory=memory,
        order=order,
        acquire_again=_again,
        tell_ready=tell_ready,
    )


def _check(taken: Handoff, grant: Grant, path: Path) -> None:
    """Raises CachedError where what came is not what was granted, or cannot be used here."""
    if taken.index.id != grant.id:
        raise handoff.foreign(f"{taken.index.id} came where {grant.id} was granted")
    if grant.device == HOST:
        taken.blob_fds()
    elif grant.device != DISK and not taken.memory_fds:
        raise handoff.foreign(f"no memory came for {grant.ref} on {grant.device}")
    if grant.device == DISK and not os.path.isdir(path):
        raise not_visible(f"{path} is not a directory that this process can see")


def _memory(taken: Handoff, wish: Wish, device: str, path: Path) -> Memory | Files:
    """Where the tensors will come from. Takes over ``memory_fds``."""
    if wish.gpu is not None and device in wish.prefers and device != HOST:
        from cached.client.gpu import Shared

        return Shared(wish.gpu, taken.index, taken.memory_fds)
    files = Files(taken.index.files, path, taken.blob_fds() if device != DISK else None)
    if wish.gpu is None or not wish.streams:
        return files
    from cached.client.streaming import Streamed

    return Streamed(wish.gpu, files)


def _local_path(grant: Grant) -> Path:
    """The model's directory as this process sees it: its data directory may be mounted elsewhere."""
    data_dir = os.environ.get("CACHED_DATA_DIR")
    return Path(data_dir) / "trees" / grant.id.removeprefix("sha256:") if data_dir else Path(grant.path)


def _ignore(_: Progress) -> None:
    """For those who only wait."""
