"""``http(s)://host/dir/``: a folder on a web server as an origin.

Owns the conversation with such servers: the listing (SHA256SUMS), sizes, ranges, and the reading of
their answers with suspicion. A range that is not the range that was asked for, a file whose size or
ETag is not the listed one, an encoded body: each is refused by name. Keeps connections, nothing else.
"""

from __future__ import annotations

import contextlib
import re
import ssl
import urllib.parse
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus

import urllib3
from urllib3.exceptions import HTTPError, InvalidHeader, LocationParseError, MaxRetryError
from urllib3.response import BaseHTTPResponse

from cached.config import SourceSettings
from cached.model import (
    CachedError,
    Digest,
    ErrorKind,
    FileSpec,
    Ref,
    Revision,
    permanent,
    revision_key,
    temporary,
)
from cached.sources import RangesIgnoredError
from cached.sources.filters import select
from cached.sources.sums import MAX_SUMS_BYTES, SUMS_NAME, parse_sums

MAX_REDIRECTS = 5
MAX_HOSTS = 16
MOST_SIZES_AT_ONCE = 8
MAX_RETRY_AFTER_S = 3600.0
RETRY_S = 2.0

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_UNSATISFIED = re.compile(r"bytes \*/(\d+)")
# How servers say that they do not answer HEAD; signed addresses say 403, as they are signed for GET.
_NO_HEAD = {
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.FORBIDDEN,
    HTTPStatus.METHOD_NOT_ALLOWED,
    HTTPStatus.NOT_IMPLEMENTED,
}
_BUSY = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}


class HttpSource:
    """Thread-safe; connections are kept and shared by everything that is read through this."""

    def __init__(
        self, settings: SourceSettings, connections: int, timeout_s: float, env: Mapping[str, str]
    ) -> None:
        self._settings = settings
        self._sizes_at_once = min(connections, MOST_SIZES_AT_ONCE)
        self._pool = urllib3.PoolManager(
            num_pools=MAX_HOSTS,
            maxsize=max(connections, self._sizes_at_once),
            timeout=urllib3.Timeout(connect=timeout_s, read=timeout_s),
            # Redirects only: who asks knows better whether and when to ask again.
            retries=urllib3.Retry(
                total=MAX_REDIRECTS,
                redirect=MAX_REDIRECTS,
                connect=0,
                read=0,
                status=0,
                other=0,
                respect_retry_after_header=False,
            ),
            headers={"Accept-Encoding": "identity", "User-Agent": "cached"},
        )

    def resolve(self, ref: Ref) -> Revision:
        """What SHA256SUMS lists, with sizes and ETags asked for each file."""
        sums = parse_sums(self._read_sums(ref + SUMS_NAME), ref + SUMS_NAME)
        chosen = select(sums, self._settings, ref)
        sums = {path: digest for path, digest in sums.items() if path in chosen}
        executor = ThreadPoolExecutor(self._sizes_at_once)
        try:
            files = tuple(executor.map(lambda entry: self._spec(ref, *entry), sums.items()))
        finally:
            executor.shutdown(cancel_futures=True)
        return Revision(ref, revision_key(ref, files), files)

    def open(self, ref: Ref, spec: FileSpec) -> HttpReader:
        return HttpReader(self, _url(ref, spec.path), spec)

    def close(self) -> None:
        self._pool.clear()

    @contextlib.contextmanager
    def request(
        self, method: str, url: str, headers: Mapping[str, str] | None = None
    ) -> Iterator[BaseHTTPResponse]:
        """One answer, its body unread. The connection is kept for the next request if it was read whole."""
        with _errors(url):
            merged = {**self._pool.headers, **(headers or {})}
            response = self._pool.request(
                method, url, headers=merged, preload_content=False, decode_content=False
            )
            try:
                yield response
            except BaseException:
                response.close()
                raise
            if response.length_remaining == 0:
                # Also an answer without a body has to be read, or its connection cannot be used again.
                response.drain_conn()
                response.release_conn()
            else:
                response.close()

    def _read_sums(self, url: str) -> bytes:
        with self.request("GET", url) as response:
            if response.status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
                raise permanent(
                    ErrorKind.NOT_FOUND,
                    "NO_SHA256SUMS",
                    f"{url} is missing: without it nobody can say which files there are, or prove them",
                    f"put it beside the files: sha256sum -- * > {SUMS_NAME}; or correct the ref",
                )
            _check_status(response, url)
            _check_plain(response, url)
            # A server may send a body in pieces; one byte more than the bound tells that it is broken.
            data = bytearray()
            while len(data) <= MAX_SUMS_BYTES and (piece := response.read(64 * 1024)):
                data += piece
            return bytes(data)

    def _spec(self, ref: Ref, path: str, digest: Digest) -> FileSpec:
        url = _url(ref, path)
        with self.request("HEAD", url) as response:
            if response.status not in _NO_HEAD:
                _check_status(response, url)
                _check_plain(response, url)
                size = response.headers.get("Content-Length", "")
                if size.isdecimal():
                    return FileSpec(path, int(size), digest, _version(response))
        return self._spec_by_range(url, path, digest)

    def _spec_by_range(self, url: str, path: str, digest: Digest) -> FileSpec:
        with self.request("GET", url, {"Range": "bytes=0-0"}) as response:
            if response.status != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                _check_status(response, url)
                _check_plain(response, url)
            size = _told_size(response)
            response.close()
        if size is None:
            raise permanent(
                ErrorKind.FAILED,
                "NO_SIZE",
                f"{url}: the server tells the file's size neither for HEAD nor for a range",
                "serve the files from a plain web server or an object store",
            )
        return FileSpec(path, size, digest, _version(response))


class HttpReader:
    """Each range is one request; threads read at once, each over a connection of its own."""

    def __init__(self, source: HttpSource, url: str, spec: FileSpec) -> None:
        self._source = source
        self._url = url
        self._spec = spec

    def read(self, start: int, stop: int, view: memoryview) -> Generator[int, None, None]:
        assert 0 <= start < stop <= self._spec.size_bytes
        whole = start == 0 and stop == self._spec.size_bytes
        # For the whole file a range would only give a server more to get wrong.
        headers = {} if whole else {"Range": f"bytes={start}-{stop - 1}"}
        with self._source.request("GET", self._url, headers) as response:
            self._check_answer(response, start, stop, whole)
            position = start
            while position < stop:
                count = response.readinto(view[: stop - position])
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
        _check_status(response, self._url)
        _check_plain(response, self._url)
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
        if found and self._spec.version and found != self._spec.version:
            raise permanent(
                ErrorKind.FAILED,
                "ORIGIN_CHANGED",
                f"{self._url} was changed after it was listed: it was {self._spec.version}, and is {found}",
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


def _url(ref: Ref, path: str) -> str:
    return ref + urllib.parse.quote(path)


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
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


def _check_plain(response: BaseHTTPResponse, url: str) -> None:
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise permanent(
            ErrorKind.FAILED,
            "ORIGIN_ENCODES",
            f"{url}: the server sends Content-Encoding {encoding[:40]!r} where identity was asked for",
            "switch compression off for this folder",
        )


def _check_status(response: BaseHTTPResponse, url: str) -> None:
    """Raises CachedError unless the answer carries content."""
    status = response.status
    if status in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
        return
    said = f"{url}: the server answered {status} {response.reason or ''}".rstrip()
    if status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
        raise permanent(
            ErrorKind.NOT_FOUND,
            "MISSING_FILE",
            f"{url} is missing at the origin, which answered {status}",
            f"put it there, or take it out of {SUMS_NAME}",
        )
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        raise permanent(
            ErrorKind.DENIED, "ORIGIN_DENIED", said, "let this node read the folder, or correct the ref"
        )
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR or status in _BUSY:
        raise temporary(
            "ORIGIN_UNAVAILABLE",
            said,
            "see the origin's own log; it is asked again",
            _retry_after_s(response),
        )
    raise permanent(
        ErrorKind.FAILED, "ORIGIN_REFUSED", said, "open this address by hand, and correct the ref"
    )


def _retry_after_s(response: BaseHTTPResponse) -> float:
    header = response.headers.get("Retry-After")
    if header is None:
        return 0.0
    with contextlib.suppress(InvalidHeader, OverflowError):
        return min(max(0.0, urllib3.Retry().parse_retry_after(header)), MAX_RETRY_AFTER_S)
    return 0.0


@contextlib.contextmanager
def _errors(url: str) -> Iterator[None]:
    try:
        yield
    except (HTTPError, OSError) as error:
        raise _connection_error(error, url) from error


def _connection_error(error: Exception, url: str) -> CachedError:
    cause: BaseException = error
    if isinstance(error, MaxRetryError) and error.reason is not None:
        cause = error.reason
    if isinstance(cause, urllib3.exceptions.ResponseError):
        return permanent(
            ErrorKind.FAILED,
            "TOO_MANY_REDIRECTS",
            f"{url}: the server redirects more than {MAX_REDIRECTS} times",
            "name the address that it leads to",
        )
    if isinstance(cause, urllib3.exceptions.LocationValueError | LocationParseError):
        return permanent(ErrorKind.INVALID, "BAD_REF", f"{url} is no address: {cause}", "correct the ref")
    if _has_cause(cause, ssl.SSLCertVerificationError):
        return permanent(
            ErrorKind.DENIED,
            "ORIGIN_CERTIFICATE",
            f"{url}: the server's certificate is not trusted: {cause}",
            "add the authority that signed it to this node's trusted ones (SSL_CERT_FILE)",
        )
    return temporary(
        "ORIGIN_UNREACHABLE",
        f"{url}: {cause}"[:500],
        "check that the origin runs, and that this node reaches it; it is asked again",
        0.0,
    )


def _has_cause(error: BaseException | None, kind: type[BaseException]) -> bool:
    for _ in range(8):
        if error is None:
            return False
        if isinstance(error, kind) or any(isinstance(part, kind) for part in error.args):
            return True
        error = error.__cause__ or error.__context__
    return False
