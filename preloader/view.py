"""The store as a standby sees it: read-only, so that what is opened through it stays read-only.

Owns the making of that view. A descriptor that a replica receives can be re-opened through ``/proc`` by a
replica that runs as root, and for writing unless the *mount* that it was opened through is read-only. So
every blob is opened through a read-only copy of the store's mount, where this process may make one
(CAP_SYS_ADMIN, Linux 5.12) or was given one.

The copy is never attached anywhere: it lives as long as a descriptor of it or of a file below it, is made
anew for each load (the store may be created, replaced or mounted over at any time), and needs no mount
namespace. A process with CAP_DAC_READ_SEARCH and the file system mounted writable elsewhere can still get
around it (``open_by_handle_at``), as can one with CAP_SYS_ADMIN: those are the node's own.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

from cached.model import CachedError, ErrorKind, permanent, temporary

# The same numbers on every architecture, as for all system calls since 2019; the C library has no wrappers
# in the versions that are about.
_OPEN_TREE = 428
_MOUNT_SETATTR = 442
_AT_EMPTY_PATH = 0x1000
_AT_RECURSIVE = 0x8000
_OPEN_TREE_CLONE = 1
_MOUNT_ATTR_RDONLY = 1

_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def open_view(data_dir: Path) -> Iterator[int]:
    """A descriptor of ``data_dir`` to open files relative to: through a read-only mount where possible.

    Raises CachedError: UNAVAILABLE while there is no such directory, DENIED where it may not be entered.
    """
    root = _open_plain(data_dir)
    try:
        copy = _open_read_only(root)
        try:
            yield root if copy is None else copy
        finally:
            if copy is not None:
                os.close(copy)
    finally:
        os.close(root)


def is_read_only(fd: int) -> bool:
    """Whether the mount that ``fd`` was opened through is read-only."""
    return bool(os.fstatvfs(fd).f_flag & os.ST_RDONLY)


def can_protect(data_dir: Path) -> bool:
    """Whether blobs of ``data_dir`` would be opened through a read-only mount."""
    for path in (data_dir, Path("/")):  # the store may not be there yet
        with contextlib.suppress(CachedError), open_view(path) as view:
            return is_read_only(view)
    return False


def _open_plain(data_dir: Path) -> int:
    try:
        return os.open(data_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise temporary(
            "NO_DATA_DIR",
            f"{data_dir} does not exist",
            "start the daemon, which creates it, or give the preloader the same --data-dir",
            retry_after_s=1.0,
        ) from error
    except OSError as error:
        raise permanent(
            ErrorKind.DENIED,
            "DATA_DIR_DENIED",
            f"{data_dir} cannot be opened: {error.strerror}",
            "run the preloader as a user that may read the store",
        ) from error


def _open_read_only(root: int) -> int | None:
    """A read-only copy of the mount tree at ``root``, or None where this process may not make one."""
    copy: int = _libc.syscall(
        _OPEN_TREE, root, b"", _OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_RECURSIVE | _AT_EMPTY_PATH
    )
    if copy < 0:
        return None
    attributes = (ctypes.c_uint64 * 4)(_MOUNT_ATTR_RDONLY, 0, 0, 0)  # set, clear, propagation, user namespace
    flags = _AT_EMPTY_PATH | _AT_RECURSIVE
    if _libc.syscall(_MOUNT_SETATTR, copy, b"", flags, attributes, ctypes.sizeof(attributes)) < 0:
        os.close(copy)
        return None
    return copy
