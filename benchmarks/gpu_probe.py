"""``python3 benchmarks/gpu_probe.py``: what a GPU and its driver really do with memory that processes share.

Owns the questions, and a process with a time limit for each of them, so that one that hangs or dies costs
only its own answer. Prints JSON lines as it goes and a summary at the end; exits with 1 where a step failed.
Runs from a bare checkout: it needs Python with cuda-bindings and nvidia-ml-py, and takes torch and xxhash
where they are. Use an idle GPU: one step fills its memory, one makes processes die of a wrong write.

A step is a process without CUDA; what needs CUDA it has other processes do (``Hand``, asked over a socket).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import json
import mmap
import os
import platform
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cached import fds as wire
from cached.cuda import CudaError, Driver, Gpu

MIB = 1024 * 1024
GIB = 1024 * MIB
CHUNK_BYTES = 16 * MIB
LIMIT_S = 300.0
ANSWER_S = 240.0
FREED_S = 10.0
EVENT_MS = 2000
READ_ONLY_FLAG = 0x08
"""CU_MEMHOSTREGISTER_READ_ONLY"""


class StepFailed(Exception):
    """What a step asked for was not so."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """``image_bytes``: of the blocks whose cost is measured. ``content_bytes``: what digests are made of."""

    image_bytes: int
    content_bytes: int
    quick: bool
    dev_dir: Path

    @property
    def settled_s(self) -> float:
        """NVML's figures follow the driver's, and a killed process's memory its end."""
        return 0.02 if self.quick else 0.5


def say(step: str, what: str, **figures: Any) -> None:
    print(json.dumps({"step": step, "what": what, **figures}, default=str), flush=True)


def ms_since(start: float) -> float:
    return round((time.perf_counter() - start) * 1000, 3)


def digest_of() -> Any:
    """A fresh hash; the fastest there is."""
    if importlib.util.find_spec("xxhash"):
        import xxhash

        return xxhash.xxh3_128()
    return hashlib.blake2b(digest_size=16)


def check(right: bool, why: str) -> None:
    if not right:
        raise StepFailed(why)


# --- one process with CUDA ----------------------------------------------------------------------------


class Hand:
    """Does what a step asks: each method is one request, and answers with figures. Holds one image.

    Every answer has "ms", the time that the driver took.
    """

    def __init__(self) -> None:
        self.held = contextlib.ExitStack()
        self.handles: list[int] = []
        self.sizes: list[int] = []
        self.fds: list[int] = []
        self.address = 0
        self.gpu: Gpu

    def init(self) -> dict[str, Any]:
        self.gpu = Driver().gpus()[0]
        return {"granularity": self.gpu.granularity_bytes(), "uuid": self.gpu.uuid, "name": self.gpu.name}

    def rss(self) -> dict[str, Any]:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return {"rss_mib": round(pages * mmap.PAGESIZE / MIB, 1)}

    def nvml_used(self) -> dict[str, Any]:
        """In a process that ends at once: NVML itself keeps the device's node open."""
        with nvml() as device:
            return {"used": device.used()}

    def context(self) -> dict[str, Any]:
        self.held.enter_context(self.gpu.context())
        return {}

    def leave(self) -> dict[str, Any]:
        self.held.close()
        return {}

    def create(self, sizes: list[int]) -> dict[str, Any]:
        for size_bytes in sizes:
            self.handles.append(self.gpu.create(size_bytes))
            self.sizes.append(size_bytes)
        return {}

    def export(self) -> dict[str, Any]:
        return {"send": [self.gpu.export(handle) for handle in self.handles]}

    def close(self) -> dict[str, Any]:
        """The descriptors that this process was sent."""
        while self.fds:
            os.close(self.fds.pop())
        return {}

    def import_(self, sizes: list[int]) -> dict[str, Any]:
        self.sizes = sizes
        self.handles = [self.gpu.import_(fd) for fd in self.fds]
        return {}

    def reserve(self) -> dict[str, Any]:
        self.address = self.gpu.reserve(sum(self.sizes))
        return {}

    def map(self) -> dict[str, Any]:
        at = self.address
        for size_bytes, handle in zip(self.sizes, self.handles, strict=True):
            self.gpu.map(at, size_bytes, handle)
            at += size_bytes
        return {}

    def allow(self, write: bool) -> dict[str, Any]:
        """All blocks in one call."""
        self.gpu.allow(self.address, sum(self.sizes), write=write)
        return {}

    def release(self) -> dict[str, Any]:
        while self.handles:
            self.gpu.release(self.handles.pop())
        return {}

    def unmap(self) -> dict[str, Any]:
        self.gpu.unmap(self.address, sum(self.sizes))
        return {}

    def free(self) -> dict[str, Any]:
        self.gpu.free(self.address, sum(self.sizes))
        return {}

    def take(self, sizes: list[int], write: bool) -> dict[str, Any]:
        """All of: import, close, map, release."""
        self.import_(sizes)
        self.close()
        return self.place(write)

    def place(self, write: bool) -> dict[str, Any]:
        self.reserve()
        self.map()
        self.allow(write)
        return self.release()

    def fill(self, seed: int) -> dict[str, Any]:
        """Bytes that depend on the seed and on their place; answers with their digest."""
        base, hash_ = os.urandom(CHUNK_BYTES), digest_of()
        with self._buffer() as (host, stream):
            for at, size_bytes in self._chunks():
                content = (seed.to_bytes(8, "little") + at.to_bytes(8, "little") + base)[:size_bytes]
                ctypes.memmove(host, content, size_bytes)
                hash_.update(content)
                self.gpu.copy_in(self.address + at, host, size_bytes, stream)
                self.gpu.synchronize(stream)
        return {"digest": hash_.hexdigest()}

    def digest(self) -> dict[str, Any]:
        """Of what a copy out of the device brings."""
        hash_ = digest_of()
        with self._buffer() as (host, stream):
            for at, size_bytes in self._chunks():
                self.gpu.copy_out(host, self.address + at, size_bytes, stream)
                self.gpu.synchronize(stream)
                hash_.update(ctypes.string_at(host, size_bytes))
        return {"digest": hash_.hexdigest()}

    def write(self, how: str) -> dict[str, Any]:
        """Write to the first bytes: by a copy, by a memset, or by a kernel of torch's."""
        if how == "kernel":
            wrapped(torch_device(self.gpu), self.address, 4096, "uint8").fill_(7)[0].item()
            return {}
        with self._buffer() as (host, stream):
            if how == "copy":
                self.gpu.copy_in(self.address, host, 4096, stream)
            else:
                self.gpu.driver.call("cuMemsetD8Async", self.address, 7, 4096, stream)
            self.gpu.synchronize(stream)
        return {}

    def set(self) -> dict[str, Any]:
        """Write all of the image on the device."""
        stream = self.gpu.stream()
        self.gpu.driver.call("cuMemsetD8Async", self.address, 1, sum(self.sizes), stream)
        self.gpu.synchronize(stream)
        self.gpu.end_stream(stream)
        return {}

    def exhaust(self, size_bytes: int) -> dict[str, Any]:
        """Make blocks of this size until the driver refuses."""
        for _ in range(4096):
            try:
                self.create([size_bytes])
            except CudaError as error:
                return {"blocks": len(self.handles), "refused": error.name}
        raise StepFailed("the memory has no end")

    def torch(self) -> dict[str, Any]:
        return torch_around(self.gpu, self.address, self.sizes[0])

    def copies(self, quick: bool) -> dict[str, Any]:
        measure_copies(self.gpu, quick)
        return {}

    def _chunks(self) -> Iterator[tuple[int, int]]:
        whole = sum(self.sizes)
        for at in range(0, whole, CHUNK_BYTES):
            yield at, min(CHUNK_BYTES, whole - at)

    @contextlib.contextmanager
    def _buffer(self) -> Iterator[tuple[int, Any]]:
        host, stream = self.gpu.pin(CHUNK_BYTES), self.gpu.stream()
        yield host, stream  # not given back after an error: the context may be dead, and the process ends
        self.gpu.end_stream(stream)
        self.gpu.unpin(host)


def serve(channel: socket.socket) -> None:
    """A hand's process: answer until the step is gone."""
    raise_limit()
    hand = Hand()
    while True:
        try:
            request, fds = wire.receive(channel)
        except wire.FramingError:
            return
        hand.fds += fds
        del request["fds"]
        start = time.perf_counter()
        try:
            answer = getattr(hand, request.pop("do"))(**request)
        except Exception as error:
            name = getattr(error, "name", "")
            wire.send(channel, {"error": f"{type(error).__name__}: {error}", "name": name})
            continue
        send = answer.pop("send", [])
        wire.send(channel, {"ms": ms_since(start), **answer}, tuple(send))
        for fd in send:
            os.close(fd)


class Refused(Exception):
    """What a hand was asked for failed: ``name`` is the driver's word for it, where it was the driver."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__(answer["error"])
        self.name = answer["name"]


class Other:
    """A hand in a process of its own, as a step sees it. Killed at the end."""

    def __init__(self, *, ready: bool = True) -> None:
        self.channel, theirs = socket.socketpair()
        self.channel.settimeout(ANSWER_S)
        command = [sys.executable, __file__, "--hand", str(theirs.fileno())]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()
        self.fds: list[int] = []
        self.granularity = 0
        if ready:
            self.granularity = self.ask("init")["granularity"]
            self.ask("context")

    def __enter__(self) -> Other:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def ask(self, do: str, fds: list[int] | None = None, **request: Any) -> dict[str, Any]:
        """The answer. Raises Refused, and StepFailed where the process died."""
        try:
            wire.send(self.channel, {"do": do, **request}, tuple(fds or ()))
            answer, received = wire.receive(self.channel)
        except (wire.FramingError, OSError) as error:
            code = self.kill()
            raise StepFailed(f"{do}: the process ended with {code} ({error})") from error
        self.fds += received
        del answer["fds"]
        if "error" in answer:
            raise Refused(answer)
        return answer

    def attempt(self, do: str, **request: Any) -> str:
        """ "done", or what went wrong: for questions whose answer is no failure of the step."""
        try:
            self.ask(do, **request)
        except (Refused, StepFailed) as error:
            return getattr(error, "name", "") or str(error)
        return "done"

    def kill(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        return self.process.wait()

    def exit(self) -> int:
        """Let it end by itself, tidily: what it exits with."""
        self.channel.close()
        return self.process.wait(timeout=ANSWER_S)

    def close(self) -> None:
        """The descriptors that it sent."""
        while self.fds:
            os.close(self.fds.pop())


# --- NVML ---------------------------------------------------------------------------------------------


class Nvml:
    """The probed device, while NVML is initialised."""

    def __init__(self) -> None:
        import pynvml

        self.ml: Any = pynvml
        self.handle = pynvml.nvmlDeviceGetHandleByUUID(os.environ["CUDA_VISIBLE_DEVICES"])
        self.whole = self.handle  # an instance's GPU, which has the events and the node
        if self.attempt("nvmlDeviceIsMigDeviceHandle", self.handle) in (1, True):
            self.whole = pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self.handle)

    def used(self) -> int:
        return int(self.ml.nvmlDeviceGetMemoryInfo(self.handle).used)

    def total(self) -> int:
        return int(self.ml.nvmlDeviceGetMemoryInfo(self.handle).total)

    def node(self, dev_dir: Path) -> Path:
        return dev_dir / f"nvidia{self.ml.nvmlDeviceGetMinorNumber(self.whole)}"

    def pids(self) -> list[int]:
        found = self.attempt("nvmlDeviceGetComputeRunningProcesses", self.handle)
        return [process.pid for process in found] if isinstance(found, list) else []

    def attempt(self, name: str, *arguments: Any) -> Any:
        """What a call says, or its error's name."""
        try:
            found = getattr(self.ml, name)(*arguments)
        except Exception as error:
            return type(error).__name__
        return getattr(found, "value", found)

    def wait_free(self, used_bytes: int) -> float | None:
        """Milliseconds until not more is used than this; None: it never was."""
        start = time.perf_counter()
        while time.perf_counter() - start < FREED_S:
            if self.used() <= used_bytes:
                return ms_since(start)
            time.sleep(0.001)
        return None

    @contextlib.contextmanager
    def events(self) -> Iterator[Callable[[], list[int] | str]]:
        """Yields what tells the XIDs since then; it waits a while for the first."""
        kinds = self.ml.nvmlEventTypeXidCriticalError
        events = self.ml.nvmlEventSetCreate()
        unsupported = self.attempt("nvmlDeviceRegisterEvents", self.whole, kinds, events)

        def seen() -> list[int] | str:
            if unsupported:
                return str(unsupported)
            found: list[int] = []
            with contextlib.suppress(self.ml.NVMLError_Timeout):
                while True:
                    event = self.ml.nvmlEventSetWait_v2(events, 100 if found else EVENT_MS)
                    found.append(int(event.eventData))
            return found

        try:
            yield seen
        finally:
            self.ml.nvmlEventSetFree(events)


@contextlib.contextmanager
def nvml() -> Iterator[Nvml]:
    import pynvml

    pynvml.nvmlInit()
    try:
        yield Nvml()
    finally:
        pynvml.nvmlShutdown()


def used_now() -> int:
    """Used bytes, without NVML staying in this process."""
    with Other(ready=False) as other:
        return int(other.ask("nvml_used")["used"])


def openers(node: Path) -> list[int]:
    """Processes that have the device's node open, of those that this one may look at."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(link) == str(node):
                found.add(int(link.parts[2]))
    return sorted(found)


# --- the steps ----------------------------------------------------------------------------------------


def split(size_bytes: int, count: int, unit: int) -> list[int]:
    """So many equal blocks, each a multiple of the granularity."""
    return [max(1, size_bytes // count // unit) * unit] * count


def runtime(sizes: Sizes) -> None:
    """(1) Versions, attributes, limits."""
    import importlib.metadata  # here, for every hand would wait for it

    step = functools.partial(say, "runtime")
    versions = {}
    for name in ("cuda-bindings", "nvidia-ml-py", "torch", "xxhash", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    step("versions", python=platform.python_version(), kernel=platform.release(), **versions)
    with nvml() as device:
        ask = functools.partial(device.attempt)
        node = device.node(sizes.dev_dir)
        step(
            "device",
            name=ask("nvmlDeviceGetName", device.handle),
            uuid=ask("nvmlDeviceGetUUID", device.handle),
            total_bytes=device.total(),
            used_bytes=device.used(),
            driver=ask("nvmlSystemGetDriverVersion"),
            persistence=ask("nvmlDeviceGetPersistenceMode", device.whole),
            mig=ask("nvmlDeviceGetMigMode", device.whole),
            ecc=ask("nvmlDeviceGetEccMode", device.whole),
            remapped_rows=ask("nvmlDeviceGetRemappedRows", device.whole),
            processes=device.pids(),
            node=str(node),
            node_mode=oct(node.stat().st_mode) if node.exists() else None,
            openers=openers(node),
        )
    gpu = Driver().gpus()[0]
    names = [
        name.removeprefix("CU_DEVICE_ATTRIBUTE_")
        for name in gpu.driver.cu.CUdevice_attribute.__members__
        if not name.endswith(("_MAX", "_WIDTH", "_HEIGHT", "_DEPTH", "_LAYERS"))
    ]
    attributes = {}
    for name in names:
        with contextlib.suppress(CudaError):
            attributes[name] = gpu.attribute(name)
    step("cuda", version=gpu.driver.version, granularity=gpu.granularity_bytes(), attributes=attributes)
    limits = {
        name: resource.getrlimit(getattr(resource, name)) for name in ("RLIMIT_NOFILE", "RLIMIT_MEMLOCK")
    }
    step("host", cpus=len(os.sched_getaffinity(0)), uid=os.getuid(), limits=limits, cgroup=cgroup_limit())
    check(gpu.attribute("HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED") == 1, "no memory as descriptors")


def cgroup_limit() -> str:
    with contextlib.suppress(OSError):
        return Path("/sys/fs/cgroup/memory.max").read_text().strip()
    return "unknown"


def memory(sizes: Sizes) -> None:
    """(2) What each stage of using CUDA costs, on the device and in RSS."""
    with nvml() as device, Other(ready=False) as hand:
        before = device.used()

        def tell(what: str, answer: dict[str, Any]) -> None:
            time.sleep(sizes.settled_s)
            ms = answer.get("ms")
            rss_mib = hand.ask("rss")["rss_mib"]
            say("memory", what, ms=ms, device_mib=(device.used() - before) / MIB, rss_mib=rss_mib)

        tell("nothing", {})
        init = hand.ask("init")
        tell("cuInit", init)
        block = split(sizes.content_bytes, 1, init["granularity"])
        try:
            tell("cuMemCreate without a context", hand.ask("create", sizes=block))
        except Refused as error:
            raise StepFailed(f"cuMemCreate without a context: {error}") from error
        tell("export without a context", hand.ask("export"))
        hand.ask("reserve")
        tell("map without a context", hand.ask("map"))
        say("memory", "access without a context", result=hand.attempt("allow", write=True))
        tell("primary context", hand.ask("context"))
        tell("access", hand.ask("allow", write=True))
        tell("written", hand.ask("set"))
        for what in ("unmap", "free", "release"):
            tell(what, hand.ask(what))
        hand.close()
        tell("descriptors closed", {})
        tell("context released", hand.ask("leave"))
        hand.kill()
        say("memory", "process ended", device_mib=(device.used() - before) / MIB)


def blocks(sizes: Sizes) -> None:
    """(3) What an image costs as few or many blocks."""
    for count in (1, 60, 240):
        with nvml() as device, Other() as owner, Other() as reader:
            parts = split(sizes.image_bytes, count, owner.granularity)
            before = device.used()
            ms = {"create": owner.ask("create", sizes=parts)["ms"], "export": owner.ask("export")["ms"]}
            start = time.perf_counter()
            ms["import"] = reader.ask("import_", fds=owner.fds, sizes=parts)["ms"]
            ms["send_and_import"] = ms_since(start)
            owner.close()
            for what in ("close", "reserve", "map"):
                ms[what] = reader.ask(what)["ms"]
            ms["allow"] = reader.ask("allow", write=True)["ms"]
            for what in ("set", "unmap", "free", "release"):
                ms[what] = reader.ask(what)["ms"]
            grown = device.used() - before
            ms["owner_release"] = owner.ask("release")["ms"]
            freed = device.wait_free(before + sum(parts) // 100)
            rate = sum(parts) / GIB / (ms["set"] / 1000)
            say(
                "blocks",
                f"{count}",
                bytes=sum(parts),
                grown=grown,
                ms=ms,
                ms_until_free=freed,
                set_gib_s=rate,
            )
            check(
                freed is not None, f"{count} blocks: the memory is not free {FREED_S:g} s after its release"
            )


def filled(owner: Other, sizes: Sizes, seed: int = 1) -> tuple[list[int], str]:
    """Let an owner make and fill an image of a few blocks; its sizes and its digest. ``owner.fds`` has it."""
    parts = split(sizes.content_bytes, 3, owner.granularity)
    owner.ask("create", sizes=parts)
    owner.ask("export")
    owner.ask("place", write=True)
    return parts, owner.ask("fill", seed=seed)["digest"]


def sharing(sizes: Sizes) -> None:
    """(4) Another process reads; another maps for writing, and writes."""
    with Other() as owner, Other() as reader, Other() as writer:
        parts, digest = filled(owner, sizes)
        reader.ask("take", fds=owner.fds, sizes=parts, write=False)
        found = reader.ask("digest")
        rate = sum(parts) / GIB / (found["ms"] / 1000)
        say("sharing", "read", same=found["digest"] == digest, bytes=sum(parts), gib_s=rate)
        check(found["digest"] == digest, "a reader sees other bytes than were written")
        writer.ask("take", fds=owner.fds, sizes=parts, write=True)
        written = writer.ask("fill", seed=2)["digest"]
        seen = {"owner": owner.ask("digest")["digest"], "reader": reader.ask("digest")["digest"]}
        say("sharing", "written through a descriptor", seen_by=[who for who in seen if seen[who] == written])
        check(set(seen.values()) == {written}, "what was written is not what the others see")


def outliving(sizes: Sizes) -> None:
    """(5) The owner is killed while somebody keeps descriptors, with the device's node open and without."""
    with nvml() as device:
        node = device.node(sizes.dev_dir)
    kept = orphaned(sizes, node, keep_open=True)
    orphaned(sizes, node, keep_open=False)
    check(kept, "memory does not outlive its owner though the device's node was open")


def orphaned(sizes: Sizes, node: Path, *, keep_open: bool) -> bool:
    """Whether the content was still there for a process that came later."""
    keeper = os.open(node, os.O_RDWR | os.O_CLOEXEC) if keep_open else -1
    before = used_now()
    with Other() as owner:
        parts, digest = filled(owner, sizes)
    time.sleep(2 * sizes.settled_s)
    others = openers(node)
    try:
        with Other() as heir:
            result = heir.attempt("take", fds=owner.fds, sizes=parts, write=False)
            found = heir.ask("digest")["digest"] if result == "done" else None
            used = used_now() - before
    finally:
        owner.close()
        if keep_open:
            os.close(keeper)
    say(
        "outliving",
        "node kept open" if keep_open else "nobody has the node open",
        openers=others,
        take=result,
        same=found == digest,
        used_bytes=used,
        bytes=sum(parts),
        used_after_close=used_now() - before,
    )
    return found == digest


def read_only(sizes: Sizes) -> None:
    """(6) A write through a mapping for reading: what the writer gets, and what the others notice."""
    with nvml() as device, Other() as owner, Other() as reader, device.events() as xids:
        parts, digest = filled(owner, sizes)
        reader.ask("take", fds=owner.fds, sizes=parts, write=False)
        for how in ("copy", "memset", *(("kernel",) if has_torch() else ())):
            with Other() as writer:
                writer.ask("take", fds=owner.fds, sizes=parts, write=False)
                result = writer.attempt("write", how=how)
                again = writer.attempt("digest")
            unharmed = [who.ask("digest")["digest"] == digest for who in (owner, reader)]
            say("read_only", how, result=result, writer_afterwards=again, xids=xids(), unharmed=unharmed)
            check(all(unharmed), f"a {how} through a mapping for reading did harm to others")


def has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def torch_step(sizes: Sizes) -> None:
    """(7) Torch on memory that it did not make."""
    if not has_torch():
        return say("torch", "torch is not installed")
    with Other() as owner, Other() as reader:
        parts, _ = filled(owner, sizes)
        reader.ask("take", fds=owner.fds, sizes=parts, write=False)
        say("torch", "wrapped", **reader.ask("torch"))
        code = reader.exit()
        say("torch", "exit with live tensors", code=code)
        check(code == 0, f"a process with live tensors ends with {code}")


def copying(sizes: Sizes) -> None:
    """(8) Host to device, and what feeds it."""
    with Other() as hand:
        hand.ask("copies", quick=sizes.quick)


def together(sizes: Sizes) -> None:
    """(9) Two readers of one copy; out of memory, and afterwards."""
    with nvml() as device:
        before = device.used()
        with Other() as owner:
            parts, digest = filled(owner, sizes)
            alone = device.used() - before
            with Other() as one, Other() as two:
                contexts = device.used() - before - alone
                for reader in (one, two):
                    reader.ask("take", fds=owner.fds, sizes=parts, write=False)
                    check(reader.ask("digest")["digest"] == digest, "a reader sees other bytes")
                mapped = device.used() - before - alone - contexts
            say("together", "two readers", bytes=sum(parts), owner=alone, contexts=contexts, mappings=mapped)
            check(mapped < sum(parts) // 2, "readers take memory of their own")
            owner.close()
        exhausting(device, sizes)


def exhausting(device: Nvml, sizes: Sizes) -> None:
    if device.pids():
        return say("together", "others use this GPU: its memory is not filled", pids=device.pids())
    before = device.used()
    with Other(ready=False) as hand:
        unit = hand.ask("init")["granularity"]
        large = split(sizes.image_bytes, 16, unit)[0]
        found = hand.ask("exhaust", size_bytes=large)
        small = hand.ask("exhaust", size_bytes=unit)
        say("together", "full", large=found, small=small, nvml_free=device.total() - device.used())
        with Other(ready=False) as late:
            late.ask("init")
            say("together", "a context where memory is full", result=late.attempt("context"))
        hand.ask("release")
        say("together", "released", ms_until_free=device.wait_free(before + 64 * unit))
        hand.ask("context")
        result = hand.attempt("create", sizes=[unit])
        say("together", "after it", result=result)
        check(found["refused"] == small["refused"] == "CUDA_ERROR_OUT_OF_MEMORY", f"full: {found}, {small}")
        check(result == "done", f"no memory after it was released: {result}")


STEPS: dict[str, Callable[[Sizes], None]] = {
    "runtime": runtime,
    "memory": memory,
    "blocks": blocks,
    "sharing": sharing,
    "outliving": outliving,
    "read_only": read_only,
    "torch": torch_step,
    "copying": copying,
    "together": together,
}


# --- (7) ----------------------------------------------------------------------------------------------

DTYPES = ("uint8", "int8", "int64", "float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e5m2")
ALIVE: list[Any] = []
"""Tensors that are still there when the process ends."""


def torch_device(gpu: Gpu) -> str:
    """With a number: torch takes "cuda" and "cuda:0" for different places of a storage."""
    return "cuda:0" if gpu.driver.torch_device == "cuda" else gpu.driver.torch_device


def wrapped(device: str, address: int, size_bytes: int, dtype: str) -> Any:
    """A tensor around memory that torch did not make and does not free."""
    import torch

    kind = getattr(torch, dtype)
    construct = torch._C._construct_storage_from_data_pointer
    storage = construct(address, torch.device(device), size_bytes)
    return torch.empty(0, dtype=kind, device=device).set_(storage, 0, (size_bytes // kind.itemsize,), (1,))


class Interface:
    """The public way: bytes at an address, by __cuda_array_interface__."""

    def __init__(self, address: int, size_bytes: int, *, read_only: bool) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size_bytes,),
            "typestr": "|u1",
            "data": (address, read_only),
            "version": 3,
        }


def torch_around(gpu: Gpu, address: int, seam: int) -> dict[str, Any]:
    """What torch reads on both sides of the seam between two blocks, in several ways."""
    import torch

    device, size_bytes = torch_device(gpu), min(MIB, seam)
    start = address + seam - size_bytes // 2
    expected = torch.frombuffer(bytearray(copied_out(gpu, start, size_bytes)), dtype=torch.uint8)
    found: dict[str, Any] = {"torch": torch.__version__, "device": device}
    for dtype in DTYPES:
        tensor = wrapped(device, start, size_bytes, dtype)
        ALIVE.append(tensor)
        found[dtype] = torch.equal(tensor.view(torch.uint8).cpu(), expected)
    raw, total = ALIVE[0], int(expected.sum(dtype=torch.int64))
    found["int4"] = torch.equal((raw & 15).cpu(), expected & 15)
    found["kernel"] = raw.sum(dtype=torch.int64).item() == total
    check(all(found[what] for what in (*DTYPES, "int4", "kernel")), f"torch reads other bytes: {found}")
    begin = time.perf_counter()
    for _ in range(10_000):
        wrapped(device, start, size_bytes, "bfloat16")
    found["us_a_tensor"] = ms_since(begin) / 10
    if device == "cpu":
        return {**found, "interface": "not on a CPU", "graph": "not on a CPU"}
    for read_only in (False, True):
        word = "interface_read_only" if read_only else "interface"
        found[word] = attempt(
            lambda only=read_only: through_interface(device, start, expected, read_only=only)
        )
    return {**found, "graph": attempt(lambda: in_graph(raw, total))}


def copied_out(gpu: Gpu, address: int, size_bytes: int) -> bytes:
    host, stream = gpu.pin(size_bytes), gpu.stream()
    gpu.copy_out(host, address, size_bytes, stream)
    gpu.synchronize(stream)
    content = ctypes.string_at(host, size_bytes)
    gpu.end_stream(stream)
    gpu.unpin(host)
    return content


def attempt(ask: Callable[[], bool]) -> bool | str:
    try:
        return ask()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def through_interface(device: str, address: int, expected: Any, *, read_only: bool) -> bool:
    import torch

    tensor = torch.as_tensor(Interface(address, len(expected), read_only=read_only), device=device)
    return tensor.data_ptr() == address and torch.equal(tensor.cpu(), expected)


def in_graph(tensor: Any, expected: int) -> bool:
    """A captured graph reads the memory each time that it is replayed."""
    import torch

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        tensor.sum(dtype=torch.int64)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = tensor.sum(dtype=torch.int64)
    graph.replay()
    torch.cuda.synchronize()
    ALIVE.append(graph)
    return bool(total.item() == expected)


# --- (8) ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Way:
    """One way for bytes to the device: ``fed`` through pinned buffers, else directly from ``source``."""

    name: str
    source: int = 0  # 0: the pinned buffers as they are
    fed: bool = False
    back: bool = False


def measure_copies(gpu: Gpu, quick: bool) -> None:
    """Rates of each way, for several threads and sizes."""
    whole, parts, counts = (32 * MIB, (1, 4), (1, 2)) if quick else (4 * GIB, (1, 4, 16, 64), (1, 2, 4, 8))
    source_bytes, room = min(GIB, whole), parts[-1] * counts[-1] * MIB
    handle, device = gpu.create(room), gpu.reserve(room)
    gpu.map(device, room, handle)
    gpu.allow(device, room, write=True)

    def sweep(way: Way) -> None:
        for threads in counts:
            for part in parts:
                measure(gpu, way, device, source_bytes, threads, part * MIB, whole)

    with source_file(source_bytes) as fd:
        pages, anonymous = map_pages(fd, source_bytes), map_pages(-1, source_bytes)
        sweep(Way("pinned"))
        sweep(Way("pinned, to the host", back=True))
        sweep(Way("pageable", pages))
        sweep(Way("ring fed from pages", pages, fed=True))
        for name, address, flags in (
            ("anonymous pages", anonymous, 0),
            ("a file's pages", pages, READ_ONLY_FLAG),
        ):
            if registered(gpu, name, address, source_bytes, flags):
                sweep(Way(f"registered, {name}", address))
                gpu.driver.call("cuMemHostUnregister", address)


def registered(gpu: Gpu, name: str, address: int, size_bytes: int, flags: int) -> bool:
    start = time.perf_counter()
    try:
        gpu.driver.call("cuMemHostRegister", address, size_bytes, flags)
    except CudaError as error:
        say("copying", f"register {name}", error=error.name)
        return False
    say("copying", f"register {name}", ms=ms_since(start), bytes=size_bytes)
    return True


def measure(gpu: Gpu, way: Way, device: int, source_bytes: int, threads: int, part: int, whole: int) -> None:
    """One figure. Each thread has a part of the device, two pinned buffers, and two copies in flight."""
    ready = threading.Barrier(threads)
    count = max(2, whole // threads // part)
    slots = [(gpu.pin(part), gpu.stream()) for _ in range(2 * threads)]

    def lane(number: int) -> tuple[float, float]:
        own = slots[2 * number : 2 * number + 2]
        with gpu.context():
            ready.wait(ANSWER_S)
            start = time.perf_counter()
            for turn in range(count):
                host, stream = own[turn % 2]
                gpu.synchronize(stream)
                source = way.source + (number * count + turn) * part % source_bytes
                one_copy(gpu, way, device + number * part, host, source, part, stream)
            for _, stream in own:
                gpu.synchronize(stream)
            return start, time.perf_counter()

    with ThreadPoolExecutor(threads) as pool:
        times = list(pool.map(lane, range(threads)))
    for host, stream in slots:
        gpu.end_stream(stream)
        gpu.unpin(host)
    seconds = max(end for _, end in times) - min(start for start, _ in times)
    rate = round(threads * count * part / GIB / seconds, 2)
    say("copying", way.name, threads=threads, part_mib=part // MIB, gib_s=rate)


def one_copy(gpu: Gpu, way: Way, device: int, host: int, source: int, part: int, stream: Any) -> None:
    if way.back:
        return gpu.copy_out(host, device, part, stream)
    if way.fed:
        ctypes.memmove(host, source, part)
    gpu.copy_in(device, source if way.source and not way.fed else host, part, stream)


@contextlib.contextmanager
def source_file(size_bytes: int) -> Iterator[int]:
    """A file in the page cache, of a file system as it is there."""
    with tempfile.TemporaryFile() as file:
        block = os.urandom(MIB)
        for _ in range(size_bytes // MIB):
            file.write(block)
        file.flush()
        yield file.fileno()


def map_pages(fd: int, size_bytes: int) -> int:
    """A file's pages for reading, as a standby has them; without a file, memory of our own. Populated."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    own = fd < 0
    access = mmap.PROT_READ | (mmap.PROT_WRITE if own else 0)
    flags = (mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS if own else mmap.MAP_SHARED) | mmap.MAP_POPULATE
    address = libc.mmap(None, size_bytes, access, flags, fd, 0)
    check(address not in (None, ctypes.c_void_p(-1).value), "mmap")
    return int(address)


# --- all of it ----------------------------------------------------------------------------------------


def raise_limit() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def choose(word: str) -> tuple[str, int]:
    """UUID and size in bytes of the device with this number or UUID. Of a GPU that is cut up, an instance."""
    import pynvml

    pynvml.nvmlInit()
    try:
        by_number = word.isdecimal()
        handle = (
            pynvml.nvmlDeviceGetHandleByIndex(int(word))
            if by_number
            else pynvml.nvmlDeviceGetHandleByUUID(word)
        )
        with contextlib.suppress(pynvml.NVMLError):
            handle = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, 0)
        return pynvml.nvmlDeviceGetUUID(handle), int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    finally:
        pynvml.nvmlShutdown()


def sizes_of(arguments: argparse.Namespace) -> Sizes:
    usual = min(60 * GIB, arguments.total_bytes * 2 // 5)
    image = int(arguments.gb * GIB) if arguments.gb else usual
    if arguments.quick:
        image = min(image, 2 * GIB)
    return Sizes(image, min(image // 4, 2 * GIB), arguments.quick, Path(arguments.dev_dir))


def run_step(name: str, sizes: Sizes) -> int:
    """One step, in its own process."""
    raise_limit()
    try:
        STEPS[name](sizes)
    except Exception as error:
        say(name, "failed", error=f"{type(error).__name__}: {error}")
        return 1
    return 0


def run(name: str, arguments: list[str], limit_s: float) -> dict[str, Any]:
    """One step as a process with a time limit; what becomes of it. Its lines are passed on."""
    start, last = time.perf_counter(), ""
    command = [sys.executable, __file__, *arguments, "--step", name]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    timer = threading.Timer(limit_s, os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line
    code = process.wait()
    timer.cancel()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # hands of a step that died
    wall_s = round(time.perf_counter() - start, 2)
    if code == 0:
        return {"ok": True, "wall_s": wall_s}
    told = json.loads(last).get("error") if last else None
    late = f"not done after {limit_s:g} s" if wall_s >= limit_s else f"ended with {code}"
    return {"ok": False, "wall_s": wall_s, "error": told or late}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--device", default="0", help="number (NVML's) or UUID")
    parser.add_argument(
        "--gb", type=float, default=0, help="GiB of the largest image; default 60, or 2/5 of it"
    )
    parser.add_argument("--quick", action="store_true", help="at most 2 GiB, and few sizes")
    parser.add_argument("--steps", default=",".join(STEPS), help="which of: %(default)s")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds for a step (%(default)g)")
    parser.add_argument("--dev-dir", default="/dev")
    parser.add_argument("--step", choices=list(STEPS), help=argparse.SUPPRESS)
    parser.add_argument("--total-bytes", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--hand", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    if arguments.hand is not None:
        serve(socket.socket(fileno=arguments.hand))
        return 0
    if arguments.step:
        return run_step(arguments.step, sizes_of(arguments))
    uuid, total_bytes = choose(arguments.device)
    os.environ["CUDA_VISIBLE_DEVICES"] = uuid
    passed = [*sys.argv[1:], "--total-bytes", str(total_bytes)]
    summary = {}
    for name in arguments.steps.split(","):
        summary[name] = run(name, passed, arguments.limit)
    print(json.dumps({"summary": summary}), flush=True)
    return 0 if all(step["ok"] for step in summary.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
