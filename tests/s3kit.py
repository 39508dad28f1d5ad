"""S3 on loopback for tests: moto, rclone and s3rver, which are real, and one that says what it is told to.

Owns what it starts, and ends it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import boto3.session
from botocore.config import Config
from moto.server import ThreadedMotoServer

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

RCLONE = Path(sys.executable).parent / "rclone"
S3RVER = Path(__file__).parent.parent / ".venv/npm/node_modules/s3rver/bin/s3rver.js"
KEY, SECRET = "ACCESSKEY", "SECRETKEY"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
S3RVER_KEY = "S3RVER"
"""s3rver's only key, and its secret: they cannot be set."""
S3RVER_CREDENTIALS = {"AWS_ACCESS_KEY_ID": S3RVER_KEY, "AWS_SECRET_ACCESS_KEY": S3RVER_KEY}


def without_aws(env: Mapping[str, str]) -> dict[str, str]:
    """The environment without anything that boto3 would find, and without asking the machine's cloud."""
    kept = {name: value for name, value in env.items() if not name.startswith("AWS_")}
    nowhere = {"AWS_CONFIG_FILE": "/nonexistent", "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent"}
    return {**kept, **nowhere, "AWS_EC2_METADATA_DISABLED": "true"}


@contextlib.contextmanager
def environment(**changes: str) -> Iterator[None]:
    """This process's environment without what boto3 would find, but with ``changes``."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update({**without_aws(before), **changes})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@dataclass(frozen=True, slots=True)
class Store:
    """A store that runs: its address, and a client to fill it with."""

    url: str
    client: S3Client

    def put(self, bucket: str, files: Mapping[str, bytes]) -> None:
        for key, data in files.items():
            self.client.put_object(Bucket=bucket, Key=key, Body=data)


def client_of(url: str, key: str = KEY, secret: str = SECRET) -> S3Client:
    session = boto3.session.Session(key, secret, region_name="us-east-1")
    config = Config(
        s3={"addressing_style": "path"},
        retries={"total_max_attempts": 1},
        # No CRC unless a test asks for one.
        request_checksum_calculation="when_required",
    )
    return session.client("s3", endpoint_url=url, config=config)


@contextlib.contextmanager
def moto() -> Iterator[Store]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield Store(f"http://{host}:{port}", client_of(f"http://{host}:{port}"))
    finally:
        server.stop()


@contextlib.contextmanager
def rclone(kind: str, root: Path, *arguments: str) -> Iterator[int]:
    """``rclone serve`` over ``root``; yields its port. Of S3 the folders in ``root`` are the buckets."""
    port = _free_port()
    command = [
        str(RCLONE),
        "serve",
        kind,
        str(root),
        "--addr",
        f"127.0.0.1:{port}",
        "--config",
        "",
        *arguments,
    ]
    with _running(command, root.parent / f"rclone-{kind}.log", port):
        yield port


@contextlib.contextmanager
def rclone_s3(root: Path) -> Iterator[Store]:
    with rclone("s3", root, "--auth-key", f"{KEY},{SECRET}") as port:
        yield Store(f"http://127.0.0.1:{port}", client_of(f"http://127.0.0.1:{port}"))


@contextlib.contextmanager
def s3rver(root: Path, bucket: str) -> Iterator[Store]:
    """npm's s3rver, with an empty bucket. It looks whose key it is, but verifies no signature (version 4)."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    node = shutil.which("node", path=path)
    assert node and S3RVER.exists(), "node or s3rver is missing: make test installs them"
    root.mkdir(exist_ok=True)
    port = _free_port()
    command = [node, str(S3RVER), "--directory", str(root), "--address", "127.0.0.1", "--port", str(port)]
    with _running([*command, "--configure-bucket", bucket], root.parent / "s3rver.log", port):
        url = f"http://127.0.0.1:{port}"
        yield Store(url, client_of(url, S3RVER_KEY, S3RVER_KEY))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _running(command: list[str], log_path: Path, port: int) -> Iterator[None]:
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        _wait_for(port, process)
        yield
    finally:
        process.kill()
        process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(200):
        assert process.poll() is None, f"{process.args!r} ended with {process.returncode}"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise AssertionError(f"{process.args!r} does not listen on port {port}")


# --- a store that says what it is told to ----------------------------------------------------


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()
    cut: bool = False
    """Say that there is one byte more than there is, and hang up."""


def refusal(status: int, code: str, *headers: tuple[str, str], details: str = "") -> Answer:
    text = f"<Error><Code>{code}</Code><Message>{code} it is</Message>{details}</Error>"
    return Answer(status, text.encode(), (("Content-Type", "application/xml"), *headers))


@dataclass(slots=True)
class Script:
    """``answers`` by method, each used once and the last for ever; ``asked`` keeps the requests' heads."""

    url: str
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    ports: set[int] = field(default_factory=set)
    """Of the connections that requests came over."""

    def says(self, *answers: Answer, method: str = "GET") -> None:
        self.answers[method] = list(answers)


@contextlib.contextmanager
def scripted(context: ssl.SSLContext | None = None) -> Iterator[Script]:
    """With ``context`` over TLS."""
    script = Script("")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            script.asked.append((self.command, self.path, dict(self.headers.items())))
            script.ports.add(self.client_address[1])
            answers = script.answers[self.command]
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            self.send_response(answer.status)
            for name, value in answer.headers:
                self.send_header(name, value)
            if not any(name == "Content-Length" for name, _ in answer.headers):
                self.send_header("Content-Length", str(len(answer.body) + answer.cut))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(answer.body)
            self.close_connection = self.close_connection or answer.cut

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """Tests are quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    script.url = f"{'http' if context is None else 'https'}://127.0.0.1:{server.server_port}"
    try:
        yield script
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
