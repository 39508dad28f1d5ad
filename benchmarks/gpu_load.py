"""How fast a model comes onto a GPU, beside what its bus and the disk could do at most.

    python -m benchmarks.gpu_load --size 8 --dir /var/tmp

Writes an artifact of that many GiB below the directory, then prints JSON lines, each median of the rounds:
the copy from pinned memory (the bus), direct reads into reused memory (the disk), and loads by the filler as
its keeper runs it, with nothing and with everything of the file in the page cache; then 10,000 small tensors.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import xxhash

from cached.cuda import CudaError, Driver, Gpu
from cached.model import CHUNK_BYTES, artifact_id
from preloader import wire

GIB = 2**30
READERS = 4
HEAD_BYTES = 8
"""No tensor's, as a file's header is."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=float, default=8, help="GiB")
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    try:
        gpu = Driver().gpus()[0]
    except CudaError as error:
        sys.exit(f"error: this machine has no GPU: {error}")
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="gpu-load-") as data_dir:
        _measure(gpu, Path(data_dir), int(options.size * GIB), options.rounds)


def _measure(gpu: Gpu, data_dir: Path, size_bytes: int, rounds: int) -> None:
    def tell(what: str, measure: Callable[[], float], of_bytes: int = size_bytes) -> float:
        seconds = [measure() for _ in range(rounds)]
        rate = of_bytes / median(seconds) / GIB
        found = {"what": what, "gib_per_s": round(rate, 2), "seconds": [round(s, 3) for s in seconds]}
        print(json.dumps(found), flush=True)
        return rate

    print(json.dumps({"gpu": gpu.name, "gib": size_bytes / GIB, "cpus": os.cpu_count()}), flush=True)
    artifact, blob = _write(data_dir, "big", size_bytes, tensor_bytes=64 * 2**20)
    small_bytes = 10_000 * 4096
    small, _ = _write(data_dir, "small", small_bytes, tensor_bytes=4096)
    with _Filler(gpu, data_dir) as filler:
        print(json.dumps({"what": "first load of a fresh process", "seconds": round(filler.load(small), 3)}))
        bus = tell("pinned copy", lambda: _copy(gpu, size_bytes))
        disk = tell("direct read", lambda: _read(blob, size_bytes))
        cold = tell("load, cold page cache", lambda: (_forget(blob), filler.load(artifact))[1])
        warm = tell("load, warm page cache", lambda: (_warm(blob), filler.load(artifact))[1])
        tell("load, 10,000 tensors of 4 KiB", lambda: filler.load(small), small_bytes)
    shares = {"cold_of_limit": round(cold / min(bus, disk), 3), "warm_of_pinned_copy": round(warm / bus, 3)}
    print(json.dumps(shares))


class _Filler:
    """A filler and this end of its socket. Blocks are given back as soon as they come."""

    def __init__(self, gpu: Gpu, data_dir: Path) -> None:
        self._sock, theirs = socket.socketpair()
        self._sock.settimeout(600)
        command = [sys.executable, "-m", "preloader.filler", "--device", f"cuda:GPU-{gpu.uuid}"]
        command += ["--data-dir", str(data_dir), "--socket-fd", str(theirs.fileno()), "--idle-s", "600"]
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": f"GPU-{gpu.uuid}"}
        with theirs:
            self._process = subprocess.Popen(command, env=env, pass_fds=[theirs.fileno()])

    def __enter__(self) -> _Filler:
        return self

    def __exit__(self, *error: object) -> None:
        self._sock.close()
        self._process.wait(60)

    def load(self, artifact: str) -> float:
        """How long it took, in seconds."""
        began = time.monotonic()
        wire.send(self._sock, {"do": "load", "id": artifact, "have": []})
        while True:
            message, fds = wire.receive(self._sock)
            for fd in fds:
                os.close(fd)
            if "error" in message:
                sys.exit(f"error: {message['error']['message']}")
            if "done" in message:
                return time.monotonic() - began


def _write(data_dir: Path, name: str, size_bytes: int, tensor_bytes: int) -> tuple[str, Path]:
    """An artifact of one file, as the store has it; its id and its blob."""
    draft, block = data_dir / name, bytearray(os.urandom(CHUNK_BYTES))
    whole, chunks = hashlib.sha256(), []
    with draft.open("wb") as file:
        for at in range(0, size_bytes, CHUNK_BYTES):
            block[:8] = at.to_bytes(8, "little")  # no two chunks are the same
            part = memoryview(block)[: min(CHUNK_BYTES, size_bytes - at)]
            file.write(part)
            whole.update(part)
            chunks.append(xxhash.xxh3_128_hexdigest(part))
        os.fsync(file.fileno())
    sha256 = whole.hexdigest()
    blob = data_dir / "blobs/sha256" / sha256[:2] / sha256
    blob.parent.mkdir(parents=True)
    draft.rename(blob)
    path = f"{name}.safetensors"
    artifact = artifact_id([(path, size_bytes, sha256)])
    manifest = {
        "files": [{"path": path, "blob": {"sha256": sha256, "size_bytes": size_bytes, "chunks": chunks}}],
        "tensors": list(_tensors(size_bytes, tensor_bytes)),
    }
    record = data_dir / "artifacts" / f"{artifact.removeprefix('sha256:')}.json"
    record.parent.mkdir(exist_ok=True)
    record.write_text(json.dumps(manifest))
    return artifact, blob


def _tensors(size_bytes: int, tensor_bytes: int) -> Iterator[dict[str, Any]]:
    for number, at in enumerate(range(HEAD_BYTES, size_bytes, tensor_bytes)):
        size = min(tensor_bytes, size_bytes - at)
        named = {"name": f"layers.{number}.weight", "dtype": "U8", "shape": [size]}
        yield {**named, "file": 0, "offset_bytes": at, "size_bytes": size}


# --- the limits ------------------------------------------------------------------------------------------


def _copy(gpu: Gpu, size_bytes: int) -> float:
    """The same bytes again and again from pinned memory, two copies in flight."""
    unit = gpu.granularity_bytes()
    length = -(-CHUNK_BYTES // unit) * unit
    handle, address = gpu.create(length), gpu.reserve(length)
    gpu.map(address, length, handle)
    gpu.release(handle)
    with gpu.context():
        gpu.allow(address, length, write=True)
        hosts, streams = [gpu.pin(CHUNK_BYTES) for _ in range(2)], [gpu.stream() for _ in range(2)]
        began = time.monotonic()
        for number in range(size_bytes // CHUNK_BYTES):
            gpu.synchronize(streams[number % 2])
            gpu.copy_in(address, hosts[number % 2], CHUNK_BYTES, streams[number % 2])
        for stream in streams:
            gpu.synchronize(stream)
        took_s = time.monotonic() - began
        for host, stream in zip(hosts, streams, strict=True):
            gpu.end_stream(stream)
            gpu.unpin(host)
    gpu.unmap(address, length)
    gpu.free(address, length)
    return took_s


def _read(path: Path, size_bytes: int) -> float:
    """The file past the page cache, in several threads, each with a buffer that it has touched before."""
    buffers = [mmap.mmap(-1, CHUNK_BYTES) for _ in range(READERS)]
    for buffer in buffers:
        buffer.write(bytes(CHUNK_BYTES))
    offsets, lock = iter(range(0, size_bytes, CHUNK_BYTES)), threading.Lock()

    def read(buffer: mmap.mmap) -> None:
        while True:
            with lock:
                offset = next(offsets, None)
            if offset is None:
                return
            os.preadv(fd, [buffer], offset)

    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    began = time.monotonic()
    threads = [threading.Thread(target=read, args=(buffer,)) for buffer in buffers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(fd)
    return time.monotonic() - began


def _forget(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def _warm(path: Path) -> None:
    with path.open("rb") as file:
        while file.read(CHUNK_BYTES):
            pass


if __name__ == "__main__":
    main()
