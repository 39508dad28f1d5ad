"""Client of one standby: what it holds, what it is to load and release, and duplicates of its descriptors.

Owns the connection to one device's process and the descriptors received from it, which keep the memory's
files at hand whatever becomes of the standby. Starts no process and decides nothing; protobuf stays in here.

On a GPU the duplicates are what the memory lives by: they outlast the connection, a standby that begins anew
gets them back, and they are closed before memory is given back. A holder could write through them, so whom
they were given to goes with every exchange: the standby proves them again before another uid gets them.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from cached import fds
from cached.model import (
    ArtifactId,
    CachedError,
    Device,
    ErrorKind,
    Gpu,
    Inventory,
    Problem,
    Resident,
    temporary,
)
from preloader.v1 import standby_pb2, standby_pb2_grpc

MAX_ASKING = 4
ASK_TIMEOUT_S = 600.0
"""For one exchange on the descriptor socket: an unlocked resident is proven again within it."""
RELEASE_TIMEOUT_S = 60.0
LINGER_S = 30.0
"""How long a forgotten descriptor stays open: a handoff that was given its number may still be sending it."""
NOBODY = -1
"""The uid of what is only kept: it is given to no replica, and whom it was given to before stays known."""
UNKNOWN_UID = -2
"""Of what was given to somebody that we have not seen: no uid is the same."""

# A stopped process keeps its socket open; pings tell it from a quiet one.
_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),
)

_KINDS = {
    grpc.StatusCode.UNAVAILABLE: ErrorKind.UNAVAILABLE,
    grpc.StatusCode.INVALID_ARGUMENT: ErrorKind.INVALID,
    grpc.StatusCode.NOT_FOUND: ErrorKind.NOT_FOUND,
    grpc.StatusCode.DATA_LOSS: ErrorKind.DATA_LOSS,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ErrorKind.NO_ROOM,
    grpc.StatusCode.PERMISSION_DENIED: ErrorKind.DENIED,
    grpc.StatusCode.DEADLINE_EXCEEDED: ErrorKind.DEADLINE,
    grpc.StatusCode.FAILED_PRECONDITION: ErrorKind.PRECONDITION,
}


def device_sockets(run_dir: Path) -> dict[Device, Path]:
    """The standbys' sockets as they can be found now; one may have nobody behind it."""
    paths = sorted((run_dir / "standby").glob("[!.]*.sock"))
    return {_device(path): path for path in paths if not path.name.endswith(".fds.sock")}


def _device(path: Path) -> Device:
    kind, dash, rest = path.stem.partition("-")
    return Device(f"{kind}:{rest}" if dash else kind)


def is_gpu(device: Device) -> bool:
    return device.startswith("cuda:")


@dataclass(frozen=True, slots=True)
class Duplicates:
    """One resident's descriptors, and the uid that they were last given to."""

    resident: Resident
    uid: int
    fds: tuple[int, ...]


Kept = dict[ArtifactId, Duplicates]
"""One device's duplicates. Whoever made it says how long they are kept, and closes what ``drop`` takes."""


def drop(kept: Kept, artifact: ArtifactId) -> None:
    """Close an artifact's duplicates at once; harmless where there are none."""
    duplicates = kept.pop(artifact, None)
    _close_all(duplicates.fds if duplicates else ())


class Standby:
    """One standby, over one connection. Used from one event loop.

    Every method raises CachedError; a temporary one with reason STANDBY_GONE where nobody answers.
    ``kept`` is what is kept of the device's descriptors; a GPU's outlast the connection.
    """

    def __init__(
        self, device: Device, socket_path: Path, linger_s: float = LINGER_S, kept: Kept | None = None
    ) -> None:
        self.device = device
        self.kept: Kept = {} if kept is None else kept
        self._is_gpu = is_gpu(device)
        self._fds_path = socket_path.with_name(f"{socket_path.stem}.fds.sock")
        self._linger_s = linger_s
        self._channel = grpc.aio.insecure_channel(f"unix:{socket_path.absolute()}", options=_OPTIONS)
        self._stub = standby_pb2_grpc.StandbyStub(self._channel)
        self._threads = ThreadPoolExecutor(MAX_ASKING, f"standby-{device}")
        self._asking: dict[tuple[ArtifactId, int], asyncio.Task[tuple[int, ...]]] = {}
        self._releasing: set[ArtifactId] = set()
        self._connections: set[socket.socket] = set()
        self._residents: dict[ArtifactId, Resident] = {}
        self._closed = False

    async def watch(self) -> AsyncIterator[Inventory]:
        """What the standby holds, at once and after every change, until it is gone: that is an error."""
        call = self._stub.Watch(standby_pb2.WatchRequest())
        try:
            async for message in call:
                inventory = _inventory(message)
                self._residents = {r.artifact: r for r in inventory.residents}
                yield inventory
        except grpc.aio.AioRpcError as error:
            raise self._translate(error) from error
        finally:
            call.cancel()
            self._residents.clear()
        raise self._gone("it ended its watch")

    async def load(self, artifact: ArtifactId, on_progress: Callable[[int, int], None]) -> Resident:
        """Make an artifact resident; ``on_progress`` hears (bytes done, in all). Cancelling undoes it."""
        call = self._stub.Load(standby_pb2.LoadRequest(artifact_id=artifact))
        try:
            async for event in call:
                if event.WhichOneof("event") == "done":
                    return self._loaded(_resident(event.done))
                on_progress(event.progress.bytes_done, event.progress.bytes_total)
        except grpc.aio.AioRpcError as error:
            raise self._translate(error) from error
        finally:
            call.cancel()
        raise self._gone("it ended a load without a result")

    async def release(self, artifact: ArtifactId) -> None:
        """Give its memory back. Harmless where it is not resident. A GPU's is free only once nobody has a
        descriptor of it open, so ours are closed first; the host's stay until ``forget``."""
        self._residents.pop(artifact, None)
        request = standby_pb2.ReleaseRequest(artifact_id=artifact)
        try:
            if self._is_gpu:
                self._releasing.add(artifact)  # who asks from now on would have it stay
                asking = [task for (asked, _), task in self._asking.items() if asked == artifact]
                await asyncio.gather(*asking, return_exceptions=True)
                self.forget(artifact)
            await self._stub.Release(request, timeout=RELEASE_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise self._translate(error) from error
        finally:
            self._releasing.discard(artifact)

    async def descriptors(self, artifact: ArtifactId, uid: int = NOBODY) -> tuple[int, ...]:
        """Its descriptors, in the standby's order, to be given to ``uid``. They stay ours; do not close them.

        A host's are one for each distinct blob: of a locked resident, kept ones are good; any other is asked
        for anew, which proves it again. A GPU's are its layout and its blocks: kept ones are good for the uid
        that had them last; for another they are asked for anew, and proven again.
        """
        uid = uid if self._is_gpu else NOBODY
        if artifact in self._releasing:
            raise temporary("WITHDRAWN", f"{artifact} leaves {self.device}", "acquire again", 1.0)
        if self._are_good(artifact, uid):
            return self.kept[artifact].fds
        asking = self._asking.get((artifact, uid))
        if asking is None:
            asking = asyncio.create_task(self._ask_and_keep(artifact, uid))
            self._asking[artifact, uid] = asking
            asking.add_done_callback(lambda task: self._asked((artifact, uid), task))
        # One proof serves all who ask meanwhile, and goes on when one of them gives up.
        descriptors = await asyncio.shield(asking)
        if not self._is_gpu:
            return descriptors
        if not self._are_good(artifact, uid):
            raise self._gone(f"{artifact} was released, or given to another uid, meanwhile")
        return self.kept[artifact].fds

    async def holds(self, artifact: ArtifactId) -> bool:
        """Whether it has a resident that an inventory lacks, which may only be older than a load."""
        try:
            await self._ask_and_keep(artifact, NOBODY)
        except CachedError as error:
            if error.problem.reason == "STANDBY_GONE":
                raise
            return error.problem.kind not in (ErrorKind.DATA_LOSS, ErrorKind.NOT_FOUND)
        return True

    async def adopt(self, artifact: ArtifactId) -> Resident:
        """Hand a GPU's kept duplicates to a standby that has begun anew and lacks them."""
        duplicates = self.kept[artifact]
        # Its own copies: ours may be closed, and their numbers reused, while a thread sends.
        sent: list[int] = []
        try:
            sent.extend(map(os.dup, duplicates.fds))
            _, received = await self._exchange({"adopt": artifact, "uid": duplicates.uid}, tuple(sent))
        except OSError as error:
            raise self._broken(error) from error
        finally:
            _close_all(tuple(sent))
        _close_all(received)
        self._residents[artifact] = duplicates.resident
        return duplicates.resident

    async def node(self) -> int | None:
        """A descriptor of the GPU's node in /dev, which the caller closes; None where it has none to give.

        The driver frees memory whose device no process has open, though descriptors of it still look valid.
        """
        try:
            _, received = await self._exchange({"node": True})
        except CachedError as error:
            if error.problem.reason == "STANDBY_GONE":
                raise
            return None
        return received[0] if received else None

    def forget(self, artifact: ArtifactId) -> None:
        """Close the kept descriptors; the host's once nobody can be sending them any more."""
        self._residents.pop(artifact, None)
        if self._is_gpu:
            drop(self.kept, artifact)
        elif artifact in self.kept:
            self._close_later(self.kept.pop(artifact).fds)

    async def close(self) -> None:
        """End the connection. What is being asked ends with an error; a host's descriptors are forgotten."""
        self._closed = True
        for connection in list(self._connections):
            _shut_down(connection)  # wakes the thread that waits on it
        await asyncio.gather(*self._asking.values(), return_exceptions=True)
        if not self._is_gpu:
            for artifact in list(self.kept):
                self.forget(artifact)
        self._threads.shutdown(wait=False)
        await self._channel.close()

    # --- descriptors --------------------------------------------------------------------------

    def _are_good(self, artifact: ArtifactId, uid: int) -> bool:
        kept = self.kept.get(artifact)
        if kept is None:
            return False
        if self._is_gpu:
            return uid in (NOBODY, kept.uid)
        resident = self._residents.get(artifact)
        return resident is not None and resident.locked

    async def _ask_and_keep(self, artifact: ArtifactId, uid: int) -> tuple[int, ...]:
        request: dict[str, Any] = {"id": artifact, "uid": uid} if self._is_gpu else {"id": artifact}
        try:
            header, received = await self._exchange(request)
        except CachedError as error:
            if self._is_gpu and error.problem.kind in (ErrorKind.DATA_LOSS, ErrorKind.NOT_FOUND):
                self.forget(artifact)  # it has given the memory up, and it is free only once we have too
            raise
        given_to = int(header.get("uid", UNKNOWN_UID))
        self._note_given(uid)
        kept = self.kept.get(artifact)
        if kept is not None and _same_files(kept.fds, received):
            _close_all(received)
            self.kept[artifact] = replace(kept, uid=given_to)
            return kept.fds
        resident = self._residents.get(artifact, Resident(artifact, 0, False))
        self.forget(artifact)
        self._residents[artifact] = resident
        self.kept[artifact] = Duplicates(resident, given_to, received)
        return received

    def _note_given(self, uid: int) -> None:
        """What others were given may share blocks with what this uid now has: only the standby can tell."""
        for artifact, kept in self.kept.items() if uid != NOBODY else ():
            if kept.uid not in (NOBODY, uid):
                self.kept[artifact] = replace(kept, uid=UNKNOWN_UID)

    def _asked(self, key: tuple[ArtifactId, int], task: asyncio.Task[tuple[int, ...]]) -> None:
        self._asking.pop(key, None)
        if not task.cancelled():
            task.exception()  # seen, also where everyone who waited has given up

    async def _exchange(
        self, request: dict[str, Any], sent: tuple[int, ...] = ()
    ) -> tuple[dict[str, Any], tuple[int, ...]]:
        if self._closed:
            raise self._gone("the connection is closed")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._ask, request, sent)

    def _ask(
        self, request: dict[str, Any], sent: tuple[int, ...] = ()
    ) -> tuple[dict[str, Any], tuple[int, ...]]:
        """In a thread: one exchange on the descriptor socket."""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                header, received = self._talk(connection, request, sent)
        except (OSError, fds.FramingError) as error:
            raise self._broken(error) from error
        if "error" in header:
            _close_all(tuple(received))
            raise _from_header(header["error"])
        return header, tuple(received)

    def _talk(
        self, connection: socket.socket, request: dict[str, Any], sent: tuple[int, ...]
    ) -> tuple[dict[str, Any], list[int]]:
        self._connections.add(connection)
        try:
            connection.settimeout(ASK_TIMEOUT_S)
            connection.connect(str(self._fds_path))
            if self._closed:  # from here on, close() wakes this thread
                raise self._gone("the connection is closed")
            fds.send(connection, request, sent)
            return fds.receive(connection)
        finally:
            self._connections.discard(connection)

    def _close_later(self, descriptors: tuple[int, ...]) -> None:
        if descriptors:
            asyncio.get_running_loop().call_later(self._linger_s, _close_all, descriptors)

    # --- answers --------------------------------------------------------------------------------

    def _loaded(self, resident: Resident) -> Resident:
        self._residents[resident.artifact] = resident
        return resident

    def _gone(self, why: str) -> CachedError:
        return temporary(
            "STANDBY_GONE",
            f"the standby for {self.device} is gone: {why}",
            "see that the preloader runs with the same run directory; its log says why it ended",
            retry_after_s=0.5,
        )

    def _broken(self, error: OSError | fds.FramingError) -> CachedError:
        if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
            return self._gone(str(error))
        hint = "raise the daemon's limit on open files (RLIMIT_NOFILE)"
        why = f"no descriptor is left to have what stands on {self.device}: {error.strerror}"
        return temporary("TOO_MANY_FILES", why, hint, retry_after_s=5.0)

    def _translate(self, error: grpc.aio.AioRpcError) -> CachedError:
        """What a call ended with. Without a reason it did not come from the standby, but instead of it."""
        trailing = {key: str(value) for key, value in error.trailing_metadata() or ()}
        details = error.details() or str(error.code())
        if "cached-reason" in trailing:
            retry = trailing.get("cached-retry-after-s")
            return CachedError(
                Problem(
                    _KINDS.get(error.code(), ErrorKind.FAILED),
                    trailing["cached-reason"],
                    details,
                    trailing.get("cached-hint", ""),
                    float(retry) if retry is not None else None,
                )
            )
        return self._gone(details)


def _inventory(message: standby_pb2.Inventory) -> Inventory:
    return Inventory(
        device=Device(message.device),
        pid=message.pid,
        limit_bytes=message.limit_bytes,
        can_lock=message.can_lock,
        cannot_lock_reason=message.cannot_lock_reason,
        write_protected=message.write_protected,
        residents=tuple(map(_resident, message.residents)),
        gpu=_gpu(message.gpu) if message.HasField("gpu") else None,
    )


def _gpu(message: standby_pb2.Gpu) -> Gpu:
    return Gpu(
        index=message.index,
        name=message.name,
        total_bytes=message.total_bytes,
        free_bytes=message.free_bytes,
        outside_bytes=message.outside_bytes,
        unfit_reason=message.unfit_reason,
    )


def _resident(message: standby_pb2.Resident) -> Resident:
    return Resident(ArtifactId(message.artifact_id), message.bytes, message.locked)


def _from_header(error: dict[str, Any]) -> CachedError:
    retry = error.get("retry_after_s")
    kind, reason = ErrorKind(error["kind"]), str(error["reason"])
    return CachedError(Problem(kind, reason, str(error["message"]), str(error["hint"]), retry))


def _same_files(left: tuple[int, ...], right: tuple[int, ...]) -> bool:
    return [_identity(fd) for fd in left] == [_identity(fd) for fd in right]


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _close_all(descriptors: tuple[int, ...]) -> None:
    for fd in descriptors:
        os.close(fd)


def _shut_down(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # not connected yet, or gone already
        connection.shutdown(socket.SHUT_RDWR)
