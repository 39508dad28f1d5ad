"""GPU memory for tests: artifacts with tensors, what stands on a device, and the filler as a process."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpukit
import pytest
from residentkit import put_blob, put_manifest

from cached.cuda import CudaError, Driver, Gpu
from cached.model import Manifest, ManifestFile, Problem, Tensor
from preloader import wire
from preloader.wire import BlobLayout

ROOT = Path(__file__).parent.parent


def real_gpu() -> Gpu:
    """This machine's first GPU, through the real bindings. Skips the test, with the reason, without one."""
    path = list(sys.path)
    fakes = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "cuda"}
    try:
        sys.path[:] = [entry for entry in path if not entry.endswith("fakegpu")]
        return Driver().gpus()[0]
    except CudaError as error:
        pytest.skip(f"needs a GPU: {error}")
    finally:
        sys.path[:] = path
        for name in [name for name in sys.modules if name.split(".")[0] == "cuda"]:
            del sys.modules[name]
        sys.modules.update(fakes)


def tensors_of(end: int, begin: int, sizes_bytes: Iterable[int], file: int = 0) -> tuple[Tensor, ...]:
    """Tensors of these sizes one after the other, as far as they go, and one with all the rest."""
    found: list[Tensor] = []
    at = min(begin, end)
    for size in [*sizes_bytes, end]:
        size = min(size, end - at)
        found.append(Tensor(f"t{len(found)}", "U8", (size,), file, at, size))
        at += size
    return tuple(found)


def put_tensors(data_dir: Path, files: dict[str, tuple[bytes, Sequence[int]]]) -> Manifest:
    """An artifact whose files have tensors of these sizes and of the rest, from byte 8 on; or none."""
    listed, tensors = [], []
    for file, (path, (data, sizes)) in enumerate(sorted(files.items())):
        listed.append(ManifestFile(path, put_blob(data_dir, data)))
        tensors += tensors_of(len(data), 8, sizes, file) if sizes else ()
    return put_manifest(data_dir, tuple(listed), tuple(tensors))


def tensors_on(gpu: Gpu, layout: BlobLayout, fds: Sequence[int]) -> dict[str, bytes]:
    """What each tensor is on the device, for whoever has the descriptors."""
    image = image_on(gpu, layout.blocks, fds)
    return {name: image[at : at + size] for name, at, size in layout.tensors}


def image_on(gpu: Gpu, blocks: Sequence[int], fds: Sequence[int]) -> bytes:
    size = sum(blocks)
    if not size:
        return b""
    with gpu.context():
        address, at, handles = gpu.reserve(size), 0, [gpu.import_(fd) for fd in fds]
        for handle, block in zip(handles, blocks, strict=True):
            gpu.map(address + at, block, handle)
            gpu.release(handle)
            at += block
        gpu.allow(address, size, write=False)
        host, stream = gpu.pin(size), gpu.stream()
        gpu.copy_out(host, address, size, stream)
        gpu.synchronize(stream)
        data = ctypes.string_at(host, size)
        gpu.end_stream(stream)
        gpu.unpin(host)
        gpu.unmap(address, size)
        gpu.free(address, size)
    return data


class FillerProcess:
    """A filler as its keeper has it."""

    def __init__(
        self, gpus: gpukit.Gpus, uuid: str, data_dir: Path, *, block_bytes: int = 0, idle_s: float = 60
    ) -> None:
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(60)
        command = [sys.executable, "-P", "-m", "preloader.filler", "--device", f"cuda:{uuid}"]
        command += ["--data-dir", str(data_dir), "--socket-fd", str(theirs.fileno()), "--idle-s", str(idle_s)]
        command += ["--block-bytes", str(block_bytes)] if block_bytes else []
        env = {**gpus.env(), "CUDA_VISIBLE_DEVICES": uuid}
        env["PYTHONPATH"] += f"{os.pathsep}{ROOT}"
        with theirs:
            self.process = subprocess.Popen(command, env=env, pass_fds=[theirs.fileno()])

    def __enter__(self) -> FillerProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        self.sock.close()

    def ask(self, message: dict[str, Any], blocks: Sequence[int] = ()) -> Outcome:
        wire.send(self.sock, message, blocks)
        outcome = Outcome({})
        while not outcome.last:
            outcome.take(*wire.receive(self.sock))
        return outcome

    def load(self, artifact: str, have: Sequence[str] = ()) -> Outcome:
        return self.ask({"do": "load", "id": artifact, "have": list(have)})

    def prove(self, outcome: Outcome) -> Outcome:
        layouts = [layout.to_json() for layout, _ in outcome.sealed.values()]
        fds = [fd for _, fds in outcome.sealed.values() for fd in fds]
        return self.ask({"do": "prove", "layout": {"blobs": layouts}}, fds)


@dataclass
class Outcome:
    """What a filler sent for one job: ``last`` is its last message."""

    last: dict[str, Any]
    sealed: dict[str, tuple[BlobLayout, list[int]]] = field(default_factory=dict)
    progress: list[list[int]] = field(default_factory=list)

    def take(self, message: dict[str, Any], fds: list[int]) -> None:
        if "sealed" in message:
            layout = wire.parse_layout(message["sealed"])
            self.sealed[layout.sha256] = (layout, fds)
        elif "progress" in message:
            self.progress.append(message["progress"])
        else:
            self.last = message

    @property
    def problem(self) -> Problem:
        return wire.parse_problem(self.last["error"])

    def close(self) -> None:
        for _, fds in self.sealed.values():
            for fd in fds:
                os.close(fd)
        self.sealed.clear()
