"""The socket is the role: who may ask what where, what is shown to whom, and how a refusal looks."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status
from kit import NodeKit, eventually, free_port, running_node, write_model

from cached.client.rpc import connect
from cached.v1 import model_cache_pb2 as pb
from cached.v1 import model_cache_pb2_grpc as pb_rpc
from cached.v1 import operator_pb2 as op
from cached.v1 import operator_pb2_grpc as op_rpc

COMMON = {"cached.v1.ModelCache", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
OPERATOR = "cached.v1.Operator"
FACES = ("operators", "replicas", "tcp")

# cachectl as another user; who is not root cannot become one, and stays. The interpreter need not be readable
# for others, so commands that need all that these two do are run, unseen, before the user is changed.
CTL_AS_NOBODY = """
import contextlib, io, os, sys, cached.cli
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    cached.cli.run(["ls", "-o", "json"])
    cached.cli.run(["evict", "file:///nowhere"])
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
sys.exit(cached.cli.run(sys.argv[1:]))
"""


@dataclass(frozen=True, slots=True)
class Served:
    """A node, one model on it that a replica holds on host, and a channel to each face."""

    node: NodeKit
    ref: str
    faces: dict[str, grpc.Channel]

    def models(self, face: str) -> Any:
        return pb_rpc.ModelCacheStub(self.faces[face])

    def operator(self, face: str = "operators") -> Any:
        return op_rpc.OperatorStub(self.faces[face])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("roles")
    node, port = NodeKit(root), free_port()
    write_model(root / "m")
    ref = f"file://{root}/m/"
    addresses = {
        "operators": f"unix:{node.run_dir}/cached.sock",
        "replicas": f"unix:{node.run_dir}/replicas/cached.sock",
        "tcp": f"127.0.0.1:{port}",
    }
    try:
        node.serve("--grpc", addresses["tcp"])
        node.holder(ref, "host")
        faces = {name: grpc.insecure_channel(address) for name, address in addresses.items()}
        yield Served(node, ref, faces)
        for channel in faces.values():
            channel.close()
    finally:
        node.close()


def _refusal(ask: Callable[[], Any]) -> grpc.RpcError:
    """The error that a call, or reading its stream, ends with."""
    with pytest.raises(grpc.RpcError) as caught:
        answer = ask()
        if not isinstance(answer, Message):
            list(answer)
    return caught.value


@dataclass(frozen=True, slots=True)
class Told:
    code: grpc.StatusCode
    message: str
    reason: str
    hint: str
    retry_s: float | None


def _told(error: grpc.RpcError) -> Told:
    """What a refusal says in google.rpc details; every part of it must be there."""
    status = rpc_status.from_call(error)
    assert status is not None, error
    info, hint = error_details_pb2.ErrorInfo(), error_details_pb2.LocalizedMessage()
    retry = error_details_pb2.RetryInfo()
    found = {type(m) for packed in status.details for m in (info, hint, retry) if packed.Unpack(m)}
    assert {type(info), type(hint)} <= found, status
    assert info.domain == "cached" and info.reason.isupper() and hint.message
    retry_s = retry.retry_delay.ToTimedelta().total_seconds() if type(retry) in found else None
    return Told(error.code(), error.details(), info.reason, hint.message, retry_s)


# --- who may ask what -----------------------------------------------------------------------

OPERATOR_CALLS: dict[str, Callable[[Any], Any]] = {
    "Prefetch": lambda stub: stub.Prefetch(op.PrefetchRequest(ref="file:///m")),
    "Pin": lambda stub: stub.Pin(op.PinRequest(ref="file:///m")),
    "Unpin": lambda stub: stub.Unpin(op.UnpinRequest(ref="file:///m")),
    "Swap": lambda stub: list(stub.Swap(op.SwapRequest(out="file:///m", ref="file:///n", device="host"))),
    "Evict": lambda stub: stub.Evict(op.EvictRequest(ref="file:///m")),
    "Verify": lambda stub: stub.Verify(op.VerifyRequest()),
    "Status": lambda stub: stub.Status(op.StatusRequest()),
}


@pytest.mark.parametrize("face", ["replicas", "tcp"])
def test_operators_calls_are_not_there_for_replicas(served: Served, face: str) -> None:
    # The list must not fall behind the protocol.
    assert set(OPERATOR_CALLS) == {m.name for m in op.DESCRIPTOR.services_by_name["Operator"].methods}
    for name, call in OPERATOR_CALLS.items():
        error = _refusal(lambda call=call: call(served.operator(face)))
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED, name
    assert served.node.row(served.ref)["state"] == "verified"


@pytest.mark.parametrize("face", FACES)
def test_health_and_reflection_tell_exactly_what_is_there(served: Served, face: str) -> None:
    services = COMMON | ({OPERATOR} if face == "operators" else set())
    database = ProtoReflectionDescriptorDatabase(served.faces[face])
    assert set(database.get_services()) == services
    assert database.FindFileContainingSymbol("cached.v1.ModelCache").package == "cached.v1"

    health = health_pb2_grpc.HealthStub(served.faces[face])
    for name in ("", *(s for s in services if s.startswith("cached."))):
        answer = health.Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING, name
    if face != "operators":
        error = _refusal(lambda: health.Check(health_pb2.HealthCheckRequest(service=OPERATOR)))
        assert error.code() is grpc.StatusCode.NOT_FOUND


def test_modes_of_sockets_and_directories(served: Served) -> None:
    run_dir = served.node.run_dir
    modes = {
        "cached.sock": 0o600,
        "replicas/cached.sock": 0o666,
        "replicas/handoff.sock": 0o666,
        "standby/host.sock": 0o600,
        "standby/host.fds.sock": 0o600,
        "leases": 0o700,
        "standby": 0o700,
        "replicas": 0o755,
    }
    assert {name: stat.S_IMODE((run_dir / name).stat().st_mode) for name in modes} == modes
    for lease in (run_dir / "leases").iterdir():
        assert stat.S_IMODE(lease.stat().st_mode) == 0o600
    # What replicas mount has the two sockets and nothing else.
    assert {p.name for p in (run_dir / "replicas").iterdir()} == {"cached.sock", "handoff.sock"}


def test_blobs_and_trees_are_read_only(served: Served) -> None:
    data_dir = served.node.data_dir
    blobs = [p for p in (data_dir / "blobs").rglob("*") if p.is_file()]
    assert blobs and {stat.S_IMODE(p.stat().st_mode) for p in blobs} == {0o444}
    (tree,) = (data_dir / "trees").iterdir()
    assert stat.S_IMODE(tree.stat().st_mode) == 0o555


@pytest.fixture
def operators_only(served: Served) -> Iterator[None]:
    """The operators' socket as another user finds it: its mode shuts out whoever cannot become one, too."""
    path = served.node.run_dir / "cached.sock"
    served.node.run_dir.chmod(0o755)
    path.chmod(0o600 if os.geteuid() == 0 else 0)
    yield
    path.chmod(0o600)


@pytest.mark.usefixtures("operators_only")
def test_another_user_reads_by_the_replicas_socket_and_cannot_operate(served: Served) -> None:
    reading = served.node.replica(CTL_AS_NOBODY, "ls", "-o", "json")
    out, err = reading.communicate(timeout=30)
    assert reading.returncode == 0 and served.ref in out, err
    assert "import sys, cached" not in out  # the holder's command
    operating = served.node.replica(CTL_AS_NOBODY, "evict", served.ref)
    _, err = operating.communicate(timeout=30)
    assert operating.returncode == 7 and "cached.sock" in err and "hint:" in err


# --- what is shown --------------------------------------------------------------------------


def test_holders_are_hidden_from_replicas(served: Served) -> None:
    for face in ("replicas", "tcp"):
        listed = served.models(face).List(pb.ListRequest()).models
        got = served.models(face).Get(pb.GetRequest(ref=served.ref))
        watched = next(iter(served.models(face).Watch(pb.WatchRequest(ref=served.ref), timeout=5)))
        claims = [claim for model in (*listed, got, watched) for claim in model.claims]
        assert len(claims) >= 3
        for claim in claims:
            assert claim.kind == "lease" and not claim.id and not claim.HasField("holder")
    (claim,) = served.models("operators").Get(pb.GetRequest(ref=served.ref)).claims
    assert claim.holder.uid == os.geteuid() and claim.holder.pid > 0 and claim.id.startswith("lease-")


def test_tcp_grants_a_path_and_a_lease_with_a_time(served: Served) -> None:
    stub = served.models("tcp")
    request = pb.AcquireRequest(ref=served.ref, lease=pb.LEASE_MODE_TTL, ttl_s=60)
    *_, event = stub.Acquire(request, timeout=20)
    assert Path(event.grant.model.path, "config.json").is_file() and not event.grant.token
    renewed = stub.Renew(pb.RenewRequest(lease_id=event.grant.lease_id, ttl_s=600))
    claims = {c.id: c for c in served.node.leases(served.ref)}
    assert claims[event.grant.lease_id].expires_at == pytest.approx(renewed.expires_at)
    stub.Release(pb.ReleaseRequest(lease_id=event.grant.lease_id))
    eventually(lambda: event.grant.lease_id not in {c.id for c in served.node.leases(served.ref)})
    error = _told(_refusal(lambda: stub.Release(pb.ReleaseRequest(lease_id=event.grant.lease_id))))
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "NO_SUCH_LEASE")


def test_waiting_only_leaves_no_lease(served: Served) -> None:
    request = pb.AcquireRequest(ref=served.ref, lease=pb.LEASE_MODE_NONE)
    *_, event = served.models("replicas").Acquire(request, timeout=20)
    assert event.grant.model.path and not event.grant.token and not event.grant.lease_id
    eventually(lambda: len(served.node.leases(served.ref)) == 1)


def test_watch_tells_changes(served: Served, tmp_path: Path) -> None:
    write_model(tmp_path / "w", seed=1)
    ref = f"file://{tmp_path}/w/"
    served.node.ctl("prefetch", ref, "--wait")
    watch = served.models("replicas").Watch(pb.WatchRequest(ref=ref), timeout=30)
    assert next(watch).state == "verified"
    served.node.ctl("pin", ref)
    seen = next(m for m in watch if m.claims)
    assert [c.kind for c in seen.claims][:1] == ["pin"] or "pin" in {c.kind for c in seen.claims}
    served.node.ctl("unpin", ref)
    assert next(m for m in watch if not m.claims).state == "verified"
    served.node.ctl("evict", ref)
    # Gone from the node: the watch says so by its end.
    error = _told(_refusal(lambda: watch))
    assert error.code is grpc.StatusCode.NOT_FOUND


# --- what is refused ------------------------------------------------------------------------

BAD_REFS = [
    "",
    "m",
    "/m",
    "zip::https://host/m.zip",
    "https://user:word@host/m",
    "hf://name",
    "file://m",
    "file:///",
    "file://///",
    "http://",
    "http:///m",
    "file:///a/../b",
    "file:///a b",
    "file:///a\n",
    "https://host/m?x=1",
    "https://host/m#x",
    "https://host/" + "m" * 3000,
    "sha256:" + "0" * 63,
]


@pytest.mark.parametrize("ref", BAD_REFS)
def test_bad_refs_are_refused_everywhere(served: Served, ref: str) -> None:
    asks: list[Callable[[], Any]] = [
        lambda: served.models("replicas").Acquire(pb.AcquireRequest(ref=ref), timeout=10),
        lambda: served.models("replicas").Get(pb.GetRequest(ref=ref), timeout=10),
        lambda: served.models("replicas").Watch(pb.WatchRequest(ref=ref), timeout=10),
        lambda: served.operator().Prefetch(op.PrefetchRequest(ref=ref), timeout=10),
        lambda: served.operator().Pin(op.PinRequest(ref=ref), timeout=10),
        lambda: served.operator().Unpin(op.UnpinRequest(ref=ref), timeout=10),
        lambda: served.operator().Evict(op.EvictRequest(ref=ref), timeout=10),
    ]
    if ref:  # none is all of them
        asks.append(lambda: served.operator().Verify(op.VerifyRequest(ref=ref), timeout=10))
    for number, ask in enumerate(asks):
        told = _told(_refusal(ask))
        assert (told.code, told.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "BAD_REF"), number
        assert len(told.message) < 400
    assert len(served.node.rows()) <= 2


BAD_DEVICES = ["tape", "cuda", "cuda:", "cuda:../x", "cuda:" + "a" * 65, "disk\n", "HOST"]


@pytest.mark.parametrize("device", BAD_DEVICES)
def test_bad_devices_are_refused(served: Served, device: str) -> None:
    for ask in (
        lambda: served.models("replicas").Acquire(pb.AcquireRequest(ref=served.ref, device=device)),
        lambda: served.operator().Pin(op.PinRequest(ref=served.ref, device=device)),
    ):
        told = _told(_refusal(ask))
        assert (told.code, told.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "BAD_DEVICE")


@pytest.mark.parametrize(
    ("lease", "ttl_s"),
    [
        (pb.LEASE_MODE_TTL, 0),
        (pb.LEASE_MODE_TTL, 7 * 24 * 3600 + 1),
        (pb.LEASE_MODE_TTL, 2**32 - 1),
        (pb.LEASE_MODE_DESCRIPTOR, 5),
        (pb.LEASE_MODE_NONE, 5),
    ],
)
def test_bad_times_to_live_are_refused(served: Served, lease: pb.LeaseMode.ValueType, ttl_s: int) -> None:
    request = pb.AcquireRequest(ref=served.ref, lease=lease, ttl_s=ttl_s)
    told = _told(_refusal(lambda: served.models("replicas").Acquire(request, timeout=10)))
    assert (told.code, told.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "BAD_TTL")
    assert len(served.node.leases(served.ref)) == 1


def test_an_unknown_kind_of_lease_is_refused(served: Served) -> None:
    newer = pb.AcquireRequest(ref=served.ref).SerializeToString() + b"\x20\x63"
    request = pb.AcquireRequest.FromString(newer)
    assert request.lease == 99
    told = _told(_refusal(lambda: served.models("replicas").Acquire(request, timeout=10)))
    assert told.code is grpc.StatusCode.INVALID_ARGUMENT


def test_what_a_client_declares_is_bounded_and_harmless(served: Served) -> None:
    command = "\x1b[31m\n" + "c" * 100_000
    holder = pb.Holder(pid=-5, host="h" * 5000, command=command, pod="p" * 5000, uid=4242)
    request = pb.AcquireRequest(ref=served.ref, lease=pb.LEASE_MODE_TTL, ttl_s=30, holder=holder)
    *_, event = served.models("replicas").Acquire(request, timeout=20)
    (shown,) = [c.holder for c in served.node.leases(served.ref) if c.id == event.grant.lease_id]
    assert shown.uid == -1 and shown.pid == 0  # no uid was seen, whatever was said
    assert max(len(shown.host), len(shown.command), len(shown.pod)) <= 256
    assert shown.command.isprintable()
    served.models("replicas").Release(pb.ReleaseRequest(lease_id=event.grant.lease_id))
    eventually(lambda: len(served.node.leases(served.ref)) == 1)


def test_a_message_that_is_too_long_is_refused(served: Served) -> None:
    request = pb.AcquireRequest(ref="file:///" + "m" * (8 << 20))
    error = _refusal(lambda: served.models("replicas").Acquire(request, timeout=20))
    assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert served.node.is_ready()


def test_what_is_not_here_is_not_found_with_a_hint(served: Served) -> None:
    for ask in (
        lambda: served.models("replicas").Get(pb.GetRequest(ref="file:///nowhere")),
        lambda: served.models("replicas").Get(pb.GetRequest(ref="sha256:" + "0" * 64)),
        lambda: served.operator().Evict(op.EvictRequest(ref="file:///nowhere")),
        lambda: served.operator().Unpin(op.UnpinRequest(ref="file:///nowhere")),
        lambda: served.operator().Verify(op.VerifyRequest(ref="file:///nowhere")),
    ):
        assert _told(_refusal(ask)).code is grpc.StatusCode.NOT_FOUND


def test_what_may_pass_by_itself_says_when_to_try_again(served: Served) -> None:
    ref = f"http://127.0.0.1:{free_port()}/m/"
    told = _told(_refusal(lambda: served.models("replicas").Acquire(pb.AcquireRequest(ref=ref), timeout=100)))
    assert told.code is grpc.StatusCode.UNAVAILABLE
    assert told.retry_s is not None and 0 < told.retry_s <= 60
    permanent = _told(_refusal(lambda: served.operator().Unpin(op.UnpinRequest(ref=ref))))
    assert permanent.retry_s is None


# --- the handoff socket ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "said", [b'{"token": "guessed"}\n', b"{}\n", b"nonsense\n", b'{"token": 7}\n', b"x" * 70_000, b'["a"]\n']
)
def test_handoff_refuses_what_is_no_token(served: Served, said: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(20)
        connection.connect(str(served.node.run_dir / "replicas" / "handoff.sock"))
        connection.sendall(said)
        answer, descriptors, _, _ = socket.recv_fds(connection, 65536, 8)
    assert b'"error"' in answer and b'"hint"' in answer and not descriptors


def test_a_token_is_worth_one_handoff(served: Served) -> None:
    *_, event = served.models("replicas").Acquire(pb.AcquireRequest(ref=served.ref), timeout=20)
    answers = []
    for _ in range(2):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(20)
            connection.connect(str(served.node.run_dir / "replicas" / "handoff.sock"))
            connection.sendall(f'{{"token": "{event.grant.token}"}}\n'.encode())
            answers.append(connection.recv(65536))
    assert b'"lease_id"' in answers[0]
    assert b"BAD_TOKEN" in answers[1]
    eventually(lambda: len(served.node.leases(served.ref)) == 1)


# --- whose origin it is ---------------------------------------------------------------------


def test_of_an_operators_origin_replicas_get_what_operators_brought(tmp_path: Path) -> None:
    theirs, bare = f"file://{tmp_path}/theirs/", f"file://{tmp_path}/bare/"
    write_model(tmp_path / "theirs")
    write_model(tmp_path / "bare", sums=False)
    config = tmp_path / "cached.toml"
    config.write_text(
        f'[[source]]\nprefix = "{theirs}"\naccess = "operators"\n'
        f'[[source]]\nprefix = "{bare}"\nrequire_digest = true\n'
    )
    with running_node(tmp_path, with_preloader=False) as node:
        replicas = ("--address", f"unix:{node.run_dir}/replicas/cached.sock")
        node.ctl("prefetch", bare, "--wait")
        node.stop_daemon()
        node.serve("--config", str(config), with_preloader=False)
        refused = node.ctl("path", theirs, *replicas, code=7)
        assert "replicas may not have it fetched" in refused.stderr and "prefetch or pin" in refused.stderr
        assert node.row(theirs) == {}
        node.ctl("prefetch", theirs, "--wait")
        assert node.ctl("path", theirs, *replicas).stdout.startswith(str(node.data_dir))
        with connect(replicas[1]) as channel:
            asked = pb.AcquireRequest(ref=theirs, fresh=True)
            refusal = _refusal(lambda: pb_rpc.ModelCacheStub(channel).Acquire(asked, timeout=10))
        assert _told(refusal).reason == "OPERATORS_ONLY"
        assert "no digest" in node.ctl("path", bare, code=7).stderr, "it came before the digest was required"
