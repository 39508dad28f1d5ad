"""Host memory: the page cache of the store's own files, locked.

Owns the mapping, locking and hashing of blobs' pages, and the right to lock them. There is no second copy: a
piece is the file's pages, and its descriptor is the file's, read-only.

Locking is tried, never required. Where it is not allowed, or fails, a piece goes on unlocked: its bytes are
read through the page cache to be proven, and whoever hands it out has to prove it again.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import threading
from collections.abc import Callable, Iterable

import xxhash

from cached.model import HOST, Blob, CachedError, Device, Digest, ErrorKind, temporary
from preloader.groups import Groups, charged_elsewhere_bytes, check_room
from preloader.view import is_read_only

READ_BYTES = 1024 * 1024
SMALLEST_ALLOWANCE_BYTES = 8 * 1024 * 1024
"""A limit on locked memory up to this is a distribution's default, not an operator's wish."""

_CAP_IPC_LOCK = 14
_PYBUF_READ = 0x100

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_int),
    ctypes.c_long,
)
for _function in (_libc.mlock, _libc.munlock, _libc.munmap):
    _function.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_view_of = ctypes.pythonapi.PyMemoryView_FromMemory
_view_of.restype = ctypes.py_object
_view_of.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
_MAP_FAILED = ctypes.c_void_p(-1).value


class HostMemory:
    """The page cache as one device.

    ``allowance_bytes`` is how much may be locked (None: no limit), ``why_not`` the words for a reader where
    that is nothing. ``same_group`` says that who fills the page cache is charged to our own control group.
    ``vouched`` are contents whose pages an earlier process of the same group had locked, so that they may be
    locked where they stand; ``tell`` hears of each content that becomes (True) or ceases to be (False) so.
    """

    device: Device = HOST

    def __init__(
        self,
        groups: Groups,
        allowance_bytes: int | None,
        why_not: str = "",
        *,
        same_group: bool = False,
        vouched: Iterable[Digest] = (),
        tell: Callable[[Digest, bool], None] = lambda digest, vouched: None,
    ) -> None:
        self._groups = groups
        self._allowance_bytes = allowance_bytes
        self._why_not = why_not
        self._same_group = same_group
        self._tell = tell
        self._lock = threading.Lock()  # guards what follows
        self._vouched = set(vouched)
        self._foreign: set[Digest] = set()
        self._held: dict[Digest, int] = {}
        self._locked_bytes = 0
        # What this load, the one at a time, may do; admit says.
        self._may_lock = allowance_bytes is None
        self._charge_refused = False
        self._bounded = groups.bounded
        self._unevictable_at_start = groups.unevictable_bytes()

    @property
    def cannot_lock_reason(self) -> str:
        return self._why_not

    def limit_bytes(self) -> int:
        return self._groups.limit_bytes()

    def admit(self, new_bytes: int) -> None:
        with self._lock:
            held, locked = sum(self._held.values()), self._locked_bytes
        check_room(self._groups.scopes(), held, locked, new_bytes)
        self._bounded = self._groups.bounded
        allowance = self._allowance_bytes
        self._may_lock = allowance is None or (allowance > 0 and locked + new_bytes <= allowance)
        self._charge_refused = False
        if not self._may_lock and allowance:
            self._why_not = f"RLIMIT_MEMLOCK of {allowance} bytes is less than {locked + new_bytes}"

    def hold(self, blob: Blob, source: int) -> HostPiece:
        if self._may_lock and self._must_drop(blob.sha256):
            # Pages that nobody maps are given up, and are read again on our own account.
            os.posix_fadvise(source, 0, 0, os.POSIX_FADV_DONTNEED)
        piece = HostPiece(self, blob, source, lock=self._may_lock)
        with self._lock:
            self._held[blob.sha256] = blob.size_bytes
        return piece

    def audit(self) -> None:
        # What is locked is read first: it is counted after locking and discounted before unlocking, so the
        # group's figure can only be the larger one.
        with self._lock:
            locked = self._locked_bytes
        now = self._groups.unevictable_bytes()
        if self._same_group or now is None or self._unevictable_at_start is None:
            return
        growth = now - self._unevictable_at_start
        elsewhere = charged_elsewhere_bytes(locked, growth, os.cpu_count() or 1)
        if elsewhere:
            self._charge_refused = True
            raise _charged_elsewhere(elsewhere)

    def _must_drop(self, digest: Digest) -> bool:
        if self._same_group or digest in self._vouched:
            return False
        return self._bounded or digest in self._foreign

    # --- what its pieces report, from any thread ------------------------------------------------

    def locked(self, size_bytes: int) -> None:
        """That many bytes more (or, negative, less) are locked."""
        with self._lock:
            self._locked_bytes += size_bytes

    def kept(self, piece: HostPiece, lock_error: str) -> None:
        """A piece was proven, locked or (with the reason) not."""
        if not piece.locked:
            self._why_not = lock_error or self._why_not
            return
        self._why_not = ""
        with self._lock:
            self._foreign.discard(piece.blob.sha256)
            self._vouched.add(piece.blob.sha256)
        self._tell(piece.blob.sha256, True)

    def closed(self, digest: Digest, kept: bool) -> None:
        """A piece is gone: released, or never kept. What was refused for its charge is dropped next time."""
        refused = self._charge_refused and not kept
        with self._lock:
            self._held.pop(digest, None)
            disowned = (kept or refused) and digest in self._vouched
            if disowned:
                self._vouched.discard(digest)
            if refused:
                self._foreign.add(digest)
        if disowned:
            self._tell(digest, False)


class HostPiece:
    """One blob's pages. Made by HostMemory.hold."""

    def __init__(self, memory: HostMemory, blob: Blob, fd: int, lock: bool) -> None:
        self.blob = blob
        self.fd = fd
        self.locked = lock
        self.write_protected = is_read_only(fd)
        self._memory = memory
        self._kept = False
        self._lock_error = ""
        self._guard = threading.Lock()
        self._locked_bytes = 0
        self._address = 0
        if lock and blob.size_bytes:
            self._map()

    @property
    def fds(self) -> tuple[int, ...]:
        return () if self.fd < 0 else (self.fd,)

    def fill(self, offset: int, size_bytes: int) -> str:
        if self.locked:
            self._lock(offset, size_bytes)
        if self.locked:  # where it is not, reading it to prove it is what brings it in
            return xxhash.xxh3_128_hexdigest(_view_of(self._address + offset, size_bytes, _PYBUF_READ))
        return self._digest_read(offset, size_bytes)

    def keep(self) -> None:
        self._kept = True
        self._memory.kept(self, self._lock_error)

    def close(self) -> None:
        if self.fd < 0:
            return
        self._count(-self._locked_bytes)
        if self._address:
            _libc.munmap(self._address, self.blob.size_bytes)
        os.close(self.fd)
        self.fd = -1
        self._memory.closed(self.blob.sha256, self._kept)

    def _lock(self, offset: int, size_bytes: int) -> None:
        # Locking alone reads page after page as it comes by; this asks the disk for all of it at once.
        os.posix_fadvise(self.fd, offset, size_bytes, os.POSIX_FADV_WILLNEED)
        if _libc.mlock(self._address + offset, size_bytes) == 0:
            self._count(size_bytes)
        else:
            self._go_unlocked("mlock", ctypes.get_errno())

    def _map(self) -> None:
        address = _libc.mmap(None, self.blob.size_bytes, mmap.PROT_READ, mmap.MAP_SHARED, self.fd, 0)
        if address == _MAP_FAILED:
            self._go_unlocked("mmap", ctypes.get_errno())
        else:
            self._address = address

    def _go_unlocked(self, call: str, number: int) -> None:
        # An unreadable file fails like a forbidden lock; proving it by reading tells which it was. The
        # mapping stays until close, for other threads may be reading through it.
        self._lock_error = f"{call}: {os.strerror(number)}"
        self.locked = False

    def _count(self, size_bytes: int) -> None:
        with self._guard:
            self._locked_bytes += size_bytes
        self._memory.locked(size_bytes)

    def _digest_read(self, offset: int, size_bytes: int) -> str:
        buffer, digest, end = memoryview(_buffer()), xxhash.xxh3_128(), offset + size_bytes
        while offset < end:
            count = os.preadv(self.fd, [buffer[: min(READ_BYTES, end - offset)]], offset)
            if count == 0:
                raise OSError(errno.EIO, f"the file ends at byte {offset}, before byte {end}")
            digest.update(buffer[:count])
            offset += count
        return digest.hexdigest()


def lock_allowance() -> tuple[int | None, str]:
    """How many bytes this process may lock (None: any number), and why none where it may not.

    Raises RLIMIT_MEMLOCK as far as this process is allowed to.
    """
    _raise_limit(resource.RLIMIT_MEMLOCK)
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if _has_ipc_lock() or soft == resource.RLIM_INFINITY:
        return None, ""
    if soft <= SMALLEST_ALLOWANCE_BYTES:
        return 0, f"CAP_IPC_LOCK is missing and RLIMIT_MEMLOCK is {soft} bytes"
    return soft, ""


def _raise_limit(kind: int) -> None:
    _, hard = resource.getrlimit(kind)
    for wanted in (resource.RLIM_INFINITY, hard):
        try:
            resource.setrlimit(kind, (wanted, wanted))
            return
        except (ValueError, OSError):
            continue  # only CAP_SYS_RESOURCE exceeds the hard limit


def _has_ipc_lock() -> bool:
    with open("/proc/self/status", encoding="ascii") as status:  # noqa: PTH123
        effective = next(line.split()[1] for line in status if line.startswith("CapEff:"))
    return bool(int(effective, 16) >> _CAP_IPC_LOCK & 1)


def _charged_elsewhere(size_bytes: int) -> CachedError:
    return temporary(
        "CHARGED_ELSEWHERE",
        f"{size_bytes / 2**20:.1f} MiB of the locked pages are charged to another control group, "
        "which would be killed for them",
        "end what maps those files, or run daemon and preloader in one group with --same-group",
        retry_after_s=10.0,
        kind=ErrorKind.NO_ROOM,
    )


_local = threading.local()


def _buffer() -> bytearray:
    """This thread's buffer, made once: fresh memory costs more than the disk."""
    if not hasattr(_local, "buffer"):
        _local.buffer = bytearray(READ_BYTES)
    buffer: bytearray = _local.buffer
    return buffer
