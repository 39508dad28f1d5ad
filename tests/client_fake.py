"""A daemon for the client's tests: the generated ModelCache servicer and the real handoff server.

Owns a small run and data directory. It fetches nothing and proves nothing; what a grant is worth, and what
goes wrong, the test says.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import queue
import secrets
import threading
import time
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import msgspec
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from cached.handoff import HandoffServer, Package
from cached.model import (
    ArtifactId,
    Blob,
    CachedError,
    Digest,
    ErrorKind,
    Manifest,
    ManifestFile,
    Problem,
    Ref,
    RevisionKey,
    artifact_id,
    permanent,
)
from cached.safetensors import parse_header
from cached.v1 import model_cache_pb2 as pb
from cached.v1.model_cache_pb2_grpc import ModelCacheServicer, add_ModelCacheServicer_to_server

REF = "file:///models/tiny/"


def manifest_of(files: dict[str, bytes]) -> Manifest:
    """What fetching these files would have made, but for the chunk digests."""
    found = []
    tensors = []
    for number, (path, content) in enumerate(sorted(files.items())):
        blob = Blob(Digest(hashlib.sha256(content).hexdigest()), len(content), ())
        found.append(ManifestFile(path, blob))
        if path.endswith(".safetensors"):
            tensors += parse_header(content, len(content), path, number)
    name = artifact_id((f.path, f.blob.size_bytes, f.blob.sha256) for f in found)
    return Manifest(ArtifactId(name), Ref(REF), RevisionKey("5" * 64), True, tuple(found), tuple(tensors))


class FakeDaemon(ModelCacheServicer):
    """Serves one model under REF, on both of its sockets, between ``start`` and ``stop``."""

    def __init__(self, folder: Path, files: dict[str, bytes]) -> None:
        self.run_dir = folder / "run"
        self.replicas = self.run_dir / "replicas"
        self.leases = self.run_dir / "leases"
        self.data_dir = folder / "data"
        self.manifest = manifest_of(files)
        self.tree = self.data_dir / "trees" / self.manifest.id.removeprefix("sha256:")
        for directory in (self.replicas, self.leases, self.tree):
            directory.mkdir(parents=True)
        for path, content in files.items():
            (self.tree / path).parent.mkdir(parents=True, exist_ok=True)
            (self.tree / path).write_bytes(content)
        self.requests: list[pb.AcquireRequest] = []
        self.uids: list[int] = []
        self.read_to_the_end: list[bool] = []
        # What the test may have go wrong.
        self.progress: list[pb.Progress] = []
        self.problem: Problem | None = None
        self.grants_anything = True
        self.stall_s = 0.0
        self.forgets_tokens = 0
        self.sends_memory = True
        self.names_id = str(self.manifest.id)
        self.ready: list[str] = []
        self.residents: dict[str, tuple[int, ...]] = {}  # by device, beside disk and host
        self.refused: dict[str, Problem] = {}  # by device
        self.cancelled = threading.Event()
        self.watched: queue.SimpleQueue[pb.Model | None] = queue.SimpleQueue()
        self._tokens: dict[str, tuple[str, str]] = {}
        self._blob_fds: list[int] = []
        self._server: grpc.Server | None = None

    # --- life ---

    def start(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._handoff = HandoffServer(self.replicas / "handoff.sock", self._redeem)
        self._do(self._handoff.start())
        self._server = grpc.server(ThreadPoolExecutor(8))
        add_ModelCacheServicer_to_server(self, self._server)
        self._server.add_insecure_port(f"unix:{self.replicas / 'cached.sock'}")
        self._server.start()

    def stop(self) -> None:
        if self._server is None:
            return
        self._server.stop(grace=None).wait(5)
        self._do(self._handoff.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()
        self._server = None
        while self._blob_fds:
            os.close(self._blob_fds.pop())

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    # --- what the client asks ---

    def Acquire(self, request: pb.AcquireRequest, context: grpc.ServicerContext) -> Iterator[pb.AcquireEvent]:
        self.requests.append(request)
        context.add_callback(lambda: None if self.read_to_the_end else self.cancelled.set())
        for progress in self.progress:
            yield pb.AcquireEvent(progress=progress)
        time.sleep(self.stall_s)
        problem = self.problem or self.refused.get(request.device)
        if problem is not None:
            context.abort_with_status(rpc_status.to_status(rich_status(problem)))
        if self.grants_anything:
            yield pb.AcquireEvent(grant=self._grant(request))
            time.sleep(0.02)
            self.read_to_the_end.append(context.is_active())

    def Ready(self, request: pb.ReadyRequest, context: grpc.ServicerContext) -> pb.ReadyResponse:
        self.ready.append(request.lease_id)
        return pb.ReadyResponse()

    def Watch(self, request: pb.WatchRequest, context: grpc.ServicerContext) -> Iterator[pb.Model]:
        try:
            while context.is_active():
                with contextlib.suppress(queue.Empty):
                    model = self.watched.get(timeout=0.05)
                    if model is None:
                        context.abort(grpc.StatusCode.UNAVAILABLE, "the daemon ends")
                    yield model
        finally:
            self.cancelled.set()

    def _grant(self, request: pb.AcquireRequest) -> pb.Grant:
        token, lease_id = secrets.token_hex(16), secrets.token_hex(8)
        device = next((each for each in request.prefers if each in self.residents), request.device)
        self._tokens[token] = (lease_id, device)
        model = pb.Model(
            ref=request.ref,
            id=self.names_id,
            revision=self.manifest.revision,
            attested=True,
            path=str(self.tree),
        )
        blobs = 0 if device == "disk" else len(self.manifest.distinct_blobs())
        blobs = len(self.residents.get(device, ())) or blobs
        return pb.Grant(token=token, lease_id=lease_id, model=model, blobs=blobs, device=device)

    async def _redeem(self, token: str, uid: int) -> Package:
        if self.forgets_tokens or token not in self._tokens:
            self.forgets_tokens = max(0, self.forgets_tokens - 1)
            raise permanent(ErrorKind.DENIED, "BAD_TOKEN", "this token is not known", "acquire again")
        lease_id, device = self._tokens.pop(token)
        if device in self.residents and device in self.refused:
            raise CachedError(self.refused[device])
        self.uids.append(uid)
        lease = os.open(self.leases / lease_id, os.O_RDWR | os.O_CREAT)
        fcntl.flock(lease, fcntl.LOCK_SH)
        blobs = self.residents.get(device) or self._blobs() if device != "disk" and self.sends_memory else ()
        index = msgspec.json.encode(self.manifest)
        return Package({"lease_id": lease_id}, lambda: index, lease, blobs)

    def _blobs(self) -> tuple[int, ...]:
        if not self._blob_fds:
            paths = {f.blob.sha256: self.tree / f.path for f in reversed(self.manifest.files)}
            self._blob_fds = [
                os.open(paths[blob.sha256], os.O_RDONLY) for blob in self.manifest.distinct_blobs()
            ]
        return tuple(self._blob_fds)

    # --- what the test asks ---

    def holds(self, lease_id: str) -> bool:
        """Whether any process has the lease open."""
        fd = os.open(self.leases / lease_id, os.O_RDONLY)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def is_freed(self, lease_id: str) -> bool:
        """Whether the lease ends: at once, but for what a loaded machine and the server's threads take."""
        end = time.monotonic() + 15
        while self.holds(lease_id):
            if time.monotonic() > end:
                return False
            time.sleep(0.01)
        return True


def rich_status(problem: Problem, code: int = grpc.StatusCode.UNAVAILABLE.value[0]) -> status_pb2.Status:
    """A problem with the google.rpc details that the daemon's errors carry."""
    details = [
        error_details_pb2.ErrorInfo(domain="cached", reason=problem.reason),
        error_details_pb2.LocalizedMessage(locale="en", message=problem.hint),
    ]
    if problem.retry_after_s is not None:
        wait = duration_pb2.Duration()
        wait.FromMilliseconds(round(problem.retry_after_s * 1000))
        details.append(error_details_pb2.RetryInfo(retry_delay=wait))
    packed = [any_pb2.Any() for _ in details]
    for box, detail in zip(packed, details, strict=True):
        box.Pack(detail)
    return status_pb2.Status(code=code, message=problem.message, details=packed)
