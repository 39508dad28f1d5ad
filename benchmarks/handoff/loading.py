"""How fast a standby loads, beside what the disk and the memory give; and what it costs when it idles.

Owns the readings that it is held against. Tells a preloader by itself what to load and release, through the
daemon's own client of it: ``python -m benchmarks.handoff.loading RUN_DIR ARTIFACT ROUNDS FILE…``.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import mmap
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.table import Table

from benchmarks.demo.processes import Process
from benchmarks.handoff.models import Model, bring_in, give_up
from benchmarks.handoff.stage import Stage
from benchmarks.peers.figures import Aim
from benchmarks.peers.measuring import trees
from cached.model import HOST, ArtifactId
from cached.standby import Standby

OF_DISK = 0.9
THREADS = min(4, os.cpu_count() or 1)
"""As many as the standby proves with."""
WINDOWS = (2**20, 4 * 2**20, 16 * 2**20)
"""Bytes that one read asks for; the best of them is what the disk gives."""
KEPT_S = 1.0

MADV_POPULATE_READ = 22

_LIBC = ctypes.CDLL(None)
_LIBC.memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


Work = Callable[[int, int, int, mmap.mmap], None]
"""(descriptor, offset, the file's size, buffer)."""

# --- in a process of its own ------------------------------------------------------------------


async def measure(run_dir: Path, artifact: ArtifactId, rounds: int, files: list[Path]) -> dict[str, object]:
    """GB/s of each way, one list each. It ends resident, so that what it costs can be seen."""
    size_bytes = sum(file.stat().st_size for file in files)
    standby = Standby(HOST, run_dir / "standby" / "host.sock")
    rates: dict[str, list[float]] = {}

    def note(name: str, took_s: float) -> None:
        rates.setdefault(name, []).append(size_bytes / 1e9 / took_s)

    for _ in range(rounds):
        for window in WINDOWS:
            give_up(files)
            note(f"disk {window}", read_all(files, window, os.O_DIRECT))
        give_up(files)
        note("buffered", read_all(files, WINDOWS[-1], 0))
        note("fresh", fresh(size_bytes))
        give_up(files)
        note("cold", await load(standby, artifact))
        await standby.release(artifact)
        bring_in(files)
        note("memcpy", copy_all(files, WINDOWS[0]))
        note("warm", await load(standby, artifact))
        await standby.release(artifact)
    await load(standby, artifact)
    await standby.close()
    return {"rates": rates}


async def load(standby: Standby, artifact: ArtifactId) -> float:
    began = time.monotonic()
    await standby.load(artifact, lambda done, total: None)
    return time.monotonic() - began


def read_all(files: Sequence[Path], window: int, flags: int) -> float:
    """Seconds to have every byte in one of a few buffers, used again and again; with O_DIRECT past the page
    cache."""
    opened = [(os.open(file, os.O_RDONLY | flags), file.stat().st_size) for file in files]
    took_s = in_threads(
        [(fd, at, size) for fd, size in opened for at in range(0, size, window)], window, read_piece
    )
    for fd, _ in opened:
        os.close(fd)
    return took_s


def copy_all(files: Sequence[Path], window: int) -> float:
    """Seconds to copy every byte out of mapped pages, without a fault: those are the loads' cost."""
    opened = [(os.open(file, os.O_RDONLY), file.stat().st_size) for file in files]
    mapped = {fd: populated(fd, size) for fd, size in opened}
    pieces = [(fd, at, size) for fd, size in opened for at in range(0, size, window)]
    took_s = in_threads(pieces, window, copied(mapped))
    for fd, _ in opened:
        os.close(fd)
    return took_s


def fresh(size_bytes: int) -> float:
    """Seconds to get as many pages as the page cache needs, with no disk at all."""
    fd, window = os.memfd_create("fresh"), WINDOWS[-1]
    os.ftruncate(fd, size_bytes)
    pieces = [(fd, at, size_bytes) for at in range(0, size_bytes, window)]
    took_s = in_threads(pieces, 1, lambda fd, at, size, _: os.posix_fallocate(fd, at, min(window, size - at)))
    os.close(fd)
    return took_s


def in_threads(pieces: Sequence[tuple[int, int, int]], window: int, work: Work) -> float:
    """The seconds that all pieces take, each done by the next free thread."""
    todo = iter(pieces)  # a list's iterator: one step of it is one step for all threads
    buffers = [reused(window) for _ in range(THREADS)]

    def one_thread(buffer: mmap.mmap) -> None:
        for piece in todo:
            work(*piece, buffer)

    with ThreadPoolExecutor(THREADS) as pool:
        began = time.monotonic()
        list(pool.map(one_thread, buffers))
        return time.monotonic() - began


def populated(fd: int, size: int) -> mmap.mmap:
    """A file's pages without a fault to come: faults are the loads' cost, not the memory's."""
    # Private and writable only so that ctypes may look at its address; nothing is written.
    pages = mmap.mmap(fd, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    pages.madvise(MADV_POPULATE_READ)
    return pages


def read_piece(fd: int, at: int, size: int, buffer: mmap.mmap) -> None:
    end, view = min(at + len(buffer), size), memoryview(buffer)
    while at < end:
        count = os.preadv(fd, [view], at)
        if count == 0:
            raise OSError(f"a file ends at byte {at}, before byte {end}")
        at += count


def copied(mapped: dict[int, mmap.mmap]) -> Work:
    """The C library's, which lets other threads run meanwhile."""
    addresses = {fd: ctypes.addressof(ctypes.c_char.from_buffer(pages)) for fd, pages in mapped.items()}

    def copy(fd: int, at: int, size: int, buffer: mmap.mmap) -> None:
        target = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        _LIBC.memcpy(target, addresses[fd] + at, min(len(buffer), size - at))

    return copy


def reused(size_bytes: int) -> mmap.mmap:
    """Aligned memory whose pages are there already."""
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    memory[:] = b"\1" * size_bytes
    return memory


# --- what it comes to -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rates:
    """GB/s, medians; ``disk`` is the best way to read it."""

    disk: float
    window: int
    buffered: float
    fresh: float
    cold: float
    warm: float
    memcpy: float


def rates(stage: Stage, artifact: str, files: Sequence[Path], rounds: int) -> Rates:
    argv = [str(stage.run_dir), artifact, str(rounds), *map(str, files)]
    found = json.loads(stage.python("benchmarks.handoff.loading", *argv))["rates"]
    disk = {window: median(found[f"disk {window}"]) for window in WINDOWS}
    best = max(WINDOWS, key=lambda window: disk[window])
    others = ("buffered", "fresh", "cold", "warm", "memcpy")
    return Rates(disk[best], best, *(median(found[name]) for name in others))


def aims_of(found: Rates) -> Iterator[Aim]:
    yield Aim("load from disk to host, to O_DIRECT into reused memory", found.cold / found.disk, OF_DISK)
    yield Aim(
        "load from disk to host, to a read through the page cache", found.cold / found.buffered, OF_DISK
    )


def table_of(model: Model, found: Rates) -> Table:
    title = f"Into host memory: {model.name}, {model.size_bytes / 1e9:.2f} GB, {THREADS} threads"
    table = Table("way", title=title)
    table.add_column("GB/s", justify="right")
    table.add_row(
        f"disk, O_DIRECT into reused memory ({found.window // 2**20} MiB reads)", f"{found.disk:.2f}"
    )
    table.add_row("disk, through the page cache into reused memory", f"{found.buffered:.2f}")
    table.add_row("as many fresh pages, without a disk", f"{found.fresh:.2f}")
    table.add_row("a standby's load, nothing in the page cache", f"{found.cold:.2f}")
    table.add_row("a standby's load, all in the page cache", f"{found.warm:.2f}")
    table.add_row("memcpy out of those pages", f"{found.memcpy:.2f}")
    return table


# --- what it costs --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cost:
    """One process: MiB. ``pss`` shares out what several processes have mapped."""

    name: str
    rss: float
    pss: float
    locked: float


def costs(process: Process) -> list[Cost]:
    """The preloader's processes as they idle."""
    time.sleep(KEPT_S)
    return [cost_of(pid) for pid in trees([process.popen.pid])]


def cost_of(pid: int) -> Cost:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    kib = {line.split(":")[0]: int(line.split()[1]) for line in rollup}
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    name = "host standby" if "preloader.serve" in words else "preloader"
    return Cost(name, kib["Rss"] / 1024, kib["Pss"] / 1024, kib["Locked"] / 1024)


def cost_table(empty: Sequence[Cost], full: Sequence[Cost], model: Model) -> Table:
    model_mib = model.size_bytes / 2**20
    table = Table(
        "process", title=f"Idle standbys, MiB, without a resident and with one of {model_mib:.0f} MiB"
    )
    for heading in ("RSS without", "PSS without", "RSS with", "PSS with", "PSS with, less the model"):
        table.add_column(heading, justify="right")
    for before, after in zip(empty, full, strict=True):
        less = after.pss - (model_mib if after.locked else 0.0)
        figures = (before.rss, before.pss, after.rss, after.pss, less)
        table.add_row(before.name, *(f"{figure:.1f}" for figure in figures))
    return table


def main() -> None:
    run_dir, artifact, rounds, *files = sys.argv[1:]
    work = measure(Path(run_dir), ArtifactId(artifact), int(rounds), [Path(file) for file in files])
    print(json.dumps(asyncio.run(work)))


if __name__ == "__main__":
    main()
