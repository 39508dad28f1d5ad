"""Where the daemon is looked for, and what a failed call means."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from client_fake import rich_status
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from cached.client import rpc
from cached.client.errors import CachedError
from cached.model import ErrorKind, Problem
from cached.v1 import model_cache_pb2 as pb
from cached.v1.model_cache_pb2_grpc import (
    ModelCacheServicer,
    ModelCacheStub,
    add_ModelCacheServicer_to_server,
)

ROOT = Path(__file__).resolve().parent.parent


class Failing(ModelCacheServicer):
    """Answers Get with the status that the test has set; knows no other call."""

    status = status_pb2.Status()

    def Get(self, request: pb.GetRequest, context: grpc.ServicerContext) -> pb.Model:
        context.abort_with_status(rpc_status.to_status(self.status))


@pytest.fixture
def failing(tmp_path: Path) -> Iterator[tuple[Failing, str]]:
    servicer = Failing()
    server = grpc.server(ThreadPoolExecutor(2))
    add_ModelCacheServicer_to_server(servicer, server)
    server.add_insecure_port(f"unix:{tmp_path}/cached.sock")
    server.start()
    yield servicer, f"unix:{tmp_path}/cached.sock"
    server.stop(None).wait(5)


def failure(address: str, timeout_s: float = 5.0) -> CachedError:
    with pytest.raises(CachedError) as caught, rpc.connect(address) as channel:
        ModelCacheStub(channel).Get(pb.GetRequest(ref="r"), timeout=timeout_s)
    return caught.value


# --- addresses ---


@pytest.mark.parametrize(
    ("run_dir", "address", "operator", "env", "expected"),
    [
        (None, None, False, {}, "unix:/run/cached/replicas/cached.sock"),
        (None, None, True, {}, "unix:/run/cached/cached.sock"),
        (None, None, False, {"CACHED_RUN_DIR": "/r"}, "unix:/r/replicas/cached.sock"),
        (None, None, True, {"CACHED_RUN_DIR": ""}, "unix:/run/cached/cached.sock"),
        ("/own", None, True, {"CACHED_RUN_DIR": "/r"}, "unix:/own/cached.sock"),
        (None, None, True, {"CACHED_RUN_DIR": "/r", "CACHED_ADDRESS": "h:1"}, "h:1"),
        ("/own", None, True, {"CACHED_ADDRESS": "h:1"}, "unix:/own/cached.sock"),
        ("/own", "h:2", True, {"CACHED_ADDRESS": "h:1"}, "h:2"),
        (None, "/a/b.sock", False, {}, "unix:/a/b.sock"),
        (None, "unix:/a/b.sock", False, {}, "unix:/a/b.sock"),
        (None, "unix:///a/b.sock", False, {}, "unix:/a/b.sock"),
        (None, "[::1]:70", False, {}, "[::1]:70"),
    ],
)
def test_what_is_said_outright_outranks_the_environment(
    run_dir: str | None, address: str | None, operator: bool, env: dict[str, str], expected: str
) -> None:
    assert rpc.resolve_address(run_dir, address, operator, env) == expected


@pytest.mark.parametrize("address", ["host", "unix:relative", "http://h:1", "h:port", " ", "a b:1"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(CachedError, match="is not an address") as caught:
        rpc.resolve_address(None, address)
    assert caught.value.exit_code == 2


def test_a_path_too_long_for_a_socket_is_refused_with_its_length() -> None:
    fits = "/" + "d" * (rpc.MAX_SOCKET_PATH_BYTES - len("//cached.sock"))
    assert rpc.resolve_address(fits, operator=True) == f"unix:{fits}/cached.sock"
    with pytest.raises(CachedError, match="101 bytes; at most 100") as caught:
        rpc.resolve_address(fits + "d", operator=True)
    assert caught.value.exit_code == 2


def test_the_handoff_is_beside_the_replicas_socket_or_below_the_operators(tmp_path: Path) -> None:
    assert rpc.handoff_path(f"unix:{tmp_path}/cached.sock") == tmp_path / "replicas" / "handoff.sock"
    (tmp_path / "handoff.sock").touch()
    assert rpc.handoff_path(f"unix:{tmp_path}/cached.sock") == tmp_path / "handoff.sock"
    assert rpc.handoff_path("h:1", "/r") == Path("/r/replicas/handoff.sock")


# --- errors ---


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, 2),
        (grpc.StatusCode.NOT_FOUND, 3),
        (grpc.StatusCode.DATA_LOSS, 4),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 5),
        (grpc.StatusCode.PERMISSION_DENIED, 7),
        (grpc.StatusCode.DEADLINE_EXCEEDED, 8),
        (grpc.StatusCode.FAILED_PRECONDITION, 1),
        (grpc.StatusCode.UNAVAILABLE, 1),
        (grpc.StatusCode.INTERNAL, 1),
    ],
)
def test_what_the_daemon_says_is_kept(
    failing: tuple[Failing, str], code: grpc.StatusCode, exit_code: int
) -> None:
    servicer, address = failing
    problem = Problem(ErrorKind.FAILED, "SOME_REASON", "what, where: ü", "how to mend it", 1.25)
    servicer.status = rich_status(problem, code.value[0])
    error = failure(address)
    assert (error.code, error.reason, error.message) == (code.name, "SOME_REASON", "what, where: ü")
    assert (error.hint, error.retry_after_s, error.exit_code) == ("how to mend it", 1.25, exit_code)


def test_a_permanent_error_has_no_time_to_retry(failing: tuple[Failing, str]) -> None:
    servicer, address = failing
    servicer.status = rich_status(Problem(ErrorKind.NOT_FOUND, "R", "m", "h"), 5)
    assert failure(address).retry_after_s is None


def test_details_of_another_domain_are_not_ours(failing: tuple[Failing, str]) -> None:
    servicer, address = failing
    status = status_pb2.Status(code=14, message="from a proxy")
    status.details.add().Pack(error_details_pb2.ErrorInfo(domain="elsewhere", reason="X"))
    servicer.status = status
    error = failure(address)
    assert error.reason == "DAEMON_UNREACHABLE" and "from a proxy" in error.message


def test_an_error_without_details_keeps_its_code(failing: tuple[Failing, str]) -> None:
    servicer, address = failing
    servicer.status = status_pb2.Status(code=grpc.StatusCode.INTERNAL.value[0], message="it broke")
    error = failure(address)
    assert (error.code, error.reason, error.message) == ("INTERNAL", "INTERNAL", "it broke")


def test_a_call_that_is_not_offered_names_the_right_socket(failing: tuple[Failing, str]) -> None:
    _, address = failing
    with pytest.raises(CachedError) as caught, rpc.connect(address) as channel:
        ModelCacheStub(channel).List(pb.ListRequest(), timeout=5)
    assert caught.value.code == "UNIMPLEMENTED" and "operators" in caught.value.hint


def test_no_socket_no_listener_and_no_port_are_unreachable(tmp_path: Path) -> None:
    error = failure(f"unix:{tmp_path}/cached.sock")
    assert (error.exit_code, error.reason) == (6, "DAEMON_UNREACHABLE")
    assert f"no daemon's socket at {tmp_path}/cached.sock" in error.message and "cached serve" in error.hint

    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(f"{tmp_path}/cached.sock")
    error = failure(f"unix:{tmp_path}/cached.sock")
    assert error.exit_code == 6 and f"nobody answers at {tmp_path}/cached.sock" in error.message

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        error = failure(address)
    assert error.exit_code == 6 and address in error.message


DENIED = """
import os, sys
from cached.client import rpc
if os.geteuid() == 0:
    os.seteuid(65534)  # root may open everything
print(rpc.unreachable(sys.argv[1]).exit_code)
"""


def test_a_socket_that_may_not_be_opened_is_denied(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(0)
    command = [sys.executable, "-c", DENIED, f"unix:{closed}/cached.sock"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=60).stdout
    closed.chmod(0o700)
    assert said == "7\n"


def test_a_daemon_that_hangs_is_a_deadline(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(f"{tmp_path}/cached.sock")
        silent.listen()
        error = failure(f"unix:{tmp_path}/cached.sock", timeout_s=0.3)
    assert error.exit_code == 8


def test_nothing_of_a_channel_lives_on(failing: tuple[Failing, str]) -> None:
    _, address = failing
    with rpc.connect(address) as channel:
        stub = ModelCacheStub(channel)
    with pytest.raises(ValueError, match="closed"):
        stub.Get(pb.GetRequest(ref="r"), timeout=5)
