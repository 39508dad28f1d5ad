"""Debian's docker-registry on loopback for tests, a token server for it, and models pushed by hand.

Owns what it starts, and ends it. Pushes speak the distribution specification through ``http.client``, so that
nothing of ours decides what is in the registry.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

IMAGE = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER_IMAGE = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
MODEL = "application/vnd.cncf.model.manifest.v1+json"
MODEL_CONFIG = "application/vnd.cncf.model.config.v1+json"
WEIGHT = "application/vnd.cncf.model.weight.v1"
PLAIN_TAR = "application/vnd.oci.image.layer.v1.tar"
FILE_PATH, TITLE = "org.cncf.model.filepath", "org.opencontainers.image.title"

USER, PASSWORD = "reader", "open sesame"
_HTPASSWD = f"{USER}:$2b$04$r/XjiFJVtmmVTQQ6pe3uA.mfKqGj.z..IM5fPKOZ9EzSNmbbXBiYS\n"
_DEBIAN = Path(__file__).parent.parent / ".venv" / "debian" / "bin"
Json = dict[str, Any]


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def program() -> str:
    """Where docker-registry is. Without it the tests fail, as it is the real peer."""
    found = shutil.which("docker-registry", path=f"{_DEBIAN}{os.pathsep}{os.environ.get('PATH', '')}")
    assert found, "docker-registry is missing: run .ci/debian docker-registry, or make test, which does"
    return found


def descriptor(data: bytes, media_type: str, annotations: Mapping[str, str] | None = None) -> Json:
    found: Json = {"mediaType": media_type, "digest": digest_of(data), "size": len(data)}
    return found | ({"annotations": dict(annotations)} if annotations else {})


@dataclass(frozen=True)
class Registry:
    """One that runs: ``host`` is what stands in a ref, and ``root`` holds what is in it."""

    host: str
    root: Path

    def ref(self, repo: str, asked: str = ":v1") -> str:
        return f"oci://{self.host}/{repo}{asked}"

    def blob(self, repo: str, data: bytes) -> None:
        found = self._ask("POST", f"/v2/{repo}/blobs/uploads/")
        place = urlsplit(found.headers["Location"])
        query = f"{place.query}&digest={digest_of(data)}".lstrip("&")
        self._ask("PUT", f"{place.path}?{query}", data, "application/octet-stream")

    def manifest(self, repo: str, tag: str, body: Json, media_type: str = "") -> str:
        """Put as it is; its digest. Without a ``tag`` it is known by that alone."""
        data = json.dumps(body).encode()
        kind = media_type or body.get("mediaType", IMAGE)
        self._ask("PUT", f"/v2/{repo}/manifests/{tag or digest_of(data)}", data, kind)
        return digest_of(data)

    def push(self, repo: str, layers: list[tuple[bytes, Json]], tag: str = "v1", **more: Any) -> str:
        """An image's manifest of these layers, with their blobs; its digest."""
        config = b"{}"
        for data in (config, *(data for data, _ in layers)):
            self.blob(repo, data)
        body = {
            "schemaVersion": 2,
            "mediaType": IMAGE,
            "config": descriptor(config, MODEL_CONFIG),
            "layers": [layer for _, layer in layers],
            **more,
        }
        return self.manifest(repo, tag, body)

    def push_model(self, repo: str, files: Mapping[str, bytes], tag: str = "v1") -> str:
        """As ``modctl build --raw`` has it."""
        layers = [
            (data, descriptor(data, f"{WEIGHT}.raw", {FILE_PATH: path})) for path, data in files.items()
        ]
        return self.push(repo, layers, tag, artifactType=MODEL)

    def push_files(self, repo: str, files: Mapping[str, bytes], tag: str = "v1") -> str:
        """As ``oras push`` has it: by default it calls every file a tar."""
        layers = [(data, descriptor(data, PLAIN_TAR, {TITLE: path})) for path, data in files.items()]
        return self.push(repo, layers, tag)

    def stored(self, digest: str) -> Path:
        """Where a blob's bytes are."""
        name = digest.removeprefix("sha256:")
        return self.root / "docker/registry/v2/blobs/sha256" / name[:2] / name / "data"

    def _ask(self, method: str, path: str, body: bytes = b"", kind: str = "") -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(self.host, timeout=10)
        try:
            connection.request(method, path, body, {"Content-Type": kind} if kind else {})
            response = connection.getresponse()
            said = response.read()
            assert response.status in (201, 202), (method, path, response.status, said)
            return response
        finally:
            connection.close()


@contextlib.contextmanager
def registry(root: Path, auth: Json | None = None) -> Iterator[Registry]:
    """A registry over ``root``; several over one may run at once."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    root.mkdir(exist_ok=True)
    settings: Json = {
        "version": 0.1,
        "log": {"level": "warn", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(root)}},
        "http": {"addr": f"127.0.0.1:{port}", "relativeurls": True},
        **({"auth": auth} if auth else {}),
    }
    # JSON is YAML.
    place = root.parent / f"registry-{port}"
    place.with_suffix(".yml").write_text(json.dumps(settings))
    with place.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(
            [program(), "serve", str(place.with_suffix(".yml"))],
            env={"PATH": os.environ.get("PATH", "")},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        _wait_for(port, process)
        yield Registry(f"127.0.0.1:{port}", root)
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def with_passwords(root: Path) -> Iterator[Registry]:
    """One that wants USER and PASSWORD themselves."""
    path = root.parent / "htpasswd"
    path.write_text(_HTPASSWD)
    with registry(root, {"htpasswd": {"realm": "here", "path": str(path)}}) as found:
        yield found


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(400):
        assert process.poll() is None, f"{process.args!r} ended with {process.returncode}"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.025)
    raise AssertionError(f"{process.args!r} does not listen on port {port}")


# --- tokens ---------------------------------------------------------------------------------


@dataclass
class Tokens:
    """A token server, as distribution's token authentication has it, whose key a registry trusts.

    Who shows USER and PASSWORD gets a token for what is asked; who shows nothing, for ``public`` alone.
    """

    folder: Path
    url: str = ""
    ttl_s: int = 300
    told_s: int | None = None
    """What is said in place of ``ttl_s``."""
    public: str = "open"
    asked: list[tuple[dict[str, list[str]], str]] = field(default_factory=list)

    def make(self, scope: str, service: str) -> str:
        kind, name, actions = scope.split(":")
        now = int(time.time())
        claims = {
            "iss": "tests",
            "sub": USER,
            "aud": service,
            # Whole seconds: it begins one earlier, as this one has begun already.
            "nbf": now - 1,
            "exp": now + self.ttl_s,
            "iat": now,
            "jti": str(len(self.asked)),
            "access": [{"type": kind, "name": name, "actions": actions.split(",")}],
        }
        certificate = (self.folder / "tokens.pem").read_text()
        x5c = "".join(line for line in certificate.splitlines() if not line.startswith("-----"))
        head = {"typ": "JWT", "alg": "RS256", "x5c": [x5c]}
        signed = ".".join(_url64(json.dumps(part).encode()) for part in (head, claims))
        command = ["openssl", "dgst", "-sha256", "-sign", str(self.folder / "tokens.key")]
        signature = subprocess.run(command, input=signed.encode(), capture_output=True, check=True).stdout
        return f"{signed}.{_url64(signature)}"


@contextlib.contextmanager
def tokens(folder: Path) -> Iterator[Tokens]:
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=tokens"
    where = ["-keyout", str(folder / "tokens.key"), "-out", str(folder / "tokens.pem")]
    subprocess.run([*command.split(), *where], check=True, capture_output=True)
    found = Tokens(folder)
    login = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            query, shown = parse_qs(urlsplit(self.path).query), self.headers.get("Authorization", "")
            found.asked.append((query, shown))
            scope = query["scope"][0]
            if shown not in ("", login) or (not shown and scope.split(":")[1] != found.public):
                return self._answer(401, {"details": "incorrect username or password"})
            body: Json = {"token": found.make(scope, query["service"][0])}
            told_s = found.ttl_s if found.told_s is None else found.told_s
            self._answer(200, {**body, "expires_in": told_s})

        def _answer(self, status: int, body: Json) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Nobody reads it."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    found.url = f"http://127.0.0.1:{server.server_port}/token"
    try:
        yield found
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def with_tokens(root: Path, server: Tokens) -> Iterator[Registry]:
    """A registry that wants tokens of ``server``."""
    told = {"realm": server.url, "service": "registry", "issuer": "tests"}
    with registry(root, {"token": {**told, "rootcertbundle": str(server.folder / "tokens.pem")}}) as found:
        yield found


def _url64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
