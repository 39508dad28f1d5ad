"""A web server that speaks raw bytes, so that it can break every rule of HTTP. Loopback only.

Files are served rightly (HEAD, GET, one range, an ETag) but where an ``Odd`` is told for their path, which
writes to the connection what it likes. Whatever an Odd waits for ends when the server is closed.
"""

from __future__ import annotations

import contextlib
import os
import socket
import socketserver
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self


@dataclass(frozen=True)
class Asked:
    method: str
    path: str
    headers: dict[str, str]

    def range(self, size_bytes: int) -> tuple[int, int] | None:
        text = self.headers.get("range", "")
        if not text.startswith("bytes="):
            return None
        first, _, last = text.removeprefix("bytes=").partition("-")
        return int(first), min(int(last or size_bytes) + 1, size_bytes)


Odd = Callable[["Talk", Asked], bool | None]
"""Answers, and hangs up afterwards; False leaves this request to be answered rightly."""


@dataclass
class Talk:
    """One connection."""

    sock: socket.socket
    over: threading.Event
    data: bytes = b""
    """Of the file that was asked for, where there is one."""

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def head(self, status: str, **headers: object) -> None:
        lines = [f"HTTP/1.1 {status}", *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items())]
        self.send("\r\n".join([*lines, "", ""]).encode("latin-1"))

    def reset(self) -> None:
        # Lingering for no time at all makes the kernel send RST instead of FIN.
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.sock.detach())

    def wait(self) -> None:
        self.over.wait(60)

    def endlessly(self, piece: bytes, every_s: float = 0.0) -> None:
        """Until the other side has enough of it."""
        while not self.over.wait(every_s):
            self.send(piece)


class Wild:
    """``with Wild() as wild``: ``wild.files[path]`` and ``wild.odd[path]``, without a leading slash."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.odd: dict[str, Odd] = {}
        self.over = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.over.set()
        self._server.shutdown()
        self._server.server_close()


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128


def _handler(wild: Wild) -> type[socketserver.BaseRequestHandler]:
    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError), self.request.makefile("rb") as reader:
                while (asked := _read(reader)) is not None:
                    talk = Talk(self.request, wild.over, wild.files.get(asked.path, b""))
                    odd = wild.odd.get(asked.path)
                    if odd is not None and odd(talk, asked) is not False:
                        return
                    _answer(talk, asked, asked.path in wild.files)

    return Handler


def _read(reader: Any) -> Asked | None:
    line = reader.readline(65536).decode("latin-1").split()
    if len(line) < 2:
        return None
    headers = {}
    while text := reader.readline(65536).decode("latin-1").strip():
        name, _, value = text.partition(":")
        headers[name.strip().lower()] = value.strip()
    return Asked(line[0], line[1].lstrip("/"), headers)


def _answer(talk: Talk, asked: Asked, found: bool) -> None:
    if not found:
        return talk.head("404 Not Found", Content_Length=0)
    size_bytes = len(talk.data)
    wanted = asked.range(size_bytes)
    start, stop = wanted or (0, size_bytes)
    told = {"Content_Range": f"bytes {start}-{stop - 1}/{size_bytes}"} if wanted else {}
    status = "206 Partial Content" if wanted else "200 OK"
    talk.head(status, Content_Length=stop - start, ETag='"one"', **told)
    if asked.method == "GET":
        talk.send(talk.data[start:stop])
