"""``hf://org/name@revision``: a model on the Hugging Face Hub, or on a server that speaks its protocol.

Owns the conversation with the Hub: which commit a branch or tag is, the commit's tree, the way to a
file's bytes, tokens, and what a refusal means. Large files are vouched for by the sha256 that git LFS knows
them by, small ones by their git blob id. Keeps connections, and for minutes where a file was found.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

import msgspec
from urllib3.response import BaseHTTPResponse

from cached.config import SourceSettings
from cached.model import (
    MAX_FILES,
    CachedError,
    Digest,
    ErrorKind,
    FileSpec,
    Ref,
    Revision,
    hub_parts,
    is_digest,
    permanent,
    revision_key,
)
from cached.sources.client import HttpClient, check_plain, check_status, final_url, led_to, same_host
from cached.sources.filters import select
from cached.sources.http import HttpReader
from cached.sources.secrets import read_secret, token_of
from cached.sources.sums import check_names

ENDPOINT = "https://huggingface.co"
MAX_ANSWER_BYTES = 32 * 1024 * 1024
MAX_PAGES = 200
LOCATION_S = 300.0
"""How long a file is read from where it was found: signed addresses hold for longer."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_NEXT = re.compile(r'<([^<>]+)>\s*;\s*rel="?next"?')
_LAPSED = {HTTPStatus.BAD_REQUEST, HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND}
T = TypeVar("T")
_Size = Annotated[int, msgspec.Meta(ge=0, le=2**60)]


class _Info(msgspec.Struct, frozen=True):
    sha: str


class _Lfs(msgspec.Struct, frozen=True):
    oid: str
    size: _Size


class _Entry(msgspec.Struct, frozen=True):
    type: str
    path: str
    oid: str = ""
    size: _Size = 0
    lfs: _Lfs | None = None


class HubSource:
    """Thread-safe."""

    def __init__(
        self, settings: SourceSettings, connections: int, timeout_s: float, env: Mapping[str, str]
    ) -> None:
        self._settings = settings
        self._env = env
        self._endpoint = (settings.endpoint or env.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")
        self._client = HttpClient(connections, timeout_s, env)

    def resolve(self, ref: Ref) -> Revision:
        """The commit that the ref's branch or tag is now, and its files: it is the ``version`` of each."""
        repo, asked = _parts(ref)
        url = f"{self._api(repo)}/revision/{urllib.parse.quote(asked, safe='')}"
        commit = self._get(url, repo, _INFO)[0].sha
        if not _COMMIT.fullmatch(commit):
            raise _bad_answer(url, f"the commit {commit[:80]!r}")
        entries = self._tree(repo, commit)
        check_names(entries, ref)
        chosen = select(entries, self._settings, ref)
        files = tuple(_spec(entry, commit) for path, entry in sorted(entries.items()) if path in chosen)
        return Revision(ref, revision_key(ref, files), files)

    def open(self, ref: Ref, spec: FileSpec) -> HttpReader:
        repo, _ = _parts(ref)
        url = f"{self._endpoint}/{repo}/resolve/{spec.version}/{urllib.parse.quote(spec.path)}"
        # A commit's address never has other content, so no ETag is compared; its digest is checked anyway.
        return HttpReader(_File(self, repo, url).ask, url, spec, etag="")

    def close(self) -> None:
        self._client.close()

    @contextlib.contextmanager
    def request(self, url: str, repo: str, headers: Mapping[str, str]) -> Iterator[BaseHTTPResponse]:
        """An answer of the Hub's own that carries content, or that says what is wrong with a range."""
        token = self._token()
        own = {"Authorization": f"Bearer {token}"} if token else {}
        with self._client.request("GET", url, {**own, **headers}) as response:
            # Where a file was found may refuse as well, but says nothing of the Hub's.
            if response.status >= HTTPStatus.BAD_REQUEST and self.own(final_url(response)):
                self._check(response, url, repo, token is not None)
            yield response

    @contextlib.contextmanager
    def request_found(self, url: str, headers: Mapping[str, str]) -> Iterator[BaseHTTPResponse]:
        """An answer from where a file was found, which is told nothing of who asks."""
        with self._client.request("GET", url, headers, self._endpoint) as response:
            yield response

    def own(self, url: str) -> bool:
        return same_host(url, self._endpoint)

    def _api(self, repo: str) -> str:
        return f"{self._endpoint}/api/models/{repo}"

    def _tree(self, repo: str, commit: str) -> dict[str, _Entry]:
        entries: dict[str, _Entry] = {}
        url = f"{self._api(repo)}/tree/{commit}?recursive=true&expand=false"
        for _ in range(MAX_PAGES):
            page, following = self._get(url, repo, _TREE)
            entries.update((entry.path, entry) for entry in page if entry.type == "file")
            if following is None:
                return entries
            if len(entries) > MAX_FILES:
                break
            if not self.own(following):
                raise _bad_answer(url, f"a next page on another server, {following[:200]}")
            url = following
        raise permanent(
            ErrorKind.FAILED,
            "TOO_MANY_FILES",
            f"{self._endpoint}/{repo} has more than {MAX_FILES} files or {MAX_PAGES} pages of them",
            "have the model put into a repository of its own",
        )

    def _get(self, url: str, repo: str, decoder: msgspec.json.Decoder[T]) -> tuple[T, str | None]:
        """An answer of the API, and the address of the next page where there is one."""
        with self.request(url, repo, {}) as response:
            check_status(response, url)
            check_plain(response, url)
            data = bytearray()
            while len(data) <= MAX_ANSWER_BYTES and (piece := response.read(64 * 1024)):
                data += piece
            link = _NEXT.search(response.headers.get("Link", "")[:8192])
        if len(data) > MAX_ANSWER_BYTES:
            raise _bad_answer(url, f"more than {MAX_ANSWER_BYTES} bytes")
        try:
            found = decoder.decode(bytes(data))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise _bad_answer(url, f"what the Hub does not answer: {error}") from error
        return found, led_to(url, link[1]) if link else None

    # --- who asks ---------------------------------------------------------------------------

    def _token(self) -> str | None:
        if self._settings.anonymous:
            return None
        return token_of(self._settings, self._env) or self._usual_token()

    def _usual_token(self) -> str | None:
        """From where the Hub's own tools look for it."""
        found = (self._env.get("HF_TOKEN") or self._env.get("HUGGING_FACE_HUB_TOKEN") or "").strip()
        if found:
            return found if found.isprintable() else None
        path = _token_path(self._env)
        try:
            return (read_secret(path) or None) if path is not None else None
        except FileNotFoundError:
            return None
        except OSError as error:
            raise permanent(
                ErrorKind.PRECONDITION,
                "NO_SECRET",
                f"the Hub's token in {path} cannot be read: {error.strerror}",
                "let the user that the daemon runs as read it, or set anonymous = true for this [[source]]",
            ) from error

    # --- what a refusal means ---------------------------------------------------------------

    def _check(self, response: BaseHTTPResponse, url: str, repo: str, known: bool) -> None:
        """Raises CachedError for the Hub's own words; others are for whoever asked."""
        page = f"{self._endpoint}/{repo}"
        said = response.headers.get("X-Error-Message", "").strip()[:200]
        code = response.headers.get("X-Error-Code", "").strip()
        told = f" ({said})" if said else ""
        if code == "GatedRepo":
            _refuse_gated(page, told, known)
        if said == "Access to this resource is disabled.":
            raise permanent(
                ErrorKind.DENIED, "DISABLED_REPO", f"{page} is disabled{told}", "choose another model"
            )
        if code == "RevisionNotFound":
            raise permanent(
                ErrorKind.NOT_FOUND,
                "NO_SUCH_REVISION",
                f"{page} has no such branch, tag or commit: {url}",
                f"see {page}/branches for those that it has",
            )
        if code == "EntryNotFound":
            raise permanent(
                ErrorKind.NOT_FOUND,
                "MISSING_FILE",
                f"{url} is missing at the Hub, which listed it",
                "ask again, and it is listed anew",
            )
        bad_token = known and "invalid" in said.lower()
        unnamed = response.status == HTTPStatus.UNAUTHORIZED and not code and not bad_token
        missing = response.status == HTTPStatus.NOT_FOUND and "/api/models/" in url and not code
        if code == "RepoNotFound" or unnamed or missing:
            _refuse_missing(page, told, known)
        if response.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            raise permanent(
                ErrorKind.DENIED,
                "ORIGIN_DENIED",
                f"{page}: the Hub answered {response.status}{told}",
                "the token is not valid there, or may not read this: see HF_TOKEN, token_env or token_file",
            )


class _File:
    """One file's way: the Hub's address once, and then for a while where that leads to."""

    def __init__(self, source: HubSource, repo: str, url: str) -> None:
        self._source = source
        self._repo = repo
        self._url = url
        self._lock = threading.Lock()
        self._found: tuple[str, float] | None = None

    @contextlib.contextmanager
    def ask(self, headers: Mapping[str, str]) -> Iterator[BaseHTTPResponse]:
        found = self._location(time.monotonic())
        if found is not None:
            with self._source.request_found(found, headers) as response:
                if response.status not in _LAPSED:
                    yield response
                    return
            self._forget(found)
        with self._source.request(self._url, self._repo, headers) as response:
            self._remember(final_url(response), time.monotonic())
            yield response

    def _location(self, now_s: float) -> str | None:
        with self._lock:
            return self._found[0] if self._found is not None and now_s < self._found[1] else None

    def _remember(self, url: str, now_s: float) -> None:
        # On the Hub itself every request needs the token, and leads on by itself.
        if not self._source.own(url):
            with self._lock:
                self._found = (url, now_s + LOCATION_S)

    def _forget(self, url: str) -> None:
        with self._lock:
            if self._found is not None and self._found[0] == url:
                self._found = None


_INFO = msgspec.json.Decoder(_Info)
_TREE = msgspec.json.Decoder(list[_Entry])


def _parts(ref: Ref) -> tuple[str, str]:
    parts = hub_parts(ref)
    assert parts is not None, ref
    return parts


def _spec(entry: _Entry, commit: str) -> FileSpec:
    if entry.lfs is not None:
        digest = entry.lfs.oid.removeprefix("sha256:")
        if not is_digest(digest):
            raise _bad_entry(entry.path, f"the LFS oid {entry.lfs.oid[:80]!r}")
        return FileSpec(entry.path, entry.lfs.size, Digest(digest), commit)
    if not _COMMIT.fullmatch(entry.oid):
        raise _bad_entry(entry.path, f"the blob id {entry.oid[:80]!r}")
    return FileSpec(entry.path, entry.size, None, commit, f"git:{entry.oid}")


def _token_path(env: Mapping[str, str]) -> Path | None:
    if env.get("HF_TOKEN_PATH"):
        return Path(env["HF_TOKEN_PATH"]).expanduser()
    if env.get("HF_HOME"):
        return Path(env["HF_HOME"]).expanduser() / "token"
    if env.get("XDG_CACHE_HOME"):
        return Path(env["XDG_CACHE_HOME"]) / "huggingface" / "token"
    # A service may have no home.
    return Path(env["HOME"]) / ".cache" / "huggingface" / "token" if env.get("HOME") else None


def _refuse_gated(page: str, told: str, known: bool) -> NoReturn:
    raise permanent(
        ErrorKind.DENIED,
        "GATED_REPO",
        f"{page} is gated{told}",
        f"accept its terms at {page} with the account whose token this node uses"
        if known
        else f"accept its terms at {page}, and give this node that account's token: HF_TOKEN where the "
        "daemon runs, or token_env or token_file in a [[source]] table",
    )


def _refuse_missing(page: str, told: str, known: bool) -> NoReturn:
    raise permanent(
        ErrorKind.NOT_FOUND,
        "NO_SUCH_REPO",
        f"there is no model {page}, or it is private{told}",
        "correct the name, or let this node's token read it"
        if known
        else "correct the name; if it is private, give this node a token: HF_TOKEN where the daemon runs, or "
        "token_env or token_file in a [[source]] table",
    )


def _bad_entry(path: str, what: str) -> CachedError:
    return permanent(
        ErrorKind.FAILED,
        "BAD_LISTING",
        f"the Hub lists {path[:200]!r} with {what}",
        "see whether HF_ENDPOINT, or the endpoint of the [[source]] table, is a Hub",
    )


def _bad_answer(url: str, what: str) -> CachedError:
    return permanent(
        ErrorKind.FAILED,
        "BAD_LISTING",
        f"{url}: the server answered {what}",
        "see whether HF_ENDPOINT, or the endpoint of the [[source]] table, is a Hub",
    )
