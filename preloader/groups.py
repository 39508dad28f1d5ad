"""Control groups: what bounds this process's memory, and who is charged for the pages it locks.

Owns the reading of ``/proc`` and the control-group files (versions 1 and 2) and the arithmetic of admission;
decides nothing else and locks nothing.

Linux charges a page to the group that touched it first. Pages of a foreign group that we lock stay charged
there and can no longer be reclaimed, until that group is killed for it; and a lock that exceeds the own
group's limit is no error but our end. So a load is admitted by arithmetic, and after locking the bytes that
the own group has as *unevictable* must have grown by what was locked.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cached.model import CachedError, ErrorKind, permanent, temporary

HEADROOM_BYTES = 32 * 1024 * 1024
"""Kept free in every scope, for page tables, buffers and the kernel's own."""
PER_CPU_SLACK_BYTES = 512 * 1024
"""The kernel counts in batches per CPU, so its figures may lag by this much for each."""
SLACK_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Scope:
    """One thing that bounds memory: a control group with a limit, or the machine.

    ``in_use_bytes`` cannot be reclaimed; what this process has locked is part of it.
    """

    name: str
    limit_bytes: int
    in_use_bytes: int


@dataclass(frozen=True, slots=True)
class Groups:
    """The own control group's directory first, then its parents as far as they can be seen.

    No directories means that no memory controller was found; only the machine bounds us then.
    """

    directories: tuple[Path, ...]
    version: int
    meminfo: Path = Path("/proc/meminfo")

    def scopes(self) -> tuple[Scope, ...]:
        """Everything that bounds memory here, as it stands now; groups without a limit are left out."""
        ram, available = _ram(self.meminfo.read_text())
        machine = Scope("this machine's memory", ram, ram - available)
        return (*(s for d in self.directories if (s := self._scope(d)) and s.limit_bytes < ram), machine)

    def limit_bytes(self) -> int:
        """The lowest limit."""
        return min(scope.limit_bytes for scope in self.scopes())

    @property
    def bounded(self) -> bool:
        """Whether a group on the own path has a limit below the machine's memory."""
        return len(self.scopes()) > 1

    def unevictable_bytes(self) -> int | None:
        """What of the own group's charge is locked. None where that cannot be read."""
        stat = _stat(self.directories[0]) if self.directories else {}
        return stat.get("unevictable")

    def _scope(self, directory: Path) -> Scope | None:
        names = ("memory.max", "memory.high") if self.version == 2 else ("memory.limit_in_bytes",)
        limits = [limit for name in names if (limit := _number(directory / name)) is not None]
        usage = _number(directory / ("memory.current" if self.version == 2 else "memory.usage_in_bytes"))
        if not limits or usage is None:
            return None
        stat, prefix = _stat(directory), "" if self.version == 2 else "total_"
        reclaimable = sum(stat.get(f"{prefix}{kind}", 0) for kind in ("active_file", "inactive_file"))
        return Scope(f"control group {directory}", min(limits), max(0, usage - reclaimable))


def find_groups(cgroup: str, mountinfo: str, meminfo: Path = Path("/proc/meminfo")) -> Groups:
    """Where this process's memory groups are, from the texts of ``/proc/self/cgroup`` and ``…/mountinfo``."""
    for version, own in _memberships(cgroup):
        for mount, root in _mounts(mountinfo, version):
            directories = _path_up(mount, root, own)
            if directories:
                return Groups(directories, version, meminfo)
    return Groups((), 2, meminfo)


def own_groups() -> Groups:
    """The groups of this process."""
    return find_groups(Path("/proc/self/cgroup").read_text(), Path("/proc/self/mountinfo").read_text())


# --- arithmetic -------------------------------------------------------------------------------


def check_room(scopes: Iterable[Scope], held_bytes: int, locked_bytes: int, new_bytes: int) -> None:
    """Refuse what does not fit. ``held_bytes`` is all that is resident, ``locked_bytes`` the locked part.

    Raises CachedError (NO_ROOM) with the arithmetic: permanent when it exceeds a limit by itself, temporary
    when it could fit once something else is gone.
    """
    for scope in scopes:
        others = max(0, scope.in_use_bytes - locked_bytes)
        if new_bytes + HEADROOM_BYTES > scope.limit_bytes:
            raise _never_fits(scope, new_bytes)
        if held_bytes + new_bytes + others + HEADROOM_BYTES > scope.limit_bytes:
            raise _no_room_now(scope, held_bytes, others, new_bytes)


def charged_elsewhere_bytes(locked_bytes: int, growth_bytes: int, cpus: int) -> int:
    """How much of ``locked_bytes`` the own group was not charged for; 0 within the figures' precision."""
    missing = locked_bytes - growth_bytes
    return missing if missing > SLACK_BYTES + cpus * PER_CPU_SLACK_BYTES else 0


def _never_fits(scope: Scope, new_bytes: int) -> CachedError:
    return permanent(
        ErrorKind.NO_ROOM,
        "EXCEEDS_MEMORY",
        f"{_mib(new_bytes)} and {_mib(HEADROOM_BYTES)} of headroom exceed "
        f"the {_mib(scope.limit_bytes)} of {scope.name}",
        "raise that limit, or keep this model on disk",
    )


def _no_room_now(scope: Scope, held_bytes: int, others: int, new_bytes: int) -> CachedError:
    return temporary(
        "NO_MEMORY",
        f"{_mib(new_bytes)} do not fit: of the {_mib(scope.limit_bytes)} of {scope.name}, "
        f"{_mib(held_bytes)} are resident, {_mib(others)} are in use by others, "
        f"{_mib(HEADROOM_BYTES)} are kept free",
        "release a resident, or raise that limit",
        retry_after_s=10.0,
        kind=ErrorKind.NO_ROOM,
    )


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.1f} MiB"


# --- reading ------------------------------------------------------------------------------------


def _memberships(cgroup: str) -> list[tuple[int, str]]:
    """(version, path) of the memory controller. Version 1 first: where it is mounted, it counts."""
    found: list[tuple[int, str]] = []
    for line in cgroup.splitlines():
        hierarchy, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            found.insert(0, (1, path))
        elif hierarchy == "0":
            found.append((2, path))
    return found


def _mounts(mountinfo: str, version: int) -> list[tuple[Path, str]]:
    """(mount point, root within the hierarchy) of each mount of that version's memory controller."""
    found = []
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, (kind, _, options) = before.split(), after.split(" ", 2)
        memory = kind == "cgroup" and "memory" in options.split(",")
        if memory if version == 1 else kind == "cgroup2":
            found.append((Path(_unescape(fields[4])), _unescape(fields[3])))
    return found


def _path_up(mount: Path, root: str, own: str) -> tuple[Path, ...]:
    """The directories with a memory controller from the own group up to the mount point."""
    # In a container the path may be told from the host's root while only the container's own part is
    # mounted; or from a namespace that shows less than the mount. The mount's top is then the own group.
    inside = own.removeprefix(root) if own == root or own.startswith(root.rstrip("/") + "/") else own
    relative = inside.strip("/")
    directory = mount if ".." in relative.split("/") else mount / relative
    if not directory.is_dir():
        directory = mount
    upwards = [directory, *directory.parents]
    visible = upwards[: upwards.index(mount) + 1]
    return tuple(d for d in visible if (d / "memory.stat").is_file())


def _ram(meminfo: str) -> tuple[int, int]:
    """(total, available) in bytes."""
    lines = dict(line.split(":", 1) for line in meminfo.splitlines() if ":" in line)
    total, available = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    return total, available


def _stat(directory: Path) -> dict[str, int]:
    try:
        lines = (directory / "memory.stat").read_text().splitlines()
    except OSError:
        return {}
    return {name: int(value) for name, _, value in (line.partition(" ") for line in lines)}


def _number(path: Path) -> int | None:
    """The number in a control file; None where there is no file, or ``max`` in it."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _unescape(field: str) -> str:
    return field.encode().decode("unicode_escape") if "\\" in field else field
