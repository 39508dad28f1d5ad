"""What a worker asks of the kernel: to die with its parent, to stand back, to begin writing to the disk.

Owns the calls that Python has no name for. Linux only; a refusal is no error, as all are courtesies
on top of what is guaranteed otherwise (the pipe's end, the caps, fsync).
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import threading
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30}
_IOPRIO_WHO_PROCESS = 1
# Best effort, the last of its eight levels: the idle class could wait for ever on a busy node.
_IOPRIO_LOWEST = (2 << 13) | 7
# None: by the CPU priority, as for everybody who never asked.
_IOPRIO_NONE = 0
_SYNC_FILE_RANGE_WRITE = 2
BACKGROUND_NICE = 10
FOREGROUND_NICE = os.getpriority(os.PRIO_PROCESS, 0)
"""What this process was started with."""


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the thread that started it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have ended before the call; then nobody is left to tell us.
    if os.getppid() != parent_pid:
        os._exit(0)


def stand_back() -> None:
    """Lower the calling thread's CPU and I/O priority; threads that it starts inherit them."""
    set_priority(threading.get_native_id(), background=True)


def set_priority(thread_id: int, background: bool) -> bool:
    """Lower one thread's CPU and I/O priority, or give both back. False where the kernel refuses.

    Anybody may lower, and change the level of I/O; to raise a thread's CPU priority again takes root,
    CAP_SYS_NICE or an RLIMIT_NICE (LimitNICE=, --ulimit nice) that allows it.
    """
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None:
        priority = _IOPRIO_LOWEST if background else _IOPRIO_NONE
        ctypes.CDLL(None, use_errno=True).syscall(number, _IOPRIO_WHO_PROCESS, thread_id, priority)
    try:
        os.setpriority(os.PRIO_PROCESS, thread_id, BACKGROUND_NICE if background else FOREGROUND_NICE)
    except ProcessLookupError:
        pass  # the thread has ended
    except OSError:
        return False
    return True


class Writeback:
    """Has a file's new pages written while more of them come: else all of them wait for the fsync.

    Proves nothing; has a descriptor of its own, so that what goes wrong is still told to that fsync.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._call = ctypes.CDLL(None, use_errno=True).sync_file_range

    def begin(self, start: int, stop: int) -> None:
        size_bytes = ctypes.c_int64(stop - start)
        self._call(self._fd, ctypes.c_int64(start), size_bytes, ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))

    def close(self) -> None:
        os.close(self._fd)
