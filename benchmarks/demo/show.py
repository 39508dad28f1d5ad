"""What the demo does, in order, and what it prints.

Owns the story: origin, daemon, three starts of each model's server, the table, the comparison. Uses
the installed commands and plain HTTP only. It may die at any line: processes.py tidies up after it.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import sys
import time
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.demo.models import Kind, Model, catalogue
from benchmarks.demo.processes import DemoError, Places, Process, remove_tree, run, start, tail
from benchmarks.demo.weights import WAYS, Way

ROOT = Path(__file__).parents[2]
START_S = 60.0
PREPARE_S = 600.0
POLL_S = 0.02
READ_BYTES = 1024 * 1024

WAY_WORDS: dict[Way, str] = {
    "download": "download, as today",
    "path": "cached: verified path",
    "handoff": "cached: host handoff",
}
QUESTIONS: dict[Kind, dict[str, Any]] = {
    "embed": {
        "texts": ["Weights that are already there.", "The quick brown fox.", "Où est la bibliothèque ?"]
    },
    "forward": {"token_ids": [(number * 7919) % 150_000 for number in range(48)]},
}


@dataclass(frozen=True, slots=True)
class Options:
    cache: Path
    rate_mbit: float
    threads: int
    only: str | None

    def transfer_limit_s(self, size_bytes: int) -> float:
        """How long moving so much may take before something must be wrong."""
        return START_S + 3 * size_bytes * 8 / (self.rate_mbit * 1e6)


@dataclass(frozen=True, slots=True)
class Measured:
    """One start of a server: seconds since its process began, and what it cost the origin."""

    model: Model
    way: Way
    imports_s: float
    weights_s: float
    ready_s: float
    origin_bytes: int
    answer: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Stage:
    """What everything after the opening needs."""

    console: Console
    options: Options
    places: Places
    env: dict[str, str]
    origin_url: str
    daemon: Process

    def ref(self, model: Model) -> str:
        return f"{self.origin_url}{model.name}/"

    def origin_bytes(self) -> int:
        _, stats = ask(self.origin_url + "-/stats")
        return int(stats["bytes_sent"])


def perform(options: Options, places: Places) -> int:
    """The whole demo. Returns the exit status; says what went wrong, and what the daemon logged of it."""
    console = Console(highlight=False, soft_wrap=True)
    try:
        stage, models = set_up(console, options, places)
        try:
            play(stage, models)
        except DemoError:
            stage.daemon.check()  # if it has ended, that is the reason
            raise
    except DemoError as error:
        console.print(f"\nerror: {error}", style="red", markup=False)
        logged = tail(daemon_log(places))
        if logged not in str(error):
            console.print(f"the daemon's last lines:\n{logged}", markup=False)
        return 1
    return 0


def set_up(console: Console, options: Options, places: Places) -> tuple[Stage, tuple[Model, ...]]:
    """Models, origin and daemon."""
    env = environment(options, places)
    console.print("[bold]How long until a new replica of a model server is ready?[/bold]")
    rate = f"{options.rate_mbit:,.0f} Mbit/s (--rate-mbit)"
    console.print(f"torch with {options.threads} threads; the origin's rate is {rate}", markup=False)
    models = prepare_models(console, options, places, env)
    origin_url = start_origin(options, places, env)
    console.print(f"· origin: {origin_url}", markup=False)
    began = time.monotonic()
    daemon = start_daemon(places, env)
    stage = Stage(console, options, places, env, origin_url, daemon)
    say(stage, f"daemon: cached serve --with-preloader, ready in {time.monotonic() - began:.1f} s")
    warm_imports(stage)
    return stage, models


def play(stage: Stage, models: tuple[Model, ...]) -> None:
    """Three starts of each model's server, and what came of them."""
    measured: list[Measured] = []
    costs: list[str] = []
    for model in models:
        measured += three_starts(stage, model, costs)
    print_table(stage, measured, costs)
    for model in models:
        say(stage, compare([m for m in measured if m.model == model]))
    stage.console.print("\n[bold]The node, with the replicas of the last starts still serving[/bold]")
    for command in (["ls"], ["status"]):
        cachectl(stage, command, START_S)


def say(stage: Stage, text: str) -> None:
    stage.console.print(f"· {text}", markup=False)


# --- the opening ----------------------------------------------------------------------------


def environment(options: Options, places: Places, outside: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The same for every process: no outside configuration, no outside network, one way to compute."""
    env = {name: value for name, value in outside.items() if not name.startswith("CACHED_")}
    return env | {
        "CACHED_RUN_DIR": str(places.run),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(options.threads),
        # Spinning threads would steal the time of whoever else runs on a small machine.
        "OMP_WAIT_POLICY": "PASSIVE",
        # Without it the result of a matrix product may depend on how its operands lie in memory.
        "MKL_CBWR": "AUTO",
        "PYTHONUNBUFFERED": "1",
    }


def prepare_models(
    console: Console, options: Options, places: Places, env: dict[str, str]
) -> tuple[Model, ...]:
    """In a process of its own: this one must not import torch."""
    module = ["-m", "benchmarks.demo.models", str(options.cache / "models"), "--scratch", str(places.work)]
    only = [] if options.only is None else ["--only", options.only]
    console.print("· models", markup=False)
    run([sys.executable, *module, *only], env, ROOT, PREPARE_S)
    models = catalogue(options.cache / "models", options.only)
    # One copy is the daemon's, one the cold server's.
    needed_bytes = int(2.1 * sum(m.size_bytes for m in models))
    free_bytes = shutil.disk_usage(places.work).free
    if free_bytes < needed_bytes:
        raise DemoError(f"{places.work} needs {size(needed_bytes)} of free disk, and has {size(free_bytes)}")
    return models


def start_origin(options: Options, places: Places, env: dict[str, str]) -> str:
    argv = [sys.executable, str(ROOT / "benchmarks" / "origin.py"), str(options.cache / "models")]
    log = places.work / "origin.log"
    process = start("the origin", [*argv, "--rate-mbit", str(options.rate_mbit)], log, env, ROOT)
    return process.wait_for(r"(http://127\.0\.0\.1:\d+/)", START_S)


def daemon_log(places: Places) -> Path:
    return places.work / "daemon.log"


def start_daemon(places: Places, env: dict[str, str]) -> Process:
    address = f"127.0.0.1:{free_port()}"
    directories = ["--data-dir", str(places.work / "data"), "--run-dir", str(places.run)]
    argv = [command("cached"), "serve", "--with-preloader", *directories, "--http", address]
    process = start("the daemon", argv, daemon_log(places), env, ROOT)
    wait_until_ready([process], f"http://{address}/", START_S)
    return process


def warm_imports(stage: Stage) -> None:
    """Or the first server alone would read torch from the disk."""
    code = "from benchmarks.demo.server import import_libraries as i; i('embed', 1); i('forward', 1)"
    say(stage, "importing torch and transformers once, so that all servers find them equally warm")
    run([sys.executable, "-c", code], stage.env, ROOT, START_S)


# --- three starts ---------------------------------------------------------------------------


def three_starts(stage: Stage, model: Model, costs: list[str]) -> list[Measured]:
    """Cold, by path, by handoff; the last server goes on serving."""
    stage.console.print(f"\n[bold]{model.name}[/bold]: {model.title}, {size(model.size_bytes)}")
    cold = measure(stage, model, "download")
    prefetch = cachectl_timed(stage, model, ["prefetch", stage.ref(model), "--wait"])
    read_once(stage, model)
    path = measure(stage, model, "path")
    pin = cachectl_timed(stage, model, ["pin", stage.ref(model), "--on", "host", "--wait"])
    handoff = measure(stage, model, "handoff", keep=True)
    costs.append(f"{model.name}, once per node: prefetch {prefetch}; pin on host {pin}")
    return [cold, path, handoff]


def measure(stage: Stage, model: Model, way: Way, keep: bool = False) -> Measured:
    """Start a server, wait until it is ready, ask it, end it (unless ``keep``)."""
    before = stage.origin_bytes()
    downloads = stage.places.work / "downloads"
    downloads.mkdir()
    process = start_server(stage, model, way, downloads)
    url = process.wait_for(r"serving on (http://127\.0\.0\.1:\d+/)", START_S)
    limit_s = stage.options.transfer_limit_s(model.size_bytes)
    times = wait_until_ready([process, stage.daemon], url, limit_s)["times_s"]
    status, answer = ask(url + model.kind, QUESTIONS[model.kind])
    if status != 200:
        raise DemoError(f"the {model.name} server ({way}) answered {status}: {answer}")
    done = Measured(
        model, way, times["imports"], times["weights"], times["ready"], stage.origin_bytes() - before, answer
    )
    if not keep:
        process.stop()
    remove_tree(downloads)
    say(
        stage,
        f"{WAY_WORDS[way]}: ready after {done.ready_s:.1f} s, {size(done.origin_bytes)} from the origin",
    )
    return done


def start_server(stage: Stage, model: Model, way: Way, downloads: Path) -> Process:
    module = [sys.executable, "-m", "benchmarks.demo.server", model.kind, stage.ref(model)]
    settings = ["--weights", way, "--downloads", str(downloads), "--threads", str(stage.options.threads)]
    log = stage.places.work / f"server-{model.name}-{way}.log"
    return start(f"the {model.name} server ({way})", [*module, *settings], log, stage.env, ROOT)


def cachectl(stage: Stage, arguments: list[str], timeout_s: float) -> None:
    """Run cachectl on this terminal, and show the command."""
    stage.console.print(f"$ cachectl {' '.join(arguments)}", style="cyan", markup=False)
    run([command("cachectl"), *arguments], stage.env, ROOT, timeout_s)


def cachectl_timed(stage: Stage, model: Model, arguments: list[str]) -> str:
    """Run it; say how long it took and what came from the origin, in words."""
    before, began = stage.origin_bytes(), time.monotonic()
    cachectl(stage, arguments, stage.options.transfer_limit_s(model.size_bytes))
    return f"{time.monotonic() - began:.1f} s and {size(stage.origin_bytes() - before)}"


def read_once(stage: Stage, model: Model) -> None:
    """Bring the files into the page cache, from which a prefetch keeps them away.

    The other two ways find the bytes in memory as well: just downloaded, or locked there.
    """
    ref = stage.ref(model)
    directory = run([command("cachectl"), "path", ref], stage.env, ROOT, START_S, capture=True).strip()
    buffer = bytearray(READ_BYTES)
    for file in sorted(p for p in Path(directory).rglob("*") if p.is_file()):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass
    say(stage, "read its files once, as an earlier replica on this node would have")


# --- the end --------------------------------------------------------------------------------


def print_table(stage: Stage, measured: list[Measured], costs: list[str]) -> None:
    title = "\nSeconds since the server's process began; importing torch and transformers is in all"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("model")
    table.add_column("its weights by")
    for heading in ("imports", "weights", "ready", "from the origin"):
        table.add_column(heading, justify="right")
    for row in measured:
        first = row.way == WAYS[0]
        seconds = [f"{s:.2f}" for s in (row.imports_s, row.weights_s, row.ready_s)]
        table.add_row(row.model.name if first else "", WAY_WORDS[row.way], *seconds, size(row.origin_bytes))
        if row.way == WAYS[-1]:
            table.add_section()
    stage.console.print(table)
    for line in costs:
        say(stage, line)


def compare(starts: list[Measured]) -> str:
    """That all answers are the same, in words. Raises DemoError when they are not."""
    name = starts[0].model.name
    if any(start.answer != starts[0].answer for start in starts):
        digests = ", ".join(f"{start.way}: {start.answer['sha256']}" for start in starts)
        raise DemoError(f"{name} computed different outputs, by sha256: {digests}")
    return f"{name}: the three outputs are equal to the last bit (sha256 {starts[0].answer['sha256'][:16]}…)"


# --- small tools ----------------------------------------------------------------------------


def command(name: str) -> str:
    """An installed command of the environment that runs the demo."""
    return str(Path(sys.executable).with_name(name))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def ask(url: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
    """GET, or POST with ``body``; the status and the JSON that came. Raises DemoError."""
    parts = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=START_S)
    try:
        data = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", parts.path, data)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise DemoError(f"no proper answer from {url}: {error}") from error
    finally:
        connection.close()


def wait_until_ready(processes: list[Process], url: str, timeout_s: float) -> dict[str, Any]:
    """Ask ``/health/ready`` of the first process until it says 200; its body. All of them must live."""
    until = time.monotonic() + timeout_s
    why = "nothing was asked"
    while time.monotonic() < until:
        for process in processes:
            process.check()
        try:
            status, body = ask(url + "health/ready")
        except DemoError as error:
            why = str(error)
        else:
            if status == 200:
                return body
            why = f"it said {status} {body}"
        time.sleep(POLL_S)
    first = processes[0]
    raise DemoError(f"{first.name} was not ready within {timeout_s:.0f} s ({why}):\n{tail(first.log)}")


def size(size_bytes: int) -> str:
    """Bytes in decimal units, as networks and disks are sold."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor:
            return (
                f"{size_bytes / factor:.2f} {unit}" if unit == "GB" else f"{size_bytes / factor:.1f} {unit}"
            )
    return f"{size_bytes} B"
