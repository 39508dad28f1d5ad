"""Descriptors over a Unix stream socket: one header line, then the descriptors in small batches.

Owns the framing that handoff.sock and the standbys' descriptor sockets share, for both ends.
Knows nothing of what is sent. Imports nothing but the standard library; blocking calls, so every
socket that is passed in must have a timeout.

The exchange: the asker sends one JSON object and a newline. The answer is one JSON object and a
newline, in which ``fds`` is the number of descriptors that follow, at most 128 with each one-byte
message (Linux refuses more than 253).
"""

from __future__ import annotations

import array
import errno
import json
import os
import socket
from typing import Any

BATCH = 128
MAX_LINE_BYTES = 64 * 1024
MAX_FDS = 20_000
PEEK_BYTES = 64 * 1024


class FramingError(Exception):
    """The other end sent something that is no message of this protocol, or went away midway."""


def send(
    sock: socket.socket,
    header: dict[str, Any],
    fds: tuple[int, ...] = (),
    *,
    most_bytes: int = MAX_LINE_BYTES,
) -> None:
    """Send ``header`` and ``fds``. Raises OSError when the other end is gone or the time is up."""
    line = json.dumps({**header, "fds": len(fds)}).encode() + b"\n"
    assert len(line) <= most_bytes and len(fds) <= MAX_FDS
    sock.sendall(line)
    for start in range(0, len(fds), BATCH):
        batch = array.array("i", fds[start : start + BATCH])
        sock.sendmsg([b"F"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, batch)])


def receive(
    sock: socket.socket, most_fds: int = MAX_FDS, *, most_bytes: int = MAX_LINE_BYTES
) -> tuple[dict[str, Any], list[int]]:
    """Receive a header of at most ``most_bytes`` and its descriptors, close-on-exec; the caller owns them.

    Raises FramingError for a malformed or broken-off message (nothing stays open), OSError else.
    """
    header = parse(_receive_line(sock, most_bytes))
    count = header.get("fds", 0)
    if type(count) is not int or not 0 <= count <= most_fds:
        raise FramingError(f"a message announces {count!r} descriptors; at most {most_fds} are taken")
    fds: list[int] = []
    try:
        while len(fds) < count:
            fds += _receive_batch(sock)
        if len(fds) != count:
            raise FramingError(f"{len(fds)} descriptors came where {count} were announced")
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return header, fds


def _receive_line(sock: socket.socket, most_bytes: int) -> bytes:
    # One byte at a time past the first read would be slow; reading past the newline would eat the
    # byte that carries descriptors. So look first, then take exactly the line.
    line = bytearray()
    while not line.endswith(b"\n"):
        seen = sock.recv(PEEK_BYTES, socket.MSG_PEEK)
        if not seen:
            raise FramingError("the other end closed the connection before its message was complete")
        end = seen.find(b"\n")
        line += sock.recv(len(seen) if end < 0 else end + 1)
        if len(line) > most_bytes:
            raise FramingError(f"a message's first line is longer than {most_bytes} bytes")
    return bytes(line)


def _receive_batch(sock: socket.socket) -> list[int]:
    room = socket.CMSG_SPACE(BATCH * array.array("i").itemsize)
    data, ancillary, flags, _ = sock.recvmsg(1, room, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    if data and fds and not flags & socket.MSG_CTRUNC:
        return list(fds)
    for fd in fds:
        os.close(fd)
    if flags & socket.MSG_CTRUNC:
        raise OSError(errno.EMFILE, "not all descriptors of a message could be taken")
    raise FramingError("the other end broke off while sending descriptors")


def parse(line: bytes) -> dict[str, Any]:
    """A message's header. Raises FramingError; RecursionError for what nobody sends in good faith."""
    try:
        header = json.loads(line)
    except ValueError as error:
        raise FramingError(f"a message's first line is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise FramingError("a message's first line is not a JSON object")
    return header
