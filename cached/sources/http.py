"""``http(s)://host/dir/`` and ``http(s)://host/file#sha256=…``: web servers as origins.

Owns the listing (SHA256SUMS), sizes, ranges, and the reading of the answers with suspicion. A range that
is not the range that was asked for, a file whose size or ETag is not the listed one, an encoded body:
each is refused by name. Keeps connections, nothing else.
"""

from __future__ import annotations

import contextlib
import re
import urllib.parse
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from http import HTTPStatus

from urllib3.response import BaseHTTPResponse

from cached.config import SourceSettings
from cached.model import (
    ORIGIN_CHANGED,
    CachedError,
    Digest,
    ErrorKind,
    FileSpec,
    Ref,
    Revision,
    check_relative_path,
    permanent,
    revision_key,
    temporary,
)
from cached.sources import RangesIgnoredError, Space
from cached.sources.client import Body, HttpClient, check_plain, check_status
from cached.sources.filters import select
from cached.sources.secrets import token_of
from cached.sources.sums import MAX_SUMS_BYTES, SUMS_NAME, parse_sums

MOST_SIZES_AT_ONCE = 8
RETRY_S = 2.0

Ask = Callable[[Mapping[str, str]], AbstractContextManager[BaseHTTPResponse]]
"""Gets one file with some headers more."""

MAX_FILE_BYTES = 2**60
# A number that is longer than that is none: it could not even be said in an error.
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,20})-([0-9]{1,20})/([0-9]{1,20}|\*)")
_UNSATISFIED = re.compile(r"bytes \*/([0-9]{1,20})")
_LENGTH = re.compile(r"[0-9]{1,20}")
# How servers say that they do not answer HEAD; signed addresses say 403, as they are signed for GET.
_NO_HEAD = {
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.FORBIDDEN,
    HTTPStatus.METHOD_NOT_ALLOWED,
    HTTPStatus.NOT_IMPLEMENTED,
}


class HttpSource:
    """Thread-safe."""

    def __init__(
        self, settings: SourceSettings, connections: int, timeout_s: float, env: Mapping[str, str]
    ) -> None:
        self._settings = settings
        self._env = env
        self._at_once = min(connections, MOST_SIZES_AT_ONCE)
        self._client = HttpClient(max(connections, self._at_once), timeout_s, env)

    def resolve(self, ref: Ref) -> Revision:
        """What SHA256SUMS lists, or the one file that the ref names; sizes and ETags asked for each."""
        address, _, digest = ref.partition("#sha256=")
        if digest:
            listed = {_name_of(address): Digest(digest)}
        else:
            listed = parse_sums(self._read_sums(ref + SUMS_NAME), ref + SUMS_NAME)
        chosen = select(listed, self._settings, ref)
        wanted = [(path, digest) for path, digest in listed.items() if path in chosen]
        executor = ThreadPoolExecutor(self._at_once)
        try:
            files = tuple(executor.map(lambda entry: self._spec(_url(ref, entry[0]), *entry), wanted))
        finally:
            executor.shutdown(cancel_futures=True)
        return Revision(ref, revision_key(ref, files), files)

    def open(self, ref: Ref, spec: FileSpec) -> HttpReader:
        url = _url(ref, spec.path)

        def ask(headers: Mapping[str, str]) -> AbstractContextManager[BaseHTTPResponse]:
            return self._request("GET", url, headers)

        return HttpReader(ask, url, spec, spec.version)

    def close(self) -> None:
        self._client.close()

    def _request(
        self, method: str, url: str, headers: Mapping[str, str] | None = None
    ) -> AbstractContextManager[BaseHTTPResponse]:
        token = token_of(self._settings, self._env)
        own = {"Authorization": f"Bearer {token}"} if token else {}
        return self._client.request(method, url, {**own, **(headers or {})})

    def _read_sums(self, url: str) -> bytes:
        with self._request("GET", url) as response:
            if response.status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
                raise permanent(
                    ErrorKind.NOT_FOUND,
                    "NO_SHA256SUMS",
                    f"{url} is missing: without it nobody can say which files there are, or prove them",
                    f"put it beside the files: sha256sum -- * > {SUMS_NAME}; or correct the ref",
                )
            check_status(response, url)
            check_plain(response, url)
            # A server may send a body in pieces; one byte more than the bound tells that it is broken.
            data = bytearray()
            while len(data) <= MAX_SUMS_BYTES and (piece := response.read(64 * 1024)):
                data += piece
            return bytes(data)

    def _spec(self, url: str, path: str, digest: Digest) -> FileSpec:
        with self._request("HEAD", url) as response:
            if response.status not in _NO_HEAD:
                check_status(response, url)
                check_plain(response, url)
                size = _length(response)
                if size is not None:
                    return _spec(path, size, digest, response, url)
        return self._spec_by_range(url, path, digest)

    def _spec_by_range(self, url: str, path: str, digest: Digest) -> FileSpec:
        with self._request("GET", url, {"Range": "bytes=0-0"}) as response:
            if response.status != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                check_status(response, url)
                check_plain(response, url)
            size = _told_size(response)
            response.close()
        if size is None:
            raise permanent(
                ErrorKind.FAILED,
                "NO_SIZE",
                f"{url}: the server tells the file's size neither for HEAD nor for a range",
                "serve the files from a plain web server or an object store",
            )
        return _spec(path, size, digest, response, url)


class HttpReader:
    """Each range is one request; threads read at once, each over a connection of its own."""

    def __init__(self, ask: Ask, url: str, spec: FileSpec, etag: str) -> None:
        """``etag``: what the file's has to be; empty where its address never has other content."""
        self._ask = ask
        self._url = url
        self._spec = spec
        self._etag = etag

    def read(self, start: int, stop: int, space: Space) -> Generator[int, None, None]:
        assert 0 <= start < stop <= self._spec.size_bytes
        whole = start == 0 and stop == self._spec.size_bytes
        # For the whole file a range would only give a server more to get wrong.
        headers = {} if whole else {"Range": f"bytes={start}-{stop - 1}"}
        with self._ask(headers) as response:
            self._check_answer(response, start, stop, whole)
            position = start
            with contextlib.closing(Body(response)) as body:
                while position < stop:
                    count = body.read_into(space()[: stop - position])
                    if count == 0:
                        raise self._broken_off(position - start, stop - start)
                    yield count
                    position += count
            if whole and response.length_remaining is None and response.read(1):
                raise self._wrong_size("more")

    def close(self) -> None:
        """Connections belong to the source."""

    def _check_answer(self, response: BaseHTTPResponse, start: int, stop: int, whole: bool) -> None:
        size = self._spec.size_bytes
        if response.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            told = _told_size(response)
            raise self._wrong_size("fewer" if told is None else str(told))
        check_status(response, self._url)
        check_plain(response, self._url)
        self._check_version(response)
        told = _told_size(response)
        if told is not None and told != size:
            raise self._wrong_size(str(told))
        if response.status == HTTPStatus.OK:
            if not whole:
                raise RangesIgnoredError
            return
        self._check_range(response, start, stop)

    def _check_version(self, response: BaseHTTPResponse) -> None:
        found = _version(response)
        if found and self._etag and found != self._etag:
            raise permanent(
                ErrorKind.FAILED,
                ORIGIN_CHANGED,
                f"{self._url} was changed after it was listed: it was {self._etag}, and is {found}",
                "ask again, and it is listed anew; better, write each version into a folder of its own",
            )

    def _check_range(self, response: BaseHTTPResponse, start: int, stop: int) -> None:
        said = response.headers.get("Content-Range", "")
        length = response.headers.get("Content-Length", str(stop - start))
        found = _CONTENT_RANGE.fullmatch(said.strip())
        right = found is not None and (int(found[1]), int(found[2])) == (start, stop - 1)
        if not right or length != str(stop - start):
            raise permanent(
                ErrorKind.DATA_LOSS,
                "BAD_RANGE",
                f"{self._url}: bytes {start}-{stop - 1} were asked for, and the server answered "
                f"{response.status} with Content-Range {said[:80]!r} and {length[:20]} bytes",
                "the server, or a proxy before it, does not do ranges as HTTP has them: mend or go round it",
            )

    def _wrong_size(self, found: str) -> CachedError:
        return permanent(
            ErrorKind.DATA_LOSS,
            "SIZE_MISMATCH",
            f"{self._url} was listed with {self._spec.size_bytes} bytes, and the server has {found}",
            "the upload may be unfinished: write the file anew, or wait until it is there",
        )

    def _broken_off(self, got_bytes: int, asked_bytes: int) -> CachedError:
        return temporary(
            "ORIGIN_BROKE_OFF",
            f"{self._url}: the server closed the connection after {got_bytes} of {asked_bytes} bytes",
            "see the server's log, and what is between it and this node",
            RETRY_S,
        )


def _spec(path: str, size_bytes: int, digest: Digest, response: BaseHTTPResponse, url: str) -> FileSpec:
    if size_bytes > MAX_FILE_BYTES:
        raise permanent(
            ErrorKind.FAILED,
            "BAD_SIZE",
            f"{url}: the server says that it has {size_bytes} bytes, and {MAX_FILE_BYTES} are the most",
            "the server, or a proxy before it, is broken: mend or go round it",
        )
    return FileSpec(path, size_bytes, digest, _version(response))


def _url(ref: Ref, path: str) -> str:
    address, mark, _ = ref.partition("#sha256=")
    return address if mark else ref + urllib.parse.quote(path)


def _name_of(address: str) -> str:
    """What a single file is called here. Raises CachedError where its address ends in no file's name."""
    name = urllib.parse.unquote(address.rpartition("/")[2])
    check_relative_path(name)
    if "/" in name:
        raise permanent(
            ErrorKind.INVALID, "BAD_REF", f"{address} does not end in a file's name", "correct the ref"
        )
    return name


def _version(response: BaseHTTPResponse) -> str:
    """What tells two contents of one address apart; empty where the server gives nothing."""
    etag = response.headers.get("ETag", "").strip()
    # Only compression makes the same content's ETag weak, and we take none.
    return etag.removeprefix("W/")[:200] or response.headers.get("Last-Modified", "")[:200]


def _told_size(response: BaseHTTPResponse) -> int | None:
    """The whole file's size, as this answer tells it."""
    said = response.headers.get("Content-Range", "").strip()
    if response.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        found = _UNSATISFIED.fullmatch(said)
        return int(found[1]) if found else None
    if response.status == HTTPStatus.PARTIAL_CONTENT:
        found = _CONTENT_RANGE.fullmatch(said)
        return int(found[3]) if found and found[3] != "*" else None
    return _length(response)


def _length(response: BaseHTTPResponse) -> int | None:
    """What the answer says of its own length; None where that is nothing, or no number."""
    said = response.headers.get("Content-Length", "").strip()
    return int(said) if _LENGTH.fullmatch(said) else None
