"""SIGKILL of everything, at several moments: what is held goes on, and the rest recovers without help.

In every case a replica holds tensors of another model in memory and reads them all again after the death,
and another replica waits for the model that is on its way: it gets it, whoever died meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit import (
    BIN,
    NodeKit,
    check_store,
    eventually,
    expect,
    is_gone,
    said,
    sha256,
    write_model,
    write_safetensors,
    write_sums,
)

from benchmarks.origin import Origin

MIB = 1 << 20
CHUNK_BYTES = 16 * MIB
CONNECTIONS = 2
BIG_BYTES = 56 * MIB
"""Three chunks and a half: with two connections, a death always finds some finished and some not."""
SLOW_BYTES_PER_S = 60e6
LOADED_BYTES = 128 * MIB
MOMENTS = {"started": 0.0, "middle": 0.5, "end": 0.93}
LOADS_DONE = 'cached_loads_total{device="host",outcome="done"}'

# Says the digest of the tensors that it holds, each time it is asked.
HOLDER = """
import hashlib, sys, torch, cached
model = cached.acquire(sys.argv[1], on=sys.argv[2], timeout_s=90)
tensors = dict(model.tensors)
print("held", flush=True)
for _ in sys.stdin:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].view(torch.uint8).numpy())
    print(digest.hexdigest(), flush=True)
"""

# Waits for a model, and then says the digest of its largest file.
WAITER = """
import hashlib, sys, cached
model = cached.acquire(sys.argv[1], on=sys.argv[2], timeout_s=90)
print("held", flush=True)
for _ in sys.stdin:
    with open(model.path / "model.safetensors", "rb") as file:
        print(hashlib.file_digest(file, "sha256").hexdigest(), flush=True)
"""

IMPATIENT = """
import sys, cached
try:
    cached.acquire(sys.argv[1], timeout_s=float(sys.argv[2]))
except cached.CachedError as error:
    print(error.exit_code, error.reason, error.message, "| hint:", error.hint, flush=True)
"""


# --- what a case is made of -----------------------------------------------------------------


class Replica:
    """A process that has acquired a model, or waits for it, and says on request what it can read of it."""

    def __init__(self, node: NodeKit, code: str, ref: str, on: str, expected: str) -> None:
        self._process = node.replica(code, ref, on)
        self._expected = expected

    def holds(self) -> None:
        """Waits until it has its model."""
        expect(self._process, "held")

    def reads_all(self) -> None:
        """Every byte is as the origin has it."""
        assert self._process.stdin is not None
        self._process.stdin.write("read\n")
        self._process.stdin.flush()
        assert said(self._process) == self._expected

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def _waiter(node: NodeKit, ref: str, folder: Path, on: str = "host") -> Replica:
    return Replica(node, WAITER, ref, on, sha256(folder / "model.safetensors"))


def _serve(node: NodeKit) -> None:
    config = node.root / "cached.toml"
    config.write_text(f"[transfer]\nconnections = {CONNECTIONS}\n")
    node.serve("--config", str(config))


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeKit]:
    """One node for all cases; each has a model of its own and leaves the node running."""
    node = NodeKit(tmp_path_factory.mktemp("kill"))
    try:
        _serve(node)
        yield node
    finally:
        node.close()


@pytest.fixture(scope="module")
def held_ref(node: NodeKit) -> str:
    write_model(node.root / "held", 3 * MIB, seed=1)
    return f"file://{node.root}/held/"


@pytest.fixture(scope="module")
def held(node: NodeKit, held_ref: str) -> Iterator[Replica]:
    """A replica that has its tensors before anything dies, and goes on through everything."""
    whole = (node.root / "held" / "model.safetensors").read_bytes()
    tensors = whole[8 + int.from_bytes(whole[:8], "little") :]
    replica = Replica(node, HOLDER, held_ref, "host", hashlib.sha256(tensors).hexdigest())
    replica.holds()
    yield replica
    replica.reads_all()
    replica.end()


def _workers(node: NodeKit) -> list[int]:
    return node.processes("cached.fetch.worker")


def _standbys(node: NodeKit) -> list[int]:
    return node.processes("-m preloader.serve")


def _parents(node: NodeKit) -> list[int]:
    return node.processes("-m preloader serve")


def _loads(node: NodeKit) -> int:
    return int(node.metrics().get(LOADS_DONE, 0))


def _kill(pids: list[int]) -> None:
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def _are_gone(pids: list[int]) -> None:
    eventually(lambda: all(is_gone(pid) for pid in pids), within_s=5)


class Death:
    """One process's end, and what has to be so afterwards."""

    def __init__(self, node: NodeKit, who: str) -> None:
        """Kills ``who``, and waits for the end of what may not outlive it."""
        self._node = node
        self._who = who
        self._parents, self._standbys = _parents(node), _standbys(node)
        workers = _workers(node)
        match who:
            case "daemon":
                node.kill_daemon()
                _are_gone(workers)
                # The origin may be filling the connection of one that is dead.
                time.sleep(0.3)
            case "worker":
                _kill(workers)
                _are_gone(workers)
            case "standby":
                _kill(self._standbys)
                _are_gone(self._standbys)
            case "parent":
                _kill(self._parents)
                _are_gone([*self._parents, *self._standbys])

    def is_mended(self) -> None:
        """What died is there again, once; what did not die is the same process as before."""
        if self._who == "daemon":
            _serve(self._node)
        eventually(lambda: self._new(_standbys(self._node), self._standbys, "standby", "parent"))
        eventually(lambda: self._new(_parents(self._node), self._parents, "parent"))

    def _new(self, now: list[int], before: list[int], *who: str) -> bool:
        if self._who in who:
            return len(now) == 1 and now != before
        assert now == before
        return True


def _is_all_well(node: NodeKit, ref: str, held_ref: str, waiting: Replica, held: Replica) -> None:
    """Both replicas have all their bytes, both models stand, and the store is whole. Ends ``waiting``."""
    waiting.reads_all()
    held.reads_all()
    for name in (ref, held_ref):
        eventually(lambda name=name: list(node.model(name).devices) == ["disk", "host"])
    check_store(node)
    waiting.end()


def _possible_loads(before: int, who: str) -> set[int]:
    """Loads that the daemon may have counted once one model more stands; a new daemon counts from 0.

    Where memory died, what was held is loaded anew, and so is a model whose load had just ended.
    """
    match who:
        case "daemon":
            return {0, 1}
        case "worker":
            return {before + 1}
        case _:
            return {before + 2, before + 3}


def _forget(node: NodeKit, ref: str) -> None:
    eventually(lambda: not node.leases(ref))
    node.ctl("evict", ref)


def _seed(*words: str) -> int:
    return int.from_bytes(hashlib.sha256("/".join(words).encode()).digest()[:4], "little")


# --- transfers ------------------------------------------------------------------------------


class Journey:
    """One model on its way from an origin: what was sent, and what of it is finished on this disk."""

    def __init__(self, node: NodeKit, origin: Origin, folder: Path) -> None:
        self._node = node
        self._origin = origin
        self._name = folder.name
        self._sums = write_sums(folder)
        self.sizes = {path: (folder / path).stat().st_size for path in self._sums}

    @property
    def share_sent(self) -> float:
        return self.sent["model.safetensors"] / self.sizes["model.safetensors"]

    @property
    def sent(self) -> dict[str, int]:
        return {path: self._origin.sent[f"{self._name}/{path}"] for path in self.sizes}

    def missing(self) -> dict[str, int]:
        """Bytes of each file that neither a blob nor a line of its journal has."""
        return {path: 0 if self._is_committed(path) else self._unwritten(path) for path in self.sizes}

    def _is_committed(self, path: str) -> bool:
        digest = self._sums[path]
        return (self._node.data_dir / "blobs" / "sha256" / digest[:2] / digest).exists()

    def _unwritten(self, path: str) -> int:
        for ingest in (self._node.data_dir / "ingest").iterdir():
            revision = json.loads((ingest / "revision.json").read_text())
            names = [file["path"] for file in revision["files"]]
            if f"/{self._name}/" in revision["ref"]:
                return self.sizes[path] - self._in_journal(ingest / f"{names.index(path)}.journal", path)
        return self.sizes[path]

    def _in_journal(self, journal: Path, path: str) -> int:
        *lines, _torn = (journal.read_text() if journal.exists() else "").split("\n")
        chunks = {int(line.split()[0]) for line in lines if not line.startswith("done")}
        return sum(min(CHUNK_BYTES, self.sizes[path] - chunk * CHUNK_BYTES) for chunk in chunks)


@pytest.fixture
def origin(node: NodeKit) -> Iterator[Origin]:
    root = node.root / "origin"
    root.mkdir(exist_ok=True)
    with Origin(root, SLOW_BYTES_PER_S) as running:
        yield running


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("who", ["daemon", "worker", "standby", "parent"])
def test_a_transfer_goes_on(
    node: NodeKit, held: Replica, held_ref: str, origin: Origin, who: str, moment: str
) -> None:
    folder = node.root / "origin" / f"{who}-{moment}"
    write_model(folder, BIG_BYTES, seed=_seed(who, moment))
    write_safetensors(folder / "first.safetensors", {"early": MIB // 4}, seed=_seed(moment, who))
    journey = Journey(node, origin, folder)
    ref = f"{origin.url}{folder.name}/"
    loads = _loads(node)

    waiting = _waiter(node, ref, folder)
    eventually(lambda: journey.share_sent > MOMENTS[moment], every_s=0.005)
    death = Death(node, who)
    held.reads_all()
    missing, before = journey.missing(), journey.sent
    origin.rate.bytes_per_s = None
    death.is_mended()
    waiting.holds()

    match who:
        case "daemon":
            # Exactly what was not finished: no blob again, no chunk again.
            assert {path: journey.sent[path] - before[path] for path in missing} == missing
        case "worker":
            most = {path: size + CONNECTIONS * CHUNK_BYTES for path, size in journey.sizes.items()}
            assert all(journey.sent[path] <= most[path] for path in most)
            finished = [path for path, size_bytes in missing.items() if size_bytes == 0]
            assert all(journey.sent[path] == journey.sizes[path] for path in finished)
        case _:
            assert journey.sent == journey.sizes
    _is_all_well(node, ref, held_ref, waiting, held)
    assert _loads(node) in _possible_loads(loads, who)
    _forget(node, ref)


# --- loads ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(node: NodeKit) -> tuple[str, Path]:
    """A model on disk that takes a moment to load."""
    folder = node.root / "large"
    write_model(folder, LOADED_BYTES, seed=2, sums=False)
    ref = f"file://{folder}/"
    node.ctl("prefetch", ref, "--wait")
    return ref, folder


def _drop_cache(node: NodeKit) -> None:
    """Loads read from the disk again, and so take their time."""
    for path in (node.data_dir / "blobs").rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def _locked_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmLck"))


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("who", ["daemon", "standby", "parent"])
def test_a_load_goes_on(
    node: NodeKit, held: Replica, held_ref: str, large: tuple[str, Path], who: str, moment: str
) -> None:
    ref, folder = large
    # A standby that was just started has nothing but what is claimed. (A new parent starts it without delay.)
    if "host" in node.model(ref).devices:
        Death(node, "parent").is_mended()
        eventually(lambda: list(node.model(held_ref).devices) == ["disk", "host"])
        assert list(node.model(ref).devices) == ["disk"]
    _drop_cache(node)
    (standby,) = _standbys(node)
    before, loads = _locked_bytes(standby), _loads(node)

    waiting = _waiter(node, ref, folder)
    share = MOMENTS[moment] * LOADED_BYTES
    eventually(lambda: _locked_bytes(standby) - before > share, every_s=0.001)
    death = Death(node, who)
    held.reads_all()
    death.is_mended()
    waiting.holds()

    _is_all_well(node, ref, held_ref, waiting, held)
    assert _loads(node) in _possible_loads(loads, who)


# --- ends that are asked for ------------------------------------------------------------------


def test_who_waits_for_a_daemon_that_does_not_come_back_is_told_so(
    cold_node: NodeKit, origin: Origin, tmp_path: Path
) -> None:
    node = cold_node
    folder = origin.root / "nobody"
    write_model(folder, BIG_BYTES, seed=3)
    node.serve(with_preloader=False)
    waiting = node.replica(IMPATIENT, f"{origin.url}nobody/", "4")
    eventually(lambda: origin.sent["nobody/model.safetensors"] > 0)
    began = time.monotonic()
    node.kill_daemon()
    assert str(node.run_dir) in node.ctl("status", code=6).stderr
    words = said(waiting)
    assert time.monotonic() - began < 6
    assert words.startswith("6 ") and str(node.run_dir) in words and "hint:" in words


def test_sigterm_parks_and_the_next_start_goes_on(cold_node: NodeKit, origin: Origin, tmp_path: Path) -> None:
    node = cold_node
    node.start_preloader("--same-group")
    node.serve(with_preloader=False)
    write_model(tmp_path / "held", MIB, seed=4)
    held_ref = f"file://{tmp_path}/held/"
    held = _waiter(node, held_ref, tmp_path / "held")
    held.holds()
    folder = origin.root / "parked"
    write_model(folder, BIG_BYTES, seed=5)
    ref = f"{origin.url}parked/"
    node.ctl("pin", ref)
    waiting = _waiter(node, ref, folder, "disk")
    journey = Journey(node, origin, folder)
    eventually(lambda: journey.share_sent > 0.3)
    origin.rate.bytes_per_s = 12e6  # it is not done before what still runs is ended
    workers, standbys = _workers(node), _standbys(node)

    began = time.monotonic()
    assert node.stop_daemon() == 0
    assert time.monotonic() - began < 10
    assert workers and all(is_gone(pid) for pid in workers)
    assert _standbys(node) == standbys
    assert len(list((node.run_dir / "leases").iterdir())) == 1
    assert len(list((node.data_dir / "claims").iterdir())) == 1
    missing, before = journey.missing(), journey.sent
    held.reads_all()

    origin.rate.bytes_per_s = None
    node.serve(with_preloader=False)
    waiting.holds()
    waiting.reads_all()
    assert {path: journey.sent[path] - before[path] for path in missing} == missing
    assert [claim.kind for claim in node.model(held_ref).claims] == ["lease"]
    assert "pin" in [claim.kind for claim in node.model(ref).claims]
    eventually(lambda: list(node.model(held_ref).devices) == ["disk", "host"])
    assert _loads(node) == 0 and _standbys(node) == standbys
    check_store(node)


def _serve_in_a_group(node: NodeKit) -> None:
    """As from a terminal: what is started belongs to the daemon's process group, unless it leaves it."""
    command = [str(BIN / "cached"), "serve", "--data-dir", str(node.data_dir), "--run-dir", str(node.run_dir)]
    command += ["--http", f"127.0.0.1:{node.http_port}", "--with-preloader"]
    with (node.root / "daemon.log").open("ab") as log:
        node.daemon = subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )


def _nothing_runs(node: NodeKit) -> bool:
    return not node.processes(str(node.run_dir))


@pytest.mark.parametrize("how", ["SIGTERM", "Ctrl-C", "SIGTERM after kill -9"])
def test_with_preloader_nothing_is_left_running(cold_node: NodeKit, origin: Origin, how: str) -> None:
    node = cold_node
    write_model(origin.root / "left", BIG_BYTES, seed=6)
    _serve_in_a_group(node)
    eventually(node.is_ready)
    eventually(lambda: _standbys(node))
    if how == "SIGTERM after kill -9":
        (parent,) = _parents(node)
        node.kill_daemon()
        _serve_in_a_group(node)
        eventually(node.is_ready)
        assert _parents(node) == [parent]
    node.ctl("pin", f"{origin.url}left/", "--on", "host")
    eventually(lambda: origin.sent["left/model.safetensors"] > 0)
    everything = [*_workers(node), *_standbys(node), *_parents(node)]
    assert len(everything) >= 3 and node.daemon is not None

    if how == "Ctrl-C":
        os.killpg(node.daemon.pid, signal.SIGINT)
    else:
        node.daemon.terminate()
    assert node.daemon.wait(10) == 0
    assert all(is_gone(pid) for pid in everything) and _nothing_runs(node)


def test_a_stop_at_any_moment_of_the_start_leaves_nothing_running(cold_node: NodeKit) -> None:
    node = cold_node
    for tenths in range(1, 12, 2):
        _serve_in_a_group(node)
        assert node.daemon is not None
        time.sleep(tenths / 10)
        node.daemon.terminate()
        # Before its first line of Python has run, a signal ends it by itself.
        assert node.daemon.wait(10) in (0, -signal.SIGTERM)
        time.sleep(0.2)
        assert _nothing_runs(node), f"after {tenths / 10} s"


# --- the preloader comes and goes by itself ---------------------------------------------------


def test_a_preloader_that_is_there_long_before_the_daemon(cold_node: NodeKit, tmp_path: Path) -> None:
    node = cold_node
    write_model(tmp_path / "m", MIB)
    node.start_preloader("--same-group")
    eventually(lambda: (node.run_dir / "standby" / "host.sock").exists())
    standbys = _standbys(node)
    time.sleep(2)
    node.serve(with_preloader=False)
    node.ctl("pin", f"file://{tmp_path}/m/", "--on", "host", "--wait")
    assert _standbys(node) == standbys


def test_a_preloader_that_comes_long_after_the_daemon(cold_node: NodeKit, tmp_path: Path) -> None:
    node = cold_node
    write_model(tmp_path / "m", MIB)
    ref = f"file://{tmp_path}/m/"
    node.serve(with_preloader=False)
    node.ctl("pin", ref, "--on", "host")
    eventually(lambda: list(node.model(ref).devices) == ["disk"])
    time.sleep(2)
    assert list(node.model(ref).devices) == ["disk"]
    node.start_preloader("--same-group")
    eventually(lambda: list(node.model(ref).devices) == ["disk", "host"])
    # With a preloader of its own, a daemon that comes later takes this one too.
    (parent,) = node.processes("preloader serve")
    node.stop_daemon()
    node.serve(with_preloader=True)
    eventually(lambda: list(node.model(ref).devices) == ["disk", "host"])
    assert _loads(node) == 0 and node.processes("preloader serve") == [parent]


# --- at random ----------------------------------------------------------------------------------


def test_a_short_soak() -> None:
    """The same chance each time; ``python -m benchmarks.soak`` goes on for as long as one likes."""
    command = [sys.executable, "-m", "benchmarks.soak", "--seconds", "8", "--seed", "1"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all held" in done.stdout
