"""A Hugging Face Hub to test against: its API, its refusals, and a CDN on a port of its own.

Real HTTP servers on loopback. Speaks as much of the protocol as downloading needs, for us and for the
real ``huggingface_hub`` client: revisions, paged trees, LFS files by redirect, git blob ids.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

GOOD = "hf_good"
"""A token that may read what is private and gated."""
OTHER = "hf_other"
"""A token of an account that has accepted nothing."""
LFS_BYTES = 1000


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Repo:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: Mapping[str, bytes], name: str = "main") -> str:
        """A new commit, and ``name`` (a branch or a tag) moved to it."""
        body = repr(sorted(files.items())).encode() + str(len(self.commits)).encode()
        sha = hashlib.sha1(body).hexdigest()
        self.commits[sha] = dict(files)
        self.names[name] = sha
        return sha

    def find(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.names.get(revision)


@dataclass(frozen=True)
class Asked:
    """One request: at ``hub`` or ``cdn``, and the token that came with it."""

    where: str
    method: str
    path: str
    token: str


class Hub:
    """``with Hub() as hub``: then ``hub.url`` is the endpoint."""

    def __init__(self, page_entries: int = 2) -> None:
        self.repos: dict[str, Repo] = {}
        self.asked: list[Asked] = []
        self.page_entries = page_entries
        self.signature = "1"
        """Of the CDN's addresses; those with another are refused."""
        self.wrong: dict[str, bytes] = {}
        """Path of a file -> what is given out in its place."""
        self.next_page_at: str | None = None
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, w)) for w in ("hub", "cdn")]
        self.url, self.cdn = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def repo(self, name: str) -> Repo:
        return self.repos.setdefault(name, Repo())

    def count(self, where: str, words: str = "") -> int:
        return sum(1 for asked in self.asked if asked.where == where and words in asked.path)

    def __enter__(self) -> Hub:
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()


def _handler(hub: Hub, where: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            hub.asked.append(Asked(where, self.command, unquote(parts.path), token))
            if where == "cdn":
                self._cdn(unquote(parts.path), parse_qs(parts.query))
            elif parts.path.startswith("/api/models/"):
                self._api(parts.path.removeprefix("/api/models/").split("/"), parse_qs(parts.query), token)
            else:
                self._file(parts.path.strip("/").split("/"), token)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """Nobody reads it."""

        def _api(self, words: list[str], query: dict[str, list[str]], token: str) -> None:
            repo = self._repo("/".join(words[:2]), token)
            if repo is None:
                return
            kind, revision = (words[2], unquote(words[3])) if len(words) > 3 else ("revision", "main")
            sha = repo.find(revision)
            if sha is None:
                self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            elif kind == "revision":
                siblings = [{"rfilename": path} for path in repo.commits[sha]]
                name = "/".join(words[:2])
                self._json({"id": name, "sha": sha, "siblings": siblings, "gated": repo.gated})
            else:
                self._tree(repo.commits[sha], words, query)

        def _tree(self, files: dict[str, bytes], words: list[str], query: dict[str, list[str]]) -> None:
            folders = sorted({path.rpartition("/")[0] for path in files if "/" in path})
            entries: list[dict[str, Any]] = [
                {"type": "directory", "oid": "0" * 40, "size": 0, "path": folder} for folder in folders
            ]
            entries += [_entry(path, data) for path, data in sorted(files.items())]
            start = int(query.get("cursor", ["0"])[0])
            stop = start + hub.page_entries
            headers = {}
            if stop < len(entries):
                base = hub.next_page_at or hub.url
                address = f"{base}/api/models/{'/'.join(words)}?recursive=true&cursor={stop}"
                headers["Link"] = f'<{address}>; rel="next"'
            self._json(entries[start:stop], headers)

        def _file(self, words: list[str], token: str) -> None:
            name, revision, path = "/".join(words[:2]), unquote(words[3]), unquote("/".join(words[4:]))
            repo = self._repo(name, token)
            if repo is None:
                return
            sha = repo.find(revision)
            if sha is None:
                return self._error(404, "RevisionNotFound", "Invalid rev id")
            if path not in repo.commits[sha]:
                return self._error(404, "EntryNotFound", "Entry not found")
            if repo.gated and token != GOOD:
                status = 403 if token else 401
                return self._error(status, "GatedRepo", f"Access to model {name} is restricted.")
            data = repo.commits[sha][path]
            headers = {"X-Repo-Commit": sha}
            if len(data) < LFS_BYTES:
                return self._content(hub.wrong.get(path, data), {**headers, "ETag": f'"{git_id(data)}"'})
            headers["X-Linked-Size"] = str(len(data))
            headers["X-Linked-ETag"] = f'"{hashlib.sha256(data).hexdigest()}"'
            headers["Location"] = f"{hub.cdn}/{name}/{sha}/{'/'.join(words[4:])}?signature={hub.signature}"
            self._answer(302, b"Found.", headers)

        def _cdn(self, path: str, query: dict[str, list[str]]) -> None:
            if query.get("signature") != [hub.signature]:
                return self._answer(403, b"expired", {})
            org, name, sha, file = path.strip("/").split("/", 3)
            data = hub.repos[f"{org}/{name}"].commits[sha][file]
            # As a CDN has it: an ETag of its own making.
            self._content(hub.wrong.get(file, data), {"ETag": '"cdn"'})

        def _repo(self, name: str, token: str) -> Repo | None:
            repo = hub.repos.get(name)
            if token not in ("", GOOD, OTHER):
                self._error(401, "", "Invalid credentials in Authorization header")
            elif repo is None or (repo.private and token != GOOD):
                # The Hub does not tell strangers what there is.
                said = "Repository not found" if token else "Invalid username or password."
                self._error(404 if token else 401, "RepoNotFound", said)
            else:
                return repo
            return None

        def _error(self, status: int, code: str, message: str) -> None:
            body = json.dumps({"error": message}).encode()
            headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
            self._answer(status, body, headers)

        def _json(self, body: object, headers: Mapping[str, str] = {}) -> None:
            self._answer(200, json.dumps(body).encode(), {"Content-Type": "application/json", **headers})

        def _content(self, data: bytes, headers: Mapping[str, str]) -> None:
            asked = self.headers.get("Range", "").removeprefix("bytes=")
            if not asked:
                return self._answer(200, data, headers)
            first, _, last = asked.partition("-")
            start, stop = int(first), min(int(last or len(data)) + 1, len(data))
            told = f"bytes {start}-{stop - 1}/{len(data)}"
            self._answer(206, data[start:stop], {**headers, "Content-Range": told})

        def _answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    return Handler


def _entry(path: str, data: bytes) -> dict[str, Any]:
    if len(data) < LFS_BYTES:
        return {"type": "file", "oid": git_id(data), "size": len(data), "path": path}
    digest = hashlib.sha256(data).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(data)}\n".encode()
    lfs = {"oid": digest, "size": len(data), "pointerSize": len(pointer)}
    return {"type": "file", "oid": git_id(pointer), "size": len(data), "path": path, "lfs": lfs}
