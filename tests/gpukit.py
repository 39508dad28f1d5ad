"""A machine with fake GPUs, for tests: makes it, and changes it while processes run on it.

Owns nothing of what the fakes do: they are in tests/fakegpu. A process has these GPUs when it is started with
``Gpus.env()``; the processes' own code knows nothing of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import uuid as uuids
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gpustate

FAKES = Path(__file__).parent / "fakegpu"
KIB = 1024
MIB = 1024 * KIB


class Gpus:
    """The fake GPUs below one directory. ``dev`` is what the machine's /dev is."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.dev = directory / "dev"
        for each in (directory, self.dev, directory / "memory", directory / "fail"):
            each.mkdir(exist_ok=True)
            each.chmod(0o777)
        for each in (directory / "lock", directory / "xids"):
            each.touch()
            each.chmod(0o666)
        self._write([])

    def env(self, base: Mapping[str, str] | None = None) -> dict[str, str]:
        """What a process needs in its environment to have these GPUs, and none else."""
        env = dict(os.environ if base is None else base)
        path = [str(FAKES), *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
        env.update(PYTHONPATH=os.pathsep.join(dict.fromkeys(path)), FAKE_GPU_DIR=str(self.directory))
        return env

    # --- devices come, change and go --------------------------------------------------------------

    def add(self, total_bytes: int = 64 * MIB, **changes: Any) -> str:
        """A GPU appears; returns its UUID ("GPU-…"). ``changes`` are fields of gpus.json.

        index, minor, name; granularity and context_bytes (what a primary context takes); reserved_bytes;
        attributes ({"ECC_ENABLED": 0}); processes ([[pid, bytes]], beside those that really run); health:
        ecc_uncorrected, ecc_corrected (None: it has no ECC), remapped ([corrected, uncorrected, pending,
        failed]); late_copies (default true: a copy from pinned memory is done only when it is waited for).
        """
        gpus = self._read()
        used = {gpu["minor"] for gpu in gpus}
        minor = next(number for number in range(len(used) + 1) if number not in used)
        gpu = {
            "uuid": f"GPU-{uuids.uuid4()}",
            "index": len(gpus),
            "minor": minor,
            "name": "Fake H200",
            "total_bytes": total_bytes,
            "granularity": 64 * KIB,
            "context_bytes": MIB,
            "mig": [],
            "health": {},
            **changes,
        }
        self._make(gpu)
        self._write([*gpus, gpu])
        return str(gpu["uuid"])

    def add_instance(self, gpu: str, total_bytes: int = 16 * MIB, **changes: Any) -> str:
        """A MIG instance appears on a GPU; returns its UUID ("MIG-…")."""
        gpus = self._read()
        parent = _of(gpus, gpu)
        number = len(parent["mig"])
        instance = {
            "uuid": f"MIG-{uuids.uuid4()}",
            "index": number,
            "name": f"{parent['name']} MIG 1g",
            "total_bytes": total_bytes,
            "gi": number + 1,
            "ci": 0,
            **changes,
        }
        self._make({**instance, "minor": parent["minor"]})
        parent["mig"].append(instance)
        self._write(gpus)
        return str(instance["uuid"])

    def change(self, uuid: str, **changes: Any) -> None:
        """Change fields of a GPU or an instance."""
        gpus = self._read()
        _of(gpus, uuid).update(changes)
        self._write(gpus)

    def ecc(self, uuid: str, uncorrected: int = 1) -> None:
        """A GPU finds errors that it cannot correct."""
        self.change(uuid, health={"ecc_uncorrected": uncorrected})

    def xid(self, uuid: str, xid: int, instance: int | None = None) -> None:
        """A GPU reports a critical error; of one of its instances, where its "gi" is given."""
        gpustate.report(self.directory, uuid, xid, instance)

    def vanish(self, uuid: str) -> dict[str, Any]:
        """A GPU falls off the bus, or an instance is destroyed. Returns what ``come_back`` wants."""
        gpus = self._read()
        gone = _of(gpus, uuid)
        for gpu in gpus:
            gpu["mig"] = [instance for instance in gpu["mig"] if instance["uuid"] != uuid]
        self._write([gpu for gpu in gpus if gpu["uuid"] != uuid])
        return gone

    def come_back(self, gone: dict[str, Any]) -> None:
        """A GPU that vanished is there again."""
        self._make(gone)
        self._write([*self._read(), gone])

    # --- memory -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def others(self, uuid: str, size_bytes: int) -> Iterator[None]:
        """Somebody else holds memory of a device, with its node open as he must."""
        gpu = gpustate.device(self.directory, uuid)
        node = os.open(gpustate.node(self.directory, gpu), os.O_RDONLY | os.O_CLOEXEC)
        fd = gpustate.take(self.directory, uuid, size_bytes, kind="others")
        try:
            assert fd is not None, "the device has not so much memory left"
            yield
        finally:
            os.close(node)
            if fd is not None:
                os.close(fd)

    def used_bytes(self, uuid: str) -> int:
        """What is taken of a device, contexts included."""
        with gpustate.locked(self.directory):
            return gpustate.used_bytes(self.directory, gpustate.device(self.directory, uuid))

    def lose_memory(self, uuid: str) -> None:
        """All of a device's memory is lost, as when nobody had its node open for a moment."""
        with gpustate.locked(self.directory):
            for path in (self.directory / "memory" / uuid).iterdir():
                path.unlink()

    # --- what fails -------------------------------------------------------------------------------

    def fail(
        self,
        call: str,
        error: str = "",
        *,
        after: int = 0,
        times: int | None = None,
        late: bool = False,
        sleep_s: float = 0,
        kill: bool = False,
    ) -> None:
        """Let a call ("cuMemCreate", "nvmlDeviceGetMemoryInfo") fail with ``error``, in all processes.

        ``error`` is the driver's or NVML's name, or empty. Only ``after`` good calls, only so many ``times``.
        ``late``: a copy does nothing, and the stream fails when it is waited for. ``sleep_s``: the call takes
        so long first. ``kill``: the process that calls is killed.
        """
        fault = {
            "error": error,
            "after": after,
            "times": times,
            "late": late,
            "sleep_s": sleep_s,
            "kill": kill,
        }
        with gpustate.locked(self.directory):
            (self.directory / "fail" / call).write_text(json.dumps(fault))
            (self.directory / "fail" / call).chmod(0o666)

    def heal(self, call: str) -> None:
        """The call does what it should again."""
        with gpustate.locked(self.directory):
            (self.directory / "fail" / call).unlink(missing_ok=True)

    # --- files ------------------------------------------------------------------------------------

    def _make(self, device: dict[str, Any]) -> None:
        gpustate.node(self.directory, device).touch()
        gpustate.node(self.directory, device).chmod(0o666)
        memory = self.directory / "memory" / device["uuid"]
        memory.mkdir(exist_ok=True)
        memory.chmod(0o777)

    def _read(self) -> list[dict[str, Any]]:
        gpus: list[dict[str, Any]] = json.loads((self.directory / "gpus.json").read_bytes())
        return gpus

    def _write(self, gpus: list[dict[str, Any]]) -> None:
        fresh = self.directory / "gpus.json.new"
        fresh.write_text(json.dumps(gpus))
        fresh.chmod(0o644)
        fresh.rename(self.directory / "gpus.json")  # nobody may read half of it


@contextlib.contextmanager
def machine() -> Iterator[Gpus]:
    """A machine without any GPU yet, in memory, gone at the end."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="fakegpu-") as directory:
        yield Gpus(Path(directory))


def _of(gpus: list[dict[str, Any]], uuid: str) -> dict[str, Any]:
    return next(each for gpu in gpus for each in (gpu, *gpu["mig"]) if each["uuid"] == uuid)
