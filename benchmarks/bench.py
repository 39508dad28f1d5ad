"""``python -m benchmarks.bench``: the figures that the project promises, measured and held against them.

Owns nothing of the product: it uses the installed commands, the public client and the operators' socket,
as their users would. Exits with 1 when a bound is missed. Ctrl-C leaves no process and no directory behind.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import os
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from benchmarks.demo.processes import DemoError, Places, Process, run, start, supervise

ROOT = Path(__file__).parents[1]
START_S = 30.0
IDLE_S = 3.0
LONGEST_S = 600.0
TIMES = 5
BIG_BYTES = 256 * 1024 * 1024

# A replica's image may lack torch; here it is only hidden.
IMPORT_CACHED = """
import sys, time
sys.modules["torch"] = None
began = time.perf_counter()
import cached
print(time.perf_counter() - began)
"""


@dataclass(frozen=True, slots=True)
class Figure:
    """``bound`` is the most that ``value`` may be, in the same ``unit``; None where nothing is promised."""

    name: str
    value: float
    unit: str
    bound: float | None = None

    @property
    def missed(self) -> bool:
        return self.bound is not None and self.value > self.bound


@dataclass(frozen=True, slots=True)
class Bench:
    places: Places
    env: Mapping[str, str]
    count: int

    def python(self, *argv: str) -> list[float]:
        """What a Python program prints: numbers, one a line."""
        output = run([sys.executable, *argv], self.env, ROOT, LONGEST_S, capture=True)
        return [float(line) for line in output.splitlines()]


def perform(count: int, places: Places) -> int:
    """Measure everything and print it. Returns the exit status."""
    console = Console(highlight=False)
    env = {name: value for name, value in os.environ.items() if not name.startswith("CACHED_")}
    bench = Bench(places, env | {"CACHED_RUN_DIR": str(places.run), "PYTHONUNBUFFERED": "1"}, count)
    try:
        figures = measure(bench, console)
    except DemoError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 1
    console.print(table_of(figures))
    return int(any(figure.missed for figure in figures))


def measure(bench: Bench, console: Console) -> list[Figure]:
    imports = [bench.python("-c", IMPORT_CACHED)[0] for _ in range(TIMES)]
    figures = [Figure("import cached, without torch", median(imports), "s", 0.3)]
    console.print(f"· making {bench.count:,} tiny models, and one of {BIG_BYTES // 2**20} MiB")
    models = make_models(bench)
    origin = start_origin(bench)

    daemon, empty_s = start_daemon(bench)
    time.sleep(IDLE_S)
    figures.append(Figure("daemon ready, nothing on disk", empty_s, "s", 2.0))
    figures.append(Figure("daemon resident, idle", resident_mib(daemon), "MiB", 80.0))
    console.print(f"· fetching {bench.count:,} models")
    (fetched_s,) = bench.python("-m", "benchmarks.bench_client", "prefetch", origin, str(bench.count))
    figures.append(Figure(f"{bench.count:,} tiny models fetched", fetched_s, "s", 60.0))
    daemon.stop()

    daemon, full_s = start_daemon(bench)
    figures.append(Figure(f"daemon ready with {bench.count:,} models: extra", full_s - empty_s, "s", 1.0))
    time.sleep(IDLE_S)
    figures.append(Figure(f"daemon resident with {bench.count:,} models, idle", resident_mib(daemon), "MiB"))
    for device in ("disk", "host"):
        console.print(f"· acquiring on {device}")
        figures += acquire_figures(bench, (models / "big").as_uri(), device)
    daemon.stop()
    return figures


def acquire_figures(bench: Bench, ref: str, device: str) -> list[Figure]:
    """The first acquire is cold on this device; the others are warm."""
    first, *others = bench.python("-m", "benchmarks.bench_client", "acquire", ref, device, "100")
    words = f"acquire on {device}, {BIG_BYTES // 2**20} MiB"
    return [
        Figure(f"{words}: first", 1000 * first, "ms"),
        Figure(f"{words}: warm, median", 1000 * median(others), "ms"),
        Figure(f"{words}: warm, slowest of {len(others)}", 1000 * max(others), "ms"),
    ]


def table_of(figures: list[Figure]) -> Table:
    table = Table("figure", title="What was promised, and what was measured")
    for heading in ("measured", "at most", ""):
        table.add_column(heading, justify="right")
    for figure in figures:
        bound = "" if figure.bound is None else f"{figure.bound:g} {figure.unit}"
        verdict = (
            "" if figure.bound is None else "[red]MISSED[/red]" if figure.missed else "[green]met[/green]"
        )
        table.add_row(figure.name, f"{figure.value:.2f} {figure.unit}", bound, verdict)
    return table


# --- the stage ------------------------------------------------------------------------------


def make_models(bench: Bench) -> Path:
    """``count`` folders of one small file each, no two alike, and one big one; all attested."""
    models = bench.places.work / "models"
    for number in range(bench.count):
        write_model(models / str(number), f"model {number}\n".encode())
    write_model(models / "big", os.urandom(2**20) * (BIG_BYTES // 2**20))
    return models


def write_model(folder: Path, content: bytes) -> None:
    folder.mkdir(parents=True)
    (folder / "weights.dat").write_bytes(content)
    (folder / "SHA256SUMS").write_text(f"{hashlib.sha256(content).hexdigest()}  weights.dat\n")


def start_origin(bench: Bench) -> str:
    argv = [sys.executable, str(ROOT / "benchmarks" / "origin.py"), str(bench.places.work / "models")]
    process = start("the origin", argv, bench.places.work / "origin.log", bench.env, ROOT)
    return process.wait_for(r"(http://127\.0\.0\.1:\d+/)", START_S)


def start_daemon(bench: Bench) -> tuple[Process, float]:
    """The daemon, and the seconds until it said that it serves."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = str(Path(sys.executable).with_name("cached"))
    directories = ["--data-dir", str(bench.places.work / "data"), "--run-dir", str(bench.places.run)]
    argv = [command, "serve", "--with-preloader", *directories, "--http", f"127.0.0.1:{port}"]
    began = time.monotonic()
    process = start("the daemon", argv, bench.places.work / "daemon.log", bench.env, ROOT)
    while not is_ready(port):
        process.check()
        if time.monotonic() > began + START_S:
            raise DemoError(f"the daemon was not ready after {START_S:.0f} s")
        time.sleep(0.01)
    return process, time.monotonic() - began


def is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_S)
    try:
        connection.request("GET", "/health/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def resident_mib(process: Process) -> float:
    status = Path(f"/proc/{process.popen.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) / 1024


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--count", type=int, default=1000, help="how many tiny models (1000)")
    given = parser.parse_args(argv)
    try:
        # The demo's directory and its lock: two measurements at once would measure each other.
        return supervise(ROOT / ".demo", partial(perform, max(1, given.count)))
    except (DemoError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
