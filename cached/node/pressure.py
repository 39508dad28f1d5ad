"""How much of its speed background work may have, by what the kernel says of the node's pressure (PSI).

Owns the reading of ``/proc/pressure`` and of the own control group's files, and the rule made of it. Told to
look once a second; whoever does background work asks for the share. Everything read is made up by the kernel
at that moment, so it waits for no disk, and the event loop may do it. Starts, slows and stops nothing itself.

Fetching makes pressure too, first of all for itself. So what counts for CPU and I/O is the time in which
somebody had to wait while nothing of ours did; where that cannot be told (no control group of our own) all
waiting counts. Neither pauses background work altogether: CPUs that are always busy are no reason for a node
never to get its models, and the scheduler puts our threads last anyway. Memory does: whoever writes into
the page cache makes it worse.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cached.config import PressureSettings

RESOURCES = ("cpu", "io", "memory")
SHARES = (1.0, 0.5, 0.25, 0.1, 0.0)
LEAST_SHARE: Mapping[str, float] = {"cpu": 0.25, "io": 0.1, "memory": 0.0}
WINDOW_S = 3.0
"""What is looked at. The kernel's own shortest average (ten seconds) tells of relief too late: work would be
at a standstill before it showed."""
DOWN_EVERY_S = 2.0
UP_AFTER_S = 5.0
CALM = 0.7
"""Below this part of its bound a pressure is over."""

Stalls = Mapping[str, float]
"""Per resource: the seconds (ever) in which at least one task had to wait, or the part of a time."""


@dataclass(frozen=True, slots=True)
class Level:
    """Where the rule stands. ``share`` is one of SHARES; ``busy_s`` and ``lowered_s`` are monotonic times."""

    share: float = 1.0
    busy_s: float = 0.0
    lowered_s: float = 0.0


def step(level: Level, stalled: Stalls, bounds: Stalls, now_s: float) -> Level:
    """What follows from the part of the last seconds (0 to 1) in which each resource was waited for."""
    above = [name for name in RESOURCES if stalled.get(name, 0.0) > bounds[name]]
    calm = all(stalled.get(name, 0.0) <= CALM * bounds[name] for name in RESOURCES)
    least = min((LEAST_SHARE[name] for name in above), default=1.0)
    if above and level.share > least and now_s >= level.lowered_s + DOWN_EVERY_S:
        lower = max(share for share in SHARES if share < level.share)
        return Level(max(lower, least), now_s, now_s)
    if not calm:
        return Level(level.share, now_s, level.lowered_s)
    if level.share < 1.0 and now_s >= level.busy_s + UP_AFTER_S:
        return Level(min(share for share in SHARES if share > level.share), now_s, level.lowered_s)
    return level


def of_others(node: Stalls, own: Stalls | None) -> dict[str, float]:
    """The stalls that count: of the node's, those beside our own, but for memory."""
    if own is None:
        return dict(node)
    return {name: s if name == "memory" else max(0.0, s - own.get(name, 0.0)) for name, s in node.items()}


class Pressure:
    """Reads, and remembers the last seconds."""

    def __init__(
        self,
        settings: PressureSettings,
        node_dir: Path = Path("/proc/pressure"),
        own_dir: Path | None = None,
    ) -> None:
        """``own_dir`` is our control group's directory (version 2); None where there is none."""
        percents = {
            "cpu": settings.cpu_percent,
            "io": settings.io_percent,
            "memory": settings.memory_percent,
        }
        self._bounds = {name: percent / 100 for name, percent in percents.items()}
        self._node_dir = node_dir
        self._own_dir = own_dir
        self._seen: list[tuple[float, dict[str, float]]] = []
        self._level = Level()

    def background_share(self) -> float:
        """How much of its full speed background work may go at: 0 (next to nothing) to 1."""
        return self._level.share

    def available(self) -> bool:
        """Whether the kernel tells of pressure at all; where it does not, the share stays 1."""
        return bool(_stalls(self._node_dir, ""))

    def look(self, now_s: float) -> None:
        """To be called about once a second; ``now_s`` is monotonic."""
        node = _stalls(self._node_dir, "")
        own = _stalls(self._own_dir, ".pressure") if self._own_dir is not None else None
        # The root group's figures are the node's: then nothing is known of us alone.
        own = own if own and any(own.get(name) != node.get(name) for name in RESOURCES) else None
        self._seen.append((now_s, of_others(node, own)))
        while len(self._seen) > 2 and self._seen[1][0] <= now_s - WINDOW_S:
            del self._seen[0]
        self._level = step(self._level, self._stalled(), self._bounds, now_s)

    def _stalled(self) -> dict[str, float]:
        (began_s, before), (ended_s, after) = self._seen[0], self._seen[-1]
        if ended_s <= began_s:
            return {}
        grown = {name: after[name] - before[name] for name in after if name in before}
        return {name: min(1.0, max(0.0, grew / (ended_s - began_s))) for name, grew in grown.items()}


def own_group(proc_self_cgroup: Path, root: Path) -> Path | None:
    """The directory of our control group of version 2; None where version 2 does not rule this machine."""
    with contextlib.suppress(OSError):
        for line in proc_self_cgroup.read_text().splitlines():
            if line.startswith("0::"):
                directory = root / line.removeprefix("0::").strip("/")
                return directory if (directory / "cpu.pressure").exists() else None
    return None


def _stalls(directory: Path, suffix: str) -> dict[str, float]:
    """Seconds per resource; those that cannot be read are left out."""
    found = {}
    for name in RESOURCES:
        with contextlib.suppress(OSError, ValueError, IndexError):
            some = (directory / f"{name}{suffix}").read_text().splitlines()[0]
            found[name] = int(some.rpartition("total=")[2]) / 1e6
    return found
