"""Our daemon for one run: fresh directories, nothing but defaults, and its end.

Also the run that kills it: a fetch worker dies midway, and the origin's counters tell what is sent again.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.demo.processes import DemoError, Places, Process, remove_tree, start
from benchmarks.peers.clients import Job
from benchmarks.peers.measuring import Sample, launch, run_client, trees, wait_for
from benchmarks.peers.stage import BUCKET, MODEL, ORG, ROOT, Stage
from cached.config import TransferSettings
from cached.model import CHUNK_BYTES

START_S = 30.0
LOOK_S = 0.005
KILLED_RATE_MBIT = 4000
"""Of the origin whose worker is killed: a download that takes long enough to be hit midway."""
RESUME_BYTES = TransferSettings().connections * CHUNK_BYTES
"""At most this is sent again after a death: one chunk for each connection."""


def environment(stage: Stage, places: Places) -> dict[str, str]:
    """For all: this checkout's code, the self-made authority, credentials that nobody checks, no proxies."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("CACHED_", "AWS_", "HF_")) and not name.lower().endswith("_proxy")
    }
    return kept | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH", "")])]),
        "PYTHONUNBUFFERED": "1",
        "REQUESTS_CA_BUNDLE": str(stage.authority),
        "AWS_ACCESS_KEY_ID": "bench",
        "AWS_SECRET_ACCESS_KEY": "bench",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(places.work / "hf-home"),
        "CACHED_RUN_DIR": str(places.run / "r"),
        "HOME": str(places.work),
    }


@contextmanager
def daemon(stage: Stage, places: Places, env: Mapping[str, str], data_dir: Path) -> Iterator[Process]:
    """A daemon that serves. Its data directory stays; its run directory goes."""
    config = places.work / "cached.toml"
    config.write_text(settings(stage))
    run_dir = Path(env["CACHED_RUN_DIR"])
    argv = [str(Path(sys.executable).with_name("cached")), "serve", "--config", str(config)]
    argv += ["--data-dir", str(data_dir), "--run-dir", str(run_dir)]
    process = start("the daemon", argv, places.work / "daemon.log", env, places.work)
    try:
        wait_until_serving(process, run_dir / "replicas" / "cached.sock")
        yield process
    finally:
        process.stop()
        remove_tree(run_dir)


def settings(stage: Stage) -> str:
    """Where the bucket and the Hub are, and room for what is measured: all else is as it comes."""
    return f"""
[store]
capacity_bytes = {2 * stage.size_bytes + 2**30}
[[source]]
prefix = "s3://{BUCKET}"
endpoint = "{stage.urls["s3"]}"
region = "us-east-1"
addressing = "path"
[[source]]
prefix = "hf://{ORG}"
endpoint = "{stage.urls["hf"]}"
"""


def wait_until_serving(process: Process, path: Path) -> None:
    until = time.monotonic() + START_S
    while True:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
                return
            except OSError:
                process.check()
        if time.monotonic() > until:
            raise DemoError(f"the daemon did not serve within {START_S:.0f} s")
        time.sleep(LOOK_S)


def run_ours(
    stage: Stage,
    places: Places,
    env: Mapping[str, str],
    job: Job,
    tiny: str,
    level: Callable[[], None],
    timeout_s: float,
) -> Sample:
    """One download through a daemon that has nothing, or just the model ``tiny``, which it fetched before."""
    target, log = Path(job.target), places.work / "client.log"
    with daemon(stage, places, env, target) as process:
        if tiny:
            run_client(client_argv(replace(job, ref=tiny)), env, target, log, lambda: None, timeout_s)
        pids = (process.popen.pid,)
        return run_client(client_argv(job), env, target, log, level, timeout_s, pids, durable=True)


def client_argv(job: Job) -> list[str]:
    return [sys.executable, "-P", "-m", "benchmarks.peers.clients", job.encode()]


# --- resuming -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Resumed:
    """What was sent before the worker was killed, and what was sent twice in the end."""

    before_bytes: int
    again_bytes: int


def run_killed(stage: Stage, places: Places, env: Mapping[str, str], job: Job, timeout_s: float) -> Resumed:
    """Kill the fetch worker (SIGKILL) when half of the model was sent; the daemon goes on by itself."""
    target = Path(job.target)
    folder = places.work / "origin" / BUCKET
    argv = [sys.executable, str(ROOT / "benchmarks" / "origin.py"), str(folder)]
    argv += ["--rate-mbit", str(KILLED_RATE_MBIT)]
    origin = start("the origin", argv, places.work / "origin.log", env, ROOT)
    url = origin.wait_for(r"(http://127\.0\.0\.1:\d+/)", START_S)
    log = places.work / "client.log"
    with daemon(stage, places, env, target) as process:
        client = launch(client_argv(replace(job, ref=f"{url}{MODEL}/")), env, target, log, piped=True)
        assert client.stdin
        wait_for(client, "ready", log, timeout_s, None)
        client.stdin.write(b"go\n")
        client.stdin.flush()
        before = wait_until_sent(url, stage.size_bytes // 2, timeout_s)
        os.kill(worker_of(process.popen.pid), signal.SIGKILL)
        wait_for(client, "done", log, timeout_s, None)
        client.communicate(timeout=timeout_s)
    again = sent_bytes(url) - stage.size_bytes
    origin.stop()
    return Resumed(before, again)


def wait_until_sent(url: str, size_bytes: int, timeout_s: float) -> int:
    until = time.monotonic() + timeout_s
    while (sent := sent_bytes(url)) < size_bytes:
        if time.monotonic() > until:
            raise DemoError(f"the origin sent {sent} bytes within {timeout_s:.0f} s")
        time.sleep(LOOK_S)
    return sent


def sent_bytes(url: str) -> int:
    """Body bytes of the weights."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{url}-/stats", timeout=START_S) as response:
        sent = json.load(response)["sent"]
    return sum(count for path, count in sent.items() if not path.endswith("SHA256SUMS"))


def worker_of(daemon_pid: int) -> int:
    """The process below the daemon that has a partial blob open."""
    for pid in trees([daemon_pid]):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            if link.is_symlink() and os.readlink(link).endswith(".part"):
                return pid
    raise DemoError("the download was over before it could be killed")
