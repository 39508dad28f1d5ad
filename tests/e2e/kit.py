"""Real processes for the end-to-end tests: the installed commands, the public client, an origin.

Owns the processes it starts and ends them all. Uses nothing of the project but what users get: the
commands ``cached``, ``preloader`` and ``cachectl``, and ``import cached``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cached import CachedError
from cached.client.rpc import connect, resolve_address
from cached.v1 import model_cache_pb2 as pb
from cached.v1 import operator_pb2 as op
from cached.v1.model_cache_pb2_grpc import ModelCacheStub
from cached.v1.operator_pb2_grpc import OperatorStub

BIN = Path(sys.executable).parent
WAIT_S = 30.0


def eventually(what: Callable[[], Any], within_s: float = WAIT_S, every_s: float = 0.05) -> Any:
    """``what()`` once it is true. Raises AssertionError with the last answer when the time is up."""
    deadline = time.monotonic() + within_s
    while True:
        answer = what()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_s:g} s: the last answer was {answer!r}")
        time.sleep(every_s)


def free_port() -> int:
    """Of those that the kernel gives to nobody by itself: it is still free when it is used a little later."""
    for _ in range(1000):
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


# --- models ---------------------------------------------------------------------------------


def write_safetensors(path: Path, tensors: dict[str, int], seed: int = 0) -> None:
    """A safetensors file of F32 vectors: name -> number of elements; the content follows from ``seed``."""
    header: dict[str, Any] = {}
    offset = 0
    for name, count in tensors.items():
        header[name] = {"dtype": "F32", "shape": [count], "data_offsets": [offset, offset + 4 * count]}
        offset += 4 * count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        block = hashlib.shake_256(str(seed).encode()).digest(1 << 20)
        # The block is varied by its number, so that no two pieces of a file are alike.
        for index, start in enumerate(range(0, offset, len(block))):
            mark = struct.pack("<QQ", seed, index)
            piece = (mark + block)[: min(len(block), offset - start)]
            file.write(piece)


def write_model(folder: Path, size_bytes: int = 1 << 20, seed: int = 0, sums: bool = True) -> dict[str, str]:
    """A small model: config.json and one safetensors file of about ``size_bytes``. Returns path -> sha256."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "test", "seed": seed}))
    count = max(2, size_bytes // 8)
    write_safetensors(folder / "model.safetensors", {"first": count, "second": count}, seed)
    return write_sums(folder) if sums else {}


def write_sums(folder: Path) -> dict[str, str]:
    """SHA256SUMS over what is there, as sha256sum writes it."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "SHA256SUMS")
    sums = {str(p.relative_to(folder)): sha256(p) for p in files}
    (folder / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    return sums


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- processes ------------------------------------------------------------------------------


class NodeKit:
    """One node: a data and a run directory, and whatever runs on them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.data_dir = root / "data"
        # Sockets' names are short; a test's temporary directory may not be.
        self.run_dir = Path(tempfile.mkdtemp(prefix="cached-e2e-"))
        self.http_port = free_port()
        self.base: Mapping[str, str] = os.environ
        """What every process of this node has in its environment."""
        self.daemon: subprocess.Popen[bytes] | None = None
        self.preloader: subprocess.Popen[bytes] | None = None
        self._others: list[subprocess.Popen[Any]] = []

    # --- the daemon -------------------------------------------------------------------------

    def serve(
        self,
        *arguments: str,
        with_preloader: bool = True,
        wait: bool = True,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Start ``cached serve`` (with ``env`` in the place of ours) and wait until it is ready."""
        command = [str(BIN / "cached"), "serve", "--data-dir", str(self.data_dir)]
        command += ["--run-dir", str(self.run_dir), "--http", f"127.0.0.1:{self.http_port}", *arguments]
        if with_preloader:
            command.append("--with-preloader")
        log = (self.root / "daemon.log").open("ab")
        calm = {**(self.base if env is None else env), "CACHED_CONFIG": str(self._calm())}
        self.daemon = subprocess.Popen(command, stderr=log, stdout=log, stdin=subprocess.DEVNULL, env=calm)
        log.close()
        if wait:
            eventually(self.is_ready)

    def _calm(self) -> Path:
        """A configuration for tests that bring none: nothing depends on what else runs or lies here."""
        path = self.root / "calm.toml"
        path.write_text(
            "[store]\nkeep_free = 0.0\n"
            "[pressure]\ncpu_percent = 100\nio_percent = 100\nmemory_percent = 100\n"
        )
        return path

    def is_ready(self) -> bool:
        assert self.daemon is not None
        if self.daemon.poll() is not None:
            raise AssertionError(f"the daemon ended with {self.daemon.returncode}:\n{self.log()}")
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(self.url("/health/ready"), timeout=5) as answer,
        ):
            return bool(answer.status == 200)
        return False

    def start_preloader(self, *arguments: str) -> None:
        command = [str(BIN / "preloader"), "serve", "--run-dir", str(self.run_dir)]
        command += ["--data-dir", str(self.data_dir), *arguments]
        with (self.root / "preloader.log").open("ab") as log:
            self.preloader = subprocess.Popen(
                command, stderr=log, stdout=log, stdin=subprocess.DEVNULL, env=self.base
            )

    def kill_daemon(self) -> None:
        assert self.daemon is not None
        self.daemon.kill()
        self.daemon.wait()

    def kill_preloader(self) -> None:
        assert self.preloader is not None
        self.preloader.kill()
        self.preloader.wait()

    def stop_preloader(self) -> int:
        """SIGTERM; returns the exit code."""
        assert self.preloader is not None
        self.preloader.terminate()
        return self.preloader.wait(20)

    def stop_daemon(self) -> int:
        """SIGTERM, as an orchestrator does; returns the exit code."""
        assert self.daemon is not None
        self.daemon.terminate()
        return self.daemon.wait(20)

    def log(self) -> str:
        path = self.root / "daemon.log"
        return path.read_text() if path.exists() else ""

    def log_events(self) -> list[dict[str, Any]]:
        """The daemon's log, line by line, as JSON."""
        return [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.http_port}{path}"

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics: name with its labels -> value."""
        with urllib.request.urlopen(self.url("/metrics"), timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        samples = (line.rpartition(" ") for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in samples}

    def processes(self, words: str) -> list[int]:
        """Pids of this node's processes whose command line has ``words``, e.g. "cached.fetch.worker"."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                if words in command and self._is_ours(int(entry.name), command):
                    found.append(int(entry.name))
        return found

    def _is_ours(self, pid: int, command: str) -> bool:
        """By its command line, or because a parent of it is ours (workers are told nothing by arguments)."""
        for _ in range(10):
            if str(self.run_dir) in command:
                return True
            try:
                pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
                command = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace")
            except (OSError, ValueError):
                return False
        return False

    # --- users ------------------------------------------------------------------------------

    def ctl(
        self, *arguments: str, code: int | None = 0, timeout_s: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run cachectl; ``code`` is the exit code that it must have (None: any)."""
        done = subprocess.run(
            [str(BIN / "cachectl"), *arguments],
            env=self.env(),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
        )
        if code is not None and done.returncode != code:
            raise AssertionError(
                f"cachectl {' '.join(arguments)} ended with {done.returncode}, not {code}\n"
                f"{done.stdout}{done.stderr}\ndaemon:\n{self.log()[-4000:]}"
            )
        return done

    def rows(self) -> list[dict[str, Any]]:
        return list(json.loads(self.ctl("ls", "-o", "json").stdout))

    def row(self, ref: str) -> dict[str, Any]:
        """The ref's row of ``cachectl ls``; empty where there is none."""
        return next((row for row in self.rows() if row["ref"] == ref), {})

    def env(self) -> dict[str, str]:
        return {**self.base, "CACHED_RUN_DIR": str(self.run_dir), "NO_COLOR": "1", "COLUMNS": "100"}

    def prefetch(self, ref: str, timeout_s: float = WAIT_S) -> CachedError | None:
        """Fetch and wait, at less cost than a command: what refused it, None if it came."""
        return self._operate(
            lambda stub: list(stub.Prefetch(op.PrefetchRequest(ref=ref, wait=True), timeout=timeout_s))
        )

    def pin(self, ref: str) -> CachedError | None:
        """Without waiting for it."""
        return self._operate(
            lambda stub: list(stub.Pin(op.PinRequest(ref=ref, device="disk"), timeout=WAIT_S))
        )

    def unpin(self, ref: str) -> CachedError | None:
        return self._operate(lambda stub: stub.Unpin(op.UnpinRequest(ref=ref), timeout=WAIT_S))

    def _operate(self, work: Callable[[OperatorStub], object]) -> CachedError | None:
        try:
            with connect(resolve_address(self.run_dir, operator=True)) as channel:
                work(OperatorStub(channel))
        except CachedError as error:
            return error
        return None

    def model(self, ref: str) -> pb.Model:
        """The ref as operators are shown it, at less cost than a command. Raises CachedError."""
        with connect(resolve_address(self.run_dir, operator=True)) as channel:
            return ModelCacheStub(channel).Get(pb.GetRequest(ref=ref), timeout=10)

    def leases(self, ref: str) -> list[pb.Claim]:
        """The ref's leases as operators are shown them; none where the ref is not known."""
        try:
            claims = self.model(ref).claims
        except CachedError as error:
            if error.reason != "NOT_HERE":
                raise
            return []
        return [claim for claim in claims if claim.kind == "lease"]

    def replica(self, code: str, *arguments: str) -> subprocess.Popen[str]:
        """A replica: Python that runs ``code`` (with ``cached`` installed), talking over stdin and stdout."""
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env=self.env(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._others.append(process)
        return process

    def holder(self, ref: str, on: str = "disk") -> subprocess.Popen[str]:
        """A replica that has acquired ``ref`` and holds it until its stdin closes or it is killed."""
        process = self.replica(HOLD, ref, on)
        assert process.stdout is not None
        line = process.stdout.readline()
        if line.strip() != "held":
            process.kill()
            raise AssertionError(f"the replica did not get its model: {line}{process.communicate()[1]}")
        return process

    def close(self) -> None:
        """End everything, gently first so that with-preloader daemons end theirs."""
        for other in self._others:
            other.kill()
            other.wait()
            for pipe in (other.stdin, other.stdout, other.stderr):
                if pipe is not None:
                    pipe.close()
        for process in (self.daemon, self.preloader):
            if process is not None and process.poll() is None:
                process.terminate()
                try:
                    process.wait(15)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        for pid in self.processes("preloader"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.run_dir, ignore_errors=True)


def expect(replica: subprocess.Popen[str], *lines: str) -> None:
    """The next lines that a replica says are these."""
    for line in lines:
        got = said(replica)
        assert got == line, f"{got!r} came where {line!r} was expected"


def said(replica: subprocess.Popen[str]) -> str:
    """The next line that a replica says; one that ends instead fails the test with what it died of."""
    assert replica.stdout is not None and replica.stderr is not None
    line = replica.stdout.readline()
    if not line:
        raise AssertionError(f"the replica ended:\n{replica.stderr.read()}")
    return line.strip()


def is_gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has reaped yet has."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state in "ZX"


def check_store(node: NodeKit) -> None:
    """Nothing unproven can be served: what lies in the data directory is whole, and the daemon agrees."""
    check_data_dir(node.data_dir)
    node.ctl("verify", "--all")


def check_data_dir(data_dir: Path) -> None:
    """At rest: every blob is what its name says; every tree is an artifact's, whole, and made of blobs."""
    blobs, artifacts = check_blobs(data_dir)
    trees = {path.name: path for path in (data_dir / "trees").iterdir()}
    assert set(trees) == set(artifacts)
    for name, expected in artifacts.items():
        files = [path for path in trees[name].rglob("*") if not path.is_dir()]
        assert {str(path.relative_to(trees[name])) for path in files} == set(expected)
        for path in files:
            assert path.samefile(blobs[expected[str(path.relative_to(trees[name]))]])


def check_blobs(data_dir: Path) -> tuple[dict[str, Path], dict[str, dict[str, str]]]:
    """What holds at any instant of a death: every blob is what its name says, and no artifact lacks one.

    Returns the blobs by digest, and each artifact's digests by path.
    """
    blobs = {path.name: path for path in (data_dir / "blobs").rglob("*") if path.is_file()}
    assert {name: sha256(path) for name, path in blobs.items()} == {name: name for name in blobs}
    artifacts = {}
    for path in (data_dir / "artifacts").glob("[!.]*.json"):
        files = json.loads(path.read_text())["files"]
        artifacts[path.stem] = {file["path"]: file["blob"]["sha256"] for file in files}
        assert set(artifacts[path.stem].values()) <= set(blobs)
    return blobs, artifacts


HOLD = """
import sys, cached
model = cached.acquire(sys.argv[1], on=sys.argv[2], timeout_s=60)
print("held", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def running_node(root: Path, *arguments: str, with_preloader: bool = True) -> Iterator[NodeKit]:
    """A node with its daemon, for one test."""
    node = NodeKit(root)
    try:
        node.serve(*arguments, with_preloader=with_preloader)
        yield node
    finally:
        node.close()
