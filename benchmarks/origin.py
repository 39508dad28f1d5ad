"""A small HTTP/1.1 origin for tests, benchmarks and the demo: ranges, ETags, a rate, counters, faults.

Owns the pretence of a model host on 127.0.0.1. It serves one folder read-only, counts every body
byte it sends, shares one rate over all connections, and misbehaves on request. Imports nothing of
the project, so that it can stand in for any origin.

In a test::

    with Origin(tmp_path, rate_bytes_per_s=50e6) as origin:
        origin.faults["model/weights.safetensors"] = Fault("reset", at_bytes=1000, times=1)
        fetch(origin.url + "model/")
        assert origin.sent["model/weights.safetensors"] == ...

By itself: ``python benchmarks/origin.py DIR --rate-mbit 1000 --port 8000``; ``GET /-/stats`` tells
the counters as JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import http.server
import json
import os
import re
import socket
import struct
import sys
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

SLICE_BYTES = 64 * 1024
"""What is sent between two looks at the rate: small enough that connections share it evenly."""
UNLIMITED_SLICE_BYTES = 1024 * 1024
MAX_WAIT_S = 3600.0
OVERSLEEP_S = 0.02
STATS_PATH = "-/stats"

FaultKind = Literal[
    "reset",  # send ``at_bytes`` of the body, then reset the connection
    "truncate",  # send ``at_bytes`` of the body, then close it in order
    "stall",  # send ``at_bytes`` of the body, then send nothing more for ``stall_s``
    "status",  # answer ``status`` (and Retry-After: ``retry_after_s``)
    "corrupt",  # flip the bits of the file's byte ``at_bytes``
    "no_ranges",  # answer every range with 200 and the whole file
    "changed",  # the file has another ETag, and every byte of it is flipped
    "wrong_range",  # say in Content-Range that the range starts one byte later
    "wrong_total",  # say in Content-Range that the file is ``at_bytes`` bytes longer
    "redirect",  # answer 302 to ``location``
]


@dataclass(slots=True)
class Fault:
    """One way to misbehave for one file.

    The first ``skip`` requests of ``methods`` are answered well, the ``times`` ones after them (None:
    all) badly. ``at_bytes`` counts from the start of the response's body, for ``corrupt`` from the
    start of the file.
    """

    kind: FaultKind
    at_bytes: int = 0
    times: int | None = None
    skip: int = 0
    status: int = 500
    retry_after_s: float | None = None
    stall_s: float = 60.0
    location: str = ""
    methods: tuple[str, ...] = ("GET",)


class Rate:
    """One rate shared by all connections: each books its slice's time, then sleeps until it comes."""

    def __init__(self, bytes_per_s: float | None) -> None:
        assert bytes_per_s is None or bytes_per_s > 0
        self.bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at = 0.0

    @property
    def slice_bytes(self) -> int:
        return UNLIMITED_SLICE_BYTES if self.bytes_per_s is None else SLICE_BYTES

    def take(self, size_bytes: int, closed: threading.Event) -> None:
        if self.bytes_per_s is None:
            return
        with self._lock:
            # What was not used in the past is gone, or a burst after a pause would falsify a figure; but for
            # the little by which sleeps are too long, or a single connection would never reach the rate.
            now = time.monotonic()
            self._free_at = max(self._free_at, now - OVERSLEEP_S) + size_bytes / self.bytes_per_s
            wait_s = self._free_at - now
        closed.wait(min(max(0.0, wait_s), MAX_WAIT_S))


class Origin:
    """Serves ``root`` until closed. ``faults`` and the counters are keyed by the path under ``root``.

    ``sent`` counts body bytes by path, ``requests`` counts GET and HEAD requests by path; both
    leave out ``/-/stats``. ``rate.bytes_per_s`` may be changed at any time.
    """

    def __init__(
        self, root: Path, rate_bytes_per_s: float | None = None, port: int = 0, host: str = "127.0.0.1"
    ) -> None:
        self.root = root.resolve()
        self._host = host
        self.rate = Rate(rate_bytes_per_s)
        self.sent: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self.faults: dict[str, Fault] = {}
        self.closed = threading.Event()
        self._lock = threading.Lock()
        self._server = _Server(self, host, port)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        return f"http://{self._host}:{self.port}/"

    @property
    def bytes_sent(self) -> int:
        """Body bytes of everything sent so far."""
        with self._lock:
            return sum(self.sent.values())

    def stats(self) -> dict[str, Any]:
        with self._lock:
            return {
                "bytes_sent": sum(self.sent.values()),
                "sent": dict(self.sent),
                "requests": dict(self.requests),
            }

    def reset_counters(self) -> None:
        with self._lock:
            self.sent.clear()
            self.requests.clear()

    def close(self) -> None:
        """Stop at once: open transfers are cut off, and the port refuses connections."""
        self.closed.set()
        self._server.shutdown()
        self._server.server_close()
        self._server.cut_connections()
        self._thread.join()

    def __enter__(self) -> Origin:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def count_request(self, path: str) -> None:
        with self._lock:
            self.requests[path] += 1

    def count_sent(self, path: str, size_bytes: int) -> None:
        with self._lock:
            self.sent[path] += size_bytes

    def fault_for(self, path: str, method: str) -> Fault | None:
        """The fault that this request must suffer, if any, counted down."""
        with self._lock:
            fault = self.faults.get(path)
            if fault is None or method not in fault.methods:
                return None
            if fault.skip > 0:
                fault.skip -= 1
                return None
            if fault.times is not None:
                if fault.times <= 0:
                    return None
                fault.times -= 1
            return fault


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512
    # Closing must not wait for a transfer that was just cut off.
    block_on_close = False

    def __init__(self, origin: Origin, host: str, port: int) -> None:
        self.origin = origin
        self._open: set[socket.socket] = set()
        self._open_lock = threading.Lock()
        super().__init__((host, port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._open_lock:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._open_lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def cut_connections(self) -> None:
        with self._open_lock:
            for sock in self._open:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news; anything else is a fault of this file."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Cut(Exception):
    """This connection ends here, on purpose."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: the counters say what matters."""

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def _serve(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).lstrip("/")
        if path == STATS_PATH:
            self._answer_json(self.server.origin.stats())
            return
        self.server.origin.count_request(path)
        fault = self.server.origin.fault_for(path, self.command)
        if fault is not None and fault.kind in ("status", "redirect"):
            self._answer_fault(fault)
            return
        # A Cut or a broken connection leaves nothing to say on it.
        with contextlib.suppress(_Cut, ConnectionError), self._open_file(path) as file:
            if file is None:
                self._answer_empty(404)
            else:
                self._send_file(path, file, fault)
            return
        self.close_connection = True

    @contextlib.contextmanager
    def _open_file(self, path: str) -> Iterator[BinaryIO | None]:
        target = (self.server.origin.root / path).resolve()
        if not target.is_relative_to(self.server.origin.root) or not target.is_file():
            yield None
            return
        with target.open("rb") as file:
            yield file

    def _send_file(self, path: str, file: BinaryIO, fault: Fault | None) -> None:
        kind = None if fault is None else fault.kind
        state = os.fstat(file.fileno())
        etag = f'"{state.st_mtime_ns:x}-{state.st_size:x}{"-changed" if kind == "changed" else ""}"'
        wanted = None if kind == "no_ranges" else self._wanted_range(etag, state.st_size)
        if wanted is not None and wanted[0] >= wanted[1]:
            self._answer_empty(416, {"Content-Range": f"bytes */{state.st_size}"})
            return
        start, stop = wanted or (0, state.st_size)
        self.send_response(200 if wanted is None else 206)
        if wanted is not None:
            self.send_header("Content-Range", _content_range(start, stop, state.st_size, fault))
        self.send_header("Content-Length", str(stop - start))
        self.send_header("ETag", etag)
        self.send_header("Last-Modified", self.date_time_string(int(state.st_mtime)))
        self.send_header("Accept-Ranges", "none" if kind == "no_ranges" else "bytes")
        self.end_headers()
        if self.command == "GET":
            self._send_body(path, file, start, stop, fault)

    def _wanted_range(self, etag: str, size_bytes: int) -> tuple[int, int] | None:
        """The asked-for range as (start, stop); None for the whole file."""
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "").strip())
        if asked is None or self.headers.get("If-Range", etag) != etag:
            return None
        first, last = asked[1], asked[2]
        if not first:
            return (max(0, size_bytes - int(last)), size_bytes) if last else None
        return int(first), min(size_bytes, int(last) + 1) if last else size_bytes

    def _send_body(self, path: str, file: BinaryIO, start: int, stop: int, fault: Fault | None) -> None:
        cut_at = stop
        if fault is not None and fault.kind in ("reset", "truncate", "stall"):
            cut_at = min(stop, start + fault.at_bytes)
        position = start
        while position < cut_at and not self.server.origin.closed.is_set():
            size_bytes = min(self.server.origin.rate.slice_bytes, cut_at - position)
            self.server.origin.rate.take(size_bytes, self.server.origin.closed)
            sent = self._send_slice(file, position, size_bytes, fault)
            self.server.origin.count_sent(path, sent)
            position += sent
        if position < stop:
            self._cut(fault)

    def _send_slice(self, file: BinaryIO, position: int, size_bytes: int, fault: Fault | None) -> int:
        if fault is None or fault.kind not in ("corrupt", "changed"):
            sent = os.sendfile(self.connection.fileno(), file.fileno(), position, size_bytes)
            if sent == 0:
                raise _Cut  # the file became shorter while it was sent
            return sent
        data = bytearray(os.pread(file.fileno(), size_bytes, position))
        if fault.kind == "changed":
            data = bytearray(byte ^ 0xFF for byte in data)
        elif position <= fault.at_bytes < position + len(data):
            data[fault.at_bytes - position] ^= 0xFF
        self.connection.sendall(data)
        return len(data)

    def _cut(self, fault: Fault | None) -> None:
        if fault is not None and fault.kind == "stall":
            self.server.origin.closed.wait(fault.stall_s)
        elif fault is not None and fault.kind == "reset":
            # Lingering for no time at all makes the kernel send RST instead of FIN.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        raise _Cut

    def _answer_fault(self, fault: Fault) -> None:
        headers = {} if fault.retry_after_s is None else {"Retry-After": f"{fault.retry_after_s:g}"}
        if fault.kind == "redirect":
            self._answer_empty(302, {"Location": fault.location})
        else:
            self._answer_empty(fault.status, headers)

    def _answer_empty(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _answer_json(self, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _content_range(start: int, stop: int, size_bytes: int, fault: Fault | None) -> str:
    kind = None if fault is None else fault.kind
    shift = 1 if kind == "wrong_range" else 0
    total = size_bytes + fault.at_bytes if fault is not None and kind == "wrong_total" else size_bytes
    return f"bytes {start + shift}-{stop - 1 + shift}/{total}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve a folder like a model host does, at a given rate.")
    parser.add_argument("dir", type=Path, help="the folder to serve")
    parser.add_argument(
        "--rate-mbit", type=float, default=None, help="Mbit/s over all connections (no limit)"
    )
    parser.add_argument("--port", type=int, default=0, help="the port on 127.0.0.1 (any free one)")
    arguments = parser.parse_args()
    rate = None if arguments.rate_mbit is None else arguments.rate_mbit * 1e6 / 8
    with Origin(arguments.dir, rate, arguments.port) as origin, contextlib.suppress(KeyboardInterrupt):
        print(origin.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
