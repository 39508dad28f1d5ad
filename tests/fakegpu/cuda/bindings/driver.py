"""FAKE, for tests: the part of ``cuda.bindings.driver`` that this project calls, on memory of the host.

Owns one process's view: handles, reservations, mappings, contexts, streams. What processes share is in
gpustate. Without FAKE_GPU_DIR it is as on a machine without a driver. Names, arguments, results and errors
are the real ones'; addresses are real addresses of this process, so that anything that reads memory can be
pointed at them. Stricter than the real one where that finds mistakes: a copy from or to pinned memory is done
only when somebody waits for it, and mappings are made accessible within a context only.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import mmap
import os
import threading
import uuid as uuids
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

import gpustate

TORCH_DEVICE = "cpu"
"""Torch's word for where these addresses lie (the real module has no such name)."""


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NOT_INITIALIZED = 3
    CUDA_ERROR_DEVICE_UNAVAILABLE = 46
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_DEVICE = 101
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_ECC_UNCORRECTABLE = 214
    CUDA_ERROR_OPERATING_SYSTEM = 304
    CUDA_ERROR_INVALID_HANDLE = 400
    CUDA_ERROR_NOT_READY = 600
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED = 712
    CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED = 713
    CUDA_ERROR_NOT_PERMITTED = 800
    CUDA_ERROR_NOT_SUPPORTED = 801
    CUDA_ERROR_SYSTEM_NOT_READY = 802
    CUDA_ERROR_UNKNOWN = 999


class CUdevice_attribute(IntEnum):
    CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16
    CU_DEVICE_ATTRIBUTE_ECC_ENABLED = 32
    CU_DEVICE_ATTRIBUTE_PCI_BUS_ID = 33
    CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT = 40
    CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING = 41
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76
    CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS = 88
    CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED = 102
    CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED = 103
    CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED = 110
    CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED = 113


class CUmemLocationType(IntEnum):
    CU_MEM_LOCATION_TYPE_DEVICE = 1


class CUmemAllocationHandleType(IntEnum):
    CU_MEM_HANDLE_TYPE_NONE = 0
    CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR = 1


class CUmemAllocationType(IntEnum):
    CU_MEM_ALLOCATION_TYPE_PINNED = 1


class CUmemAllocationGranularity_flags(IntEnum):
    CU_MEM_ALLOC_GRANULARITY_MINIMUM = 0
    CU_MEM_ALLOC_GRANULARITY_RECOMMENDED = 1


class CUmemAccess_flags(IntEnum):
    CU_MEM_ACCESS_FLAGS_PROT_NONE = 0
    CU_MEM_ACCESS_FLAGS_PROT_READ = 1
    CU_MEM_ACCESS_FLAGS_PROT_READWRITE = 3


class CUstream_flags(IntEnum):
    CU_STREAM_DEFAULT = 0
    CU_STREAM_NON_BLOCKING = 1


class CUevent_flags(IntEnum):
    CU_EVENT_DEFAULT = 0
    CU_EVENT_DISABLE_TIMING = 2


@dataclass
class CUmemLocation:
    type: CUmemLocationType = CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    id: int = 0


@dataclass
class CUmemAllocationProp:
    type: CUmemAllocationType = CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    requestedHandleTypes: CUmemAllocationHandleType = CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_NONE
    location: CUmemLocation = field(default_factory=CUmemLocation)


@dataclass
class CUmemAccessDesc:
    location: CUmemLocation = field(default_factory=CUmemLocation)
    flags: CUmemAccess_flags = CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_NONE


@dataclass(frozen=True)
class CUuuid:
    bytes: bytes


class CUcontext(int):
    """0: none."""


class CUstream(int):
    """0: the default one."""


class CUevent(int):
    pass


class _Refused(Exception):
    def __init__(self, result: CUresult) -> None:
        self.result = result


def _refuse_unless(right: object, result: CUresult = CUresult.CUDA_ERROR_INVALID_VALUE) -> None:
    if not right:
        raise _Refused(result)


# --- one process --------------------------------------------------------------------------------------

_NONE = 0
_NORESERVE, _FIXED = 0x4000, 0x10
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@dataclass
class _Handle:
    fd: int
    size_bytes: int
    exportable: bool


@dataclass
class _Mapping:
    size_bytes: int
    flags: int = 0


@dataclass
class _Stream:
    waiting: deque[Callable[[], None]] = field(default_factory=deque)
    done: int = 0
    asked: int = 0
    error: CUresult = CUresult.CUDA_SUCCESS
    lock: threading.RLock = field(default_factory=threading.RLock)


class _Process:
    """What cuInit made. Dictionaries are keyed by address or by handle."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.pid = os.getpid()
        self.numbers = itertools.count(1)
        self.uuids = _visible(directory)
        _refuse_unless(self.uuids, CUresult.CUDA_ERROR_NO_DEVICE)
        self.nodes = [self._open_node(uuid) for uuid in self.uuids]
        self.handles: dict[int, _Handle] = {}
        self.reservations: dict[int, int] = {}
        self.mappings: dict[int, _Mapping] = {}
        self.pinned: dict[int, int] = {}
        self.registered: dict[int, int] = {}
        self.contexts: dict[int, tuple[int, int]] = {}  # ordinal -> (times retained, descriptor)
        self.streams: dict[int, _Stream] = {0: _Stream()}
        self.events: dict[int, tuple[int, int]] = {}  # -> (stream, how much was asked of it before)
        self.dead = CUresult.CUDA_SUCCESS  # an error after which no context is of use
        self.lock = threading.RLock()

    def _open_node(self, uuid: str) -> int:
        device = gpustate.device(self.directory, uuid)
        with gpustate.locked(self.directory):
            gpustate.held(self.directory, uuid)  # finds out that nobody has the node open
            return os.open(gpustate.node(self.directory, device), os.O_RDONLY | os.O_CLOEXEC)

    def device(self, ordinal: int) -> dict[str, Any]:
        _refuse_unless(0 <= ordinal < len(self.uuids), CUresult.CUDA_ERROR_INVALID_DEVICE)
        return gpustate.device(self.directory, self.uuids[ordinal])

    def granularity(self, ordinal: int) -> int:
        return int(self.device(ordinal).get("granularity", gpustate.GRANULARITY_BYTES))

    def reserved(self, address: int, size_bytes: int) -> bool:
        return any(
            start <= address and address + size_bytes <= start + whole
            for start, whole in self.reservations.items()
        )

    def mapped(self, address: int, size_bytes: int) -> list[int]:
        """The mappings that together are exactly this range. Refused where there is none such."""
        found = [start for start in sorted(self.mappings) if address <= start < address + size_bytes]
        end = address
        for start in found:
            _refuse_unless(start == end)
            end += self.mappings[start].size_bytes
        _refuse_unless(found and end == address + size_bytes)
        return found

    def allowed(self, address: int, size_bytes: int) -> int:
        """The access that is allowed in all of a range that may begin and end within mappings.

        What nobody has reserved is torch's: it allocates by itself on the device that it takes this one for.
        """
        if not any(
            start < address + size_bytes and address < start + whole
            for start, whole in self.reservations.items()
        ):
            return 3
        flags, end = 3, address
        for start in sorted(self.mappings):
            mapping = self.mappings[start]
            if start <= end < start + mapping.size_bytes:
                flags &= mapping.flags
                end = start + mapping.size_bytes
        return flags if end >= address + size_bytes else 0

    def is_pinned(self, address: int, size_bytes: int) -> bool:
        return any(
            start <= address and address + size_bytes <= start + whole
            for start, whole in (*self.pinned.items(), *self.registered.items())
        )

    def finish(self, stream: int, until: int | None = None) -> None:
        """Do what was asked of a stream; raises what went wrong in it."""
        work = self.streams.get(stream) or _Stream()  # another thread may have ended it
        with work.lock:  # who waits while another does the work waits for that
            while work.waiting and (until is None or work.done < until):
                work.waiting.popleft()()
                work.done += 1
            error, work.error = work.error, CUresult.CUDA_SUCCESS
        _refuse_unless(error == CUresult.CUDA_SUCCESS, error)


_process: _Process | None = None
_current = threading.local()


def _visible(directory: Path) -> list[str]:
    """UUIDs in CUDA's order. Of a GPU that is cut up only the first instance is seen, unless one is named."""
    gpus = gpustate.gpus(directory)
    usual = [(gpu.get("mig") or [gpu])[0]["uuid"] for gpu in gpus]
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return usual
    found: list[str] = []
    for word in filter(None, named.split(",")):
        known = [usual[int(word)]] if word.isdecimal() and int(word) < len(usual) else []
        if not word.isdecimal():
            known = [first for gpu, first in zip(gpus, usual, strict=True) if gpu["uuid"].startswith(word)]
            instances = [instance["uuid"] for gpu in gpus for instance in gpu.get("mig", ())]
            known += [uuid for uuid in instances if uuid.startswith(word)]
        if not known:
            break  # the real one, too, ends at the first that it does not know
        found.append(known[0])
    return list(dict.fromkeys(found))


def _here() -> _Process:
    """This process, which has called cuInit itself: nothing of it holds in a forked child."""
    if _process is None or _process.pid != os.getpid():
        raise _Refused(CUresult.CUDA_ERROR_NOT_INITIALIZED)
    return _process


def _call(*, context: bool = False) -> Callable[[Callable[..., Any]], Callable[..., tuple[Any, ...]]]:
    """Make a function a call of the driver: (result, values…). Errors are results."""

    def wrap(function: Callable[..., Any]) -> Callable[..., tuple[Any, ...]]:
        @functools.wraps(function)
        def call(*arguments: Any) -> tuple[Any, ...]:
            try:
                fault = gpustate.fault(_directory(), function.__name__)
                if fault and not fault["late"]:
                    raise _Refused(CUresult[fault["error"]])
                if context:
                    _refuse_unless(getattr(_current, "context", 0), CUresult.CUDA_ERROR_INVALID_CONTEXT)
                    _refuse_unless(_here().dead == CUresult.CUDA_SUCCESS, _here().dead)
                late = {"late": CUresult[fault["error"]]} if fault else {}
                values = function(*arguments, **late)
            except _Refused as refused:
                return (refused.result, None)
            except gpustate.Gone:
                return (CUresult.CUDA_ERROR_DEVICE_UNAVAILABLE, None)
            except OSError:
                return (CUresult.CUDA_ERROR_OPERATING_SYSTEM, None)
            if values is None:
                return (CUresult.CUDA_SUCCESS,)
            return (CUresult.CUDA_SUCCESS, *(values if isinstance(values, tuple) else (values,)))

        return call

    return wrap


def _directory() -> Path:
    directory = gpustate.root()
    if directory is None:
        raise RuntimeError("fake driver: no FAKE_GPU_DIR, so this machine has no libcuda")
    return directory


@_call()
def cuInit(flags: int) -> None:
    global _process
    if _process is not None:
        _here()  # a forked child of a process that uses CUDA never gets it to work
    if _process is None or _process.directory != _directory():
        for node in _process.nodes if _process is not None else ():
            os.close(node)
        _process = _Process(_directory())
        _current.context = CUcontext(0)


@_call()
def cuDriverGetVersion() -> int:
    return 13000


# --- devices ------------------------------------------------------------------------------------------


@_call()
def cuDeviceGetCount() -> int:
    return len(_here().uuids)


@_call()
def cuDeviceGet(ordinal: int) -> int:
    _here().device(ordinal)
    return ordinal


@_call()
def cuDeviceGetUuid(device: int) -> CUuuid:
    uuid: str = _here().device(device)["uuid"]
    return CUuuid(uuids.UUID(uuid.partition("-")[2]).bytes)


@_call()
def cuDeviceGetName(size: int, device: int) -> bytes:
    name: str = _here().device(device)["name"]
    return name.encode()[: size - 1].ljust(size, b"\0")


@_call()
def cuDeviceTotalMem(device: int) -> int:
    return int(_here().device(device)["total_bytes"])


@_call()
def cuDeviceGetAttribute(attribute: CUdevice_attribute, device: int) -> int:
    name = CUdevice_attribute(attribute).name.removeprefix("CU_DEVICE_ATTRIBUTE_")
    usual = {"COMPUTE_CAPABILITY_MAJOR": 9, "COMPUTE_CAPABILITY_MINOR": 0, "PAGEABLE_MEMORY_ACCESS": 0}
    return int(_here().device(device).get("attributes", {}).get(name, usual.get(name, 1)))


# --- memory, without a context ------------------------------------------------------------------------


@_call()
def cuMemGetAllocationGranularity(prop: CUmemAllocationProp, option: int) -> int:
    return _here().granularity(prop.location.id)


@_call()
def cuMemCreate(size: int, prop: CUmemAllocationProp, flags: int) -> int:
    here, uuid = _here(), _here().device(prop.location.id)["uuid"]
    _refuse_unless(size > 0 and size % here.granularity(prop.location.id) == 0)
    fd = gpustate.take(here.directory, uuid, size)
    if fd is None:
        raise _Refused(CUresult.CUDA_ERROR_OUT_OF_MEMORY)
    return _handle(fd, exportable=bool(prop.requestedHandleTypes))


@_call()
def cuMemExportToShareableHandle(handle: int, kind: int, flags: int) -> int:
    held = _handle_of(handle)
    _refuse_unless(kind == CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR)
    _refuse_unless(held.exportable)
    return os.dup(held.fd)


@_call()
def cuMemImportFromShareableHandle(fd: int, kind: int) -> int:
    memory = _here().directory / "memory"
    name = Path(os.readlink(f"/proc/self/fd/{int(fd)}"))
    _refuse_unless(memory in name.parents and gpustate.exists(int(fd)))
    _refuse_unless(name.parent.name in _here().uuids, CUresult.CUDA_ERROR_INVALID_DEVICE)
    return _handle(os.dup(int(fd)), exportable=True)


@_call()
def cuMemRelease(handle: int) -> None:
    os.close(_handle_of(handle).fd)
    del _here().handles[int(handle)]


def _handle(fd: int, *, exportable: bool) -> int:
    here = _here()
    handle = 0x1000 + next(here.numbers)
    here.handles[handle] = _Handle(fd, os.fstat(fd).st_size, exportable)
    return handle


def _handle_of(handle: int) -> _Handle:
    _refuse_unless(int(handle) in _here().handles)
    return _here().handles[int(handle)]


# --- memory at addresses ------------------------------------------------------------------------------


def _mmap(address: int, size: int, protection: int, flags: int, fd: int = -1) -> int:
    found = _libc.mmap(address or None, size, protection, flags, fd, 0)
    if found in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "mmap")
    return int(found)


def _nothing(address: int, size: int) -> int:
    """Addresses that cannot be touched, at ``address`` or anywhere."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE | (_FIXED if address else 0)
    return _mmap(address, size, _NONE, flags)


@_call()
def cuMemAddressReserve(size: int, alignment: int, address: int, flags: int) -> int:
    here, unit = _here(), max(alignment, _here().granularity(0))
    _refuse_unless(size > 0 and size % here.granularity(0) == 0)
    wide = _nothing(0, size + unit)
    start = -(-wide // unit) * unit
    if start > wide:
        _libc.munmap(wide, start - wide)
    if wide + unit > start:
        _libc.munmap(start + size, wide + unit - start)
    here.reservations[start] = size
    return start


@_call()
def cuMemAddressFree(address: int, size: int) -> None:
    here = _here()
    _refuse_unless(here.reservations.get(int(address)) == size)
    _refuse_unless(not any(address <= start < address + size for start in here.mappings))
    del here.reservations[int(address)]
    _libc.munmap(int(address), size)


@_call()
def cuMemMap(address: int, size: int, offset: int, handle: int, flags: int) -> None:
    here, held, unit = _here(), _handle_of(handle), _here().granularity(0)
    _refuse_unless(offset == 0 and size == held.size_bytes and address % unit == 0)
    _refuse_unless(here.reserved(address, size))
    with here.lock:
        end = address + size
        _refuse_unless(
            all(end <= other or other + it.size_bytes <= address for other, it in here.mappings.items())
        )
        _mmap(int(address), size, _NONE, mmap.MAP_SHARED | _FIXED, held.fd)
        here.mappings[int(address)] = _Mapping(size)


@_call()
def cuMemUnmap(address: int, size: int) -> None:
    here = _here()
    with here.lock:
        starts = here.mapped(int(address), size)
        _nothing(int(address), size)
        for start in starts:
            del here.mappings[start]


@_call(context=True)
def cuMemSetAccess(address: int, size: int, descriptions: list[CUmemAccessDesc], count: int) -> None:
    here = _here()
    _refuse_unless(len(descriptions) == count == 1)
    flags = int(descriptions[0].flags)
    here.device(descriptions[0].location.id)
    protection = mmap.PROT_READ * (flags & 1) | mmap.PROT_WRITE * (flags >> 1)
    for start in here.mapped(int(address), size):
        here.mappings[start].flags = flags
    if _libc.mprotect(int(address), size, protection) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")


@_call()
def cuMemGetAccess(location: CUmemLocation, address: int) -> int:
    return _here().allowed(int(address), 1)


# --- contexts -----------------------------------------------------------------------------------------


@_call()
def cuDevicePrimaryCtxRetain(device: int) -> CUcontext:
    here, gpu = _here(), _here().device(device)
    with here.lock:
        times, fd = here.contexts.get(device, (0, -1))
        if not times:
            taken = gpustate.take(here.directory, gpu["uuid"], max(1, gpu.get("context_bytes", 0)), "context")
            if taken is None:
                raise _Refused(CUresult.CUDA_ERROR_OUT_OF_MEMORY)
            fd = taken
        here.contexts[device] = (times + 1, fd)
    return CUcontext(device + 1)


@_call()
def cuDevicePrimaryCtxRelease(device: int) -> None:
    here = _here()
    with here.lock:
        _refuse_unless(device in here.contexts, CUresult.CUDA_ERROR_INVALID_CONTEXT)
        times, fd = here.contexts.pop(device)
        if times > 1:
            here.contexts[device] = (times - 1, fd)
        else:
            os.close(fd)
            here.dead = CUresult.CUDA_SUCCESS


@_call()
def cuDevicePrimaryCtxGetState(device: int) -> tuple[int, int]:
    return 0, int(device in _here().contexts)


@_call()
def cuCtxGetCurrent() -> CUcontext:
    _here()
    return getattr(_current, "context", CUcontext(0))


@_call()
def cuCtxSetCurrent(context: CUcontext) -> None:
    here = _here()
    _refuse_unless(not context or int(context) - 1 in here.contexts, CUresult.CUDA_ERROR_INVALID_CONTEXT)
    _current.context = context


@_call(context=True)
def cuCtxSynchronize() -> None:
    here = _here()
    for stream in list(here.streams):
        here.finish(stream)


@_call(context=True)
def cuMemGetInfo() -> tuple[int, int]:
    here = _here()
    gpu = here.device(int(_current.context) - 1)
    with gpustate.locked(here.directory):
        return gpustate.free_bytes(here.directory, gpu), int(gpu["total_bytes"])


# --- memory of the host -------------------------------------------------------------------------------


@_call(context=True)
def cuMemHostAlloc(size: int, flags: int) -> int:
    _refuse_unless(size > 0)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    address = _mmap(0, size, mmap.PROT_READ | mmap.PROT_WRITE, flags)
    _here().pinned[address] = size
    return address


@_call(context=True)
def cuMemFreeHost(address: int) -> None:
    here = _here()
    _refuse_unless(int(address) in here.pinned)
    for stream in list(here.streams):
        here.finish(stream)
    _libc.munmap(int(address), here.pinned.pop(int(address)))


@_call(context=True)
def cuMemHostRegister(address: int, size: int, flags: int) -> None:
    already = CUresult.CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED
    _refuse_unless(not _here().is_pinned(int(address), size), already)
    _here().registered[int(address)] = size


@_call(context=True)
def cuMemHostUnregister(address: int) -> None:
    here = _here()
    _refuse_unless(int(address) in here.registered, CUresult.CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED)
    del here.registered[int(address)]


# --- streams, events, copies --------------------------------------------------------------------------


def _stream_of(stream: CUstream) -> _Stream:
    _refuse_unless(int(stream) in _here().streams, CUresult.CUDA_ERROR_INVALID_HANDLE)
    return _here().streams[int(stream)]


@_call(context=True)
def cuStreamCreate(flags: int) -> CUstream:
    stream = CUstream(next(_here().numbers))
    _here().streams[stream] = _Stream()
    return stream


@_call(context=True)
def cuStreamDestroy(stream: CUstream) -> None:
    _stream_of(stream)
    _here().finish(int(stream))
    del _here().streams[int(stream)]


@_call(context=True)
def cuStreamSynchronize(stream: CUstream) -> None:
    _stream_of(stream)
    _here().finish(int(stream))


@_call(context=True)
def cuStreamQuery(stream: CUstream) -> None:
    _stream_of(stream)
    _here().finish(int(stream))


@_call(context=True)
def cuEventCreate(flags: int) -> CUevent:
    event = CUevent(next(_here().numbers))
    _here().events[event] = (0, 0)
    return event


@_call(context=True)
def cuEventRecord(event: CUevent, stream: CUstream) -> None:
    _refuse_unless(int(event) in _here().events, CUresult.CUDA_ERROR_INVALID_HANDLE)
    _here().events[int(event)] = (int(stream), _stream_of(stream).asked)


def _wait(event: CUevent) -> None:
    here = _here()
    _refuse_unless(int(event) in here.events, CUresult.CUDA_ERROR_INVALID_HANDLE)
    stream, until = here.events[int(event)]
    if stream in here.streams:
        here.finish(stream, until)


@_call(context=True)
def cuEventSynchronize(event: CUevent) -> None:
    _wait(event)


@_call(context=True)
def cuEventQuery(event: CUevent) -> None:
    _wait(event)


@_call(context=True)
def cuEventDestroy(event: CUevent) -> None:
    _refuse_unless(int(event) in _here().events, CUresult.CUDA_ERROR_INVALID_HANDLE)
    del _here().events[int(event)]


@_call(context=True)
def cuMemcpyHtoDAsync(
    device: int, host: int, size: int, stream: CUstream, late: CUresult = CUresult.CUDA_SUCCESS
) -> None:
    _copy(int(device), int(host), int(device), 3, int(host), size, stream, late)


@_call(context=True)
def cuMemcpyDtoHAsync(
    host: int, device: int, size: int, stream: CUstream, late: CUresult = CUresult.CUDA_SUCCESS
) -> None:
    _copy(int(host), int(device), int(device), 1, int(host), size, stream, late)


@_call(context=True)
def cuMemsetD8Async(
    device: int, value: int, size: int, stream: CUstream, late: CUresult = CUresult.CUDA_SUCCESS
) -> None:
    _refuse_unless(_here().allowed(int(device), size))
    _ask(stream, late, int(device), size, 3, lambda: ctypes.memset(int(device), value, size))


def _copy(
    to: int, source: int, device: int, access: int, host: int, size: int, stream: CUstream, late: CUresult
) -> None:
    here = _here()
    _refuse_unless(here.allowed(device, size))
    _ask(stream, late, device, size, access, lambda: ctypes.memmove(to, source, size))
    waits = here.device(int(_current.context) - 1).get("late_copies", True)
    if not waits or not here.is_pinned(host, size):
        here.finish(int(stream))  # from pageable memory the real one copies before it returns, too


def _ask(
    stream: CUstream, late: CUresult, device: int, size: int, access: int, work: Callable[[], Any]
) -> None:
    here, asked = _here(), _stream_of(stream)

    def do() -> None:
        if late != CUresult.CUDA_SUCCESS:
            asked.error = late
        elif here.allowed(device, size) & access != access:
            asked.error = here.dead = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
            gpustate.report(here.directory, here.uuids[0], xid=31)
        elif here.dead == CUresult.CUDA_SUCCESS:
            work()

    with asked.lock:
        asked.waiting.append(do)
        asked.asked += 1
