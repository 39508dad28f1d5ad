"""A web server that says what it is told to say, with or without TLS, and a forward proxy. Loopback only."""

from __future__ import annotations

import base64
import contextlib
import http.client
import select
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Answer:
    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def redirect(to: str, status: int = 302) -> Answer:
    return Answer(b"elsewhere", status, {"Location": to})


class _Server:
    def __init__(self, handler: type[BaseHTTPRequestHandler], context: ssl.SSLContext | None = None) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        if context is not None:
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_port

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


class Site(_Server):
    """``site.answers[path]``: what GET and HEAD get, a list to be gone through or the same each time."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.answers: dict[str, Answer | list[Answer]] = {}
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        super().__init__(_site_handler(self), context)
        self.url = f"{'http' if context is None else 'https'}://127.0.0.1:{self.port}/"

    def headers_of(self, path: str) -> dict[str, str]:
        """Of the last request for it."""
        return next(headers for _, asked, headers in reversed(self.asked) if asked == path)


def _site_handler(site: Site) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            site.asked.append((self.command, self.path, dict(self.headers)))
            found = site.answers.get(self.path, Answer(b"nothing here", 404))
            answer = (found.pop(0) if len(found) > 1 else found[0]) if isinstance(found, list) else found
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """Nobody reads it."""

    return Handler


class Proxy(_Server):
    """A forward proxy that knows the names in ``ports`` (name -> port on loopback), and no others."""

    def __init__(self, ports: dict[str, int], login: str = "") -> None:
        self.ports = ports
        self.login = login
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        super().__init__(_proxy_handler(self))
        self.url = f"http://127.0.0.1:{self.port}"


def _proxy_handler(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            port = self._admit(parts.hostname or "")
            if port is None:
                return
            onward = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            headers = {k: v for k, v in self.headers.items() if k.lower() != "proxy-authorization"}
            onward.request(self.command, parts.path, headers=headers)
            answer = onward.getresponse()
            body = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("date", "server"):
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
            onward.close()

        do_HEAD = do_GET

        def do_CONNECT(self) -> None:
            port = self._admit(self.path.partition(":")[0])
            if port is None:
                return
            with socket.create_connection(("127.0.0.1", port), timeout=5) as onward:
                self.send_response(200)
                self.end_headers()
                self.close_connection = True
                _relay(self.connection, onward)

        def _admit(self, host: str) -> int | None:
            proxy.asked.append((self.command, host, dict(self.headers)))
            expected = "Basic " + base64.b64encode(proxy.login.encode()).decode()
            if proxy.login and self.headers.get("Proxy-Authorization") != expected:
                self.send_error(407)
                return None
            if host not in proxy.ports:
                self.send_error(502)
            return proxy.ports.get(host)

        def log_message(self, format: str, *args: object) -> None:
            """Nobody reads it."""

    return Handler


def _relay(one: socket.socket, other: socket.socket) -> None:
    ways = {one: other, other: one}
    with contextlib.suppress(OSError):
        while True:
            for ready in select.select(list(ways), [], [], 10)[0]:
                data = ready.recv(65536)
                if not data:
                    return
                ways[ready].sendall(data)


def make_authority(folder: Path, *names: str) -> tuple[Path, Callable[[], ssl.SSLContext]]:
    """A certificate for ``names`` that is its own authority: the file to trust, and a server's context."""
    key, certificate = folder / "key.pem", folder / "ca.pem"
    kinds = (f"{'IP' if name[0].isdigit() else 'DNS'}:{name}" for name in names)
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test"
    )
    where = ["-keyout", str(key), "-out", str(certificate), "-addext", f"subjectAltName={','.join(kinds)}"]
    subprocess.run([*command.split(), *where], check=True, capture_output=True)

    def context() -> ssl.SSLContext:
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        made.load_cert_chain(certificate, key)
        return made

    return certificate, context
