"""One GPU's standby within the preloader's parent: its keeper, and the sockets that it is served on.

Owns how a device's figures, filler and services come together. What it imports is large (gRPC), so it is
imported only once there is a GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

from cached.model import Device, Gpu
from preloader.filling import Filler
from preloader.found import Found
from preloader.keeper import Keeper
from preloader.services import serve


class GpuStandby:
    """One GPU or MIG instance, from when it was found until ``end``; ``node`` stays open that long."""

    def __init__(self, found: Found, node: int | None, sockets: Path, data_dir: Path) -> None:
        device = Device(f"cuda:{found.uuid}")
        # -P: no code from whatever directory this was started in.
        command = [sys.executable, "-P", "-m", "preloader.filler", "--device", device]
        filler = Filler(
            (*command, "--data-dir", str(data_dir)),
            {"CUDA_VISIBLE_DEVICES": found.uuid},
        )
        self._keeper = Keeper(device, filler, _gpu(found), found.used_bytes, node)
        self._stop = serve(self._keeper, sockets / f"cuda-{found.uuid}")

    def update(self, found: Found) -> None:
        """What the device is now."""
        self._keeper.update(_gpu(found), found.used_bytes)

    def end(self) -> None:
        """Its sockets go, and what stood there."""
        self._stop()
        self._keeper.close()


def _gpu(found: Found) -> Gpu:
    return Gpu(
        found.index,
        found.name,
        found.total_bytes,
        found.free_bytes,
        unfit_reason=found.unfit_reason,
    )
