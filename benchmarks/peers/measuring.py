"""One client, from its start to its end: seconds, CPU seconds and memory of its processes.

Owns the processes that it starts and the reading of /proc. Knows nothing of what they do. CPU is user and
system time of the client's processes and of what they waited for; not the server's, and not the kernel's own
threads'. Memory is each process's own peak, added up.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.demo.processes import DemoError, tail

LOOK_S = 0.02
"""How often peaks are read: what happens in a process's last moments is missed."""
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Sample:
    """One run. ``synced_s``: until all files are on the disk too; ``said``: what the client had to say."""

    done_s: float
    synced_s: float
    cpu_s: float
    peak_mib: float
    said: Mapping[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Watch:
    """CPU and peak memory of process trees."""

    roots: tuple[int, ...]
    peaks: dict[int, int] = field(default_factory=dict)
    before_s: float = 0.0

    def begin(self) -> None:
        self.before_s = cpu_s(self.roots)

    def look(self) -> None:
        for pid in trees(self.roots):
            with suppress(OSError):
                self.peaks[pid] = max(self.peaks.get(pid, 0), peak_kib(pid))

    @property
    def spent_s(self) -> float:
        return cpu_s(self.roots) - self.before_s

    @property
    def peak_mib(self) -> float:
        return sum(self.peaks.values()) / 1024


def run_command(
    argv: list[str],
    env: Mapping[str, str],
    target: Path,
    log: Path,
    level: Callable[[], None],
    timeout_s: float,
) -> Sample:
    """A program, from its start to its end, in the folder that it fills. Raises DemoError.

    ``level`` is called last before the clock starts, here as for all others.
    """
    level()
    began = time.monotonic()
    process = launch(argv, env, target, log)
    watch = Watch((process.pid,))
    ended = os.pidfd_open(process.pid)
    try:
        while not select.select([ended], [], [], LOOK_S)[0]:
            watch.look()
            check_time(began, timeout_s, process, log)
    finally:
        os.close(ended)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    done_s = time.monotonic() - began
    if process.returncode != 0:
        raise DemoError(f"{Path(argv[0]).name} ended with {process.returncode}:\n{tail(log)}")
    sync_files(target)
    synced_s = time.monotonic() - began
    return Sample(done_s, synced_s, usage.ru_utime + usage.ru_stime, watch.peak_mib)


def run_client(
    argv: list[str],
    env: Mapping[str, str],
    target: Path,
    log: Path,
    level: Callable[[], None],
    timeout_s: float,
    others: tuple[int, ...] = (),
    durable: bool = False,
) -> Sample:
    """A client that says ``ready`` and ``done``; ``others`` are processes that work for it.

    What is ``durable`` when it is done needs no sync. Raises DemoError.
    """
    process = launch(argv, env, target, log, piped=True)
    assert process.stdin and process.stdout
    try:
        wait_for(process, "ready", log, timeout_s, None)
        watch = Watch((process.pid, *others))
        level()
        watch.begin()
        began = time.monotonic()
        process.stdin.write(b"go\n")
        process.stdin.flush()
        said = wait_for(process, "done", log, timeout_s, watch)
        done_s = time.monotonic() - began
        spent_s = watch.spent_s
        watch.look()
        if not durable:
            sync_files(target)
        synced_s = done_s if durable else time.monotonic() - began
    finally:
        process.stdin.close()
        process.stdout.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout_s)
        process.kill()
    return Sample(done_s, synced_s, spent_s, watch.peak_mib, json.loads(said))


def launch(
    argv: list[str], env: Mapping[str, str], cwd: Path, log: Path, piped: bool = False
) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE if piped else None
    with log.open("wb") as file:
        try:
            return subprocess.Popen(
                argv,
                env=dict(env),
                cwd=cwd,
                stdin=pipe or subprocess.DEVNULL,
                stdout=pipe or file,
                stderr=file,
                start_new_session=True,
            )
        except OSError as error:
            raise DemoError(f"cannot start {argv[0]}: {error.strerror}") from error


def wait_for(
    process: subprocess.Popen[bytes], word: str, log: Path, timeout_s: float, watch: Watch | None
) -> str:
    """The rest of the line that begins with ``word``."""
    assert process.stdout
    began = time.monotonic()
    while not select.select([process.stdout], [], [], LOOK_S)[0]:
        if watch is not None:
            watch.look()
        check_time(began, timeout_s, process, log)
    line = process.stdout.readline().decode()
    if not line.startswith(word):
        raise DemoError(f"a client failed before it was {word}:\n{tail(log)}")
    return line.removeprefix(word).strip()


def check_time(began: float, timeout_s: float, process: subprocess.Popen[bytes], log: Path) -> None:
    if time.monotonic() > began + timeout_s:
        process.kill()
        raise DemoError(f"a client did not end within {timeout_s:.0f} s:\n{tail(log)}")


def sync_files(folder: Path) -> None:
    """Have every file and folder below ``folder`` on the disk."""
    for directory, _, names in os.walk(folder):
        for path in (Path(directory), *(Path(directory) / name for name in names)):
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                continue
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


# --- /proc ----------------------------------------------------------------------------------


def trees(roots: Iterable[int]) -> list[int]:
    """The processes themselves and all below them."""
    found, todo = [], list(roots)
    while todo:
        pid = todo.pop()
        found.append(pid)
        with suppress(OSError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                todo += [int(child) for child in (task / "children").read_text().split()]
    return found


def cpu_s(roots: Iterable[int]) -> float:
    """User and system seconds of whole trees, and of those below that ended and were waited for."""
    total = 0
    for pid in trees(roots):
        with suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += sum(int(field) for field in fields[11:15])
    return total / TICKS_PER_S


def peak_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    return 0  # it has ended, and nobody has waited for it yet
