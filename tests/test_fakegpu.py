"""The fake GPU has the real one's names, and its memory lives and dies among processes as the real one's."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpukit
import pytest

from cached.cuda import CudaError, Driver, Gpu

ROOT = Path(__file__).parent.parent
SIZE = 256 * gpukit.KIB
PATTERN = bytes(range(256)) * (SIZE // 256)

NAMES = """
import enum, importlib, json, sys
found = {}
for name in ("cuda.bindings.driver", "pynvml"):
    module = importlib.import_module(name)
    found[name] = names = {}
    for word in dir(module):
        value = getattr(module, word)
        if word.startswith(("CU", "cu", "NVML", "nvml", "c_nvml")):
            names[word] = value if isinstance(value, int) else None
        if isinstance(value, type) and word.startswith("CU") and hasattr(value, "__members__"):
            names.update({f"{word}.{each}": int(getattr(value, each)) for each in value.__members__})
print(json.dumps(found))
"""

OWNER = """
import os, socket, sys
from cached.cuda import Driver
gpu = Driver().gpus()[0]
size = int(sys.argv[1])
handle = gpu.create(size)
fd = gpu.export(handle)
with gpu.context():
    address, host, stream = gpu.reserve(size), gpu.pin(size), gpu.stream()
    gpu.map(address, size, handle)
    gpu.allow(address, size, write=True)
    import ctypes
    ctypes.memmove(host, bytes(range(256)) * (size // 256), size)
    gpu.copy_in(address, host, size, stream)
    gpu.synchronize(stream)
    socket.send_fds(socket.socket(fileno=int(sys.argv[2])), [b"x"], [fd])
    sys.stdin.read()
"""


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[gpukit.Gpus]:
    with gpukit.machine() as gpus:
        monkeypatch.setenv("FAKE_GPU_DIR", str(gpus.directory))
        yield gpus


def names(path: str) -> dict[str, dict[str, int | None]]:
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-P", "-c", NAMES], env=env, check=True, capture_output=True)
    found: dict[str, dict[str, int | None]] = json.loads(done.stdout)
    return found


def test_the_fakes_have_the_names_and_values_of_the_real_bindings() -> None:
    real, fake = names(str(ROOT)), names(str(gpukit.FAKES))
    for module in real:
        assert len(fake[module]) > 40
        assert fake[module].items() <= real[module].items()
    called = set(re.findall(r"\"(cu[A-Z]\w+)\"", (ROOT / "cached/cuda.py").read_text()))
    used = set(re.findall(r"\b(CU_[A-Z_]+[A-Z])\b", (ROOT / "cached/cuda.py").read_text()))
    # Of the two names of cuDeviceGetUuid only version 12 has the one with a version.
    assert called - {"cuDeviceGetUuid_v2"} <= fake["cuda.bindings.driver"].keys()
    members = {name.partition(".")[2] for name in fake["cuda.bindings.driver"]}
    assert used - {"CU_DEVICE_ATTRIBUTE"} <= members


def owner(gpus: gpukit.Gpus) -> tuple[subprocess.Popen[bytes], int]:
    """A process that has made memory and filled it, and a descriptor of it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", OWNER, str(SIZE), str(theirs.fileno())],
            env=gpus.env({**os.environ, "PYTHONPATH": str(ROOT)}),
            stdin=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        return process, socket.recv_fds(ours, 1, 1)[1][0]


def kill(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_memory_outlives_its_maker_while_somebody_holds_it(gpus: gpukit.Gpus) -> None:
    uuid = gpus.add(context_bytes=gpukit.MIB)
    maker, fd = owner(gpus)
    assert gpus.used_bytes(uuid) == SIZE + gpukit.MIB
    gpu = Driver().gpus()[0]
    kill(maker)
    assert gpus.used_bytes(uuid) == SIZE
    with gpu.context():
        address = mapped(gpu, gpu.import_(fd), write=False)
        os.close(fd)
        assert gpus.used_bytes(uuid) == SIZE + gpukit.MIB
        assert (
            digest(address) == hashlib.sha256(PATTERN).digest() == hashlib.sha256(out(gpu, address)).digest()
        )
        gpu.unmap(address, SIZE)
        gpu.free(address, SIZE)
    assert gpus.used_bytes(uuid) == 0


def test_who_has_a_descriptor_may_write_but_not_through_a_mapping_for_reading(gpus: gpukit.Gpus) -> None:
    gpus.add()
    maker, fd = owner(gpus)
    gpu = Driver().gpus()[0]
    with gpu.context():
        reading, writing = (mapped(gpu, gpu.import_(fd), write=write) for write in (False, True))
        os.close(fd)
        host, stream = gpu.pin(SIZE), gpu.stream()
        gpu.copy_in(writing, host, SIZE, stream)
        assert digest(reading) == hashlib.sha256(PATTERN).digest(), "a copy is done before anybody waits"
        gpu.synchronize(stream)
        assert not any(out(gpu, reading))
        gpu.copy_in(reading, host, SIZE, stream)
        with pytest.raises(CudaError, match="ILLEGAL_ADDRESS"):
            gpu.synchronize(stream)
        with pytest.raises(CudaError, match="ILLEGAL_ADDRESS"):
            gpu.memory()  # the context is of no use any more
        for address in (reading, writing):
            with pytest.raises(CudaError, match="INVALID_VALUE"):
                gpu.free(address, SIZE)
            gpu.unmap(address, SIZE)
            gpu.free(address, SIZE)
    kill(maker)


def test_memory_is_lost_when_nobody_has_the_devices_node_open(gpus: gpukit.Gpus) -> None:
    uuid = gpus.add()
    keeper = os.open(gpus.dev / "nvidia0", os.O_RDONLY)
    maker, fd = owner(gpus)
    kill(maker)
    assert gpus.used_bytes(uuid) == SIZE
    os.close(keeper)
    assert gpus.used_bytes(uuid) == 0
    gpu = Driver().gpus()[0]
    with pytest.raises(CudaError, match="INVALID_VALUE"):
        gpu.import_(fd)
    os.close(fd)


def test_it_refuses_what_the_driver_refuses(gpus: gpukit.Gpus) -> None:
    uuid = gpus.add(total_bytes=4 * SIZE)
    gpu = Driver().gpus()[0]
    assert f"GPU-{gpu.uuid}" == uuid
    with pytest.raises(CudaError, match="INVALID_VALUE"):
        gpu.create(SIZE + 1)
    with gpus.others(uuid, SIZE):
        handles = [gpu.create(SIZE) for _ in range(3)]
        with pytest.raises(CudaError, match="OUT_OF_MEMORY"):
            gpu.create(SIZE)
    gpu.release(handles.pop())
    for wrong in (lambda: gpu.release(0x1000), gpu.memory, gpu.stream, lambda: gpu.pin(SIZE)):
        with pytest.raises(CudaError, match="INVALID_"):
            wrong()
    gpus.fail("cuMemCreate", "CUDA_ERROR_NOT_SUPPORTED", after=1, times=1)
    gpu.release(gpu.create(SIZE))
    with pytest.raises(CudaError, match="NOT_SUPPORTED"):
        gpu.create(SIZE)
    gone = gpus.vanish(uuid)
    with pytest.raises(CudaError, match="DEVICE_UNAVAILABLE"):
        gpu.create(SIZE)
    gpus.come_back(gone)
    for handle in (gpu.create(SIZE), *handles):
        gpu.release(handle)


def test_nvml_tells_of_devices_their_memory_and_their_health(gpus: gpukit.Gpus) -> None:
    import pynvml

    first, second = gpus.add(total_bytes=64 * gpukit.MIB, reserved_bytes=gpukit.MIB), gpus.add()
    instance = gpus.add_instance(second)
    pynvml.nvmlInit()
    try:
        assert pynvml.nvmlDeviceGetCount() == 2
        gpu, cut = (pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in (first, second))
        with gpus.others(first, gpukit.MIB):
            memory = pynvml.nvmlDeviceGetMemoryInfo(gpu)
            assert (memory.free, memory.used) == (62 * gpukit.MIB, 2 * gpukit.MIB)
        mig = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(cut, 0)
        assert pynvml.nvmlDeviceGetUUID(mig) == instance
        assert pynvml.nvmlDeviceGetMemoryInfo(mig, pynvml.nvmlMemory_v2).total == 16 * gpukit.MIB
        watch_for_xids(pynvml, gpus, cut, mig)
        gpus.ecc(first)
        uncorrected = pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
        assert pynvml.nvmlDeviceGetTotalEccErrors(gpu, *uncorrected) == 1
        gpus.vanish(first)
        with pytest.raises(pynvml.NVMLError_GpuIsLost):
            pynvml.nvmlDeviceGetMemoryInfo(gpu)
    finally:
        pynvml.nvmlShutdown()
    pynvml.nvmlInit()
    assert pynvml.nvmlDeviceGetCount() == 1
    pynvml.nvmlShutdown()


def watch_for_xids(pynvml: Any, gpus: gpukit.Gpus, gpu: Any, instance: Any) -> None:
    events = pynvml.nvmlEventSetCreate()
    with pytest.raises(pynvml.NVMLError_NotSupported):
        pynvml.nvmlDeviceRegisterEvents(instance, pynvml.nvmlEventTypeXidCriticalError, events)
    pynvml.nvmlDeviceRegisterEvents(gpu, pynvml.nvmlEventTypeXidCriticalError, events)
    gpus.xid(pynvml.nvmlDeviceGetUUID(gpu), 79, instance=1)
    event = pynvml.nvmlEventSetWait_v2(events, 1000)
    assert (event.eventData, event.gpuInstanceId, event.device) == (79, 1, gpu)
    with pytest.raises(pynvml.NVMLError_Timeout):
        pynvml.nvmlEventSetWait_v2(events, 0)
    pynvml.nvmlEventSetFree(events)


def mapped(gpu: Gpu, handle: int, *, write: bool) -> int:
    """Memory at an address, which alone keeps it."""
    address = gpu.reserve(SIZE)
    gpu.map(address, SIZE, handle)
    gpu.allow(address, SIZE, write=write)
    gpu.release(handle)
    return address


def digest(address: int) -> bytes:
    return hashlib.sha256(ctypes.string_at(address, SIZE)).digest()


def out(gpu: Gpu, address: int) -> bytes:
    """What a copy from the device brings."""
    host, stream = gpu.pin(SIZE), gpu.stream()
    gpu.copy_out(host, address, SIZE, stream)
    gpu.synchronize(stream)
    gpu.end_stream(stream)
    found = ctypes.string_at(host, SIZE)
    gpu.unpin(host)
    return found
