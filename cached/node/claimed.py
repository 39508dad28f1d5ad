"""Which GPUs the orchestrator has given to somebody: asked again and again, told to the planner on a change.

Owns the loop that asks kubelet. Decides nothing: what stands on such a GPU is the planner's to say.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import structlog

from cached.metrics import Metrics
from cached.model import CachedError, Device
from cached.node.core import Core
from cached.plan import types as t
from cached.podresources import PodResources

USUAL_SOCKET = "/var/lib/kubelet/pod-resources/kubelet.sock"
ASK_EVERY_S = 1.0

log = structlog.get_logger("cached.node")


class ClaimedGpus:
    """Follows kubelet at ``path``; None is the usual place, where it is no news that nobody is there."""

    def __init__(self, path: str | None, core: Core, metrics: Metrics, every_s: float = ASK_EVERY_S) -> None:
        self._path = path or USUAL_SOCKET
        self._expected = path is not None
        self._core = core
        self._metrics = metrics
        self._every_s = every_s
        self._told: Mapping[Device, str] | None = None
        self._away = False

    async def run(self) -> None:
        """Ask for ever. While kubelet is away, what it said last holds."""
        kubelet = PodResources(self._path)
        try:
            while True:
                await self._ask(kubelet)
                await asyncio.sleep(self._every_s)
        finally:
            await kubelet.close()

    async def _ask(self, kubelet: PodResources) -> None:
        try:
            by = await kubelet.claimed()
        except CachedError as error:
            if self._expected and not self._away:
                self._away = True
                self._metrics.problem(error.problem.reason)
                log.warning(error.problem.message, reason=error.problem.reason, hint=error.problem.hint)
            return
        self._expected, self._away = True, False
        if by != self._told:
            log.info("GPUs that are claimed", by=dict(by))
            self._told = by
            self._core.post(t.GpusClaimed(by))
