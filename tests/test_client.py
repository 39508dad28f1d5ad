"""What a replica sees: acquire, the lease, the tensors, and every way in which it can go wrong."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from client_fake import REF, FakeDaemon
from safetensors.torch import save

import cached
from cached.client import handoff
from cached.model import ErrorKind, Problem
from cached.v1 import model_cache_pb2 as pb

ROOT = Path(__file__).resolve().parent.parent


def tiny() -> dict[str, bytes]:
    """Two weight files, and what lies beside them."""
    torch.manual_seed(0)
    first = {"net.weight": torch.randn(4, 3), "net.bias": torch.randn(4)}
    second = {"head.weight": torch.randn(2, 4).to(torch.bfloat16), "empty": torch.empty(0, 4)}
    return {
        "config.json": b'{"hidden": 4}',
        "empty.txt": b"",
        "weights/model-00001-of-00002.safetensors": save(first),
        "weights/model-00002-of-00002.safetensors": save(second, {"format": "pt"}),
    }


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    fake = FakeDaemon(tmp_path, tiny())
    fake.start()
    yield fake
    fake.stop()


@pytest.fixture(params=["disk", "host"])
def model(request: pytest.FixtureRequest, daemon: FakeDaemon) -> Iterator[cached.Model]:
    with cached.acquire(REF, on=request.param, run_dir=daemon.run_dir, timeout_s=30) as acquired:
        yield acquired


def in_a_process(
    daemon: FakeDaemon, script: str, *arguments: str, **environment: str
) -> subprocess.Popen[str]:
    """Run ``script`` in a process of its own, told by its environment where the daemon is."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CACHED_RUN_DIR": str(daemon.run_dir), **environment}
    command = [sys.executable, "-c", script, REF, *arguments]
    return subprocess.Popen(command, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def output_of(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return said


def eventually(holds: Callable[[], bool]) -> bool:
    """Whether it comes true; the fake, and gRPC, close their descriptors in the background."""
    end = time.monotonic() + 15
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def open_paths() -> list[str]:
    """What this process, and so the fake in it, has open."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # another thread has closed it meanwhile
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return found


def mapped_file(address: int) -> str:
    """What is mapped at an address of this process, by /proc."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, path = line.split(maxsplit=5)
        begin, _, end = span.partition("-")
        if int(begin, 16) <= address < int(end, 16):
            return path
    return ""


# --- what comes ---


def test_a_model_says_what_it_is(daemon: FakeDaemon, model: cached.Model) -> None:
    assert model.id == daemon.manifest.id
    assert (model.ref, model.revision, model.attested) == (REF, "5" * 64, True)
    assert model.path == daemon.tree
    assert [f.path for f in model.files] == sorted(tiny())
    assert [f.size_bytes for f in model.files] == [len(c) for _, c in sorted(tiny().items())]
    assert model.device in repr(model) and model.id in repr(model)


def test_tensors_are_the_files_content(model: cached.Model) -> None:
    from safetensors.torch import load

    expected = {}
    for path, content in tiny().items():
        expected |= load(content) if path.endswith(".safetensors") else {}
    assert set(model.tensors) == set(expected)
    for name, tensor in model.tensors.items():
        assert tensor.dtype == expected[name].dtype and tensor.shape == expected[name].shape
        assert torch.equal(tensor, expected[name])


def test_no_tensor_is_a_copy(daemon: FakeDaemon, model: cached.Model) -> None:
    for name in ("net.weight", "net.bias", "head.weight"):
        assert mapped_file(model.tensors[name].data_ptr()).startswith(str(daemon.tree))


def test_each_tensor_has_a_storage_of_its_own(model: cached.Model) -> None:
    # Else saving one tensor would save its whole file, and loaders would take all for tied.
    tensor = model.tensors["net.bias"]
    assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert tensor.untyped_storage().data_ptr() == tensor.data_ptr()


def test_load_state_dict_takes_the_tensors_themselves(daemon: FakeDaemon, model: cached.Model) -> None:
    net = torch.nn.ModuleDict({"net": torch.nn.Linear(3, 4), "head": torch.nn.Linear(4, 2, bias=False)})
    missing, unexpected = net.load_state_dict(model.tensors, assign=True, strict=False)
    assert (missing, unexpected) == ([], ["empty"])
    assert mapped_file(net["net"].weight.data_ptr()).startswith(str(daemon.tree))
    assert net["net"](torch.ones(3)).shape == (4,)


def test_a_write_stays_this_replicas_own(daemon: FakeDaemon, model: cached.Model) -> None:
    before = model.tensors["net.weight"].clone()
    with cached.acquire(REF, on=model.device, run_dir=daemon.run_dir, timeout_s=30) as other:
        theirs = other.tensors["net.weight"]
        model.tensors["net.weight"].zero_()
        assert torch.equal(model.tensors["net.weight"], torch.zeros(4, 3)), "it is written here"
        assert torch.equal(theirs, before), "and not to another holder"
    for path, content in tiny().items():
        assert (daemon.tree / path).read_bytes() == content, "nor to the file"


def test_tensors_outlive_close(model: cached.Model) -> None:
    tensors = model.tensors
    taken = tensors["net.weight"]
    before = taken.clone()
    model.close()
    model.close()
    assert torch.equal(taken, before)
    assert torch.equal(tensors["net.weight"], before), "as does a mapping that was taken"
    with pytest.raises(cached.CachedError) as caught:
        _ = model.tensors
    assert caught.value.reason == "MODEL_CLOSED"
    assert model.lease_fd == -1 and "closed" in repr(model)


def test_memory_is_unmapped_with_the_last_tensor(daemon: FakeDaemon, model: cached.Model) -> None:
    taken = model.tensors["net.weight"]
    assert str(daemon.tree) in Path("/proc/self/maps").read_text()
    model.close()
    del taken
    assert str(daemon.tree) not in Path("/proc/self/maps").read_text()


def test_an_unknown_tensor_is_a_key_error(model: cached.Model) -> None:
    with pytest.raises(KeyError):
        model.tensors["absent"]
    assert "absent" not in model.tensors and len(model.tensors) == 4


def test_many_tensors_in_more_files_than_one_message_carries(tmp_path: Path) -> None:
    files = {
        f"part-{f:03}.safetensors": save({f"t{f}.{t}": torch.full((3,), f + t / 10) for t in range(4)})
        for f in range(260)
    }
    daemon = FakeDaemon(tmp_path, files)
    daemon.start()
    try:
        before = len(open_paths())
        with cached.acquire(REF, on="host", run_dir=daemon.run_dir, timeout_s=20) as model:
            assert len(model.tensors) == 1040
            for name, tensor in model.tensors.items():
                f, t = map(int, name[1:].split("."))
                assert torch.equal(tensor, torch.full((3,), f + t / 10))
        del model, tensor
        # The fake keeps a descriptor of each blob, as a daemon does; the client keeps none.
        assert eventually(lambda: len(open_paths()) <= before + 260)
    finally:
        daemon.stop()


FEW_DESCRIPTORS = """
import resource, sys, cached
resource.setrlimit(resource.RLIMIT_NOFILE, (80, 80))
with cached.acquire(sys.argv[1], on="host", timeout_s=30) as model:
    print(len(model.tensors))
"""


def test_mapping_needs_no_more_descriptors_than_came(tmp_path: Path) -> None:
    files = {f"part-{f:02}.safetensors": save({f"t{f}": torch.full((3,), f)}) for f in range(40)}
    daemon = FakeDaemon(tmp_path, files)
    daemon.start()
    try:
        assert output_of(in_a_process(daemon, FEW_DESCRIPTORS)) == "40\n"
    finally:
        daemon.stop()


def test_what_has_no_tensors_is_closed_once_the_rest_is_mapped(daemon: FakeDaemon) -> None:
    with cached.acquire(REF, on="host", run_dir=daemon.run_dir, timeout_s=30) as model:
        assert len(model.tensors) == 4
        config = str(daemon.tree / "config.json")
        assert eventually(lambda: open_paths().count(config) == 1), "the fake's own"


# --- the lease ---


def test_the_lease_lives_from_acquire_to_close(daemon: FakeDaemon) -> None:
    model = cached.acquire(REF, run_dir=daemon.run_dir, timeout_s=30)
    assert daemon.holds(model.lease_id)
    assert os.get_inheritable(model.lease_fd)
    _ = model.tensors["net.bias"]
    model.close()
    assert daemon.is_freed(model.lease_id), "tensors do not prolong it"


def test_a_with_block_ends_the_lease(daemon: FakeDaemon) -> None:
    with pytest.raises(ZeroDivisionError), cached.acquire(REF, run_dir=daemon.run_dir, timeout_s=30) as model:
        raise ZeroDivisionError
    assert daemon.is_freed(model.lease_id)


def test_closing_frees_every_descriptor(daemon: FakeDaemon) -> None:
    before = len(open_paths())
    for _ in range(5):
        model = cached.acquire(REF, on="host", run_dir=daemon.run_dir, timeout_s=30)
        model.close()
        assert daemon.is_freed(model.lease_id)
    most = before + len(daemon.manifest.distinct_blobs())
    assert eventually(lambda: len(open_paths()) <= most), "only the fake's blobs stay"


EXEC = """
import os, sys, cached
model = cached.acquire(sys.argv[1], on="host", timeout_s=30)
print(model.lease_id, flush=True)
os.execv(sys.executable, [sys.executable, "-c", "import sys; print('exec', flush=True); sys.stdin.read()"])
"""


def test_the_lease_lives_through_exec_and_ends_with_sigkill(daemon: FakeDaemon) -> None:
    process = in_a_process(daemon, EXEC)
    assert process.stdout is not None
    with process:
        lease_id = process.stdout.readline().strip()
        assert process.stdout.readline() == "exec\n"
        assert daemon.holds(lease_id)
        process.kill()
        assert daemon.is_freed(lease_id)


FORK = """
import os, sys, cached
model = cached.acquire(sys.argv[1], on="host", timeout_s=30)
total = float(model.tensors["net.weight"].sum())
child = os.fork()
if child:
    print(model.lease_id, flush=True)
    model.close()
    os.kill(os.getpid(), 9)
with cached.acquire(sys.argv[1], on="disk", timeout_s=30) as again:
    same = float(again.tensors["net.weight"].sum()) == total
print(same, float(model.tensors["net.weight"].sum()) == total, flush=True)
sys.stdin.read()
"""


def test_a_forked_child_keeps_lease_and_tensors_and_can_acquire(daemon: FakeDaemon) -> None:
    process = in_a_process(daemon, FORK)
    assert process.stdout is not None and process.stdin is not None
    with process:
        lease_id = process.stdout.readline().strip()
        assert process.stdout.readline() == "True True\n"
        assert process.wait(30) == -signal.SIGKILL
        assert daemon.holds(lease_id), "the child has it still"
        process.stdin.close()
        assert daemon.is_freed(lease_id)


SPAWN = """
import multiprocessing, sys, cached

def child(model, pipe):
    pipe.send((model.lease_id, model.device, list(model.tensors)))
    pipe.recv()

if __name__ == "__main__":
    with cached.acquire(sys.argv[1], on="host", timeout_s=30) as model:
        here, there = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=child, args=(model, there))
        process.start()
        lease, device, names = here.recv()
        print(lease != model.lease_id, device, names == list(model.tensors))
        here.send(None)
        process.join()
"""


def test_a_spawned_child_acquires_anew(daemon: FakeDaemon, tmp_path: Path) -> None:
    (tmp_path / "spawn.py").write_text(SPAWN)  # a child that is spawned imports the script again
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CACHED_RUN_DIR": str(daemon.run_dir)}
    said = subprocess.check_output(
        [sys.executable, tmp_path / "spawn.py", REF], env=env, text=True, timeout=60
    )
    assert said == "True host True\n"
    assert len(daemon.requests) == 2


def test_a_model_that_has_moved_meanwhile_is_not_taken_for_the_pickled_one(daemon: FakeDaemon) -> None:
    with cached.acquire(REF, run_dir=daemon.run_dir, timeout_s=30) as model:
        again, (order, _) = model.__reduce__()
        with pytest.raises(cached.CachedError, match="by now") as caught:
            again(order, "sha256:" + "0" * 64)
    assert caught.value.reason == "MODEL_MOVED"


# --- beside the waiting one ---


def test_the_async_twin_gives_the_same_and_lets_the_loop_run(daemon: FakeDaemon) -> None:
    daemon.progress = [pb.Progress(phase=pb.PHASE_FETCHING, eta_s=-1)]
    daemon.stall_s = 0.2
    told: list[cached.Progress] = []
    threads: set[int] = set()

    def tell(progress: cached.Progress) -> None:
        told.append(progress)
        threads.add(threading.get_ident())

    async def both() -> tuple[cached.Model, int]:
        waiting = asyncio.create_task(
            cached.acquire_async(REF, run_dir=daemon.run_dir, timeout_s=30, on_progress=tell)
        )
        turns = 0
        while not waiting.done():
            await asyncio.sleep(0.01)
            turns += 1
        return waiting.result(), turns

    model, turns = asyncio.run(both())
    with model:
        assert model.id == daemon.manifest.id and turns > 5
        assert told == [cached.Progress("fetching")] and threads == {threading.get_ident()}


def test_a_cancelled_wait_ends_the_claim(daemon: FakeDaemon) -> None:
    daemon.stall_s = 1.0

    async def given_up() -> None:
        async with asyncio.timeout(0.3):
            await cached.acquire_async(REF, run_dir=daemon.run_dir, timeout_s=30)

    begin = time.monotonic()
    with pytest.raises(TimeoutError):
        asyncio.run(given_up())
    assert daemon.cancelled.wait(5) and time.monotonic() - begin < 0.9
    assert os.listdir(daemon.leases) == []


def test_changes_are_told_over_an_end_of_the_daemon_and_only_once(daemon: FakeDaemon) -> None:
    states = [pb.Model(state="fetching"), pb.Model(state="verified", id="sha256:1", devices=["disk"])]
    for model in (states[0], states[0], states[1]):
        daemon.watched.put(model)
    changes = cached.watch(REF, run_dir=daemon.run_dir)
    assert next(changes) == cached.Change(REF, "fetching", "", "", ())
    assert next(changes) == cached.Change(REF, "verified", "sha256:1", "", ("disk",))
    daemon.watched.put(None)
    assert daemon.cancelled.wait(5)
    daemon.cancelled.clear()
    states.append(pb.Model(state="verified", id="sha256:1", devices=["disk", "host"]))
    for model in states[1:]:
        daemon.watched.put(model)
    assert next(changes).devices == ("disk", "host")

    async def first() -> cached.Change:
        async for change in cached.watch_async(REF, run_dir=daemon.run_dir):
            return change
        raise AssertionError

    changes.close()
    assert daemon.cancelled.wait(5), "a closed iterator ends its call"
    daemon.watched.put(states[0])
    assert asyncio.run(first()).state == "fetching"


def test_the_daemon_is_told_when_the_holder_has_its_memory(daemon: FakeDaemon) -> None:
    with cached.acquire(REF, on="host", run_dir=daemon.run_dir, timeout_s=30) as model:
        model.prefault()
        model.ready()
        assert daemon.ready == [model.lease_id]
    asked = len(daemon.requests)
    command = [str(Path(sys.executable).parent / "cachectl"), "run", REF, "--on", "host"]
    for absent, code in (("no-such-command", 127), (str(daemon.run_dir), 126)):
        assert subprocess.run([*command, "--run-dir", str(daemon.run_dir), "--", absent]).returncode == code
    assert len(daemon.requests) == asked, "nobody waits for what cannot be run"
    command += ["--run-dir", str(daemon.run_dir), "--ready-after", "0.1", "--", "sleep", "60"]
    with subprocess.Popen(command) as ran:
        assert eventually(lambda: len(daemon.ready) == 2)
        ran.terminate()
    assert ran.returncode == 128 + 15


# --- being light ---


def test_importing_is_light() -> None:
    script = """
import sys, time
begin = time.perf_counter()
import cached
from cached import CachedError, Model, Progress, acquire
spent = time.perf_counter() - begin
print(spent, [m for m in ("grpc", "torch", "google.protobuf", "numpy") if m in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    spent, _, heavy = done.stdout.partition(" ")
    assert heavy.strip() == "[]"
    assert float(spent) < 0.3


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # as if it were not installed
import cached
with cached.acquire(sys.argv[1], on=sys.argv[2], timeout_s=30) as model:
    print((model.path / "config.json").read_text(), len(model.tensors))
    try:
        model.tensors["net.bias"]
    except cached.CachedError as error:
        print(error.reason)
"""


@pytest.mark.parametrize("device", ["disk", "host"])
def test_the_path_needs_no_torch(daemon: FakeDaemon, device: str) -> None:
    assert output_of(in_a_process(daemon, WITHOUT_TORCH, device)) == '{"hidden": 4} 4\nNO_TORCH\n'


AFTERWARDS = """
import os, sys, time, cached
model = cached.acquire(sys.argv[1], timeout_s=30)

def sockets():
    paths = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return [path for path in paths if os.path.lexists(path) and os.readlink(path).startswith("socket:")]

end = time.monotonic() + 15  # gRPC closes in the background
while (sockets() or len(os.listdir("/proc/self/task")) > 1) and time.monotonic() < end:
    time.sleep(0.01)
print(len(sockets()), len(os.listdir("/proc/self/task")))
"""


def test_neither_connection_nor_thread_of_grpc_is_left(daemon: FakeDaemon) -> None:
    assert output_of(in_a_process(daemon, AFTERWARDS)) == "0 1\n"


# --- what is asked, and where ---


def test_the_holder_is_declared_and_its_uid_seen(daemon: FakeDaemon) -> None:
    script = "import sys, cached; cached.acquire(sys.argv[1], timeout_s=30)"
    process = in_a_process(daemon, script, "\udcff" * 3 + "x" * 500, POD_NAME="web-1")
    output_of(process)
    holder = daemon.requests[0].holder
    assert holder.pid == process.pid and holder.host and holder.pod == "web-1"
    assert len(holder.command) == 200 and "python" in holder.command
    assert daemon.uids == [os.geteuid()]


def test_request_and_progress(daemon: FakeDaemon) -> None:
    daemon.progress = [
        pb.Progress(phase=pb.PHASE_RESOLVING, eta_s=-1),
        pb.Progress(
            phase=pb.PHASE_FETCHING, bytes_done=5, bytes_total=10, rate_bytes_per_s=2.5, eta_s=2, message="m"
        ),
    ]
    told: list[cached.Progress] = []
    cached.acquire(
        REF, on="host", fresh=True, run_dir=daemon.run_dir, timeout_s=10, on_progress=told.append
    ).close()
    assert told == [cached.Progress("resolving"), cached.Progress("fetching", 5, 10, 2.5, 2.0, "m")]
    assert told[1].words() == "fetching, 0 of 0 MB (50 %): m"
    request = daemon.requests[0]
    assert (request.ref, request.device, request.fresh) == (REF, "host", True)
    assert request.lease == pb.LEASE_MODE_DESCRIPTOR


def test_the_stream_is_read_to_its_end(daemon: FakeDaemon) -> None:
    # Breaking it off after the grant would cancel the call, and a daemon may take that for a refusal.
    cached.acquire(REF, run_dir=daemon.run_dir, timeout_s=30).close()
    assert daemon.read_to_the_end == [True]


def test_an_address_leads_to_the_handoff_beside_it(daemon: FakeDaemon) -> None:
    address = f"unix:{daemon.replicas}/cached.sock"
    cached.acquire(REF, address=address, timeout_s=30).close()


def test_the_data_directory_may_be_mounted_elsewhere(daemon: FakeDaemon, tmp_path: Path) -> None:
    elsewhere = tmp_path / "mounted"
    elsewhere.symlink_to(daemon.data_dir)
    script = (
        "import sys, cached; m = cached.acquire(sys.argv[1], timeout_s=30); print(m.path, len(m.tensors))"
    )
    said = output_of(in_a_process(daemon, script, CACHED_DATA_DIR=str(elsewhere)))
    assert said == f"{elsewhere}/trees/{daemon.tree.name} 4\n"


# --- what goes wrong ---


def refused(daemon: FakeDaemon, on: str = "disk", timeout_s: float = 30.0) -> cached.CachedError:
    with pytest.raises(cached.CachedError) as caught:
        cached.acquire(REF, on=on, run_dir=daemon.run_dir, timeout_s=timeout_s)
    return caught.value


def test_the_daemons_error_arrives_as_it_was_said(daemon: FakeDaemon) -> None:
    # UNAVAILABLE, but the origin: it is not to be taken for our daemon, nor waited for.
    daemon.problem = Problem(ErrorKind.UNAVAILABLE, "ORIGIN_UNAVAILABLE", "origin answers 503", "wait", 30.5)
    error = refused(daemon)
    assert (error.code, error.reason, error.message) == (
        "UNAVAILABLE",
        "ORIGIN_UNAVAILABLE",
        "origin answers 503",
    )
    assert (error.hint, error.retry_after_s, error.exit_code) == ("wait", 30.5, 1)
    assert str(error) == "origin answers 503 (hint: wait)"
    assert pickle.loads(pickle.dumps(error)).args == error.args
    assert len(daemon.requests) == 1


def test_a_missing_daemon_is_named_after_the_time_given(tmp_path: Path) -> None:
    told: list[cached.Progress] = []
    begin = time.monotonic()
    with pytest.raises(cached.CachedError) as caught:
        cached.acquire(REF, run_dir=tmp_path, timeout_s=0.5, on_progress=told.append)
    assert time.monotonic() - begin < 10
    assert (caught.value.reason, caught.value.exit_code) == ("DAEMON_UNREACHABLE", 6)
    assert f"{tmp_path}/replicas/cached.sock" in caught.value.message
    assert told and told[0].phase == "waiting" and "socket" in told[0].message


def test_a_daemon_that_comes_later_is_waited_for(tmp_path: Path) -> None:
    daemon = FakeDaemon(tmp_path, tiny())
    late = threading.Timer(0.3, daemon.start)
    late.start()
    try:
        cached.acquire(REF, run_dir=daemon.run_dir, timeout_s=30).close()
    finally:
        late.join()
        daemon.stop()


def test_a_daemon_that_restarts_midway_is_waited_for(tmp_path: Path) -> None:
    daemon = FakeDaemon(tmp_path, tiny())
    daemon.stall_s = 1.0
    daemon.start()

    def restart() -> None:
        daemon.stop()
        daemon.stall_s = 0.0
        daemon.start()

    restarting = threading.Timer(0.3, restart)
    restarting.start()
    try:
        cached.acquire(REF, run_dir=daemon.run_dir, timeout_s=30).close()
        assert len(daemon.requests) == 2
    finally:
        restarting.join()
        daemon.stop()


def test_a_token_that_a_restart_forgot_is_acquired_anew(daemon: FakeDaemon) -> None:
    daemon.forgets_tokens = 2
    cached.acquire(REF, run_dir=daemon.run_dir, timeout_s=30).close()
    assert len(daemon.requests) == 3


def test_the_deadline_says_how_far_it_was(daemon: FakeDaemon) -> None:
    daemon.progress = [pb.Progress(phase=pb.PHASE_FETCHING, bytes_done=10**8, bytes_total=10**9)]
    daemon.stall_s = 1.0
    error = refused(daemon, timeout_s=0.4)
    assert (error.code, error.exit_code) == ("DEADLINE_EXCEEDED", 8)
    assert REF in error.message and "100 of 1000 MB (10 %)" in error.message


def test_a_path_that_is_not_mounted_is_refused_and_the_lease_ended(daemon: FakeDaemon) -> None:
    daemon.tree.rename(daemon.tree.with_name("away"))
    error = refused(daemon)
    assert error.reason == "PATH_NOT_VISIBLE" and "mount" in error.hint
    (lease,) = os.listdir(daemon.leases)
    assert daemon.is_freed(lease)


def test_memory_needs_no_mount(daemon: FakeDaemon) -> None:
    cached.acquire(REF, on="host", run_dir=daemon.run_dir, timeout_s=30).close()  # the fake has opened it
    daemon.tree.rename(daemon.tree.with_name("away"))
    with cached.acquire(REF, on="host", run_dir=daemon.run_dir, timeout_s=30) as model:
        assert model.tensors["net.weight"].shape == (4, 3)


@pytest.mark.parametrize("fault", ["no grant", "no memory", "another id"])
def test_a_daemon_that_does_not_keep_its_word_is_refused(daemon: FakeDaemon, fault: str) -> None:
    daemon.grants_anything = fault != "no grant"
    daemon.sends_memory = fault != "no memory"
    if fault == "another id":
        daemon.names_id = "sha256:" + "0" * 64
    assert refused(daemon, on="host").reason in ("NO_GRANT", "FOREIGN_HANDOFF")
    for lease in os.listdir(daemon.leases):
        assert daemon.is_freed(lease)


@pytest.mark.parametrize("on", ["disk", "host"])
def test_a_file_of_another_size_is_not_mapped(daemon: FakeDaemon, on: str) -> None:
    with cached.acquire(REF, on=on, run_dir=daemon.run_dir, timeout_s=30) as model:
        os.truncate(daemon.tree / "weights/model-00001-of-00002.safetensors", 10)
        with pytest.raises(cached.CachedError) as caught:
            _ = model.tensors
    assert (caught.value.reason, caught.value.exit_code) == ("SIZE_CHANGED", 4)
    assert "model-00001" in caught.value.message


def test_a_tensor_name_in_two_files_is_refused_with_both(tmp_path: Path) -> None:
    same = {"w": torch.ones(2)}
    daemon = FakeDaemon(tmp_path, {"a.safetensors": save(same), "b.safetensors": save(same, {"x": "y"})})
    daemon.start()
    try:
        with cached.acquire(REF, run_dir=daemon.run_dir, timeout_s=30) as model:
            assert model.path.is_dir(), "the path is good all the same"
            with pytest.raises(cached.CachedError, match=r"'w'.*a\.safetensors.*b\.safetensors"):
                _ = model.tensors
    finally:
        daemon.stop()


def test_too_few_descriptors_are_told_before_the_token_is_spent() -> None:
    handoff.check_room(10)
    with pytest.raises(cached.CachedError, match="limit") as caught:
        handoff.check_room(10**9)
    assert caught.value.exit_code == 5


def test_an_interrupted_wait_leaves_nothing_behind(daemon: FakeDaemon) -> None:
    def interrupt(_: cached.Progress) -> None:
        raise KeyboardInterrupt

    daemon.progress = [pb.Progress(phase=pb.PHASE_FETCHING)]
    with pytest.raises(KeyboardInterrupt):
        cached.acquire(REF, run_dir=daemon.run_dir, timeout_s=10, on_progress=interrupt)
    with contextlib.suppress(FileNotFoundError):
        assert os.listdir(daemon.leases) == []
