"""The handoff socket, with clients that behave and clients that do not."""

from __future__ import annotations

import array
import asyncio
import gc
import json
import os
import socket
import stat
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from cached import fds
from cached.handoff import HandoffServer, Package
from cached.model import ErrorKind, permanent


class Desk:
    """Redeems the token "good"; remembers the leases that it gave out."""

    def __init__(self, blob_fds: tuple[int, ...] = (), index: bytes = b"{}") -> None:
        self.blob_fds = blob_fds
        self.index = index
        self.uids: list[int] = []
        self.leases: list[tuple[int, int]] = []

    async def redeem(self, token: str, uid: int) -> Package:
        self.uids.append(uid)
        if token == "slow":
            await asyncio.sleep(60)
        if token == "bug":
            raise ZeroDivisionError("a bug")
        if not token.startswith("good"):
            raise permanent(ErrorKind.NOT_FOUND, "BAD_TOKEN", "no such token", "acquire again")
        # A pipe stands for the lease: its other end sees when the last copy is closed.
        watch, lease = os.pipe()
        self.leases.append((watch, lease))
        index = self.unreadable if token == "good for a while" else lambda: self.index
        return Package({"lease_id": "l1", "attested": True}, index, lease, self.blob_fds)

    def unreadable(self) -> bytes:
        raise permanent(ErrorKind.NOT_FOUND, "NO_ARTIFACT", "it is gone", "prefetch it")

    def all_leases_ended(self) -> bool:
        """Whether nobody has a lease's descriptor any more. To be asked once."""
        ended = True
        for watch, _ in self.leases:
            os.set_blocking(watch, False)
            try:
                ended = ended and os.read(watch, 1) == b""
            except BlockingIOError:
                ended = False
            os.close(watch)
        return ended


@asynccontextmanager
async def serving(path: Path, desk: Desk, **limits: Any) -> AsyncIterator[HandoffServer]:
    server = HandoffServer(path, desk.redeem, **limits)
    await server.start()
    try:
        yield server
    finally:
        await server.close()


def connected(path: Path, timeout_s: float = 20.0) -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.settimeout(timeout_s)
    client.connect(str(path))
    return client


def ask(path: Path, token: str = "good") -> tuple[dict[str, Any], list[int]]:
    with connected(path) as client:
        fds.send(client, {"token": token})
        return fds.receive(client)


def say(path: Path, line: bytes) -> dict[str, Any]:
    with connected(path) as client:
        client.sendall(line)
        return fds.receive(client)[0]


def close_all(received: list[int]) -> None:
    for fd in received:
        os.close(fd)


def open_fds() -> int:
    gc.collect()  # what earlier tests left behind is not to go meanwhile
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "handoff.sock"


@pytest.fixture
def blob(tmp_path: Path) -> int:
    (tmp_path / "blob").write_bytes(b"weights")
    return os.open(tmp_path / "blob", os.O_RDONLY)


async def test_a_token_is_worth_lease_index_and_memory(path: Path, blob: int) -> None:
    desk = Desk((blob,), index=b'{"id": "x"}')
    async with serving(path, desk):
        header, received = await asyncio.to_thread(ask, path)
        assert header == {"lease_id": "l1", "attested": True, "fds": 3}
        assert os.pread(received[1], 100, 0) == b'{"id": "x"}'
        assert os.path.samestat(os.fstat(received[2]), os.fstat(blob))
        assert desk.uids == [os.geteuid()]
        close_all(received)
    assert os.pread(blob, 7, 0) == b"weights", "the standby's descriptor stays open"
    assert desk.all_leases_ended(), "the server keeps no copy of a lease"


@pytest.fixture
def littered(path: Path) -> Path:
    """A socket's path with what a killed predecessor leaves behind."""
    path.with_name(".handoff.sock.tmp").write_bytes(b"left behind")
    path.write_bytes(b"left behind")
    return path


async def test_everyone_may_connect_and_the_socket_replaces_a_predecessors(littered: Path) -> None:
    path = littered
    async with serving(path, Desk()):
        assert stat.filemode(os.stat(path).st_mode) == "srw-rw-rw-"
        assert os.listdir(path.parent) == ["handoff.sock"]


async def test_nobody_can_change_the_index(path: Path) -> None:
    async with serving(path, Desk(index=b"{}")):
        _, received = await asyncio.to_thread(ask, path)
    with pytest.raises(PermissionError):
        os.write(received[1], b"x")
    with pytest.raises(PermissionError):
        os.ftruncate(received[1], 0)
    again = os.open(f"/proc/self/fd/{received[1]}", os.O_RDWR)
    with pytest.raises(PermissionError):
        os.pwrite(again, b"x", 0)
    close_all([*received, again])


async def test_a_refusal_is_told_in_the_words_of_redeem(path: Path) -> None:
    async with serving(path, Desk()):
        header, received = await asyncio.to_thread(ask, path, "wrong")
    assert received == []
    assert header["error"] == {
        "kind": "not_found",
        "reason": "BAD_TOKEN",
        "message": "no such token",
        "hint": "acquire again",
        "retry_after_s": None,
    }


async def test_an_index_that_is_gone_is_told_and_costs_no_lease(path: Path) -> None:
    desk = Desk()
    async with serving(path, desk):
        header, received = await asyncio.to_thread(ask, path, "good for a while")
    assert header["error"]["reason"] == "NO_ARTIFACT" and received == []
    assert desk.all_leases_ended()


async def test_a_bug_in_redeem_is_told_and_reported(path: Path) -> None:
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    async with serving(path, Desk()):
        header, _ = await asyncio.to_thread(ask, path, "bug")
        assert header["error"]["reason"] == "INTERNAL"
        await asyncio.to_thread(ask, path, "wrong")
    assert [type(context["exception"]) for context in reported] == [ZeroDivisionError]


async def test_a_slow_redeem_has_a_bound(path: Path) -> None:
    async with serving(path, Desk(), redeem_s=0.1):
        header, _ = await asyncio.to_thread(ask, path, "slow")
    assert header["error"]["reason"] == "HANDOFF_NOT_READY"
    assert header["error"]["retry_after_s"] > 0


async def test_more_descriptors_than_one_message_takes(path: Path, tmp_path: Path) -> None:
    many = []
    for number in range(300):
        (tmp_path / f"b{number}").write_bytes(str(number).encode())
        many.append(os.open(tmp_path / f"b{number}", os.O_RDONLY))
    async with serving(path, Desk(tuple(many))):
        _, received = await asyncio.to_thread(ask, path)
    assert [os.pread(fd, 10, 0) for fd in received[2:]] == [str(n).encode() for n in range(300)]
    close_all([*received, *many])


async def test_a_big_index_arrives_whole(path: Path) -> None:
    index = os.urandom(8 * 1024 * 1024)
    async with serving(path, Desk(index=index)):
        _, received = await asyncio.to_thread(ask, path)
        assert os.pread(received[1], len(index) + 1, 0) == index
        close_all(received)


@pytest.mark.parametrize(
    "line",
    [
        b"garbage\n",
        b"\xff\xfe\x00\n",
        b"[]\n",
        b"{}\n",
        b'{"token": 7}\n',
        b'{"token": ""}\n',
        b'{"token": "' + b"x" * 300 + b'"}\n',
        b'{"token": "good", "fds": 3}\n',
        b'{"token": "good", "fds": -1}\n',
        b"[" * 60_000 + b"\n",
        b"x" * 70_000,
    ],
)
async def test_what_is_no_request_is_refused(path: Path, line: bytes) -> None:
    desk = Desk()
    async with serving(path, desk):
        try:
            answer = await asyncio.to_thread(say, path, line)
            assert answer["error"]["reason"] == "BAD_HANDOFF_REQUEST"
            assert answer["error"]["kind"] == "invalid"
        except OSError:
            assert len(line) > fds.MAX_LINE_BYTES, "only an endless line is cut off without a word"
        header, received = await asyncio.to_thread(ask, path)
        assert header["lease_id"] == "l1", "and the next client is served"
        close_all(received)
    assert len(desk.uids) == 1, "nothing was redeemed for it"


async def test_a_client_that_drips_bytes_is_cut_off_in_time(path: Path) -> None:
    def drip() -> float:
        begin = time.monotonic()
        with connected(path) as client:
            try:
                while time.monotonic() < begin + 20:
                    client.sendall(b"x")
                    time.sleep(0.05)
            except OSError:
                pass
        return time.monotonic() - begin

    async with serving(path, Desk(), client_s=0.3):
        assert await asyncio.to_thread(drip) < 10


async def test_a_client_that_never_reads_keeps_no_place_and_no_lease_beyond_its_end(
    path: Path, blob: int
) -> None:
    copies = tuple(os.dup(blob) for _ in range(300))
    desk = Desk(copies)
    async with serving(path, desk, most_at_once=1, client_s=30):
        lazy = await asyncio.to_thread(connected, path)
        await asyncio.to_thread(fds.send, lazy, {"token": "good"})
        header, _ = await asyncio.wait_for(asyncio.to_thread(ask, path, "wrong"), 15)
        assert header["error"]["reason"] == "BAD_TOKEN"
        assert len(desk.leases) == 1
        lazy.close()
    assert desk.all_leases_ended()
    close_all(list(copies))


async def test_clients_beyond_the_bound_wait_their_turn(path: Path) -> None:
    async with serving(path, Desk(), client_s=0.5, most_at_once=2):
        begin = time.monotonic()
        idle = [await asyncio.to_thread(connected, path) for _ in range(2)]
        _, received = await asyncio.to_thread(ask, path)
        assert time.monotonic() - begin > 0.4, "until an idle one's time was up"
        close_all([*received, *(client.detach() for client in idle)])


async def test_a_client_that_leaves_takes_no_lease_with_it(path: Path, blob: int) -> None:
    desk = Desk((blob,))
    before = open_fds()
    async with serving(path, desk):
        for _ in range(20):
            with await asyncio.to_thread(connected, path) as client:
                await asyncio.to_thread(fds.send, client, {"token": "good"})
        _, received = await asyncio.to_thread(ask, path)
        close_all(received)
    # An answer that was under way when the server closed is ended by its thread, a moment later.
    async with asyncio.timeout(5):
        while not desk.all_leases_ended() or open_fds() != before:
            await asyncio.sleep(0.01)


async def test_descriptors_that_a_client_sends_are_not_taken(path: Path, blob: int) -> None:
    def smuggle() -> None:
        with connected(path) as client:
            batch = array.array("i", [blob] * 50)
            line = json.dumps({"token": "wrong"}).encode() + b"\n"
            client.sendmsg([line], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, batch)])
            assert fds.receive(client)[0]["error"]["reason"] == "BAD_TOKEN"

    before = open_fds()
    async with serving(path, Desk()):
        await asyncio.to_thread(smuggle)
    assert open_fds() == before


async def test_closing_breaks_off_what_is_under_way(path: Path, blob: int) -> None:
    desk = Desk((blob,))
    before = open_fds()
    server = HandoffServer(path, desk.redeem, client_s=30)
    await server.start()
    idle = [await asyncio.to_thread(connected, path) for _ in range(5)]
    slow = await asyncio.to_thread(connected, path)
    await asyncio.to_thread(fds.send, slow, {"token": "slow"})
    await asyncio.sleep(0.1)
    begin = time.monotonic()
    await server.close()
    assert time.monotonic() - begin < 15
    for client in (*idle, slow):
        assert client.recv(1) == b"", "the other end is closed"
        client.close()
    assert open_fds() == before
    with pytest.raises(ConnectionRefusedError):
        connected(path)
