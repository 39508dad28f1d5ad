"""The downloads that are libraries or raw loops: ``python -m benchmarks.peers.clients JOB`` is one of them.

Owns how each of them is used. ``JOB`` is a ``Job`` as JSON. The process imports and opens what it needs, says
``ready``, waits for a line, downloads, says ``done`` and what it found out, and waits for its input's end, so
that it can be looked at. What is measured begins with that line: nobody is slower for Python's start.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import http.client
import json
import mmap
import os
import queue
import socket
import ssl
import sys
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MIB = 2**20
RANGE_BYTES = 16 * MIB
SLICE_BYTES = 256 * 1024
"""What is read and written at once: larger buffered writes are sometimes many times slower."""
DIRECT_BYTES = 4 * MIB
PAGE_BYTES = 4096
PIPE_BYTES = MIB
TIMEOUT_S = 120.0
HASHED_BYTES = 512 * MIB

Work = Callable[[], dict[str, float]]
"""Does what is measured; the answer is what it has to say besides that it is done."""


@dataclass(frozen=True, slots=True)
class Job:
    """``files``: (name, size in bytes) of what lies under ``url``; ``target``: the folder to fill."""

    kind: str
    url: str
    files: tuple[tuple[str, int], ...]
    target: str
    connections: int = 4
    authority: str = ""
    ref: str = ""
    piece_bytes: int = RANGE_BYTES
    sink: str = "buffered"

    def encode(self) -> str:
        return json.dumps(asdict(self))

    def path(self, name: str) -> Path:
        return Path(self.target) / name


def decode(text: str) -> Job:
    fields = json.loads(text)
    return Job(**fields | {"files": tuple((name, size) for name, size in fields["files"])})


# --- others' libraries ----------------------------------------------------------------------


def prepare_boto3(job: Job) -> Work:
    import boto3
    from boto3.s3.transfer import TransferConfig
    from botocore.config import Config

    parts = urllib.parse.urlsplit(job.url)
    bucket, prefix = parts.path.strip("/").split("/")
    config = Config(s3={"addressing_style": "path"}, max_pool_connections=job.connections)
    client = boto3.client("s3", endpoint_url=f"{parts.scheme}://{parts.netloc}", config=config)
    # Its other engine, CRT, loses the endpoint.
    transfer = TransferConfig(
        max_concurrency=job.connections,
        multipart_chunksize=job.piece_bytes,
        multipart_threshold=job.piece_bytes,
        preferred_transfer_client="classic",
    )

    def work() -> dict[str, float]:
        for name, _ in job.files:
            client.download_file(bucket, f"{prefix}/{name}", str(job.path(name)), Config=transfer)
        return {}

    return work


def prepare_obstore(job: Job) -> Work:
    """Bounded ranges, as a request may not take longer than 30 s there, into their places in the file."""
    import obstore
    from obstore.store import S3Store

    parts = urllib.parse.urlsplit(job.url)
    bucket, prefix = parts.path.strip("/").split("/")
    store = S3Store(
        bucket,
        endpoint=f"{parts.scheme}://{parts.netloc}",
        region=os.environ["AWS_REGION"],
        virtual_hosted_style_request=False,
        client_options={"allow_http": True, "timeout": "120s"},
    )

    def work() -> dict[str, float]:
        with Files(job) as files, ThreadPoolExecutor(job.connections) as pool:

            def one(piece: tuple[str, int, int]) -> None:
                name, start, stop = piece
                got = obstore.get_range(store, f"{prefix}/{name}", start=start, end=stop)
                write_at(files.fds[name], memoryview(got), start)

            list(pool.map(one, pieces_of(job)))
        return {}

    return work


def prepare_huggingface_hub(job: Job) -> Work:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()

    def work() -> dict[str, float]:
        snapshot_download(job.ref, cache_dir=job.target, endpoint=job.url, max_workers=job.connections)
        return {}

    return work


def prepare_ours_for_replica(job: Job) -> Work:
    """A replica that waits for its model, which then is in the page cache for it."""
    import cached

    def work() -> dict[str, float]:
        cached.acquire(job.ref, on="disk", timeout_s=TIMEOUT_S).close()
        return {}

    return work


def prepare_ours(job: Job) -> Work:
    """What ``cachectl prefetch --wait`` does: the model is on disk, proven and durable, and not in memory."""
    import grpc

    from cached.v1 import operator_pb2, operator_pb2_grpc

    channel = grpc.insecure_channel(f"unix:{os.environ['CACHED_RUN_DIR']}/cached.sock")
    stub = operator_pb2_grpc.OperatorStub(channel)

    def work() -> dict[str, float]:
        request = operator_pb2.PrefetchRequest(ref=job.ref, wait=True)
        *_, last = stub.Prefetch(request, timeout=TIMEOUT_S)
        if last.WhichOneof("event") != "done" or last.done.state != "verified":
            raise RuntimeError(f"the prefetch ended with {last}")
        return {}

    return work


# --- raw loops ------------------------------------------------------------------------------


def prepare_threads(job: Job) -> Work:
    """http.client: ranges read into reused buffers and written from there, unproven."""

    def one(files: Files, ask: Asking, view: memoryview, piece: tuple[str, int, int]) -> None:
        name, start, stop = piece
        for count in ask.read(name, start, stop, view):
            write_at(files.fds[name], view[:count], start)
            start += count

    return lambda: in_threads(job, one, buffer)


def prepare_splice(job: Job) -> Work:
    """Socket to pipe to file, without a copy to this process."""

    def one(files: Files, ask: Asking, pipe: tuple[int, int], piece: tuple[str, int, int]) -> None:
        name, start, stop = piece
        connection = ask.raw(name, start, stop)
        while start < stop:
            count = os.splice(connection, pipe[1], min(PIPE_BYTES, stop - start))
            if count == 0:
                raise ConnectionError(f"{name}: the server broke off")
            while count:
                moved = os.splice(pipe[0], files.fds[name], count, offset_dst=start)
                start, count = start + moved, count - moved

    return lambda: in_threads(job, one, pipe_of)


def prepare_drop(job: Job) -> Work:
    """Read and forget: what the way from the server's socket to this process's memory allows."""

    def one(files: Files, ask: Asking, view: memoryview, piece: tuple[str, int, int]) -> None:
        for _ in ask.read(*piece, view):
            pass

    return lambda: in_threads(job, one, buffer)


# --- what this machine allows ---------------------------------------------------------------


def prepare_hash(job: Job) -> Work:
    """sha256 on ``connections`` threads, over what lies in a core's cache."""

    def one(_: int) -> None:
        view, digest = memoryview(bytearray(SLICE_BYTES)), hashlib.sha256()
        for _ in range(HASHED_BYTES // SLICE_BYTES):
            digest.update(view)

    def work() -> dict[str, float]:
        with ThreadPoolExecutor(job.connections) as pool:
            list(pool.map(one, range(job.connections)))
        return {"bytes": float(HASHED_BYTES * job.connections)}

    return work


def prepare_write(job: Job) -> Work:
    """Files of these sizes, from memory."""

    def one(file: tuple[str, int]) -> None:
        with Sink(job.path(file[0]), file[1], job.sink) as sink:
            while sink.left_bytes:
                sink.filled(len(sink.space()))

    return lambda: in_pool(job, one)


def prepare_limit(job: Job) -> Work:
    """Read, hash and write, and nothing else: each file by one thread, in order, over one connection."""

    def one(file: tuple[str, int]) -> str:
        name, size_bytes = file
        digest = hashlib.sha256()
        with Sink(job.path(name), size_bytes, job.sink) as sink, Asking(job) as ask:
            response = ask.response(name, 0, size_bytes)
            while sink.left_bytes:
                space = sink.space()
                count = response.readinto(space)
                if count == 0:
                    raise ConnectionError(f"{name}: the server broke off")
                digest.update(space[:count])
                sink.filled(count)
        return digest.hexdigest()

    return lambda: in_pool(job, one)


class Sink:
    """One file written from its start, its space reserved first.

    ``buffered``: slices into the page cache. ``hinted``: the same, and the kernel is asked to begin with
    the disk after each range. ``direct``: past the page cache, from a larger, aligned buffer.
    """

    def __init__(self, path: Path, size_bytes: int, kind: str) -> None:
        direct = os.O_DIRECT if kind == "direct" else 0
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | direct, 0o644)
        os.posix_fallocate(self._fd, 0, size_bytes)
        self._kind = kind
        self._size_bytes = self.left_bytes = size_bytes
        # Private, and on huge pages: shared memory is dearer to fill, and to pin for the disk.
        self._memory = mmap.mmap(
            -1, DIRECT_BYTES if direct else SLICE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
        self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._view = memoryview(self._memory)
        self._fill = self._written = self._begun = 0

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def space(self) -> memoryview:
        """Where the next bytes go."""
        return self._view[self._fill :][: self.left_bytes]

    def filled(self, count: int) -> None:
        self._fill += count
        self.left_bytes -= count
        if self._kind != "direct" or self._fill == DIRECT_BYTES or not self.left_bytes:
            self._flush()

    def _flush(self) -> None:
        # Past the cache only whole pages can be written: what is too much is cut off again.
        whole = -(-self._fill // PAGE_BYTES) * PAGE_BYTES if self._kind == "direct" else self._fill
        write_at(self._fd, self._view[:whole], self._written)
        self._written += self._fill
        self._fill = 0
        if not self.left_bytes:
            os.ftruncate(self._fd, self._size_bytes)
        if self._kind == "hinted" and (self._written - self._begun >= RANGE_BYTES or not self.left_bytes):
            begin_writeback(self._fd, self._begun, self._written - self._begun)
            self._begun = self._written


_LIBC = ctypes.CDLL(None, use_errno=True)
SYNC_FILE_RANGE_WRITE = 2


def begin_writeback(fd: int, start: int, size_bytes: int) -> None:
    offset, count = ctypes.c_int64(start), ctypes.c_int64(size_bytes)
    _LIBC.sync_file_range(fd, offset, count, ctypes.c_uint(SYNC_FILE_RANGE_WRITE))


# --- what they share ------------------------------------------------------------------------


class Files:
    """Every file of the job, opened for writing, its space reserved."""

    def __init__(self, job: Job) -> None:
        self.fds: dict[str, int] = {}
        for name, size_bytes in job.files:
            self.fds[name] = os.open(job.path(name), os.O_WRONLY | os.O_CREAT, 0o644)
            os.posix_fallocate(self.fds[name], 0, size_bytes)

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self.fds.values():
            os.close(fd)


class Asking:
    """One connection to the server."""

    def __init__(self, job: Job) -> None:
        parts = urllib.parse.urlsplit(job.url)
        self._path = parts.path
        # Without a timeout of their own: with one, Python asks the kernel twice for each read.
        if parts.scheme == "https":
            context = ssl.create_default_context(cafile=job.authority)
            self._connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                parts.netloc, context=context
            )
        else:
            self._connection = http.client.HTTPConnection(parts.netloc)

    def __enter__(self) -> Asking:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def response(self, name: str, start: int, stop: int) -> http.client.HTTPResponse:
        self._connection.request(
            "GET", f"{self._path}/{name}", headers={"Range": f"bytes={start}-{stop - 1}"}
        )
        response = self._connection.getresponse()
        if response.status != http.HTTPStatus.PARTIAL_CONTENT or response.length != stop - start:
            raise ConnectionError(f"{name}: the server answered {response.status}, {response.length} bytes")
        return response

    def read(self, name: str, start: int, stop: int, view: memoryview) -> Iterator[int]:
        """The counts of bytes that lie in ``view``, until ``stop`` is there."""
        response = self.response(name, start, stop)
        while start < stop:
            count = response.readinto(view[: stop - start])
            if count == 0:
                raise ConnectionError(f"{name}: the server broke off")
            yield count
            start += count
        response.read()

    def raw(self, name: str, start: int, stop: int) -> int:
        """The connection's descriptor, the answer's headers read and nothing of its body."""
        if self._connection.sock is None:
            self._connection.connect()
        found: socket.socket = self._connection.sock
        host = f"{self._connection.host}:{self._connection.port}"
        lines = (
            f"GET {self._path}/{name} HTTP/1.1",
            f"Host: {host}",
            f"Range: bytes={start}-{stop - 1}",
            "",
            "",
        )
        found.sendall("\r\n".join(lines).encode())
        seen = b""
        while b"\r\n\r\n" not in seen:
            # What has been seen stays there, so that it can be taken exactly to the headers' end.
            seen = found.recv(PAGE_BYTES, socket.MSG_PEEK)
        found.recv(seen.index(b"\r\n\r\n") + 4)
        if not seen.startswith(b"HTTP/1.1 206"):
            raise ConnectionError(f"{name}: the server answered {seen[:40]!r}")
        return found.fileno()


def pieces_of(job: Job) -> list[tuple[str, int, int]]:
    """(name, start, stop) of every range, in order."""
    return [
        (name, start, min(start + job.piece_bytes, size_bytes))
        for name, size_bytes in job.files
        for start in range(0, size_bytes, job.piece_bytes)
    ]


def in_threads(
    job: Job, one: Callable[[Files, Asking, Any, tuple[str, int, int]], None], resource: Callable[[], Any]
) -> dict[str, float]:
    """Every range by the next free thread; each thread has a connection and a resource of its own."""
    todo: queue.SimpleQueue[tuple[str, int, int]] = queue.SimpleQueue()
    for piece in pieces_of(job):
        todo.put(piece)

    def thread(files: Files) -> None:
        own = resource()
        with Asking(job) as ask, suppress(queue.Empty):
            while True:
                one(files, ask, own, todo.get_nowait())

    with Files(job) as files, ThreadPoolExecutor(job.connections) as pool:
        for ended in [pool.submit(thread, files) for _ in range(job.connections)]:
            ended.result()
    return {}


def in_pool(job: Job, one: Callable[[tuple[str, int]], object]) -> dict[str, float]:
    """Every file by the next free thread, the largest first."""
    with ThreadPoolExecutor(job.connections) as pool:
        list(pool.map(one, sorted(job.files, key=lambda file: -file[1])))
    return {}


def buffer() -> memoryview:
    return memoryview(bytearray(SLICE_BYTES))


def pipe_of() -> tuple[int, int]:
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return read, write


def write_at(fd: int, view: memoryview, offset: int) -> None:
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


KINDS: dict[str, Callable[[Job], Work]] = {
    "boto3": prepare_boto3,
    "obstore": prepare_obstore,
    "huggingface_hub": prepare_huggingface_hub,
    "ours": prepare_ours,
    "ours-for-replica": prepare_ours_for_replica,
    "threads": prepare_threads,
    "splice": prepare_splice,
    "drop": prepare_drop,
    "hash": prepare_hash,
    "write": prepare_write,
    "limit": prepare_limit,
}


def main() -> None:
    job = decode(sys.argv[1])
    work = KINDS[job.kind](job)
    # What libraries print is not for whoever listens.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    print("ready", file=out)
    sys.stdin.readline()
    print("done", json.dumps(work()), file=out)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
