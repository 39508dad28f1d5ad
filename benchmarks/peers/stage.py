"""What every contestant downloads, and the nginx that it comes from: over HTTP, HTTPS, as S3 and as a Hub.

Owns the model's files, the self-made authority, and the server's configuration. Measures nothing.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import pwd
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.demo.processes import DemoError, Process, start

ROOT = Path(__file__).parents[2]
DEBIAN_BIN = ROOT / ".venv" / "debian" / "bin"
"""Where ``.ci/debian`` puts what the machine itself lacks."""

MODEL = "model"
TINY = "tiny"
"""A model of one small file: whoever fetched it has its processes started and its libraries imported."""
BUCKET = "bench"
ORG = "bench"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TENSOR_BYTES = 64 * 2**20
PIECE_BYTES = 2**20
START_S = 20.0


@dataclass(frozen=True, slots=True)
class File:
    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Stage:
    """``urls``: protocol (``http``, ``https``, ``s3``, ``hf``) -> the server, no slash at its end."""

    files: tuple[File, ...]
    urls: Mapping[str, str]
    authority: Path

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def program(name: str) -> str | None:
    """The path of a program of this machine, or of one that ``.ci/debian`` brought."""
    path = os.pathsep.join([str(DEBIAN_BIN), os.environ.get("PATH", os.defpath), "/usr/sbin"])
    return shutil.which(name, path=path)


def build(work: Path, size_bytes: int, shards: int) -> tuple[Stage, Process]:
    """Make the files and start the server. Raises DemoError."""
    nginx = program("nginx")
    if nginx is None:
        raise DemoError("nginx is not here; on Debian: .ci/debian nginx")
    root = work / "origin" / BUCKET
    files = write_model(root / MODEL, size_bytes, shards)
    tiny = write_model(root / TINY, 1024, 1)
    write_hub(root.parent / "hub" / MODEL, f"{ORG}/{MODEL}", files)
    write_hub(root.parent / "hub" / TINY, f"{ORG}/{TINY}", tiny)
    (root.parent / "list.xml").write_text(listing(files))
    authority, key = make_authority(work)
    ports = dict(zip(("http", "https", "hf"), free_ports(3), strict=True))
    stage = Stage(files, addresses(ports), authority)
    config = work / "nginx.conf"
    config.write_text(nginx_config(work, {MODEL: files, TINY: tiny}, ports, authority, key))
    argv = [nginx, "-e", "stderr", "-p", str(work), "-c", str(config)]
    process = start("nginx", argv, work / "nginx.log", os.environ, work)
    wait_until_up(process, ports["http"])
    return stage, process


def warm(stage: Stage, work: Path) -> None:
    """Have all that the server gives in the page cache, as it is in a busy origin."""
    view = memoryview(bytearray(PIECE_BYTES))
    for file in stage.files:
        with (work / "origin" / BUCKET / MODEL / file.name).open("rb", buffering=0) as opened:
            while opened.readinto(view):
                pass


# --- the files ------------------------------------------------------------------------------


def write_model(folder: Path, size_bytes: int, shards: int) -> tuple[File, ...]:
    """``shards`` safetensors files that nothing can compress, config.json, and SHA256SUMS over all."""
    folder.mkdir(parents=True)
    names = [f"model-{number:05}-of-{shards:05}.safetensors" for number in range(1, shards + 1)]
    files = [write_shard(folder / name, number, size_bytes // shards) for number, name in enumerate(names)]
    config = json.dumps({"model_type": "bench", "architectures": ["Bench"]}, indent=2).encode()
    (folder / "config.json").write_bytes(config)
    files.insert(0, File("config.json", len(config), hashlib.sha256(config).hexdigest()))
    (folder / "SHA256SUMS").write_text("".join(f"{file.sha256}  {file.name}\n" for file in files))
    return tuple(files)


def write_shard(path: Path, number: int, size_bytes: int) -> File:
    header = shard_header(number, size_bytes)
    digest = hashlib.sha256(header)
    # Random once, then varied by its place: making gigabytes of chance would take longer than the download.
    piece = bytearray(os.urandom(PIECE_BYTES))
    left = data_bytes = size_bytes // 2 * 2
    with path.open("wb", buffering=0) as file:
        file.write(header)
        while left:
            struct.pack_into("<QQ", piece, 0, number, left)
            part = memoryview(piece)[: min(PIECE_BYTES, left)]
            digest.update(part)
            file.write(part)
            left -= len(part)
    return File(path.name, len(header) + data_bytes, digest.hexdigest())


def shard_header(number: int, size_bytes: int) -> bytes:
    """A safetensors header: as many BF16 matrices as fit, none above ``TENSOR_BYTES``."""
    tensors: dict[str, dict[str, object]] = {}
    offset, stop = 0, size_bytes // 2 * 2
    while offset < stop:
        count = min(TENSOR_BYTES, stop - offset)
        name = f"layers.{number}.{len(tensors)}.weight"
        tensors[name] = {"dtype": "BF16", "shape": [count // 2], "data_offsets": [offset, offset + count]}
        offset += count
    text = json.dumps(tensors).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_hub(folder: Path, repo: str, files: tuple[File, ...]) -> None:
    """What the Hub's interface says of a model; all of its files are large ones, found by a redirect."""
    folder.mkdir(parents=True)
    siblings = [{"rfilename": file.name} for file in files]
    info = {"id": repo, "sha": COMMIT, "private": False, "gated": False, "siblings": siblings}
    tree = [
        {
            "type": "file",
            "oid": hashlib.sha1(file.sha256.encode()).hexdigest(),
            "size": file.size_bytes,
            "path": file.name,
            "lfs": {"oid": file.sha256, "size": file.size_bytes, "pointerSize": 134},
        }
        for file in files
    ]
    (folder / "revision.json").write_text(json.dumps(info))
    (folder / "tree.json").write_text(json.dumps(tree))


# --- the server -----------------------------------------------------------------------------


def make_authority(work: Path) -> tuple[Path, Path]:
    """A certificate for this machine that is its own authority, and its key."""
    certificate, key = work / "authority.pem", work / "authority.key"
    words = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=bench"
    extensions = ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    argv = [*words.split(), *extensions, "-keyout", str(key), "-out", str(certificate)]
    try:
        made = subprocess.run(argv, capture_output=True, timeout=START_S, text=True, check=False)
    except OSError as error:
        raise DemoError(f"cannot start openssl, which makes the certificate: {error.strerror}") from error
    if made.returncode != 0:
        raise DemoError(f"openssl made no certificate: {made.stderr.strip()[-300:]}")
    return certificate, key


def free_ports(count: int) -> list[int]:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(server.getsockname()[1]) for server in servers]
    for server in servers:
        server.close()
    return ports


def addresses(ports: Mapping[str, int]) -> dict[str, str]:
    # The store of objects is the plain server: a bucket is a folder.
    return {
        "http": f"http://127.0.0.1:{ports['http']}/{BUCKET}",
        "https": f"https://127.0.0.1:{ports['https']}/{BUCKET}",
        "s3": f"http://127.0.0.1:{ports['http']}",
        "hf": f"http://127.0.0.1:{ports['hf']}",
    }


def listing(files: tuple[File, ...]) -> str:
    """What a bucket answers to ListObjectsV2."""
    entries = "".join(
        f"<Contents><Key>{MODEL}/{file.name}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
        f"<ETag>&quot;{file.sha256[:32]}&quot;</ETag><Size>{file.size_bytes}</Size>"
        f"<StorageClass>STANDARD</StorageClass></Contents>"
        for file in files
    )
    return (
        '<?xml version="1.0" encoding="UTF-8"?>'
        f'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>{BUCKET}</Name>'
        f"<Prefix>{MODEL}/</Prefix><KeyCount>{len(files)}</KeyCount><MaxKeys>1000</MaxKeys>"
        f"<IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
    )


def nginx_config(
    work: Path, models: Mapping[str, tuple[File, ...]], ports: Mapping[str, int], authority: Path, key: Path
) -> str:
    """One server for the files, with and without TLS, and one that leads to it as the Hub does."""
    user = f"user {pwd.getpwuid(os.geteuid()).pw_name};" if os.geteuid() == 0 else ""
    linked = [
        (f"/{model}/resolve/[^/]+/{file.name}$", file) for model, files in models.items() for file in files
    ]
    sizes = " ".join(f'"~{address}" {file.size_bytes};' for address, file in linked)
    etags = " ".join(f'"~{address}" \'"{file.sha256}"\';' for address, file in linked)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    scratch = " ".join(f"{kind}_temp_path {work}/nginx-{kind};" for kind in kinds)
    return f"""
{user}
daemon off;
worker_processes 2;
pid {work}/nginx.pid;
error_log stderr warn;
events {{ worker_connections 1024; }}
http {{
  {scratch}
  access_log off;
  types {{ application/xml xml; application/json json; }}
  default_type application/octet-stream;
  sendfile on; tcp_nopush on; keepalive_requests 100000;
  map $uri $linked_size {{ {sizes} }}
  map $uri $linked_etag {{ {etags} }}
  server {{
    listen 127.0.0.1:{ports["http"]};
    listen 127.0.0.1:{ports["https"]} ssl;
    ssl_certificate {authority};
    ssl_certificate_key {key};
    root {work}/origin;
    if ($args ~ list-type=2) {{ rewrite ^ /list.xml break; }}
  }}
  server {{
    listen 127.0.0.1:{ports["hf"]};
    root {work}/origin/hub;
    rewrite ^/api/models/{ORG}/([^/]+)/(revision|tree)/ /$1/$2.json break;
    location ~ ^/{ORG}/(?<model>[^/]+)/resolve/[^/]+/(?<file>.+)$ {{
      add_header X-Repo-Commit {COMMIT} always;
      add_header X-Linked-Size $linked_size always;
      add_header X-Linked-ETag $linked_etag always;
      return 302 http://127.0.0.1:{ports["http"]}/{BUCKET}/$model/$file;
    }}
  }}
}}
"""


def wait_until_up(process: Process, port: int) -> None:
    until = time.monotonic() + START_S
    while True:
        process.check()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_S)
        try:
            connection.request("HEAD", f"/{BUCKET}/{MODEL}/config.json")
            if connection.getresponse().status == http.HTTPStatus.OK:
                return
        except OSError:
            pass
        finally:
            connection.close()
        if time.monotonic() > until:
            raise DemoError(f"nginx did not answer within {START_S:.0f} s")
        time.sleep(0.02)
