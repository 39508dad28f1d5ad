"""What the machine gives at most: copies to the device, reads from the disk, copies out of the page cache.

A process of its own, with the GPU as its only one: ``python -m benchmarks.gpu.limits BYTES ROUNDS FILE…``.
Prints GB/s as JSON: of each the best way to do it, of each way the median.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

from benchmarks.handoff.models import bring_in, give_up
from cached.cuda import Driver

MIB = 2**20
PART_BYTES = 16 * MIB
RING = 16
"""Pinned buffers, each with a copy in flight."""
THREADS = tuple(count for count in (2, 4, 8, 16) if count <= max(2, os.cpu_count() or 1))
WINDOWS = (4 * MIB, 16 * MIB)
MADV_POPULATE_READ = 22

_LIBC = ctypes.CDLL(None)
_LIBC.memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)

Bring = Callable[[int, int, mmap.mmap], int]
"""(descriptor, offset, buffer) -> bytes brought."""


def copy_rate(size_bytes: int) -> float:
    """GB/s from a ring of pinned buffers to the device."""
    turns = max(RING, size_bytes // PART_BYTES)
    gpu = Driver().gpus()[0]
    area = RING * PART_BYTES
    handle, address = gpu.create(area), gpu.reserve(area)
    gpu.map(address, area, handle)
    gpu.release(handle)
    with gpu.context():
        gpu.allow(address, area, write=True)
        slots = [(gpu.pin(PART_BYTES), gpu.stream(), address + n * PART_BYTES) for n in range(RING)]
        for host, _, _ in slots:
            ctypes.memset(host, 1, PART_BYTES)
        began = time.perf_counter()
        for turn in range(turns):
            host, stream, there = slots[turn % RING]
            gpu.synchronize(stream)
            gpu.copy_in(there, host, PART_BYTES, stream)
        for _, stream, _ in slots:
            gpu.synchronize(stream)
        took_s = time.perf_counter() - began
        for host, stream, _ in slots:
            gpu.end_stream(stream)
            gpu.unpin(host)
        gpu.unmap(address, area)
    gpu.free(address, area)
    return turns * PART_BYTES / 1e9 / took_s


def read_s(files: Sequence[Path], threads: int, window: int, from_cache: bool) -> float:
    """Seconds to have every byte in one of a few buffers, used again and again."""
    opened = {}
    for file in files:
        fd = os.open(file, os.O_RDONLY | (0 if from_cache else os.O_DIRECT))
        opened[fd] = file.stat().st_size
    bring = copier(opened) if from_cache else read_piece
    pieces = iter([(fd, at) for fd, size in opened.items() for at in range(0, size, window)])
    buffers = [reused(window) for _ in range(threads)]

    def one(buffer: mmap.mmap) -> None:
        for fd, at in pieces:  # a list's iterator: one step of it is one step for all threads
            wanted = min(window, opened[fd] - at)
            if bring(fd, at, buffer) < wanted:
                raise OSError(f"less than {wanted} bytes came from byte {at}")

    with ThreadPoolExecutor(threads) as pool:
        began = time.perf_counter()
        list(pool.map(one, buffers))
        took_s = time.perf_counter() - began
    for fd in opened:
        os.close(fd)
    return took_s


def read_piece(fd: int, at: int, buffer: mmap.mmap) -> int:
    return os.preadv(fd, [buffer], at)


def copier(opened: dict[int, int]) -> Bring:
    """memcpy out of mapped pages, all of which are there."""
    mapped = {}
    for fd, size in opened.items():
        # Private and writable only so that ctypes may look at its address; nothing is written.
        pages = mmap.mmap(fd, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        pages.madvise(MADV_POPULATE_READ)
        mapped[fd] = ctypes.c_char.from_buffer(pages)

    def copy(fd: int, at: int, buffer: mmap.mmap) -> int:
        count = min(len(buffer), opened[fd] - at)
        target = ctypes.c_char.from_buffer(buffer)
        _LIBC.memcpy(ctypes.addressof(target), ctypes.addressof(mapped[fd]) + at, count)
        return count

    return copy


def reused(size_bytes: int) -> mmap.mmap:
    """Aligned memory whose pages are there already."""
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    memory[:] = b"\1" * size_bytes
    return memory


def ways(files: Sequence[Path], from_cache: bool, rounds: int) -> Iterator[tuple[str, float]]:
    """(way, GB/s) of each number of threads and size of a read."""
    size_bytes = sum(file.stat().st_size for file in files)
    for threads in THREADS:
        for window in WINDOWS:
            took = []
            for _ in range(rounds):
                (bring_in if from_cache else give_up)(files)
                took.append(read_s(files, threads, window, from_cache))
            yield f"{threads} threads, {window // MIB} MiB", size_bytes / 1e9 / median(took)


def measure(size_bytes: int, rounds: int, files: Sequence[Path]) -> Iterator[dict[str, object]]:
    rate = median(copy_rate(size_bytes) for _ in range(rounds))
    yield {"what": "copy", "gb_s": rate, "way": f"{RING} copies of {PART_BYTES // MIB} MiB in flight"}
    for what in ("disk", "memcpy"):
        way, rate = max(ways(files, what == "memcpy", rounds), key=lambda found: found[1])
        yield {"what": what, "gb_s": rate, "way": way}


if __name__ == "__main__":
    copied, times, *paths = sys.argv[1:]
    for found in measure(int(copied), int(times), [Path(path) for path in paths]):
        print(json.dumps(found), flush=True)
