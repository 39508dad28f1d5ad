"""The raw socket that exchanges a one-time token for descriptors: lease, tensor index, memory.

Owns handoff.sock and every connection to it. Decides nothing: what a token is worth comes from
``redeem``. Keeps no lease descriptor once its answer was sent or has failed, never closes a standby's
descriptors, and does no blocking work on the event loop.

The exchange has the framing of ``fds.py``. The client sends ``{"token": …}``. The answer is the
package's header and the descriptors [lease, index, blobs in the manifest's order], or
``{"error": {kind, reason, message, hint, retry_after_s}}`` and none.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cached import fds
from cached.durable import RealFs, temporary_name
from cached.model import CachedError, ErrorKind, Problem

MAX_TOKEN_CHARS = 256
MAX_WORDS_CHARS = 2_000
"""An error's texts are cut here: the framing's line ends at 64 KiB, and JSON may take 12 bytes for one."""
BACKLOG = 1024
ACCEPT_PAUSE_S = 0.1

T = TypeVar("T")

_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@dataclass(frozen=True, slots=True)
class Package:
    """What one token is worth. The server closes ``lease_fd``; ``blob_fds`` stay the standby's.

    ``index`` reads the Manifest as JSON, in a thread, and may raise CachedError; ``blob_fds`` are in the
    order of its distinct blobs.
    """

    header: dict[str, str | int | bool]
    index: Callable[[], bytes]
    lease_fd: int
    blob_fds: tuple[int, ...]


Redeem = Callable[[str, int], Awaitable[Package]]
"""(token, verified uid) -> package. Raises model.CachedError, ``BAD_TOKEN`` for one that a restart forgot."""


class HandoffServer:
    """Serves handoff.sock from ``start`` to ``close``.

    A client has ``client_s`` to ask and as long again to take its answer, whatever it does, and costs
    one of ``most_at_once`` places; ``redeem`` has ``redeem_s``. More clients wait in the socket's backlog.
    The socket's file stays behind: the next daemon renames its own over it.
    """

    def __init__(
        self,
        path: Path,
        redeem: Redeem,
        most_at_once: int = 128,
        client_s: float = 5.0,
        redeem_s: float = 60.0,
    ) -> None:
        self._path = path
        self._redeem = redeem
        self._client_s = client_s
        self._redeem_s = redeem_s
        self._places = asyncio.Semaphore(most_at_once)
        # One thread for each place, so that no client waits behind another one's slowness.
        self._threads = ThreadPoolExecutor(most_at_once, thread_name_prefix="handoff")
        self._serving: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen. Raises CachedError or OSError where the socket cannot be made."""
        assert self._accepting is None
        self._listener = _listen(self._path)
        self._accepting = asyncio.create_task(self._accept(self._listener), name="handoff accept")

    async def close(self) -> None:
        """Stop listening, break off what is under way, and wait until nothing of it is left."""
        tasks = {*self._serving, *([self._accepting] if self._accepting else [])}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
        # Their connections are shut, so that they end at once.
        await asyncio.get_running_loop().run_in_executor(None, self._threads.shutdown)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._places.acquire()
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError:
                # Out of descriptors, or a client gone before it was accepted: both pass.
                self._places.release()
                await asyncio.sleep(ACCEPT_PAUSE_S)
                continue
            except asyncio.CancelledError:
                self._places.release()
                raise
            task = asyncio.create_task(self._serve(connection), name="handoff")
            self._serving.add(task)
            task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._serving.discard(task)
        self._places.release()

    async def _serve(self, connection: socket.socket) -> None:
        try:
            # The loop reads the token itself: to hand it to a thread costs more than all the rest.
            async with asyncio.timeout(self._client_s):
                asked = await _receive_token(connection)
            answer = asked if isinstance(asked, Problem) else await self._answer(asked, _peer_uid(connection))
            # A timeout on the socket bounds one write only, and a client that drips bytes would never meet
            # it; so the answer has a deadline, at which the connection is shut down.
            connection.settimeout(self._client_s)
            await self._within(connection, _send, connection, answer)
        except TimeoutError:
            pass  # it has asked for nothing
        finally:
            _shut(connection)
            connection.close()

    async def _answer(self, token: str, uid: int) -> _Parcel | Problem:
        try:
            async with asyncio.timeout(self._redeem_s):
                package = await self._redeem(token, uid)
            return _own(package)
        except CachedError as error:
            return error.problem
        except TimeoutError:
            return _busy(f"the handoff was not ready within {self._redeem_s:g} s")
        except OSError as error:
            return _busy(f"the handoff's descriptors cannot be given: {error}")
        except Exception as error:
            # A bug of ours: the client is told at once, and the loop's handler is told what it was.
            context = {"message": "redeeming a token failed", "exception": error}
            asyncio.get_running_loop().call_exception_handler(context)
            return Problem(
                ErrorKind.FAILED, "INTERNAL", "the daemon failed at this handoff", "see the daemon's log"
            )

    async def _within(self, connection: socket.socket, work: Callable[..., T], *arguments: Any) -> T:
        """Run blocking ``work`` in a thread of ours, shutting the connection down when the time is up."""
        loop = asyncio.get_running_loop()
        alarm = loop.call_later(self._client_s, _shut, connection)
        try:
            # Shielded: work that owns descriptors always runs and closes them, also when we are cancelled.
            return await asyncio.shield(loop.run_in_executor(self._threads, work, *arguments))
        finally:
            alarm.cancel()


@dataclass(frozen=True, slots=True)
class _Parcel:
    """A package on its way, with descriptors that are ours alone: the lease first."""

    header: dict[str, str | int | bool]
    index: Callable[[], bytes]
    fds: tuple[int, ...]


def _own(package: Package) -> _Parcel:
    """Take the lease, and duplicates of the blobs.

    The standby's descriptors may be closed, and their numbers reused, as soon as the loop runs on;
    another file would then be sent in their place. Raises OSError, having closed what was taken.
    """
    taken = [package.lease_fd]
    try:
        for fd in package.blob_fds:
            taken.append(os.dup(fd))
    except OSError:
        _close_all(taken)
        raise
    return _Parcel(package.header, package.index, tuple(taken))


async def _receive_token(connection: socket.socket) -> str | Problem:
    loop, line = asyncio.get_running_loop(), bytearray()
    try:
        while b"\n" not in line and len(line) <= fds.MAX_LINE_BYTES:
            seen = await loop.sock_recv(connection, 4096)
            if not seen:
                return _bad_request("it was broken off")
            line += seen
        request = fds.parse(bytes(line.partition(b"\n")[0]))
    except (fds.FramingError, RecursionError, OSError) as error:
        return _bad_request(str(error))
    token = request.get("token")
    if request.get("fds", 0) != 0:
        return _bad_request("it announces descriptors")
    if not isinstance(token, str) or not 0 < len(token) <= MAX_TOKEN_CHARS:
        return _bad_request(f"its token is no text of 1 to {MAX_TOKEN_CHARS} characters")
    return token


def _send(connection: socket.socket, answer: _Parcel | Problem) -> None:
    """Send the answer and close what it owns. A client that is gone, or too slow, gets nothing."""
    with contextlib.suppress(OSError):
        if isinstance(answer, Problem):
            fds.send(connection, {"error": _words(answer)})
        else:
            try:
                _send_parcel(connection, answer)
            except CachedError as error:  # its index cannot be read any more; nothing was sent yet
                fds.send(connection, {"error": _words(error.problem)})


def _send_parcel(connection: socket.socket, parcel: _Parcel) -> None:
    owned = [*parcel.fds]
    try:
        index = _sealed(parcel.index())
        owned.append(index)
        lease, *blobs = parcel.fds
        fds.send(connection, dict(parcel.header), (lease, index, *blobs))
    finally:
        _close_all(owned)


def _sealed(content: bytes) -> int:
    """A descriptor of ``content`` that nobody who receives it can change. Raises OSError."""
    fd = os.memfd_create("cached-index", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        left = memoryview(content)
        while left:
            left = left[os.write(fd, left) :]
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _listen(path: Path) -> socket.socket:
    """A listening socket that appears under ``path`` only once everyone may connect to it."""
    fs = RealFs()
    scratch = temporary_name(path)
    fs.unlink(scratch, missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        listener.bind(str(scratch))
        listener.listen(BACKLOG)
        fs.chmod(scratch, 0o666)
        fs.rename(scratch, path)
    except BaseException:
        listener.close()
        raise
    return listener


def _peer_uid(connection: socket.socket) -> int:
    """The uid that the kernel saw when the client connected. The pid beside it is 0 across pid namespaces."""
    credentials = struct.Struct("iII")
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size)
    _, uid, _ = credentials.unpack(packed)
    return int(uid)


def _shut(connection: socket.socket) -> None:
    """Wake whatever blocks on the connection, in any thread."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _close_all(owned: list[int]) -> None:
    for fd in owned:
        os.close(fd)


def _words(problem: Problem) -> dict[str, str | float | None]:
    return {
        "kind": problem.kind.value,
        "reason": problem.reason,
        "message": problem.message[:MAX_WORDS_CHARS],
        "hint": problem.hint[:MAX_WORDS_CHARS],
        "retry_after_s": problem.retry_after_s,
    }


def _bad_request(why: str) -> Problem:
    hint = 'send one line, {"token": "…"}, with the token of a grant'
    return Problem(ErrorKind.INVALID, "BAD_HANDOFF_REQUEST", f"this is no request for a handoff: {why}", hint)


def _busy(message: str) -> Problem:
    hint = "acquire again; if it lasts, look at the standby and at the daemon's limit of open files"
    return Problem(ErrorKind.UNAVAILABLE, "HANDOFF_NOT_READY", message, hint, retry_after_s=1.0)
