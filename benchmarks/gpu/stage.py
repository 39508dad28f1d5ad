"""What every step stands on: models in the store, a daemon and a preloader that can be killed, and replicas.

Owns those processes. Measures nothing. Needs no installed command, and only packages that the product needs.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.demo.processes import DemoError, Places, Process, remove_tree, start, tail
from benchmarks.handoff.models import transformer, write_model
from benchmarks.peers.measuring import trees

ROOT = Path(__file__).parents[2]
START_S = 60.0
ASK_S = 300.0
LOOK_S = 0.005
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
SPARE = 1.1


class StepFailed(Exception):
    """A step could not be done, or what it looked at is not as it has to be."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """``sizes``: GB of the models that are handed over. ``reserve_bytes`` 0: the product's own."""

    gb: float
    sizes: tuple[float, ...]
    rounds: int
    crowds: tuple[int, int]
    dev_dir: Path
    reserve_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Stored:
    """A model that is proven on this node's disk."""

    ref: str
    id: str
    folder: Path
    size_bytes: int
    tensors: int

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))


@dataclass(slots=True)
class Stage:
    """``rates`` are the limits that were seen, ``digests`` the models' by their ids. ``slowly`` makes the
    fake's copies take their time, where something is to happen midway."""

    places: Places
    env: Mapping[str, str]
    uuid: str
    wanted: Wanted
    rates: dict[str, float] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    slowly: Callable[[], AbstractContextManager[None]] = nullcontext
    logs: int = 0

    @property
    def device(self) -> str:
        return f"cuda:{self.uuid}"

    @property
    def run_dir(self) -> Path:
        return Path(self.env["CACHED_RUN_DIR"])

    def log(self, name: str) -> Path:
        self.logs += 1
        return self.places.work / f"{name}-{self.logs:03}.log"

    # --- asked ------------------------------------------------------------------------------

    def python(self, module: str, *argv: object) -> list[dict[str, Any]]:
        """The JSON lines that one of our modules prints. Raises StepFailed for an error."""
        command = [sys.executable, "-P", "-m", module, *map(str, argv)]
        done = subprocess.run(command, env=dict(self.env), capture_output=True, text=True, timeout=ASK_S)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        if done.returncode or not lines:
            raise StepFailed(f"{module} ended with {done.returncode}: {done.stderr[-2000:].strip()}")
        if "error" in lines[-1]:
            raise StepFailed(str(lines[-1]["error"]))
        return lines

    def tell(self, word: str, *argv: object) -> dict[str, Any]:
        return self.python("benchmarks.gpu.tell", word, *argv)[-1]

    def used_bytes(self) -> int:
        return int(self.tell("devices", self.uuid)["used_bytes"])

    @contextmanager
    def telling(self, word: str, *argv: object) -> Iterator[Iterator[dict[str, Any]]]:
        """The lines as they come, of what is not waited for."""
        command = [sys.executable, "-P", "-m", "benchmarks.gpu.tell", word, *map(str, argv)]
        with subprocess.Popen(command, env=dict(self.env), stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            try:
                yield map(json.loads, process.stdout)
            finally:
                process.kill()

    # --- models -----------------------------------------------------------------------------

    @contextmanager
    def model(self, node: Node, gb: float) -> Iterator[Stored]:
        """A model of this size in the store, for as long as this goes; the main one stays."""
        folder, shape = self.places.run / f"model-{gb:g}", transformer(int(gb * 1e9))
        ref, stays = folder.as_uri(), gb == self.wanted.gb
        if not folder.exists():
            self._check_room(gb)
            unfinished = folder.with_suffix(".part")
            remove_tree(unfinished)  # a step that ran out of time
            write_model(unfinished, shape)
            unfinished.rename(folder)
        found = self.tell("prefetch", ref)
        hollow(folder)
        files = list(Path(found["folder"]).glob("*.safetensors"))
        size_bytes = sum(file.stat().st_size for file in files)
        try:
            yield Stored(ref, found["id"], Path(found["folder"]), size_bytes, len(shape))
        finally:
            if not stays:
                self.tell("unpin")
                node.wait_gone()
                self.tell("evict", ref)
                remove_tree(folder)

    def _check_room(self, gb: float) -> None:
        """Where it comes from lies on the disk too, unless that is in memory."""
        once = self.places.work.stat().st_dev != self.places.run.stat().st_dev
        needed, free = SPARE * gb * (1 if once else 2), shutil.disk_usage(self.places.work).free / 1e9
        if free < needed:
            raise StepFailed(f"a model of {gb:g} GB needs {needed:.0f} GB of disk, and {free:.0f} are free")

    # --- processes --------------------------------------------------------------------------

    @contextmanager
    def node(self) -> Iterator[Node]:
        """A daemon and a preloader without pins and residents, and their end."""
        node = Node(self)
        try:
            node.start_preloader()
            node.start_daemon()
            self.tell("unpin")  # what the last step left, and what was loaded for that at once
            node.wait_gone()
            yield node
            self.tell("unpin")
        finally:
            node.end()

    @contextmanager
    def preloader(self) -> Iterator[None]:
        """A preloader with nobody who tells it anything."""
        node = Node(self)
        try:
            node.start_preloader()
            yield
        finally:
            node.end()

    @contextmanager
    def replica(self, model: Stored, way: str = "gpu") -> Iterator[Replica]:
        replica = Replica(self, way, model)
        try:
            yield replica
        finally:
            replica.end()


class Node:
    """The node's two processes; each may be killed and started again."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._run_dir = stage.run_dir
        self._running: dict[str, Process] = {}
        self._logs: list[Path] = []
        self._gpu_socket = self._run_dir / "standby" / f"cuda-{stage.uuid}.sock"
        self._run_dir.mkdir(exist_ok=True)

    def start_preloader(self) -> None:
        options = ["--dev-dir", str(self._stage.wanted.dev_dir), "--devices", f"host,{self._stage.device}"]
        self._start("preloader", ["preloader", "serve", *options])
        for path in (self._gpu_socket, self._gpu_socket.with_name("host.sock")):
            self._wait_for("preloader", path)

    def start_daemon(self) -> None:
        config = self._stage.places.work / "cached.toml"
        config.write_text(self._settings())
        self._start("daemon", ["cached.daemon", "serve", "--config", str(config)])
        self._wait_for("daemon", self._run_dir / "cached.sock")

    def kill(self, name: str) -> None:
        """SIGKILL."""
        process = self._running.pop(name)
        process.popen.kill()
        process.popen.wait()

    def stop(self, name: str) -> None:
        """SIGTERM, as an orchestrator does."""
        self._running.pop(name).stop()

    def end(self) -> None:
        for name in ("daemon", "preloader"):
            if name in self._running:
                with suppress(DemoError):
                    self.stop(name)
        remove_tree(self._run_dir)

    def pids(self) -> dict[int, str]:
        """Every process of the node, with what it is."""
        return {pid: name_of(pid) for pid in trees([each.popen.pid for each in self._running.values()])}

    def filler(self) -> int | None:
        return next((pid for pid, name in self.pids().items() if name == "preloader.filler"), None)

    def loads(self) -> int:
        """How often something was loaded onto the GPU."""
        return sum(event.get("device") == self._stage.device for event in self.events("resident"))

    def events(self, name: str) -> list[dict[str, Any]]:
        """What both processes have logged of that name."""
        lines = (line for log in self._logs for line in log.read_text().splitlines())
        events = [json.loads(line) for line in lines if line.startswith('{"')]
        return [event for event in events if event.get("event") == name]

    def wait_gone(self) -> None:
        """Until nothing is resident on the GPU any more."""
        self._stage.tell("empty", self._stage.device)

    def _start(self, name: str, argv: list[str]) -> None:
        log = self._stage.log(name)
        self._logs.append(log)
        directories = ["--run-dir", str(self._run_dir), "--data-dir", str(self._stage.places.work / "data")]
        command = [sys.executable, "-P", "-m", *argv, *directories]
        self._running[name] = start(name, command, log, self._stage.env, ROOT)

    def _wait_for(self, name: str, path: Path) -> None:
        until = time.monotonic() + START_S
        while not answers(path):
            self._running[name].check()
            if time.monotonic() > until:
                raise StepFailed(f"{path} did not answer within {START_S:.0f} s:\n{tail(self._logs[-1])}")
            time.sleep(LOOK_S)

    def _settings(self) -> str:
        """All as it comes, but for what depends on what else lies on this disk, and for waiting."""
        memory = PAGE_BYTES * os.sysconf("SC_PHYS_PAGES")
        reserve = self._stage.wanted.reserve_bytes
        return (
            "[store]\nkeep_free = 0.0\nscrub_bytes_per_s = 0\n"
            "[pressure]\ncpu_percent = 100\nio_percent = 100\nmemory_percent = 100\n"
            f"[standby]\nclaimed_grace_s = 1\npod_resources = ''\nhost_capacity_bytes = {memory * 6 // 10}\n"
            + (f"gpu_reserve_bytes = {reserve}\n" if reserve else "")
        )


class Replica:
    """A process that has the GPU for itself, ready to load."""

    def __init__(self, stage: Stage, way: str, model: Stored) -> None:
        self._log = stage.log("replica")
        command = [sys.executable, "-P", "-m", "benchmarks.gpu.replica", way, model.ref, str(model.folder)]
        with self._log.open("wb") as log:
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(
                command, env=dict(stage.env), stdin=pipe, stdout=pipe, stderr=log, text=True
            )

    def ready(self) -> float:
        """Seconds that imports and the context took."""
        return float(self._heard("ready")["prepared_s"])

    def begin(self) -> None:
        self._say("load")

    def loaded(self) -> dict[str, Any]:
        found: dict[str, Any] = self._heard("load")
        return found

    def load(self) -> dict[str, Any]:
        self.ready()
        self.begin()
        return self.loaded()

    def digest(self) -> str:
        self._say("sum")
        return str(self._heard("sum"))

    def end(self) -> None:
        assert self._process.stdin and self._process.stdout
        with suppress(OSError):
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(START_S)
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()

    def _say(self, word: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()

    def _heard(self, word: str) -> Any:
        assert self._process.stdout
        if not select.select([self._process.stdout], [], [], ASK_S)[0]:
            raise StepFailed(f"a replica was silent for {ASK_S:.0f} s:\n{tail(self._log)}")
        line = self._process.stdout.readline()
        if not line.startswith(f"{word} "):
            raise StepFailed(f"a replica failed before its {word}:\n{tail(self._log)}")
        return json.loads(line.removeprefix(word))


def hollow(folder: Path) -> None:
    """Keep what tells the revision, and nothing of the contents: there may be no room for them twice."""
    for path in folder.glob("*.safetensors"):
        was = path.stat()
        os.truncate(path, 0)
        os.truncate(path, was.st_size)
        os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))


def answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def name_of(pid: int) -> str:
    """The module that a process runs."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return "(ended)"
    return words[words.index("-m") + 1] if "-m" in words else Path(words[0]).name


def pss_mib(pid: int) -> dict[str, float]:
    """Of one process; ``pss`` shares out what several processes have mapped."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    kib = {line.split(":")[0]: int(line.split()[1]) for line in rollup}
    return {"rss_mib": kib["Rss"] / 1024, "pss_mib": kib["Pss"] / 1024}


def read_bytes(pid: int) -> int:
    """What a process has read from files so far; 0 once it has ended."""
    with suppress(OSError):
        words = Path(f"/proc/{pid}/io").read_text().split()
        return int(words[words.index("rchar:") + 1])
    return 0
