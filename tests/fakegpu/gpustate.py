"""FAKE, for tests: the GPUs of one machine, as files below FAKE_GPU_DIR, which all its processes share.

Owns what the fake driver and the fake NVML both see. Knows neither of their interfaces.

    gpus.json           the devices, see tests/gpukit.py
    dev/nvidia<minor>   what /dev/nvidia<minor> is
    memory/<uuid>/      memory that exists: a file each, as large as the memory, its holder's pid in its name
    fail/<call>         how that call of the driver or of NVML fails (``fault``)
    xids                JSON lines: what the devices reported

Memory is held while any descriptor or mapping of its file lives in any process: each of them shares the open
file, and a lock upon it which the kernel ends with the last of them. A file that can be locked anew has no
holder and is removed. As with the real driver all memory is lost when nobody has the device's node open any
more: its file is unlinked then, though descriptors of it still look valid.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GRANULARITY_BYTES = 2 * 1024 * 1024
_numbers = itertools.count()


class Gone(Exception):
    """The device is not there any more."""


def root() -> Path | None:
    """None: this machine has no driver."""
    directory = os.environ.get("FAKE_GPU_DIR")
    return Path(directory) if directory else None


def must_root() -> Path:
    directory = root()
    assert directory is not None
    return directory


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Alone among all processes and threads."""
    fd = os.open(directory / "lock", os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


# --- devices ------------------------------------------------------------------------------------------


def gpus(directory: Path) -> list[dict[str, Any]]:
    """Every GPU there is now, each with its instances in "mig"."""
    found: list[dict[str, Any]] = json.loads((directory / "gpus.json").read_bytes())
    for gpu in found:
        for instance in gpu.get("mig", ()):
            instance.update(parent=gpu["uuid"], minor=gpu["minor"])
            instance.setdefault("granularity", gpu.get("granularity", GRANULARITY_BYTES))
            instance.setdefault("context_bytes", gpu.get("context_bytes", 0))
    return found


def devices(directory: Path) -> dict[str, dict[str, Any]]:
    """Every GPU and every instance there is now, by UUID."""
    found = {}
    for gpu in gpus(directory):
        found[gpu["uuid"]] = gpu
        found.update({instance["uuid"]: instance for instance in gpu.get("mig", ())})
    return found


def device(directory: Path, uuid: str) -> dict[str, Any]:
    """Raises Gone."""
    found = devices(directory).get(uuid)
    if found is None:
        raise Gone(uuid)
    return found


def node(directory: Path, gpu: dict[str, Any]) -> Path:
    return directory / "dev" / f"nvidia{gpu['minor']}"


def nobody_has_open(path: Path) -> bool:
    """True when no process has the file open; False also where this process may not know.

    The kernel gives a write lease on a file only to who alone has it open. Who opens the file meanwhile
    waits until it is closed here, and a signal is sent, for which one is chosen that does nothing.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


# --- memory -------------------------------------------------------------------------------------------


def take(directory: Path, uuid: str, size_bytes: int, kind: str = "mem") -> int | None:
    """A descriptor of new memory, held from now on. None: there is not so much left. Raises Gone."""
    gpu = device(directory, uuid)
    with locked(directory):
        if size_bytes > free_bytes(directory, gpu):
            return None
        path = _place(directory, uuid) / f"{kind}-{os.getpid()}-{next(_numbers)}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        fcntl.flock(fd, fcntl.LOCK_SH)
        os.fchmod(fd, 0o666)  # whoever is sent a descriptor may have another uid
        os.ftruncate(fd, size_bytes)
        return fd


def held(directory: Path, uuid: str) -> list[tuple[str, int]]:
    """Name and size of all memory that somebody holds. The lock is held."""
    gpu = device(directory, uuid)
    place = _place(directory, uuid)
    paths = [f"{place}/{name}" for name in sorted(os.listdir(place))]
    lost = bool(paths) and nobody_has_open(node(directory, gpu))
    found = []
    for path in paths:
        size_bytes = 0 if lost else _size_if_held(path)
        if size_bytes:
            found.append((os.path.basename(path), size_bytes))
        else:
            os.unlink(path)
    return found


def used_bytes(directory: Path, gpu: dict[str, Any]) -> int:
    """What is taken of a device and of its instances. The lock is held."""
    uuids = [gpu["uuid"], *(instance["uuid"] for instance in gpu.get("mig", ()))]
    return sum(size_bytes for uuid in uuids for _, size_bytes in held(directory, uuid))


def free_bytes(directory: Path, gpu: dict[str, Any]) -> int:
    """The lock is held."""
    reserved_bytes: int = gpu.get("reserved_bytes", 0)
    return max(0, int(gpu["total_bytes"]) - reserved_bytes - used_bytes(directory, gpu))


def exists(fd: int) -> bool:
    """Whether the memory behind a descriptor is still there."""
    return os.fstat(fd).st_nlink > 0


def _place(directory: Path, uuid: str) -> Path:
    return directory / "memory" / uuid


def _size_if_held(path: str) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return 0
    except BlockingIOError:
        return os.fstat(fd).st_size
    finally:
        os.close(fd)


# --- what devices report, and what fails ---------------------------------------------------------------


def report(directory: Path, uuid: str, xid: int, instance: int | None = None) -> None:
    """A GPU's critical error; of one of its instances, where its "gi" is given. They are its GPU's."""
    gpu = device(directory, uuid)
    line = {"uuid": gpu.get("parent", uuid), "xid": xid, "gi": gpu.get("gi", instance)}
    with (directory / "xids").open("a") as xids:
        xids.write(json.dumps(line) + "\n")


def fault(directory: Path, call: str) -> dict[str, Any]:
    """How this call fails now: {"error": …, "late": bool}; empty: it does not. See gpukit.Gpus.fail.

    Waits here, and dies here, where the fault says so.
    """
    path = directory / "fail" / call
    if not path.exists():
        return {}
    with locked(directory):
        try:
            found: dict[str, Any] = json.loads(path.read_bytes())
        except FileNotFoundError:
            return {}
        if found["after"]:
            path.write_text(json.dumps({**found, "after": found["after"] - 1}))
            return {}
        if found["times"] == 1:
            path.unlink()
        elif found["times"] is not None:
            path.write_text(json.dumps({**found, "times": found["times"] - 1}))
    time.sleep(found["sleep_s"])
    if found["kill"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return found if found["error"] else {}
