"""The Standby service and the descriptor socket of one device, whatever holds its memory.

Owns what goes over those sockets: protobuf and framing on one side, the words of the house on the other. Does
what it is told; what is resident is the business of the ``Standing`` behind it.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from cached import fds
from cached.model import (
    ArtifactId,
    CachedError,
    ErrorKind,
    Gpu,
    Inventory,
    Problem,
    Resident,
    is_artifact_id,
    permanent,
)
from preloader import log as logs
from preloader.standing import ANYBODY, NOBODY, LoadCancelled, Standing, close_all
from preloader.v1 import standby_pb2, standby_pb2_grpc
from preloader.wire import problem_to_json

MAX_RPCS = 32
MAX_HANDOFFS = 8
PROGRESS_EVERY_S = 0.25
WATCH_LOOK_EVERY_S = 1.0
HANDOFF_TIMEOUT_S = 10.0
ACCEPT_AGAIN_S = 0.5

# Pings tell the daemon of a standby that was stopped; the default takes one every five minutes for an attack.
SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
)

STATUS = {
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

log = logging.getLogger("preloader")


class StandbyService(standby_pb2_grpc.StandbyServicer):
    """The gRPC side of one device."""

    def __init__(self, standing: Standing) -> None:
        self._standing = standing
        self._loads = ThreadPoolExecutor(MAX_RPCS, "load")

    def Watch(
        self, request: standby_pb2.WatchRequest, context: grpc.ServicerContext
    ) -> Iterator[standby_pb2.Inventory]:
        seen = -1
        while context.is_active():
            version = self._standing.wait_for_change(seen, WATCH_LOOK_EVERY_S)
            if version != seen:
                seen = version
                yield _inventory(self._standing.inventory())

    def Load(
        self, request: standby_pb2.LoadRequest, context: grpc.ServicerContext
    ) -> Iterator[standby_pb2.LoadEvent]:
        cancel, meter = threading.Event(), _Meter()
        if not context.add_callback(cancel.set):
            return
        try:
            artifact = _checked(request.artifact_id)
            running = self._loads.submit(_timed_load, self._standing, artifact, meter, cancel)
            while not _ended(running):
                yield meter.event()
            resident = running.result()
        except LoadCancelled:
            return
        except CachedError as error:
            _abort(context, error.problem)
        yield meter.event()
        yield standby_pb2.LoadEvent(done=_resident(resident))

    def Release(
        self, request: standby_pb2.ReleaseRequest, context: grpc.ServicerContext
    ) -> standby_pb2.ReleaseResponse:
        try:
            artifact = _checked(request.artifact_id)
            released = self._standing.release(artifact)
        except CachedError as error:
            _abort(context, error.problem)
        if released:
            log.info("released", extra=logs.fields(artifact=artifact))
        return standby_pb2.ReleaseResponse()


class DescriptorServer:
    """The raw socket that sends a resident's descriptors to whoever may open it, or takes them back."""

    def __init__(self, standing: Standing) -> None:
        self._standing = standing
        self._pool = ThreadPoolExecutor(MAX_HANDOFFS, "descriptors")
        self._slots = threading.Semaphore(MAX_HANDOFFS)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._stopped = False

    def start(self, path: Path) -> None:
        """Listen at ``path``, which appears once it answers."""
        hidden = _hidden(path)
        self._listener.bind(str(hidden))
        self._listener.listen(MAX_HANDOFFS)
        hidden.rename(path)
        threading.Thread(target=self._accept, name="accept", daemon=True).start()

    def stop(self) -> None:
        """Take no more; what is under way ends by itself."""
        self._stopped = True
        with contextlib.suppress(OSError):  # it was not started
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits on it

    def _accept(self) -> None:
        with self._listener:
            while not self._stopped:
                self._slots.acquire()  # callers beyond the bound wait in the socket's queue
                try:
                    connection, _ = self._listener.accept()
                except OSError as error:  # too many open files, most likely; handoffs under way will end
                    self._slots.release()
                    if self._stopped:
                        return
                    log.error("a handoff was not taken", extra=logs.fields(error=str(error)))
                    time.sleep(ACCEPT_AGAIN_S)
                    continue
                self._pool.submit(self._answer, connection)

    def _answer(self, connection: socket.socket) -> None:
        try:
            with connection:
                connection.settimeout(HANDOFF_TIMEOUT_S)
                self._exchange(connection)
        except (OSError, fds.FramingError) as error:
            log.warning("a handoff broke off", extra=logs.fields(error=str(error)))
        finally:
            self._slots.release()

    def _exchange(self, connection: socket.socket) -> None:
        request, received = fds.receive(connection)
        try:
            if "adopt" in request:
                self._adopt(connection, request, received)
            else:
                close_all(received)
                answer = self._node if "node" in request else self._given
                self._send(connection, *answer(request))
        except (OSError, fds.FramingError):
            raise
        except CachedError as error:
            fds.send(connection, {"error": problem_to_json(error.problem)})
        except Exception as error:  # a bug of ours: whoever took it for our end would ask the same for ever
            log.exception("a handoff failed")
            fds.send(connection, {"error": problem_to_json(_internal(error))})

    def _adopt(self, connection: socket.socket, request: dict[str, Any], received: list[int]) -> None:
        try:
            artifact, uid = _checked(str(request["adopt"])), _uid(request)
        except CachedError:
            close_all(received)
            raise
        self._standing.adopt(artifact, uid, received)
        log.info("adopted", extra=logs.fields(artifact=artifact))
        fds.send(connection, {"adopted": True})

    def _node(self, request: dict[str, Any]) -> tuple[dict[str, Any], tuple[int, ...]]:
        node = self._standing.node()
        return {"node": node is not None}, () if node is None else (node,)

    def _given(self, request: dict[str, Any]) -> tuple[dict[str, Any], tuple[int, ...]]:
        artifact = _checked(str(request.get("id")))
        uid, descriptors = self._standing.descriptors(artifact, _uid(request))
        return {"id": artifact, "uid": uid}, descriptors

    def _send(self, connection: socket.socket, header: dict[str, Any], descriptors: tuple[int, ...]) -> None:
        try:
            fds.send(connection, header, descriptors)
        finally:
            close_all(descriptors)


class _Meter:
    """How far a load is, written by its thread and read by the call's."""

    def __init__(self) -> None:
        self._state = (0, 0)

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        self._state = (done_bytes, total_bytes)

    def event(self) -> standby_pb2.LoadEvent:
        done, total = self._state
        return standby_pb2.LoadEvent(progress=standby_pb2.LoadProgress(bytes_done=done, bytes_total=total))


def _timed_load(standing: Standing, artifact: ArtifactId, meter: _Meter, cancel: threading.Event) -> Resident:
    began = time.monotonic()
    try:
        resident = standing.load(artifact, meter, cancel)
    except LoadCancelled:
        log.info("load cancelled", extra=logs.fields(artifact=artifact))
        raise
    except CachedError as error:
        problem = error.problem
        said = logs.fields(artifact=artifact, reason=problem.reason, message=problem.message)
        log.warning("load refused", extra=said)
        raise
    took = round(time.monotonic() - began, 3)
    said = logs.fields(artifact=artifact, bytes=resident.size_bytes, locked=resident.locked, seconds=took)
    log.info("resident", extra=said)
    return resident


def _internal(error: Exception) -> Problem:
    words = f"the preloader failed at this: {error!r}"
    return Problem(ErrorKind.FAILED, "INTERNAL", words, "see the preloader's log", None)


def _ended(future: Future[Resident]) -> bool:
    return bool(wait([future], PROGRESS_EVERY_S).done)


def _checked(text: str) -> ArtifactId:
    if not is_artifact_id(text):
        raise permanent(
            ErrorKind.INVALID,
            "BAD_ARTIFACT_ID",
            f"{text[:80]!r} is not an artifact id",
            "it is sha256: and 64 hex digits",
        )
    return ArtifactId(text)


def _uid(request: dict[str, Any]) -> int:
    uid = request.get("uid", NOBODY)
    if type(uid) is not int or uid < ANYBODY:
        raise permanent(ErrorKind.INVALID, "BAD_UID", f"{uid!r} is not a uid", "it is a number, -1 or -2")
    return uid


def _inventory(inventory: Inventory) -> standby_pb2.Inventory:
    return standby_pb2.Inventory(
        device=inventory.device,
        pid=inventory.pid,
        limit_bytes=inventory.limit_bytes,
        can_lock=inventory.can_lock,
        cannot_lock_reason=inventory.cannot_lock_reason,
        write_protected=inventory.write_protected,
        residents=map(_resident, inventory.residents),
        gpu=None if inventory.gpu is None else _gpu(inventory.gpu),
    )


def _gpu(gpu: Gpu) -> standby_pb2.Gpu:
    return standby_pb2.Gpu(
        index=gpu.index,
        name=gpu.name,
        total_bytes=gpu.total_bytes,
        free_bytes=gpu.free_bytes,
        outside_bytes=gpu.outside_bytes,
        unfit_reason=gpu.unfit_reason,
    )


def _resident(resident: Resident) -> standby_pb2.Resident:
    return standby_pb2.Resident(
        artifact_id=resident.artifact, bytes=resident.size_bytes, locked=resident.locked
    )


def _abort(context: grpc.ServicerContext, problem: Problem) -> NoReturn:
    """End the call with a problem: status and text, the rest as trailing metadata."""
    trailing = [("cached-reason", problem.reason), ("cached-hint", _ascii(problem.hint))]
    if problem.retry_after_s is not None:
        trailing.append(("cached-retry-after-s", str(problem.retry_after_s)))
    context.set_trailing_metadata(tuple(trailing))
    context.abort(STATUS[problem.kind], problem.message)


def _ascii(text: str) -> str:
    """Metadata values are printable ASCII."""
    return "".join(c if " " <= c <= "~" else "?" for c in text)


def serve(standing: Standing, stem: Path) -> Callable[[], None]:
    """Serve at ``stem``.sock and ``stem``.fds.sock; returns what ends that and removes them."""
    paths = stem.with_name(f"{stem.name}.fds.sock"), stem.with_name(f"{stem.name}.sock")
    handoffs = DescriptorServer(standing)
    try:
        handoffs.start(paths[0])
        server = new_server(StandbyService(standing), paths[1])
    except BaseException:
        handoffs.stop()
        paths[0].unlink(missing_ok=True)
        raise

    def stop() -> None:
        for path in paths:
            path.unlink(missing_ok=True)
        server.stop(None)
        handoffs.stop()

    return stop


def new_server(service: StandbyService, path: Path) -> grpc.Server:
    """Serve at ``path``, which appears once it answers."""
    server = grpc.server(
        ThreadPoolExecutor(MAX_RPCS + 8, "rpc"), maximum_concurrent_rpcs=MAX_RPCS, options=SERVER_OPTIONS
    )
    standby_pb2_grpc.add_StandbyServicer_to_server(service, server)
    checks = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    for name in ("", "preloader.v1.Standby"):
        checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    hidden = _hidden(path)
    server.add_insecure_port(f"unix:{hidden}")
    server.start()
    hidden.rename(path)
    return server


def _hidden(path: Path) -> Path:
    """Where a socket is bound before it is renamed into place; what a predecessor left there goes."""
    hidden = path.with_name(f".{path.name}")
    hidden.unlink(missing_ok=True)
    return hidden
