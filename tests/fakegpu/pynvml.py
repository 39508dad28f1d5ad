"""FAKE, for tests: the part of ``pynvml`` (nvidia-ml-py) that tells of devices, memory and health.

Owns what NVML keeps in a process: which GPUs there were at nvmlInit (others appear with the next one, those
that vanish are lost) and event sets. What processes share is in gpustate. Without FAKE_GPU_DIR it is as on a
machine without a driver. Names, arguments, results and errors are the real ones'. Unlike the real one it does
not keep the devices' nodes open, so that nothing relies on it.
"""

from __future__ import annotations

import functools
import json
import string
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpustate

NVML_SUCCESS = 0
NVML_ERROR_UNINITIALIZED = 1
NVML_ERROR_INVALID_ARGUMENT = 2
NVML_ERROR_NOT_SUPPORTED = 3
NVML_ERROR_NO_PERMISSION = 4
NVML_ERROR_NOT_FOUND = 6
NVML_ERROR_DRIVER_NOT_LOADED = 9
NVML_ERROR_TIMEOUT = 10
NVML_ERROR_LIBRARY_NOT_FOUND = 12
NVML_ERROR_FUNCTION_NOT_FOUND = 13
NVML_ERROR_GPU_IS_LOST = 15
NVML_ERROR_RESET_REQUIRED = 16
NVML_ERROR_UNKNOWN = 999

NVML_FEATURE_DISABLED, NVML_FEATURE_ENABLED = 0, 1
NVML_DEVICE_MIG_DISABLE, NVML_DEVICE_MIG_ENABLE = 0, 1
NVML_MEMORY_ERROR_TYPE_CORRECTED, NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 0, 1
NVML_VOLATILE_ECC, NVML_AGGREGATE_ECC = 0, 1
NVML_MEMORY_LOCATION_DEVICE_MEMORY, NVML_MEMORY_LOCATION_DRAM, NVML_MEMORY_LOCATION_SRAM = 2, 2, 7
nvmlEventTypeDoubleBitEccError = 2
nvmlEventTypeXidCriticalError = 8
nvmlEventMigConfigChange = 256
nvmlMemory_v2 = 0x02000028

_EVENTS = nvmlEventTypeDoubleBitEccError | nvmlEventTypeXidCriticalError
_POLL_S = 0.01


class NVMLError(Exception):
    """``value`` is the code; each code has a class of its own, NVMLError_<Name>."""

    value: int

    def __new__(cls, value: int = NVML_ERROR_UNKNOWN) -> NVMLError:
        made = super().__new__(_classes.get(value, cls) if cls is NVMLError else cls, value)
        made.value = value
        return made

    def __str__(self) -> str:
        return next((name for name, value in _codes() if value == self.value), f"code {self.value}")


def _codes() -> list[tuple[str, int]]:
    return [(name, value) for name, value in globals().items() if name.startswith("NVML_ERROR_")]


def _class(name: str, value: int) -> type[NVMLError]:
    def new(cls: type[NVMLError], *_: object) -> NVMLError:
        return NVMLError.__new__(cls, value)

    name = "NVMLError_" + string.capwords(name.removeprefix("NVML_ERROR_"), "_").replace("_", "")
    return type(name, (NVMLError,), {"__new__": new, "__module__": __name__})


_classes: dict[int, type[NVMLError]] = {value: _class(name, value) for name, value in _codes()}
for _made in _classes.values():
    setattr(sys.modules[__name__], _made.__name__, _made)


@dataclass(frozen=True)
class _Device:
    uuid: str


@dataclass
class _Memory:
    total: int
    free: int
    used: int
    reserved: int = 0
    version: int = 0


@dataclass
class _ProcessInfo:
    pid: int
    usedGpuMemory: int | None
    gpuInstanceId: int = 0xFFFFFFFF
    computeInstanceId: int = 0xFFFFFFFF


@dataclass
class c_nvmlEventData_t:
    device: _Device
    eventType: int
    eventData: int
    gpuInstanceId: int = 0xFFFFFFFF
    computeInstanceId: int = 0xFFFFFFFF


@dataclass
class _EventSet:
    """``seen``: how many of the reported events each registered device's watcher has passed."""

    seen: dict[str, int] = field(default_factory=dict)


@dataclass
class _Process:
    times: int = 0
    uuids: list[str] = field(default_factory=list)


_process = _Process()


def _call(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a call fail where the test says so, where NVML is not initialised, and where a device is gone."""

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        fault = gpustate.fault(_directory(), function.__name__)
        if fault:
            raise NVMLError(globals()[fault["error"]])
        if not _process.times and function.__name__ != "nvmlInit":
            raise NVMLError(NVML_ERROR_UNINITIALIZED)
        try:
            return function(*arguments)
        except gpustate.Gone:
            raise NVMLError(NVML_ERROR_GPU_IS_LOST) from None

    return call


def _directory() -> Path:
    directory = gpustate.root()
    if directory is None:
        raise NVMLError(NVML_ERROR_LIBRARY_NOT_FOUND)
    return directory


def _refuse_unless(right: object, code: int) -> None:
    if not right:
        raise NVMLError(code)


def _facts(device: _Device, *, whole: bool = False) -> dict[str, Any]:
    """A device's part of gpus.json. ``whole``: the call is not for instances."""
    facts = gpustate.device(_directory(), device.uuid)
    _refuse_unless(not (whole and "parent" in facts), NVML_ERROR_NOT_SUPPORTED)
    return facts


# --- the machine --------------------------------------------------------------------------------------


@_call
def nvmlInit() -> None:
    if not _process.times:
        gpus = sorted(gpustate.gpus(_directory()), key=lambda gpu: int(gpu["index"]))
        _process.uuids = [gpu["uuid"] for gpu in gpus]
    _process.times += 1


@_call
def nvmlShutdown() -> None:
    _process.times -= 1


@_call
def nvmlSystemGetDriverVersion() -> str:
    return "580.00.00"


@_call
def nvmlDeviceGetCount() -> int:
    return len(_process.uuids)


@_call
def nvmlDeviceGetHandleByIndex(index: int) -> _Device:
    _refuse_unless(0 <= index < len(_process.uuids), NVML_ERROR_INVALID_ARGUMENT)
    device = _Device(_process.uuids[index])
    _facts(device)
    return device


@_call
def nvmlDeviceGetHandleByUUID(uuid: str | bytes) -> _Device:
    device = _Device(uuid if isinstance(uuid, str) else uuid.decode())
    if device.uuid not in _process.uuids:
        known = gpustate.devices(_directory()).get(device.uuid, {})
        _refuse_unless(known.get("parent") in _process.uuids, NVML_ERROR_NOT_FOUND)
    _facts(device)
    return device


# --- one device ---------------------------------------------------------------------------------------


@_call
def nvmlDeviceGetUUID(device: _Device) -> str:
    return str(_facts(device)["uuid"])


@_call
def nvmlDeviceGetName(device: _Device) -> str:
    return str(_facts(device)["name"])


@_call
def nvmlDeviceGetIndex(device: _Device) -> int:
    """An instance's number is that on its GPU."""
    return int(_facts(device)["index"])


@_call
def nvmlDeviceGetMinorNumber(device: _Device) -> int:
    return int(_facts(device, whole=True)["minor"])


@_call
def nvmlDeviceGetPersistenceMode(device: _Device) -> int:
    return int(_facts(device, whole=True).get("persistence", NVML_FEATURE_DISABLED))


@_call
def nvmlDeviceGetMemoryInfo(device: _Device, version: int | None = None) -> _Memory:
    facts = _facts(device)
    with gpustate.locked(_directory()):
        used = gpustate.used_bytes(_directory(), facts)
    total, reserved = int(facts["total_bytes"]), int(facts.get("reserved_bytes", 0))
    free = max(0, total - reserved - used)
    if version is None:  # the first version counts as used what the driver has reserved
        return _Memory(total, free, used + reserved)
    _refuse_unless(version == nvmlMemory_v2, NVML_ERROR_INVALID_ARGUMENT)
    return _Memory(total, free, used, reserved, version)


@_call
def nvmlDeviceGetComputeRunningProcesses(device: _Device) -> list[_ProcessInfo]:
    """Those that have a context, and those that the test says."""
    facts = _facts(device)
    with gpustate.locked(_directory()):
        held = gpustate.held(_directory(), device.uuid)
    used: dict[int, int] = {}
    for name, size_bytes in held:
        pid = int(name.split("-")[1])
        used[pid] = used.get(pid, 0) + size_bytes
    running = {int(name.split("-")[1]) for name, _ in held if name.startswith("context-")}
    said = [_ProcessInfo(pid, size_bytes) for pid, size_bytes in facts.get("processes", ())]
    return [_ProcessInfo(pid, used[pid]) for pid in sorted(running)] + said


# --- instances ----------------------------------------------------------------------------------------


@_call
def nvmlDeviceGetMigMode(device: _Device) -> list[int]:
    mode = int(bool(_facts(device, whole=True).get("mig")))
    return [mode, mode]


@_call
def nvmlDeviceGetMaxMigDeviceCount(device: _Device) -> int:
    return 7 if _facts(device, whole=True).get("mig") else 0


@_call
def nvmlDeviceGetMigDeviceHandleByIndex(device: _Device, index: int) -> _Device:
    for instance in _facts(device, whole=True).get("mig", ()):
        if instance["index"] == index:
            return _Device(instance["uuid"])
    raise NVMLError(NVML_ERROR_NOT_FOUND)


@_call
def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(device: _Device) -> _Device:
    parent = _facts(device).get("parent")
    _refuse_unless(parent, NVML_ERROR_INVALID_ARGUMENT)
    return _Device(str(parent))


@_call
def nvmlDeviceGetGpuInstanceId(device: _Device) -> int:
    _refuse_unless("gi" in _facts(device), NVML_ERROR_NOT_SUPPORTED)
    return int(_facts(device)["gi"])


@_call
def nvmlDeviceIsMigDeviceHandle(device: _Device) -> int:
    return int("parent" in _facts(device))


# --- health -------------------------------------------------------------------------------------------


@_call
def nvmlDeviceGetEccMode(device: _Device) -> list[int]:
    mode = int(_ecc(device, NVML_MEMORY_ERROR_TYPE_UNCORRECTED) is not None)
    return [mode, mode]


@_call
def nvmlDeviceGetTotalEccErrors(device: _Device, error_type: int, counter_type: int) -> int:
    count = _ecc(device, error_type)
    _refuse_unless(count is not None, NVML_ERROR_NOT_SUPPORTED)
    return int(count or 0)


@_call
def nvmlDeviceGetMemoryErrorCounter(
    device: _Device, error_type: int, counter_type: int, location: int
) -> int:
    """Every error is in the device's memory."""
    count = _ecc(device, error_type)
    _refuse_unless(count is not None, NVML_ERROR_NOT_SUPPORTED)
    return int(count or 0) if location == NVML_MEMORY_LOCATION_DEVICE_MEMORY else 0


@_call
def nvmlDeviceGetRemappedRows(device: _Device) -> tuple[int, int, int, int]:
    """(corrected, uncorrected, pending, failed)"""
    corrected, uncorrected, pending, failed = _facts(device, whole=True)["health"].get(
        "remapped", [0, 0, 0, 0]
    )
    return (corrected, uncorrected, pending, failed)


def _ecc(device: _Device, error_type: int) -> int | None:
    health = _facts(device, whole=True).get("health", {})
    uncorrected = error_type == NVML_MEMORY_ERROR_TYPE_UNCORRECTED
    count: int | None = health.get("ecc_uncorrected" if uncorrected else "ecc_corrected", 0)
    return count


# --- events -------------------------------------------------------------------------------------------


@_call
def nvmlDeviceGetSupportedEventTypes(device: _Device) -> int:
    _facts(device, whole=True)
    return _EVENTS


@_call
def nvmlEventSetCreate() -> _EventSet:
    return _EventSet()


@_call
def nvmlDeviceRegisterEvents(device: _Device, types: int, events: _EventSet) -> None:
    """From now on. An instance's events come from its GPU."""
    _facts(device, whole=True)
    _refuse_unless(types & _EVENTS, NVML_ERROR_NOT_SUPPORTED)
    events.seen[device.uuid] = len(_reported())


@_call
def nvmlEventSetWait_v2(events: _EventSet, timeout_ms: int) -> c_nvmlEventData_t:
    until = time.monotonic() + timeout_ms / 1000
    while True:
        for number, report in enumerate(_reported()):
            if number >= events.seen.get(report["uuid"], sys.maxsize):
                events.seen[report["uuid"]] = number + 1
                return _event(report)
        _refuse_unless(time.monotonic() < until, NVML_ERROR_TIMEOUT)
        time.sleep(_POLL_S)


nvmlEventSetWait = nvmlEventSetWait_v2


@_call
def nvmlEventSetFree(events: _EventSet) -> None:
    events.seen.clear()


def _reported() -> list[dict[str, Any]]:
    text = (_directory() / "xids").read_text()
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _event(report: dict[str, Any]) -> c_nvmlEventData_t:
    event = c_nvmlEventData_t(_Device(report["uuid"]), nvmlEventTypeXidCriticalError, report["xid"])
    if report["gi"] is not None:
        event.gpuInstanceId, event.computeInstanceId = report["gi"], 0
    return event
