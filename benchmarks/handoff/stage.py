"""What every part stands on: the directories, the daemon or a preloader by itself, and one replica's run.

Owns the processes that it starts. Measures nothing but what a replica says of itself.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import TimeoutExpired

from rich.console import Console

from benchmarks.demo.processes import DemoError, Places, Process, remove_tree, run, start
from benchmarks.handoff.replica import Task
from benchmarks.peers.measuring import launch, wait_for
from benchmarks.peers.node import wait_until_serving

ROOT = Path(__file__).parents[2]
START_S = 30.0
TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Replica:
    """What one process said. ``state``: its state dict's digest, empty where it was not asked for."""

    imports: Mapping[str, float]
    took: Mapping[str, float]
    state: str


@dataclass(frozen=True, slots=True)
class Stage:
    places: Places
    env: Mapping[str, str]
    console: Console
    began: float = field(default_factory=time.monotonic)

    @property
    def data_dir(self) -> Path:
        return self.places.work / "data"

    @property
    def run_dir(self) -> Path:
        return Path(self.env["CACHED_RUN_DIR"])

    @property
    def log(self) -> Path:
        return self.places.work / "client.log"

    def say(self, words: str) -> None:
        self.console.print(f"· {time.monotonic() - self.began:.0f} s: {words}", markup=False, soft_wrap=True)

    @contextmanager
    def daemon(self, *options: str) -> Iterator[Process]:
        """A daemon that serves. Its data directory stays; its run directory goes."""
        config = self.places.work / "cached.toml"
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        config.write_text(f"[standby]\nhost_capacity_bytes = {memory * 6 // 10}\n")
        argv = [command("cached"), "serve", "--config", str(config), "--data-dir", str(self.data_dir)]
        argv += ["--run-dir", str(self.run_dir), *options]
        process = start("the daemon", argv, self.places.work / "daemon.log", self.env, self.places.work)
        try:
            wait_until_serving(process, self.run_dir / "replicas" / "cached.sock")
            yield process
        finally:
            process.stop()
            remove_tree(self.run_dir)

    @contextmanager
    def preloader(self) -> Iterator[Process]:
        """A preloader with nobody who tells it anything."""
        argv = [command("preloader"), "serve", "--data-dir", str(self.data_dir)]
        argv += ["--run-dir", str(self.run_dir), "--same-group"]
        self.run_dir.mkdir(exist_ok=True)
        process = start("the preloader", argv, self.places.work / "preloader.log", self.env, self.places.work)
        try:
            wait_for_path(process, self.run_dir / "standby" / "host.sock")
            yield process
        finally:
            process.stop()
            remove_tree(self.run_dir)

    def fetch(self, ref: str) -> Path:
        """Wait until it is proven on disk; its directory."""
        argv = [command("cachectl"), "path", ref]
        return Path(run(argv, self.env, self.places.work, TIMEOUT_S, capture=True).strip())

    def evict(self, ref: str) -> None:
        run([command("cachectl"), "evict", ref], self.env, self.places.work, TIMEOUT_S, capture=True)

    def python(self, module: str, *argv: str) -> str:
        """What one of our modules prints."""
        return run([sys.executable, "-P", "-m", module, *argv], self.env, ROOT, TIMEOUT_S, capture=True)

    def stand(self, ref: str) -> None:
        """Have it in host memory; nobody counts how long that takes."""
        self.replica(Task("ours-host", ref, "", touch=False), {}, ask_sum=False)

    def replica(self, task: Task, env: Mapping[str, str], ask_sum: bool) -> Replica:
        """One fresh process, from its start to its end. Raises DemoError."""
        argv = [sys.executable, "-P", "-m", "benchmarks.handoff.replica", task.encode()]
        process = launch(argv, {**self.env, **env}, self.places.work, self.log, piped=True)
        assert process.stdin and process.stdout
        try:
            imports = wait_for(process, "ready", self.log, TIMEOUT_S, None)
            process.stdin.write(b"go\n")
            process.stdin.flush()
            took = wait_for(process, "done", self.log, TIMEOUT_S, None)
            process.stdin.write(b"sum\n" if ask_sum else b"end\n")
            process.stdin.flush()
            state = wait_for(process, "sum", self.log, TIMEOUT_S, None) if ask_sum else ""
        finally:
            process.stdin.close()
            with suppress(TimeoutExpired):
                process.wait(START_S)
            process.kill()
            process.wait()
            process.stdout.close()
        return Replica(json.loads(imports), json.loads(took), state)


def command(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def environment(places: Places) -> dict[str, str]:
    """This checkout's code, and nothing that the caller has set for a daemon of their own."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("CACHED_", "RUNAI_", "NUMPY_")) and not name.lower().endswith("_proxy")
    }
    return kept | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH", "")])]),
        "PYTHONUNBUFFERED": "1",
        "CACHED_RUN_DIR": str(places.run / "r"),
    }


def wait_for_path(process: Process, path: Path) -> None:
    until = time.monotonic() + START_S
    while not path.exists():
        process.check()
        if time.monotonic() > until:
            raise DemoError(f"{path} did not appear within {START_S:.0f} s")
        time.sleep(0.01)
