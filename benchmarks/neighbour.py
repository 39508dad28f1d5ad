"""``python -m benchmarks.neighbour``: what a latency-bound loop feels of a download beside it.

Owns the measuring: a process that wakes up every millisecond and does a small piece of work, as a server's
loop does, alone, beside a prefetch, beside a fetch that a replica waits for, and beside curl; each time the
same model from the same origin on this machine, fetched again and again. Owns nothing of the product: it uses
the installed commands and the sockets. Prints medians of several runs, taken in turn, after one that does not
count.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import grpc
from rich.console import Console
from rich.table import Table

import cached
from benchmarks.bench import LONGEST_S, ROOT, Bench, start_daemon, start_origin
from benchmarks.demo.processes import DemoError, Places, start, supervise
from cached.v1 import operator_pb2, operator_pb2_grpc

EVERY_S = 0.001
WORK_BYTES = 128 * 1024
TIMES = 5
SECONDS = 4.0
MODEL_BYTES = 512 * 1024 * 1024
FILES = 4
SITUATIONS = ("alone", "prefetch", "acquire", "curl")
NAMES = {
    "alone": "nothing beside it",
    "prefetch": "a prefetch, which nobody waits for",
    "acquire": "a fetch that a replica waits for",
    "curl": "curl, unproven, not durable",
}


@dataclass(frozen=True, slots=True)
class Run:
    """``late_s``: of each turn of the loop, how long after its due time it was done; sorted."""

    late_s: tuple[float, ...]
    bytes_per_s: float

    def late_us(self, share: float) -> float:
        return 1e6 * self.late_s[min(len(self.late_s) - 1, int(share * len(self.late_s)))]


# --- the processes that this starts of itself ---------------------------------------------------


def probe(seconds: float) -> None:
    """Print how late each turn was done, in seconds."""
    source, target = os.urandom(WORK_BYTES), bytearray(WORK_BYTES)
    began = due = time.monotonic()
    late = []
    while due < began + seconds:
        due += EVERY_S
        time.sleep(max(0.0, due - time.monotonic()))
        target[:] = source
        hashlib.blake2b(target[: WORK_BYTES // 8]).digest()
        now = time.monotonic()
        late.append(now - due)
        # A turn that took longer than until the next one's time does not make that one late as well.
        due = max(due, now)
    print(*(f"{value:.7f}" for value in late), sep="\n")


def fetch(kind: str, ref: str, seconds: float) -> None:
    """Fetch, evict, and again, until the time is up; print the bytes."""
    with grpc.insecure_channel(f"unix:{os.environ['CACHED_RUN_DIR']}/cached.sock") as channel:
        stub = operator_pb2_grpc.OperatorStub(channel)
        until, done = time.monotonic() + seconds, 0
        print("ready", flush=True)
        while time.monotonic() < until:
            if kind == "acquire":
                cached.acquire(ref, on="disk", timeout_s=LONGEST_S).close()
            else:
                *_, _ = stub.Prefetch(operator_pb2.PrefetchRequest(ref=ref, wait=True), timeout=LONGEST_S)
            done += MODEL_BYTES
            evict(stub, ref)
        print(done, flush=True)


def evict(stub: operator_pb2_grpc.OperatorStub, ref: str) -> None:
    """As soon as the lease that was just closed is seen to be gone."""
    for _ in range(100):
        try:
            stub.Evict(operator_pb2.EvictRequest(ref=ref), timeout=LONGEST_S)
            return
        except grpc.RpcError:
            time.sleep(0.02)
    raise SystemExit(f"{ref} cannot be evicted")


def curl(url: str, target: str, seconds: float) -> None:
    """Download file after file, until the time is up; print the bytes."""
    until, done = time.monotonic() + seconds, 0
    print("ready", flush=True)
    while time.monotonic() < until:
        for number in range(FILES):
            command = ["curl", "-sf", "-o", f"{target}/{number}", f"{url}{number}.dat"]
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        done += MODEL_BYTES
    print(done, flush=True)


# --- the measuring ------------------------------------------------------------------------------


def perform(times: int, seconds: float, places: Places) -> int:
    """Measure everything and print it. Returns the exit status."""
    console = Console(highlight=False)
    env = {name: value for name, value in os.environ.items() if not name.startswith("CACHED_")}
    bench = Bench(places, env | {"CACHED_RUN_DIR": str(places.run), "PYTHONUNBUFFERED": "1"}, 0)
    situations = [name for name in SITUATIONS if name != "curl" or shutil.which("curl")]
    try:
        console.print(f"· {times} runs of {seconds:g} s for each of {', '.join(situations)}, and one before")
        load = os.getloadavg()[0]
        runs = measure(bench, situations, times, seconds)
    except (DemoError, subprocess.SubprocessError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 1
    console.print(table_of(runs))
    console.print(f"load average {load:.1f} before, on {os.cpu_count()} CPUs; the origin runs on them too")
    return 0


def measure(bench: Bench, situations: list[str], times: int, seconds: float) -> dict[str, list[Run]]:
    make_model(bench.places.work / "models" / "big")
    origin = start_origin(bench)
    daemon, _ = start_daemon(bench)
    target = bench.places.work / "curl"
    target.mkdir()
    commands: dict[str, Callable[[], list[str]]] = {
        "alone": list,
        "prefetch": lambda: ["fetch", "prefetch", f"{origin}big/", str(seconds + 1)],
        "acquire": lambda: ["fetch", "acquire", f"{origin}big/", str(seconds + 1)],
        "curl": lambda: ["curl", f"{origin}big/", str(target), str(seconds + 1)],
    }
    runs: dict[str, list[Run]] = {name: [] for name in situations}
    # In turn, so that what else goes on here meets all of them.
    for number in range(times + 1):
        for name in situations:
            run = measure_one(bench, f"{name}-{number}", commands[name](), seconds)
            if number:
                runs[name].append(run)
    daemon.stop()
    return runs


def measure_one(bench: Bench, name: str, beside: list[str], seconds: float) -> Run:
    other = None
    began = time.monotonic()
    if beside:
        argv = [sys.executable, "-m", "benchmarks.neighbour", *beside]
        other = start(f"the download of {name}", argv, bench.places.work / f"{name}.log", bench.env, ROOT)
        other.wait_for(r"(ready)", LONGEST_S)
        began = time.monotonic()
        time.sleep(0.5)
    late = sorted(bench.python("-m", "benchmarks.neighbour", "probe", str(seconds)))
    if other is None:
        return Run(tuple(late), 0.0)
    other.popen.wait(LONGEST_S)
    done = int(other.wait_for(r"ready\s+(\d+)\s", LONGEST_S))
    return Run(tuple(late), done / (time.monotonic() - began))


def make_model(folder: Path) -> None:
    folder.mkdir(parents=True)
    sums = []
    for number in range(FILES):
        block = os.urandom(2**20)
        content = block * (MODEL_BYTES // FILES // len(block))
        (folder / f"{number}.dat").write_bytes(content)
        sums.append(f"{hashlib.sha256(content).hexdigest()}  {number}.dat\n")
    (folder / "SHA256SUMS").write_text("".join(sums))


def table_of(runs: dict[str, list[Run]]) -> Table:
    table = Table("beside the loop", title=f"How late a turn of a {1e3 * EVERY_S:g} ms loop is done, in µs")
    for heading in ("p50", "p99", "p99.9", "MB/s"):
        table.add_column(heading, justify="right")
    for name, measured in runs.items():
        late = [f"{median(run.late_us(share) for run in measured):,.0f}" for share in (0.5, 0.99, 0.999)]
        rate = median(run.bytes_per_s for run in measured) / 1e6
        table.add_row(NAMES[name], *late, f"{rate:,.0f}" if rate else "")
    return table


def main(argv: list[str]) -> int:
    match argv:
        case ["probe", seconds]:
            probe(float(seconds))
            return 0
        case ["fetch", kind, ref, seconds]:
            fetch(kind, ref, float(seconds))
            return 0
        case ["curl", url, target, seconds]:
            curl(url, target, float(seconds))
            return 0
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.neighbour", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--times", type=int, default=TIMES, help=f"how many runs of each ({TIMES})")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of each run ({SECONDS:g})")
    given = parser.parse_args(argv)
    try:
        # The demo's directory and its lock: two measurements at once would measure each other.
        return supervise(ROOT / ".demo", partial(perform, max(1, given.times), max(0.1, given.seconds)))
    except (DemoError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
