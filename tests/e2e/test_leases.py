"""The lease is the descriptor: it lives while anybody has it, through all of our restarts."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from kit import NodeKit, eventually, expect, running_node, said, write_model, write_safetensors, write_sums

from cached.client.rpc import connect, resolve_address
from cached.v1 import model_cache_pb2 as pb
from cached.v1.model_cache_pb2_grpc import ModelCacheStub

NOBODY = 65534

FORK = """
import os, sys, cached
model = cached.acquire(sys.argv[1], timeout_s=60)
if os.fork():
    os._exit(0)
print("forked", flush=True)
sys.stdin.read()
"""

EXEC = """
import os, sys, cached
model = cached.acquire(sys.argv[1], timeout_s=60)
code = "import sys; print('executed', flush=True); sys.stdin.read()"
os.execv(sys.executable, [sys.executable, "-c", code])
"""

# Only root can become another user; who is not, stays. The interpreter need not be readable for others, so
# everything is imported before the user is changed: by a call, as gRPC imports much of itself only then.
OTHER_USER = """
import os, sys, cached, cached.client.granting, cached.client.handoff, cached.client.model
from cached.client.rpc import connect, resolve_address
from cached.v1 import model_cache_pb2 as pb, model_cache_pb2_grpc as rpc
with connect(resolve_address()) as channel:
    rpc.ModelCacheStub(channel).List(pb.ListRequest())
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
model = cached.acquire(sys.argv[1], on="host", timeout_s=60)
print("held", flush=True)
sys.stdin.read()
"""

FEW = """
import resource, sys, cached
resource.setrlimit(resource.RLIMIT_NOFILE, (50, 50))
try:
    cached.acquire(sys.argv[1], on="host", timeout_s=60)
except cached.CachedError as error:
    print(error.reason, error, flush=True)
"""

READ_LATE = """
import sys, torch, cached
model = cached.acquire(sys.argv[1], on="host", timeout_s=60)
first = model.tensors["first"]
print("held", flush=True)
sys.stdin.readline()
print(int(first.view(torch.uint8).to(torch.int64).sum()), flush=True)
print(int(model.tensors["second"].view(torch.uint8).to(torch.int64).sum()), flush=True)
sys.stdin.read()
"""

CLOSE = """
import sys, cached
model = cached.acquire(sys.argv[1], timeout_s=60)
print("held", flush=True)
sys.stdin.readline()
model.close()
print("closed", flush=True)
sys.stdin.read()
"""

AGAIN_AND_AGAIN = """
import sys, threading, cached
asked = threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), asked.set()), daemon=True).start()
rounds = 0
while not asked.is_set():
    with cached.acquire(sys.argv[1], on="host", timeout_s=60) as model:
        rounds += 1
        if rounds == 1:
            print("going", flush=True)
print("done", flush=True)
"""


@dataclass(frozen=True, slots=True)
class Uncollected:
    """A grant, on a node of its own, whose token nobody takes to the handoff socket."""

    node: NodeKit
    ref: str
    at_s: float


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeKit]:
    with running_node(tmp_path_factory.mktemp("leases")) as running:
        # Replicas of another user must get to the sockets; a deployment's run directory is as open.
        running.run_dir.chmod(0o755)
        yield running


@pytest.fixture(scope="module", autouse=True)
def uncollected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Uncollected]:
    """Made first, so that its half minute passes while the other tests run."""
    root = tmp_path_factory.mktemp("uncollected")
    write_model(root / "m", 4096)
    ref = f"file://{root}/m/"
    with running_node(root, with_preloader=False) as node:
        with connect(resolve_address(node.run_dir)) as channel:
            *_, last = ModelCacheStub(channel).Acquire(pb.AcquireRequest(ref=ref), timeout=60)
        assert last.grant.token and last.grant.lease_id
        yield Uncollected(node, ref, time.monotonic())


@pytest.fixture
def ref(node: NodeKit, request: pytest.FixtureRequest) -> str:
    """A model of the test's own."""
    folder: Path = node.root / request.node.name
    write_model(folder, 1 << 20, seed=len(list(node.root.iterdir())))
    return f"file://{folder}/"


def _refused(node: NodeKit, ref: str) -> str:
    """What the eviction of something leased says."""
    return " ".join(node.ctl("evict", ref, code=1).stderr.split())


def _ends(node: NodeKit, ref: str) -> float:
    """Seconds until the ref has no lease any more; then it can be evicted."""
    began = time.monotonic()
    eventually(lambda: not node.leases(ref), within_s=5, every_s=0.01)
    took_s = time.monotonic() - began
    node.ctl("evict", ref)
    return took_s


def test_it_lives_on_in_a_forked_child(node: NodeKit, ref: str) -> None:
    replica = node.replica(FORK, ref)
    expect(replica, "forked")
    assert replica.wait(10) == 0  # the parent
    time.sleep(1)  # four looks at the lease
    assert "lease on disk" in _refused(node, ref)
    assert replica.stdin is not None
    replica.stdin.close()
    _ends(node, ref)


def test_it_lives_on_through_exec(node: NodeKit, ref: str) -> None:
    replica = node.replica(EXEC, ref)
    expect(replica, "executed")
    time.sleep(1)
    assert f"pid {replica.pid}" in _refused(node, ref)
    replica.kill()
    _ends(node, ref)


def test_too_few_descriptors_are_told_before_the_token_is_spent(node: NodeKit) -> None:
    folder = node.root / "many"
    folder.mkdir()
    for number in range(60):
        write_safetensors(folder / f"{number}.safetensors", {f"t{number}": 4}, seed=number)
    write_sums(folder)
    replica = node.replica(FEW, f"file://{folder}/")
    words = said(replica)
    assert words.startswith("TOO_FEW_DESCRIPTORS") and "60 descriptors" in words and "ulimit -n" in words
    replica.kill()


def test_closing_the_model_ends_it_while_the_process_goes_on(node: NodeKit, ref: str) -> None:
    replica = node.replica(CLOSE, ref)
    expect(replica, "held")
    assert "lease on disk" in _refused(node, ref)
    assert replica.stdin is not None
    replica.stdin.write("\n")
    replica.stdin.flush()
    expect(replica, "closed")
    _ends(node, ref)
    assert replica.poll() is None


@pytest.mark.parametrize("on", ["disk", "host"])
def test_after_sigkill_it_is_gone(node: NodeKit, ref: str, on: str) -> None:
    replica = node.holder(ref, on)
    assert f"lease on {on}" in _refused(node, ref)
    replica.kill()
    took_s = _ends(node, ref)
    print(f"a lease on {on} was gone {took_s:.3f} s after SIGKILL")


def test_the_refusal_names_the_holders(node: NodeKit, ref: str) -> None:
    holders = [node.holder(ref), node.holder(ref, "host")]
    words = _refused(node, ref)
    for replica, on in zip(holders, ("disk", "host"), strict=True):
        assert f"lease on {on} of uid {os.geteuid()}" in words
        assert f"declares pid {replica.pid} on {socket.gethostname()}" in words
    assert "import sys, cached" in words  # its command
    assert "hint:" in words
    assert [c.holder.pid for c in node.leases(ref)] == [r.pid for r in holders]
    holders[0].kill()
    eventually(lambda: len(node.leases(ref)) == 1)
    assert f"pid {holders[1].pid}" in _refused(node, ref)
    holders[1].kill()
    _ends(node, ref)


def test_the_uid_is_verified_and_each_holder_has_its_own(node: NodeKit, ref: str) -> None:
    ours = os.geteuid()
    theirs = NOBODY if ours == 0 else ours
    own = node.holder(ref, "host")
    other = node.replica(OTHER_USER, ref)
    expect(other, "held")
    uids = {claim.holder.pid: claim.holder.uid for claim in node.leases(ref)}
    assert uids == {own.pid: ours, other.pid: theirs}
    words = _refused(node, ref)
    for replica, uid in ((own, ours), (other, theirs)):
        assert f"uid {uid} (declares pid {replica.pid}" in words
    table = " ".join(node.ctl("show", ref).stdout.split())
    assert str(theirs) in table and str(other.pid) in table
    for replica in (own, other):
        replica.kill()
    _ends(node, ref)


def test_it_lives_through_kill_9_of_the_daemon(node: NodeKit, ref: str) -> None:
    on_disk, on_host = node.holder(ref), node.holder(ref, "host")
    gone = node.holder(ref)
    node.kill_daemon()
    gone.kill()  # while nobody looks
    gone.wait()
    node.serve()
    words = _refused(node, ref)
    for replica, on in ((on_disk, "disk"), (on_host, "host")):
        assert f"lease on {on} of uid {os.geteuid()} (declares pid {replica.pid}" in words
    assert str(gone.pid) not in words
    eventually(lambda: "host" in node.row(ref)["devices"])
    on_disk.kill()
    eventually(lambda: len(node.leases(ref)) == 1, within_s=5)
    assert "lease on host" in _refused(node, ref)
    on_host.kill()
    _ends(node, ref)


def test_it_lives_through_restarts_of_the_preloader(node: NodeKit, ref: str) -> None:
    replica = node.replica(READ_LATE, ref)
    expect(replica, "held")
    for words in ("preloader.serve", "preloader serve"):  # the standby, then its parent
        before = node.processes("preloader.serve")
        for pid in node.processes(words):
            os.kill(pid, 9)
        assert "lease on host" in _refused(node, ref)
        eventually(lambda old=before: set(node.processes("preloader.serve")) - set(old))
        eventually(lambda: "host" in node.model(ref).devices)
        assert "lease on host" in _refused(node, ref)
    assert replica.stdin is not None
    replica.stdin.write("\n")
    replica.stdin.flush()
    whole = (node.root / ref.rstrip("/").rpartition("/")[2] / "model.safetensors").read_bytes()
    tensors = whole[8 + int.from_bytes(whole[:8], "little") :]
    half = len(tensors) // 2
    assert [int(said(replica)), int(said(replica))] == [sum(tensors[:half]), sum(tensors[half:])]
    replica.kill()
    _ends(node, ref)


def test_a_lease_with_a_time_survives_a_restart_and_ends_by_itself(node: NodeKit, ref: str) -> None:
    ttl_s = 8
    began = time.monotonic()
    answer = node.ctl("path", ref, "--ttl", str(ttl_s))
    path = Path(answer.stdout.strip())
    assert (path / "config.json").is_file() and "leased" in answer.stderr
    node.kill_daemon()
    node.serve()
    (claim,) = node.leases(ref)
    assert 0 < claim.expires_at - time.time() <= ttl_s
    if time.monotonic() - began < ttl_s - 2:  # a slow machine may take longer than that for a restart
        assert "lease on disk" in _refused(node, ref)
    eventually(lambda: not node.leases(ref), within_s=ttl_s + 5)
    assert time.monotonic() - began >= ttl_s
    assert not [p for p in (node.data_dir / "claims").iterdir() if "lease" in p.name]
    node.ctl("evict", ref)
    assert not path.exists()


def test_a_lease_whose_time_passed_while_nobody_ran_is_gone_at_once(node: NodeKit, ref: str) -> None:
    node.ctl("path", ref, "--ttl", "1")
    node.kill_daemon()
    time.sleep(1)
    node.serve()
    eventually(lambda: not node.leases(ref), within_s=2)
    node.ctl("evict", ref)


def test_acquires_go_on_while_the_daemon_is_killed_again_and_again(node: NodeKit, ref: str) -> None:
    replica = node.replica(AGAIN_AND_AGAIN, ref)
    expect(replica, "going")
    for pause_s in (0.1, 0.35, 0.2):
        time.sleep(pause_s)
        node.kill_daemon()
        node.serve()
    assert replica.stdin is not None
    replica.stdin.write("\n")
    replica.stdin.flush()
    expect(replica, "done")
    replica.wait(10)
    _ends(node, ref)


def test_a_grant_that_nobody_collects_ends(uncollected: Uncollected) -> None:
    node, ref = uncollected.node, uncollected.ref
    if time.monotonic() - uncollected.at_s < 25:
        assert "lease on disk" in _refused(node, ref)
    left_s = max(0.0, uncollected.at_s + 30 - time.monotonic())
    eventually(lambda: not node.leases(ref), within_s=left_s + 5)
    node.ctl("evict", ref)
