"""One standby: the Standby service and the descriptor socket of one device, in a process of its own.

Owns what goes over those sockets and the process's set-up: limits, the lock that only one standby of a device
has, the end when its parent ends. Does what it is told; what is resident is the loader's business.

Started by the preloader's parent as ``python -m preloader.serve``, with a pipe as standard input that never
brings anything: its end is the parent's end, and then this process's. On standard output it says which
contents it has locked (``+digest``, ``-digest``), for a successor.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import logging
import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from cached import fds
from cached.model import (
    HOST,
    ArtifactId,
    CachedError,
    Device,
    Digest,
    ErrorKind,
    Problem,
    Resident,
    is_artifact_id,
    is_digest,
    permanent,
)
from preloader import log as logs
from preloader.groups import own_groups
from preloader.loader import LoadCancelled, Loader
from preloader.memory.host import HostMemory, lock_allowance
from preloader.v1 import standby_pb2, standby_pb2_grpc
from preloader.view import can_protect
from preloader.wire import problem_to_json

MAX_RPCS = 32
MAX_HANDOFFS = 8
PROGRESS_EVERY_S = 0.25
WATCH_LOOK_EVERY_S = 1.0
HANDOFF_TIMEOUT_S = 10.0
ACCEPT_AGAIN_S = 0.5
PREDECESSOR_TIMEOUT_S = 10.0
MAX_VOUCHED_BYTES = 16 * 1024 * 1024

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

    def __init__(self, loader: Loader, memory: HostMemory, data_dir: Path) -> None:
        self._loader = loader
        self._memory = memory
        self._data_dir = data_dir
        self._loads = ThreadPoolExecutor(MAX_RPCS, "load")

    def Watch(
        self, request: standby_pb2.WatchRequest, context: grpc.ServicerContext
    ) -> Iterator[standby_pb2.Inventory]:
        seen = -1
        while context.is_active():
            version = self._loader.wait_for_change(seen, WATCH_LOOK_EVERY_S)
            if version != seen:
                seen = version
                yield self._inventory()

    def Load(
        self, request: standby_pb2.LoadRequest, context: grpc.ServicerContext
    ) -> Iterator[standby_pb2.LoadEvent]:
        cancel, meter = threading.Event(), _Meter()
        if not context.add_callback(cancel.set):
            return
        try:
            artifact = _checked(request.artifact_id)
            running = self._loads.submit(_timed_load, self._loader, artifact, meter, cancel)
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
        except CachedError as error:
            _abort(context, error.problem)
        if self._loader.release(artifact):
            log.info("released", extra=logs.fields(artifact=artifact))
        return standby_pb2.ReleaseResponse()

    def _inventory(self) -> standby_pb2.Inventory:
        why_not = self._memory.cannot_lock_reason
        return standby_pb2.Inventory(
            device=self._memory.device,
            pid=os.getpid(),
            limit_bytes=self._memory.limit_bytes(),
            can_lock=not why_not,
            cannot_lock_reason=why_not,
            write_protected=self._loader.write_protected() and can_protect(self._data_dir),
            residents=[_resident(r) for r in self._loader.residents()],
        )


class DescriptorServer:
    """The raw socket that sends a resident's descriptors to whoever may open it."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._pool = ThreadPoolExecutor(MAX_HANDOFFS, "descriptors")
        self._slots = threading.Semaphore(MAX_HANDOFFS)

    def start(self, path: Path) -> None:
        """Listen at ``path``, which appears once it answers."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        hidden = _hidden(path)
        listener.bind(str(hidden))
        listener.listen(MAX_HANDOFFS)
        hidden.rename(path)
        threading.Thread(target=self._accept, args=(listener,), name="accept", daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            self._slots.acquire()  # callers beyond the bound wait in the socket's queue
            try:
                connection, _ = listener.accept()
            except OSError as error:  # too many open files, most likely; handoffs under way will end
                log.error("a handoff was not taken", extra=logs.fields(error=str(error)))
                self._slots.release()
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
        except Exception:
            log.exception("a handoff failed")
            raise
        finally:
            self._slots.release()

    def _exchange(self, connection: socket.socket) -> None:
        request, _ = fds.receive(connection, most_fds=0)
        try:
            artifact = _checked(str(request.get("id")))
            descriptors = self._loader.descriptors(artifact)
        except CachedError as error:
            fds.send(connection, {"error": problem_to_json(error.problem)})
            return
        try:
            fds.send(connection, {"id": artifact}, descriptors)
        finally:
            for fd in descriptors:
                os.close(fd)


class _Meter:
    """How far a load is, written by its thread and read by the call's."""

    def __init__(self) -> None:
        self._state = (0, 0)

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        self._state = (done_bytes, total_bytes)

    def event(self) -> standby_pb2.LoadEvent:
        done, total = self._state
        return standby_pb2.LoadEvent(progress=standby_pb2.LoadProgress(bytes_done=done, bytes_total=total))


def _timed_load(loader: Loader, artifact: ArtifactId, meter: _Meter, cancel: threading.Event) -> Resident:
    began = time.monotonic()
    try:
        resident = loader.load(artifact, meter, cancel)
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


# --- the process ---------------------------------------------------------------------------------


def main() -> None:
    options = _arguments()
    logs.configure(sys.stderr)
    # Sockets come into being as 0600: only who may be root here, or this user, talks to a standby.
    os.umask(0o177)
    _allow_open_files()
    sockets: Path = options.run_dir / "standby"
    _await_predecessor(sockets / f"{options.device}.lock")
    memory = _memory(options)
    loader = Loader(options.data_dir, memory)
    DescriptorServer(loader).start(sockets / f"{options.device}.fds.sock")
    server = new_server(StandbyService(loader, memory, options.data_dir), sockets / f"{options.device}.sock")
    said = logs.fields(device=options.device, pid=os.getpid(), cannot_lock=memory.cannot_lock_reason)
    log.info("standby serves", extra=said)
    _await_parents_end()
    server.stop(None)
    os._exit(0)  # nothing here needs an orderly end, and threads may be in the middle of anything


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="preloader.serve", description=__doc__)
    parser.add_argument("--device", type=Device, choices=[HOST], required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--same-group", action="store_true")
    parser.add_argument("--vouched-fd", type=int, help="a file of digests that a predecessor had locked")
    return parser.parse_args()


def _memory(options: argparse.Namespace) -> HostMemory:
    allowance, why_not = lock_allowance()
    return HostMemory(
        own_groups(),
        allowance,
        why_not,
        same_group=options.same_group,
        vouched=_read_vouched(options.vouched_fd),
        tell=_tell_parent,
    )


def _read_vouched(fd: int | None) -> list[Digest]:
    if fd is None:
        return []
    with os.fdopen(fd, "rb") as file:
        words = file.read(MAX_VOUCHED_BYTES).decode("ascii", "replace").split()
    return [Digest(word) for word in words if is_digest(word)]


def _tell_parent(digest: Digest, vouched: bool) -> None:
    with contextlib.suppress(BrokenPipeError):  # no parent: this process is about to end too
        os.write(sys.stdout.fileno(), f"{'+' if vouched else '-'}{digest}\n".encode())


def _allow_open_files() -> None:
    """Each resident blob is an open file."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _await_predecessor(path: Path) -> None:
    """Wait until no other standby of this device is left; none starts before this one's memory is gone."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + PREDECESSOR_TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.02)
    sys.exit(f"error: another standby still has {path} after {PREDECESSOR_TIMEOUT_S:.0f} s")


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


def _await_parents_end() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass


if __name__ == "__main__":
    main()
