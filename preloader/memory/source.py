"""Reading a blob's file into memory that is reused: what stands in RAM from there, the rest past it.

Owns a blob's descriptors and the choice between the page cache and the disk itself. A file that is read for a
device leaves nothing in the page cache: a copy there would only push out what others need.
"""

from __future__ import annotations

import errno
import mmap
import os

PROBE_BYTES = mmap.PAGESIZE
ALIGN_BYTES = 4096
"""What file systems want offsets, sizes and addresses of direct reads to be multiples of, at most."""


class Source:
    """One file. ``read`` may be called from any thread. Owns ``fd`` from now on."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        try:
            self._direct = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:  # a file system without direct reads, or no more descriptors; the page cache will do
            self._direct = -1

    def read(self, buffer: memoryview, offset: int, size_bytes: int) -> None:
        """Read a range to the buffer's beginning. Raises OSError, also where the file ends too early.

        Offset and buffer begin at a multiple of ALIGN_BYTES, and the buffer has room for one more.
        """
        done = self._read_cached(buffer[:size_bytes], offset)
        if self._direct >= 0 and done < size_bytes:
            done -= done % ALIGN_BYTES
            done += self._read_direct(buffer[done : _round_up(size_bytes)], offset + done)
        while done < size_bytes:
            count = os.preadv(self._fd, [buffer[done:size_bytes]], offset + done)
            if count == 0:
                at, end = offset + done, offset + size_bytes
                raise OSError(errno.EIO, f"the file ends at byte {at}, before byte {end}")
            done += count

    def close(self) -> None:
        """Repeating it is harmless."""
        for fd in (self._fd, self._direct):
            if fd >= 0:
                os.close(fd)
        self._fd = self._direct = -1

    def _read_cached(self, buffer: memoryview, offset: int) -> int:
        """What stands in RAM of the range's beginning."""
        # Asked for all of it at once, Linux would begin to read all of it ahead where it is not there.
        try:
            if os.preadv(self._fd, [buffer[:PROBE_BYTES]], offset, os.RWF_NOWAIT) < len(buffer[:PROBE_BYTES]):
                return 0
            return os.preadv(self._fd, [buffer], offset, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
                return 0
            raise

    def _read_direct(self, buffer: memoryview, offset: int) -> int:
        """What can be read past the page cache: all up to the file's end, or nothing."""
        done = 0
        try:
            while done < len(buffer) and done % ALIGN_BYTES == 0:
                count = os.preadv(self._direct, [buffer[done:]], offset + done)
                if count == 0:
                    break
                done += count
        except OSError as error:
            if error.errno != errno.EINVAL:  # it is refused for its alignment
                raise
        return done


def _round_up(size_bytes: int) -> int:
    return -(-size_bytes // ALIGN_BYTES) * ALIGN_BYTES
