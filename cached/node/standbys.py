"""Follows the standbys: finds their sockets, connects, tells the planner what they hold and when they go.

Owns the connections. Starts and ends no process: a standby is another container's.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import structlog

from cached.metrics import Metrics
from cached.model import HOST, CachedError, Device, Inventory
from cached.node.core import Core
from cached.node.effects import Effects
from cached.plan import types as t
from cached.standby import Standby, device_sockets

LOOK_EVERY_S = 0.5
RECONNECT_S = 0.3
MAX_STANDBYS = 256

log = structlog.get_logger("cached.node")


class Standbys:
    """One follower for each device whose socket was seen."""

    def __init__(
        self, run_dir: Path, core: Core, effects: Effects, metrics: Metrics, host_capacity_bytes: int | None
    ) -> None:
        self._run_dir = run_dir
        self._core = core
        self._effects = effects
        self._metrics = metrics
        self._host_capacity_bytes = host_capacity_bytes
        self._followed: set[Device] = set()

    async def run(self) -> None:
        """Look for new sockets, for ever."""
        while True:
            for device, path in device_sockets(self._run_dir).items():
                if device not in self._followed and len(self._followed) < MAX_STANDBYS:
                    self._followed.add(device)
                    self._core.spawn(self._follow(device, path), f"standby {device}")
            await asyncio.sleep(LOOK_EVERY_S)

    async def _follow(self, device: Device, path: Path) -> None:
        while True:
            await self._session(device, path)
            await asyncio.sleep(RECONNECT_S)

    async def _session(self, device: Device, path: Path) -> None:
        """One connection, from its first inventory to its end."""
        standby = Standby(device, path)
        connected = False
        try:
            async for inventory in standby.watch():
                if not connected:
                    # Only the first one tells news about residents: later ones may be older than what
                    # our own loads and releases have told us meanwhile.
                    connected = True
                    self._connected(standby, inventory)
        except CachedError:
            pass
        finally:
            if connected:
                await self._gone(device)
            await standby.close()

    def _connected(self, standby: Standby, inventory: Inventory) -> None:
        device = inventory.device
        log.info("standby connected", device=device, pid=inventory.pid, residents=len(inventory.residents))
        self._effects.standbys[device] = standby
        self._metrics.set_standby(device, True)
        self._core.post(t.StandbySeen(inventory, self._capacity_bytes(inventory)))

    def _capacity_bytes(self, inventory: Inventory) -> int:
        if inventory.device == HOST and self._host_capacity_bytes is not None:
            return min(self._host_capacity_bytes, inventory.limit_bytes)
        return inventory.limit_bytes // 2 if inventory.device == HOST else inventory.limit_bytes

    async def _gone(self, device: Device) -> None:
        log.warning("standby gone", device=device)
        standby = self._effects.standbys.pop(device)
        await self._effects.stop_loads(device)
        standby.forget_all()
        self._metrics.set_standby(device, False)
        self._core.post(t.StandbyGone(device))
