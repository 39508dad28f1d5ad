"""Follows the standbys: finds their sockets, connects, tells the planner what they hold and when they go.

Owns the connections, and the duplicates of GPUs' descriptors from one connection to the next. Starts and ends
no process: a standby is another container's.
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import replace
from pathlib import Path

import structlog

from cached.config import StandbySettings
from cached.metrics import Metrics
from cached.model import HOST, ArtifactId, CachedError, Device, Gpu, Inventory
from cached.node.core import Core
from cached.node.effects import Effects
from cached.plan import types as t
from cached.standby import Kept, Standby, device_sockets, drop, is_gpu

LOOK_EVERY_S = 0.5
RECONNECT_S = 0.3
MAX_STANDBYS = 256
KEEP_GONE_S = 3600.0
"""How long the memory of a GPU whose standby is gone is kept for a successor."""

log = structlog.get_logger("cached.node")


class Standbys:
    """One follower for each device whose socket was seen."""

    def __init__(
        self, run_dir: Path, core: Core, effects: Effects, metrics: Metrics, settings: StandbySettings
    ) -> None:
        self._run_dir = run_dir
        self._core = core
        self._effects = effects
        self._metrics = metrics
        self._settings = settings
        self._followed: set[Device] = set()
        self._kept: dict[Device, Kept] = {}
        self._nodes: dict[Device, int] = {}
        self._gone_at: dict[Device, float] = {}
        self._told: dict[Device, Gpu] = {}

    async def run(self) -> None:
        """Look for new sockets, and for what is kept for nobody any more; for ever."""
        while True:
            for device, path in device_sockets(self._run_dir).items():
                if device not in self._followed and len(self._followed) < MAX_STANDBYS:
                    self._followed.add(device)
                    self._core.spawn(self._follow(device, path), f"standby {device}")
            for device in self._gone_at:
                self._let_go(device)
            await asyncio.sleep(LOOK_EVERY_S)

    def _let_go(self, device: Device) -> None:
        """Close what was kept of a standby that is gone, where it is gone for good or nothing proves it."""
        too_long = time.monotonic() > self._gone_at.get(device, time.monotonic()) + KEEP_GONE_S
        kept = self._kept[device]
        for artifact in list(kept):
            if too_long or not self._core.state.is_verified(artifact):
                drop(kept, artifact)
                why = f"gone for {KEEP_GONE_S:.0f} s" if too_long else "not proven on disk any more"
                log.warning("memory is kept no longer", device=device, artifact=artifact, why=why)
        if not kept:
            self._close_node(device)

    def _close_node(self, device: Device) -> None:
        node = self._nodes.pop(device, None)
        if node is not None:
            os.close(node)

    async def _follow(self, device: Device, path: Path) -> None:
        """Until its socket is gone and nothing is kept for it: instances of MIG come and go for ever."""
        while device in device_sockets(self._run_dir) or self._kept.get(device):
            await self._session(device, path)
            await asyncio.sleep(RECONNECT_S)
        self._followed.discard(device)

    async def _session(self, device: Device, path: Path) -> None:
        """One connection, from its first inventory to its end."""
        standby = Standby(device, path, kept=self._kept.setdefault(device, {}))
        connected = False
        try:
            async for inventory in standby.watch():
                if not connected:
                    # Only the first one tells news about residents: later ones may be older than what
                    # our own loads and releases have told us meanwhile.
                    inventory = await self._give_back(standby, inventory)
                    connected = True
                    self._connected(standby, inventory)
                elif inventory.gpu is not None:
                    await self._heed(standby, inventory, inventory.gpu)
        except CachedError:
            pass
        finally:
            if connected:
                await self._gone(device)
            await standby.close()

    async def _give_back(self, standby: Standby, inventory: Inventory) -> Inventory:
        """What a GPU's standby that has begun anew lacks of what was kept is its own again."""
        if not is_gpu(standby.device):
            return inventory
        self._let_go(standby.device)
        held = {resident.artifact for resident in inventory.residents}
        adopted = []
        for artifact in [artifact for artifact in standby.kept if artifact not in held]:
            if artifact not in standby.kept:  # let go meanwhile
                continue
            try:
                adopted.append(await standby.adopt(artifact))
            except CachedError as error:
                if error.problem.reason == "STANDBY_GONE":
                    raise
                self._tell(standby.device, artifact, error)
                standby.forget(artifact)
        if adopted:
            log.info("memory was given back", device=standby.device, residents=len(adopted))
        return replace(inventory, residents=(*inventory.residents, *adopted))

    def _connected(self, standby: Standby, inventory: Inventory) -> None:
        device = inventory.device
        log.info("standby connected", device=device, pid=inventory.pid, residents=len(inventory.residents))
        self._effects.standbys[device] = standby
        self._metrics.set_standby(device, True)
        self._gone_at.pop(device, None)
        self._core.post(t.StandbySeen(inventory, self._capacity_bytes(inventory)))
        if inventory.gpu is not None:
            self._told[device] = inventory.gpu
            self._core.spawn(self._keep(standby, inventory), f"keep {device}")

    async def _keep(self, standby: Standby, inventory: Inventory) -> None:
        """Have duplicates of all that stands on a GPU, and its node open: then it outlives the standby."""
        try:
            node = await standby.node()
        except CachedError:  # it is gone
            return
        self._close_node(standby.device)
        if node is not None:
            self._nodes[standby.device] = node
        for resident in inventory.residents:
            try:
                await standby.descriptors(resident.artifact)
            except CachedError as error:
                if error.problem.reason == "STANDBY_GONE":
                    return
                if error.problem.reason != "WITHDRAWN":
                    self._tell(standby.device, resident.artifact, error)

    async def _heed(self, standby: Standby, inventory: Inventory, gpu: Gpu) -> None:
        """A GPU's figures have changed, or it has given up residents by itself."""
        device = standby.device
        if gpu != self._told[device]:
            self._told[device] = gpu
            self._core.post(t.GpuTold(device, gpu))
        held = {resident.artifact for resident in inventory.residents}
        lost = set()
        for artifact in self._standing(device) - held:
            # An unfit one holds nothing any more, and does not answer for what it held.
            if gpu.unfit_reason or not await standby.holds(artifact):
                standby.forget(artifact)
                lost.add(artifact)
        if lost:
            log.warning("residents were given up", device=device, residents=len(lost), why=gpu.unfit_reason)
            self._withdraw(inventory, lost)

    def _withdraw(self, inventory: Inventory, lost: set[ArtifactId]) -> None:
        # What is waiting to be worked in may have changed what stands: it comes first.
        self._core.turn(time.time())
        standing = self._standing(inventory.device) - lost
        known = {resident.artifact: resident for resident in inventory.residents}
        kept = self._kept[inventory.device]
        known |= {artifact: kept[artifact].resident for artifact in standing if artifact in kept}
        residents = tuple(known[artifact] for artifact in standing if artifact in known)
        seen = replace(inventory, residents=residents)
        self._core.post(t.StandbySeen(seen, self._capacity_bytes(inventory)))
        self._core.turn(time.time())

    def _standing(self, device: Device) -> set[ArtifactId]:
        """What the planner takes for resident there."""
        steps = self._core.state.residencies.items()
        return {spot[1] for spot, r in steps if spot[0] == device and r.step is t.ResidentStep.RESIDENT}

    def _tell(self, device: Device, artifact: ArtifactId, error: CachedError) -> None:
        problem = error.problem
        self._metrics.problem(problem.reason)
        log.warning(
            problem.message, reason=problem.reason, hint=problem.hint, device=device, artifact=artifact
        )

    def _capacity_bytes(self, inventory: Inventory) -> int:
        settings = self._settings
        if inventory.gpu is not None:
            most_bytes = max(0, inventory.gpu.total_bytes - settings.gpu_reserve_bytes)
            return min(most_bytes, settings.gpu_capacity_bytes or most_bytes)
        if inventory.device == HOST and settings.host_capacity_bytes is not None:
            return min(settings.host_capacity_bytes, inventory.limit_bytes)
        return inventory.limit_bytes // 2 if inventory.device == HOST else inventory.limit_bytes

    async def _gone(self, device: Device) -> None:
        log.warning("standby gone", device=device)
        self._effects.standbys.pop(device)
        await self._effects.stop_loads(device)
        if is_gpu(device):
            self._gone_at[device] = time.monotonic()
        self._metrics.set_standby(device, False)
        self._core.post(t.StandbyGone(device))
