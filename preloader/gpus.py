"""The node's GPUs, as the preloader's parent keeps them: a keeper and a pair of sockets for each.

Owns the inventory's process, the open nodes of the devices (the driver frees memory whose device no process
has open) and the standbys' comings and goings with the devices. Never calls CUDA or NVML, and imports what it
takes to serve only once there is a GPU.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from preloader import log as logs
from preloader.child import TALKING, Child
from preloader.found import Found, parse_line

if TYPE_CHECKING:
    from preloader.standby import GpuStandby

SILENT_S = 10.0
FIRST_SILENT_S = 60.0
"""Until its first line, for NVML may have to wake every GPU first."""
GONE_AFTER_S = 3.0
"""One look that NVML fails at, just after its start, is not to cost all that stands on a device."""
ASK_AGAIN_S = 60.0
"""How often it is seen whether there is an NVML by now."""
ASK_SOON_S = 5.0
"""The same, where there was one."""
MAX_SOCKET_PATH_BYTES = 107

log = logging.getLogger("preloader")


class Gpus(Child):
    """The GPUs and MIG instances of those ``wanted`` (cuda:all, cuda:<uuid>, cuda:<index>) that there are."""

    def __init__(self, wanted: tuple[str, ...], sockets: Path, data_dir: Path, dev_dir: Path) -> None:
        super().__init__("inventory of GPUs")
        self._wanted = frozenset(wanted)
        self._sockets = sockets
        self._data_dir = data_dir
        self._dev_dir = dev_dir
        self._standbys: dict[str, GpuStandby] = {}
        self._nodes: dict[int, int | None] = {}
        self._known: dict[str, Found] = {}
        self._missed: dict[str, float] = {}
        """Since when each of those was not told of."""
        self._marked: dict[str, str] = {}
        self._without_path: set[str] = set()
        self._not_begun: set[str] = set()
        self._speaks = False
        self._missing = ""
        self._said_missing = ""

    # --- the inventory's process ----------------------------------------------------------------

    def spawn(self) -> subprocess.Popen[bytes]:
        self._missing, self._speaks = "", False
        command = [sys.executable, "-P", "-m", "preloader.inventory", "--dev-dir", str(self._dev_dir)]
        return subprocess.Popen([*command, "--marked", json.dumps(self._marked)], **TALKING)

    def heard(self, line: bytes) -> None:
        try:
            found = parse_line(line)
        except ValueError as error:  # a library's own words, most likely: nothing that stands may end of it
            log.error("a line of the inventory is not understood", extra=logs.fields(error=str(error)))
            return
        self._speaks = True
        if isinstance(found, str):
            # Of no device, so none of them ends: the driver's files may just be replaced by others.
            self._missing = found
            return
        self._marked = {d.parent_uuid or d.uuid: d.unfit_reason for d in found if d.marked}
        self._are([device for device in found if self._is_wanted(device) and self._has_path(device)])

    def look(self, now: float) -> None:
        """NVML hangs where a GPU has fallen off the bus."""
        most_s = SILENT_S if self._speaks else FIRST_SILENT_S
        if self.silent_s(now) > most_s and self.process is not None:
            log.error("the inventory of GPUs is silent", extra=logs.fields(seconds=self.silent_s(now)))
            self.process.kill()
            self._read_at = now  # where the driver does not let go of it, it is not told every second

    def ended(self, now: float) -> None:
        if not self._missing:
            super().ended(now)
            return
        self._reap()
        self.start_at = now + (ASK_SOON_S if self._standbys else ASK_AGAIN_S)
        if self._missing != self._said_missing:
            log.info("nothing tells of GPUs", extra=logs.fields(why=self._missing))
            self._said_missing = self._missing

    def close(self) -> None:
        super().close()
        for uuid in list(self._standbys):
            self._end(uuid)
        self._hold_nodes(set())

    # --- the devices ------------------------------------------------------------------------------

    def _is_wanted(self, device: Found) -> bool:
        names = {"all", str(device.index), device.uuid, device.parent_uuid}
        return bool(self._wanted & {f"cuda:{name}" for name in names})

    def _has_path(self, device: Found) -> bool:
        longest = self._sockets / f".cuda-{device.uuid}.fds.sock"
        if len(os.fsencode(longest)) <= MAX_SOCKET_PATH_BYTES:
            return True
        if device.uuid not in self._without_path:
            self._without_path.add(device.uuid)
            said = logs.fields(
                path=str(longest), hint=f"at most {MAX_SOCKET_PATH_BYTES} bytes: use a shorter --run-dir"
            )
            log.error("a GPU has no standby: the path is too long for a socket", extra=said)
        return False

    def _are(self, found: list[Found]) -> None:
        """These there are now; another that there was ends once it was missed for a while."""
        now = time.monotonic()
        self._known |= {device.uuid: device for device in found}
        missed = self._known.keys() - {device.uuid for device in found}
        self._missed = {uuid: self._missed.get(uuid, now) for uuid in missed}
        for uuid in [uuid for uuid, since in self._missed.items() if now - since > GONE_AFTER_S]:
            del self._known[uuid], self._missed[uuid]
            if uuid in self._standbys:
                self._end(uuid)
        self._hold_nodes({device.minor for device in self._known.values()})
        for device in found:
            if device.uuid in self._standbys:
                self._standbys[device.uuid].update(device)
            else:
                self._begin(device)

    def _hold_nodes(self, minors: set[int]) -> None:
        for minor in self._nodes.keys() - minors:
            fd = self._nodes.pop(minor)
            if fd is not None:
                os.close(fd)
        for minor in [minor for minor in minors if self._nodes.get(minor) is None]:
            path = self._dev_dir / f"nvidia{minor}"
            try:
                self._nodes[minor] = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            except OSError as error:
                if minor not in self._nodes:
                    said = logs.fields(path=str(path), error=error.strerror)
                    log.warning(
                        "a GPU's node cannot be kept open: its memory may go with its last user", extra=said
                    )
                self._nodes[minor] = None  # it may come, and is looked for again

    def _begin(self, device: Found) -> None:
        from preloader.standby import GpuStandby  # late: it is large, and most nodes have no GPU

        node = self._nodes[device.minor]
        said = logs.fields(device=f"cuda:{device.uuid}", model=device.name, index=device.index)
        try:
            self._standbys[device.uuid] = GpuStandby(device, node, self._sockets, self._data_dir)
        except (OSError, RuntimeError) as error:  # the other GPUs' memory is not to go for it
            if device.uuid not in self._not_begun:
                log.error("a standby does not begin", extra={**said, **logs.fields(error=str(error))})
            self._not_begun.add(device.uuid)
            return
        self._not_begun.discard(device.uuid)
        log.info("standby serves", extra=said)

    def _end(self, uuid: str) -> None:
        self._standbys.pop(uuid).end()
        log.info("standby ended", extra=logs.fields(device=f"cuda:{uuid}"))
