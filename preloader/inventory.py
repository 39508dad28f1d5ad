"""Which GPUs and MIG instances there are, how much of their memory is used, and whether they are well.

Owns every call of NVML, in a process of its own that the preloader's parent starts as
``python -m preloader.inventory`` and kills when it is silent, for NVML hangs when a GPU falls off the bus.
Holds nothing that is worth keeping and decides nothing; knows neither CUDA nor models.

Standard output brings a line (see ``found``) every ``POLL_S``, or sooner where a device reported something:
all devices, a GPU in MIG mode replaced by its instances; or, without NVML, why there is none, and then the
process ends. What an event or a count of errors said of a GPU stays until it was gone for a while (a reset),
or the preloader starts anew; ``--marked`` hands it on to a successor. The end of standard input is the
parent's end, and this process's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from preloader.found import Found, is_uuid, to_line

POLL_S = 0.25
PATIENCE_S = 5.0
"""How long a device may not answer before it is unfit, unless NVML says that it is lost."""
SCAN_AGAIN_S = 2.0
"""How often NVML is started anew while a device does not answer or is gone: it may be back."""
MAX_EVENTS = 64
KERNELS_LIST = Path("/proc/driver/nvidia/gpus")
"""NVML sees the GPUs that there were when it was started; this list and the devices' nodes tell of others."""

APPLICATION_XIDS = frozenset({13, 31, 43, 45, 68, 109})
"""A program's own fault: it ends, the device is well."""
XID_WORDS = {
    48: "double-bit ECC error",
    62: "internal micro-controller halt",
    63: "row remapping or page retirement recorded",
    64: "row remapping or page retirement failed",
    74: "NVLink error",
    79: "the GPU has fallen off the bus",
    92: "high rate of single-bit ECC errors",
    94: "contained ECC error",
    95: "uncontained ECC error",
    119: "the GPU's system processor does not answer",
    120: "error of the GPU's system processor",
}


class Missing(Exception):
    """There is no NVML here."""


class Lost(Exception):
    """NVML as a whole is not what it was: it has to be started anew."""


class Nvml:
    """NVML from its start to its end, and what was heard of each GPU's health meanwhile."""

    def __init__(self, dev_dir: Path, marks: dict[str, str]) -> None:
        try:
            import pynvml
        except ImportError as error:
            raise Missing(f"nvidia-ml-py is not installed ({error})") from error
        self._n: Any = pynvml
        self._dev_dir = dev_dir
        self._marks = marks
        self._errors_at_first: dict[str, int] = {}
        self._gpus: dict[int, str] = {}
        self._answered: set[str] = set()
        self._ever: set[str] = set()
        self._seen: dict[int, list[Found]] = {}
        self._silent_since: dict[int, float] = {}
        self._events: Any = None
        self._listened: set[str] = set()
        self._started_at = 0.0

    # --- its life -----------------------------------------------------------------------------

    def start(self, now: float) -> None:
        """Raises Missing where there is no library, or no driver behind it."""
        try:
            self._n.nvmlInit()
        except self._n.NVMLError as error:
            raise Missing(f"NVML does not start: {error}") from error
        self._started_at = now
        self._nodes = self._list_nodes()
        self._gpus.clear()
        self._seen.clear()
        self._silent_since.clear()
        self._listened.clear()
        self._events = self._ask("nvmlEventSetCreate")

    def stop(self) -> None:
        if self._events is not None:
            self._ask("nvmlEventSetFree", self._events)
        self._ask("nvmlShutdown")

    def check(self, now: float) -> None:
        """Raises Lost where devices came or went that NVML may not know of yet."""
        waited = now - self._started_at > SCAN_AGAIN_S
        if self._list_nodes() != self._nodes or (waited and self._answered != self._ever):
            raise Lost

    def _list_nodes(self) -> list[str]:
        nodes = [str(path) for path in self._dev_dir.glob("nvidia[0-9]*")]
        with contextlib.suppress(OSError):
            nodes += os.listdir(KERNELS_LIST)
        return sorted(nodes)

    # --- devices ------------------------------------------------------------------------------

    def devices(self, now: float) -> list[Found]:
        """Every device as it is now. Raises Lost."""
        self._answered.clear()
        count = self._count()
        found = [device for index in range(count) for device in self._at(index, now) if is_uuid(device.uuid)]
        self._ever |= self._answered
        present = {uuid for index, uuid in self._gpus.items() if index < count}
        for uuid in (self._marks.keys() | self._errors_at_first.keys()) - present:
            self._marks.pop(uuid, None)  # when it is back, it was reset
            self._errors_at_first.pop(uuid, None)
        return found

    def _count(self) -> int:
        try:
            return int(self._n.nvmlDeviceGetCount())
        except self._n.NVMLError as error:
            raise Lost from error

    def _at(self, index: int, now: float) -> list[Found]:
        """A GPU, or its instances. What does not answer any more is as it was, but unfit."""
        try:
            handle = self._n.nvmlDeviceGetHandleByIndex(index)
            gpu = self._described(handle, index)
            self._listen(gpu.uuid, handle)
            self._gpus[index] = gpu.uuid
            self._seen[index] = list(self._instances(handle, gpu)) if self._is_mig(handle) else [gpu]
        except self._n.NVMLError_Uninitialized as error:
            raise Lost from error
        except self._n.NVMLError as error:
            return self._silent(index, error, now)
        self._silent_since.pop(index, None)
        self._answered.add(gpu.uuid)
        return self._seen[index]

    def _silent(self, index: int, error: Exception, now: float) -> list[Found]:
        since = self._silent_since.setdefault(index, now)
        lost = isinstance(error, (self._n.NVMLError_GpuIsLost, self._n.NVMLError_ResetRequired))
        before = self._seen.get(index, [])
        if not lost and before and now - since < PATIENCE_S:
            self._answered.add(self._gpus[index])
            return before
        return [replace(found, unfit_reason=found.unfit_reason or f"NVML: {error}") for found in before]

    def _described(self, handle: Any, index: int) -> Found:
        uuid = _text(self._n.nvmlDeviceGetUUID(handle))
        memory = self._n.nvmlDeviceGetMemoryInfo(handle)
        reason, marked = self._unfit(uuid, handle)
        return Found(
            uuid=uuid,
            index=index,
            name=_text(self._n.nvmlDeviceGetName(handle)),
            minor=int(self._n.nvmlDeviceGetMinorNumber(handle)),
            total_bytes=int(memory.total),
            used_bytes=int(memory.used),
            free_bytes=int(memory.free),
            unfit_reason=reason,
            marked=marked,
        )

    def _is_mig(self, handle: Any) -> bool:
        mode = self._ask("nvmlDeviceGetMigMode", handle)
        return mode is not None and mode[0] == self._n.NVML_DEVICE_MIG_ENABLE

    def _instances(self, handle: Any, gpu: Found) -> Iterator[Found]:
        for number in range(self._ask("nvmlDeviceGetMaxMigDeviceCount", handle) or 0):
            instance = self._ask("nvmlDeviceGetMigDeviceHandleByIndex", handle, number)
            if instance is None:  # numbers have gaps
                continue
            memory = self._n.nvmlDeviceGetMemoryInfo(instance)
            yield replace(
                gpu,
                uuid=_text(self._n.nvmlDeviceGetUUID(instance)),
                name=_text(self._n.nvmlDeviceGetName(instance)),
                total_bytes=int(memory.total),
                used_bytes=int(memory.used),
                free_bytes=int(memory.free),
                parent_uuid=gpu.uuid,
            )

    # --- health -------------------------------------------------------------------------------

    def _unfit(self, uuid: str, handle: Any) -> tuple[str, bool]:
        """Why nothing may stand there, and whether that is marked."""
        errors = self._ask(
            "nvmlDeviceGetTotalEccErrors",
            handle,
            self._n.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
            self._n.NVML_VOLATILE_ECC,
        )
        if errors is not None:
            more = errors - self._errors_at_first.setdefault(uuid, errors)
            if more > 0:
                self._marks.setdefault(uuid, f"ECC: {more} uncorrectable memory errors")
        if uuid in self._marks:
            return self._marks[uuid], True
        return self._pending(handle), False

    def _pending(self, handle: Any) -> str:
        rows = self._ask("nvmlDeviceGetRemappedRows", handle)
        if rows is not None and rows[3]:
            return "ECC: remapping of memory rows failed"
        if rows is not None and rows[2]:
            return "ECC: rows of its memory wait to be remapped by a reset"
        if self._ask("nvmlDeviceGetRetiredPagesPendingStatus", handle):
            return "ECC: pages of its memory wait to be retired by a reset"
        return ""

    def _listen(self, uuid: str, handle: Any) -> None:
        if self._events is None or uuid in self._listened:
            return
        self._listened.add(uuid)
        wanted = self._n.nvmlEventTypeXidCriticalError | self._n.nvmlEventTypeDoubleBitEccError
        supported = self._ask("nvmlDeviceGetSupportedEventTypes", handle)
        if supported is not None and supported & wanted:
            self._ask("nvmlDeviceRegisterEvents", handle, supported & wanted, self._events)

    def hear(self, timeout_s: float) -> None:
        """Wait for an event, and note what it says of its device, with all that follow at once."""
        timeout_ms = int(timeout_s * 1000)
        for _ in range(MAX_EVENTS if self._events is not None and self._listened else 0):
            event = self._ask("nvmlEventSetWait_v2", self._events, timeout_ms)
            if event is None:
                return
            self._note(event)
            timeout_ms = 0

    def _note(self, event: Any) -> None:
        reason = "ECC: double-bit memory error"
        if event.eventType & self._n.nvmlEventTypeXidCriticalError:
            xid = int(event.eventData)
            if xid in APPLICATION_XIDS:
                return
            reason = f"XID {xid}: {XID_WORDS.get(xid, 'critical error')}"
        uuid = self._ask("nvmlDeviceGetUUID", event.device)
        # Of a GPU that is off the bus not even the name can be had; which of them it is shows the next look.
        if uuid is not None:
            self._marks.setdefault(_text(uuid), reason)

    def _ask(self, name: str, *arguments: Any) -> Any:
        """What NVML answers, or None where it does not: not supported, unknown to it, timed out, lost."""
        try:
            return getattr(self._n, name)(*arguments)
        except (AttributeError, self._n.NVMLError):
            return None


def main() -> None:
    options = _arguments()
    try:
        nvml = Nvml(options.dev_dir, options.marked)
        while True:
            nvml.start(time.monotonic())
            _say_until_lost(nvml)
            nvml.stop()
    except Missing as missing:
        _print(to_line(str(missing)))


def _say_until_lost(nvml: Nvml) -> None:
    while True:
        began = time.monotonic()
        try:
            _print(to_line(nvml.devices(began)))
            nvml.check(began)
        except Lost:
            _pause(POLL_S)
            return
        nvml.hear(POLL_S)
        _pause(max(0.0, began + POLL_S - time.monotonic()))


def _pause(timeout_s: float) -> None:
    """Wait; end with the parent."""
    if select.select([sys.stdin], [], [], timeout_s)[0]:
        sys.exit(0)


def _print(line: str) -> None:
    try:
        print(line, flush=True)
    except BrokenPipeError:  # no parent
        os._exit(0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="preloader.inventory", description=__doc__)
    parser.add_argument("--dev-dir", type=Path, default=Path("/dev"))
    parser.add_argument("--marked", type=json.loads, default={}, help="JSON: a GPU's UUID to its reason")
    return parser.parse_args()


def _text(value: str | bytes) -> str:
    """Older bindings answer with bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


if __name__ == "__main__":
    main()
