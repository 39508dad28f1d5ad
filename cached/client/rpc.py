"""The way to the daemon: its address, a channel, and its errors in the client's words.

Owns where the daemon is looked for and what a failed call means. Makes no calls of its own, keeps no
channel and no state.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from cached.client.errors import UNREACHABLE, CachedError

DEFAULT_RUN_DIR = "/run/cached"
MAX_SOCKET_PATH_BYTES = 100
"""Linux takes 107; the rest is room for the temporary names under which sockets are made."""
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""A model of 10,000 files with long names needs more than gRPC's 4 MiB."""

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # One attempt is one attempt: no connection or backoff is shared with an earlier channel.
    ("grpc.use_local_subchannel_pool", 1),
    # The daemon is on this node; a proxy for the outer world cannot know it.
    ("grpc.enable_http_proxy", 0),
)


def run_dir_or_default(run_dir: str | os.PathLike[str] | None, env: Mapping[str, str] | None = None) -> Path:
    """The run directory: the argument, else ``CACHED_RUN_DIR``, else ``/run/cached``."""
    known = os.environ if env is None else env
    return Path(run_dir or known.get("CACHED_RUN_DIR") or DEFAULT_RUN_DIR).absolute()


def resolve_address(
    run_dir: str | os.PathLike[str] | None = None,
    address: str | None = None,
    operator: bool = False,
    env: Mapping[str, str] | None = None,
) -> str:
    """Where to connect, as gRPC writes it: ``unix:/run/cached/replicas/cached.sock``, ``HOST:PORT``.

    What is said outright outranks the environment: address, run_dir, ``CACHED_ADDRESS``,
    ``CACHED_RUN_DIR``, ``/run/cached``. An address may also be the path of a socket. Raises CachedError
    (INVALID_ARGUMENT) for what cannot be an address.
    """
    known = os.environ if env is None else env
    chosen = address or (None if run_dir else known.get("CACHED_ADDRESS"))
    if chosen:
        return _checked(chosen)
    place = run_dir_or_default(run_dir, known)
    return _checked(f"unix:{place / 'cached.sock' if operator else place / 'replicas' / 'cached.sock'}")


def socket_path(address: str) -> Path | None:
    """The file of a Unix socket's address; None for TCP."""
    return Path(address.removeprefix("unix:")) if address.startswith("unix:") else None


def handoff_path(address: str, run_dir: str | os.PathLike[str] | None = None) -> Path:
    """The handoff socket that belongs to ``address``: beside it, or in the ``replicas`` directory below."""
    own = socket_path(address)
    if own is None:
        return run_dir_or_default(run_dir) / "replicas" / "handoff.sock"
    beside = own.with_name("handoff.sock")
    return beside if beside.exists() else own.parent / "replicas" / "handoff.sock"


def check_socket_path(path: Path) -> None:
    """Refuse a path that no Unix socket can have. Raises CachedError (INVALID_ARGUMENT)."""
    length = len(os.fsencode(path))
    if length > MAX_SOCKET_PATH_BYTES:
        raise CachedError(
            "INVALID_ARGUMENT",
            "SOCKET_PATH_TOO_LONG",
            f"the socket path {path} has {length} bytes; at most {MAX_SOCKET_PATH_BYTES} can be used",
            "choose a shorter run directory, or link to it from a shorter path",
        )


@contextmanager
def connect(address: str) -> Iterator[grpc.Channel]:
    """A channel that is closed at the end of the block; nothing of gRPC lives on.

    A grpc.RpcError that leaves the block becomes a CachedError, so callers need no handler of their own.
    """
    channel = grpc.insecure_channel(address, options=_OPTIONS)
    try:
        yield channel
    except grpc.RpcError as error:
        raise translate(error, address) from error
    finally:
        channel.close()


def translate(error: grpc.RpcError, address: str) -> CachedError:
    """A failed call in the client's words; what the daemon said of it is kept as it was said."""
    if not isinstance(error, grpc.Call):
        return CachedError("UNKNOWN", "RPC_FAILED", f"the call to {address} failed: {error}")
    status = _status_of(error)
    told = None if status is None else _told(error.code().name, status)
    return told or _untold(error.code().name, error.details() or "", address)


def unreachable(address: str, detail: str = "") -> CachedError:
    """Why nobody answers at ``address``, as far as it can be seen from here."""
    path = socket_path(address)
    if path is None:
        return _unreachable(
            f"no daemon answers at {address}", "check the address, and `cached serve --grpc`", detail
        )
    try:
        path.stat()
    except PermissionError:
        return _denied(path)
    except OSError:
        hint = "start `cached serve`, or name its run directory (--run-dir, CACHED_RUN_DIR), mounted here"
        return _unreachable(f"there is no daemon's socket at {path}", hint)
    if not os.access(path, os.R_OK | os.W_OK, effective_ids=True):
        return _denied(path)
    return _unreachable(
        f"nobody answers at {path}", "the daemon is starting or has ended; see its log", detail
    )


def _unreachable(message: str, hint: str, detail: str = "") -> CachedError:
    said = f"{message}: {detail}" if detail else message
    return CachedError("UNAVAILABLE", UNREACHABLE, said, hint, retry_after_s=1.0)


def _denied(path: Path) -> CachedError:
    return CachedError(
        "PERMISSION_DENIED",
        "SOCKET_DENIED",
        f"this user (uid {os.geteuid()}) may not open {path}",
        "operate as the user that runs the daemon; replicas use replicas/cached.sock",
    )


def _checked(text: str) -> str:
    path = re.fullmatch(r"(?:unix:(?://)?)?(/.+)", text)
    if path is not None:
        check_socket_path(Path(path[1]))
        return f"unix:{path[1]}"
    if re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^\s/:]+):[0-9]{1,5}", text):
        return text
    hint = "write unix:/path/of/cached.sock or HOST:PORT (--address, CACHED_ADDRESS)"
    raise CachedError("INVALID_ARGUMENT", "BAD_ADDRESS", f"{text[:200]!r} is not an address", hint)


def _status_of(call: grpc.Call) -> status_pb2.Status | None:
    try:
        status: status_pb2.Status | None = rpc_status.from_call(call)
    except ValueError:  # the details contradict the status itself, so they are not the daemon's
        return None
    return status


def _told(code: str, status: status_pb2.Status) -> CachedError | None:
    """The error as the daemon told it; None where the details are not the daemon's."""
    info = error_details_pb2.ErrorInfo()
    hint = error_details_pb2.LocalizedMessage()
    retry = error_details_pb2.RetryInfo()
    found = {type(m) for any_ in status.details for m in (info, hint, retry) if any_.Unpack(m)}
    if error_details_pb2.ErrorInfo not in found or info.domain != "cached":
        return None
    delay = retry.retry_delay
    wait_s = delay.seconds + delay.nanos / 1e9 if error_details_pb2.RetryInfo in found else None
    return CachedError(code, info.reason, status.message, hint.message, wait_s)


def _untold(code: str, details: str, address: str) -> CachedError:
    """An error that gRPC itself made: the daemon has not said why."""
    match code:
        case "UNAVAILABLE":
            return unreachable(address, details)
        case "DEADLINE_EXCEEDED":
            hint = "allow more time (--timeout, timeout_s); `cachectl show REF` says how far it is"
            return CachedError(code, code, "the time given for this call has passed", hint)
        case "UNIMPLEMENTED":
            hint = "operators' commands need the operators' socket, cached.sock in the run directory"
            return CachedError(code, code, f"what listens at {address} does not offer this call", hint)
        case _:
            return CachedError(code, code, details or f"the call to {address} failed", "see the daemon's log")
