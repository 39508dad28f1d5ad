"""What a replica imports: ``acquire``, and the model that it returns.

Owns the waiting: one acquire from the first try to the handoff, over restarts of the daemon. Imports nothing
of the daemon's; gRPC only once something is acquired, torch only once a tensor is asked for.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cached.client import handoff
from cached.client.errors import UNREACHABLE, CachedError
from cached.client.handoff import File
from cached.client.model import DISK, Model
from cached.client.progress import Progress

if TYPE_CHECKING:
    from cached.client.granting import Grant

__all__ = ["CachedError", "File", "Model", "Progress", "acquire"]

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
) -> Model:
    """Wait until ``ref`` is local, proven, and stands on ``on`` (``disk`` or ``host``); keep it by a lease.

    ``fresh`` asks the origin even if the ref's content is known. ``run_dir`` and ``address`` say where the
    daemon is, else ``CACHED_ADDRESS``, ``CACHED_RUN_DIR``, ``/run/cached``. A daemon that is not there yet,
    or restarts, is waited for. Raises CachedError after ``timeout_s`` seconds at the latest. Leaves no
    gRPC channel open, so that the process may fork.
    """
    from cached.client import granting, rpc  # late: gRPC is not free to import

    where = rpc.resolve_address(run_dir, address)
    request = granting.make_request(ref, on or DISK, fresh, os.environ)
    tell = on_progress or _ignore
    deadline = time.monotonic() + timeout_s
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            grant = granting.wait_for_grant(where, request, deadline - time.monotonic(), tell)
            return _take(grant, request.device, rpc.handoff_path(where, run_dir), deadline - time.monotonic())
        except CachedError as error:
            if error.reason not in _TRY_AGAIN or time.monotonic() + pause_s >= deadline:
                raise
            tell(Progress("waiting", message=error.message))
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _take(grant: Grant, device: str, socket_path: Path, timeout_s: float) -> Model:
    """Exchange a grant for the model."""
    handoff.check_room(grant.blobs)
    taken = handoff.redeem(socket_path, grant.token, max(timeout_s, FIRST_PAUSE_S))
    model = Model(
        taken,
        path=_local_path(grant),
        ref=grant.ref,
        revision=grant.revision,
        attested=grant.attested,
        device=device,
        lease_id=grant.lease_id,
    )
    try:
        _check(model, grant, bool(taken.blob_fds))
    except CachedError:
        model.close()
        raise
    return model


def _check(model: Model, grant: Grant, has_memory: bool) -> None:
    if model.id != grant.id:
        raise handoff.foreign(f"{model.id} came where {grant.id} was granted")
    if model.device != DISK and not has_memory:
        raise handoff.foreign(f"no memory came for {model.ref} on {model.device}")
    if model.device == DISK and not os.path.isdir(model.path):
        message = f"{model.path} is not a directory that this process can see"
        hint = (
            "mount the data directory read-only at the path that the daemon has it at, or set CACHED_DATA_DIR"
        )
        raise CachedError("FAILED_PRECONDITION", "PATH_NOT_VISIBLE", message, hint)


def _local_path(grant: Grant) -> Path:
    """The model's directory as this process sees it: its data directory may be mounted elsewhere."""
    data_dir = os.environ.get("CACHED_DATA_DIR")
    return Path(data_dir) / "trees" / grant.id.removeprefix("sha256:") if data_dir else Path(grant.path)


def _ignore(_: Progress) -> None:
    """For those who only wait."""
