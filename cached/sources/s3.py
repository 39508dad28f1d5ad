"""``s3://bucket/prefix/``: the objects under a prefix of an S3 bucket, or of anything that speaks S3.

Owns the conversation with such stores. Credentials come from wherever boto3 finds them; who vouches for
a file is SHA256SUMS beside the objects where there is one, else the sha256 that the store itself keeps of a
whole object. A whole object's CRC is checked and vouches for nothing; a checksum of parts (``COMPOSITE``) is
none of the content's. Every range is read from the version, or under the ETag, that was listed.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import itertools
import re
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import boto3.session
import botocore.session
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from urllib3.exceptions import HTTPError
from urllib3.response import BaseHTTPResponse

from cached.config import SourceSettings
from cached.model import (
    MAX_FILES,
    ORIGIN_CHANGED,
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
from cached.sources import RangesIgnoredError, Space
from cached.sources.client import Body
from cached.sources.filters import select
from cached.sources.s3_errors import code_of, credentials_refused, no_credentials, problem_of
from cached.sources.sums import MAX_SUMS_BYTES, SUMS_NAME, check_names, parse_sums

if TYPE_CHECKING:
    from botocore.credentials import Credentials
    from botocore.response import StreamingBody
    from types_boto3_s3 import S3Client
    from types_boto3_s3.type_defs import (
        GetObjectOutputTypeDef,
        GetObjectRequestTypeDef,
        HeadObjectOutputTypeDef,
    )

MOST_SIZES_AT_ONCE = 8
PAGE_KEYS = 1000
MAX_PAGES = 1000
"""Room for MAX_FILES objects and their folders' markers, also from stores with small pages."""
RETRY_S = 2.0

_VERSION = "versionId="
_OF_PARTS = re.compile(r'-\d+"?$')
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


@dataclass(frozen=True, slots=True)
class _Access:
    """A client, and what it signs with (None: nothing)."""

    client: S3Client
    credentials: Credentials | None


class S3Source:
    """Thread-safe; connections are kept and shared by everything that is read through this."""

    def __init__(self, settings: SourceSettings, connections: int, timeout_s: float) -> None:
        self._settings = settings
        self._at_once = min(connections, MOST_SIZES_AT_ONCE)
        self._config = Config(
            signature_version=UNSIGNED if settings.anonymous else None,
            s3={"addressing_style": settings.addressing},
            connect_timeout=timeout_s,
            read_timeout=timeout_s,
            max_pool_connections=max(connections, self._at_once),
            # Who asks knows better whether and when to ask again.
            retries={"total_max_attempts": 1, "mode": "standard"},
            # The content is proven on disk; here it would be hashed a second time.
            response_checksum_validation="when_required",
            user_agent_extra="cached",
        )
        self._lock = threading.Lock()
        self._access: _Access | None = None

    def resolve(self, ref: Ref) -> Revision:
        """What SHA256SUMS lists, or without it every object under the prefix; with sizes and versions."""
        bucket, prefix = _place(ref)
        listing = self._sums(ref, bucket, prefix)
        if listing is None:
            listing = dict.fromkeys(self._list(ref, bucket, prefix))
        chosen = sorted(select(listing, self._settings, ref))
        executor = ThreadPoolExecutor(self._at_once)
        try:
            files = tuple(executor.map(lambda path: self._spec(ref, path, listing[path]), chosen))
        finally:
            executor.shutdown(cancel_futures=True)
        return Revision(ref, revision_key(ref, files), files)

    def open(self, ref: Ref, spec: FileSpec) -> S3Reader:
        return S3Reader(self, ref, spec)

    def close(self) -> None:
        access, self._access = self._access, None
        if access is not None:
            access.client.close()

    @contextlib.contextmanager
    def asking(self, url: str) -> Iterator[S3Client]:
        """The client; what goes wrong while it is used for ``url`` becomes a CachedError."""
        access = self._current(url)
        try:
            yield access.client
        except (BotoCoreError, ClientError, HTTPError, OSError) as error:
            if credentials_refused(error) and self._renew(access, url):
                raise temporary(
                    "CREDENTIALS_RENEWED",
                    f"{url}: the credentials ended while they were used, and there are new ones",
                    "nothing is to be done: it is asked again with the new ones",
                    0.0,
                ) from error
            method = None if access.credentials is None else access.credentials.method
            raise CachedError(problem_of(error, url, method)) from error

    # --- credentials ------------------------------------------------------------------------

    def _current(self, url: str) -> _Access:
        with self._lock:
            if self._access is None:
                self._access = self._make(url)
            return self._access

    def _make(self, url: str) -> _Access:
        settings = self._settings
        core = botocore.session.Session(profile=settings.profile)
        try:
            session = boto3.session.Session(botocore_session=core, region_name=settings.region)
            credentials = None if settings.anonymous else session.get_credentials()
            if credentials is None and not settings.anonymous:
                raise no_credentials(url, core)
            client = session.client("s3", endpoint_url=settings.endpoint, config=self._config)
        except (BotoCoreError, ValueError) as error:
            raise CachedError(problem_of(error, url, None)) from error
        return _Access(client, credentials)

    def _renew(self, refused: _Access, url: str) -> bool:
        """Look for credentials anew. Whether there are others than those that were refused.

        A mounted secret or a shared file may have been rotated under a long fetch.
        """
        with self._lock:
            if self._access is not refused:
                return True
            found = self._make(url)
            if _secrets(found.credentials) == _secrets(refused.credentials):
                return False
            self._access = found
            return True

    # --- listing ----------------------------------------------------------------------------

    def _sums(self, ref: Ref, bucket: str, prefix: str) -> dict[str, Digest | None] | None:
        url = ref + SUMS_NAME
        with self.asking(url) as client:
            try:
                answer = client.get_object(Bucket=bucket, Key=prefix + SUMS_NAME)
            except ClientError as error:
                if code_of(error) in ("NoSuchKey", "404"):
                    return None
                raise
            with contextlib.closing(answer["Body"]) as body:
                data = body.read(MAX_SUMS_BYTES + 1)
        return dict(parse_sums(data, url))

    def _list(self, ref: Ref, bucket: str, prefix: str) -> list[str]:
        paths: list[str] = []
        with self.asking(ref) as client:
            pages = client.get_paginator("list_objects_v2").paginate(
                Bucket=bucket, Prefix=prefix, PaginationConfig={"PageSize": PAGE_KEYS}
            )
            for number, page in enumerate(itertools.islice(pages, MAX_PAGES + 1), 1):
                # What stands for a folder in the web consoles is an object whose key ends in a slash.
                keys = [found["Key"] for found in page.get("Contents", ())]
                paths += [_under(prefix, key, ref) for key in keys if not key.endswith("/")]
                if len(paths) > MAX_FILES or number > MAX_PAGES:
                    raise _too_many(ref)
        check_names(paths, ref)
        return paths

    def _spec(self, ref: Ref, path: str, digest: Digest | None) -> FileSpec:
        bucket, prefix = _place(ref)
        with self.asking(ref + path) as client:
            found = client.head_object(Bucket=bucket, Key=prefix + path, ChecksumMode="ENABLED")
        digest = digest or _attested(found)
        checksum = "" if digest else _crc(found)
        return FileSpec(path, found["ContentLength"], digest, _version(found), checksum)


class S3Reader:
    """Each range is one request; threads read at once, each over a connection of its own."""

    def __init__(self, source: S3Source, ref: Ref, spec: FileSpec) -> None:
        self._source = source
        self._url = ref + spec.path
        self._spec = spec
        bucket, prefix = _place(ref)
        self._asked: GetObjectRequestTypeDef = {"Bucket": bucket, "Key": prefix + spec.path}
        if spec.version.startswith(_VERSION):
            self._asked["VersionId"] = spec.version.removeprefix(_VERSION)
        elif spec.version and not spec.version.startswith("W/"):
            # A weak one never matches where it is asked for; it is compared all the same.
            self._asked["IfMatch"] = spec.version

    def read(self, start: int, stop: int, space: Space) -> Generator[int, None, None]:
        assert 0 <= start < stop <= self._spec.size_bytes
        asked: GetObjectRequestTypeDef = {**self._asked}
        if (start, stop) != (0, self._spec.size_bytes):
            asked["Range"] = f"bytes={start}-{stop - 1}"
        with self._source.asking(self._url) as client:
            answer = client.get_object(**asked)
            # A connection whose answer was read to its end went back to the pool before this closes it.
            with contextlib.closing(answer["Body"]) as stream, _body(stream) as read_into:
                self._check_answer(answer, start, stop)
                position = start
                while position < stop:
                    count = read_into(space()[: stop - position])
                    if count == 0:
                        raise self._broken_off(position - start, stop - start)
                    yield count
                    position += count

    def close(self) -> None:
        """Connections belong to the source."""

    def _check_answer(self, answer: GetObjectOutputTypeDef, start: int, stop: int) -> None:
        size = self._spec.size_bytes
        self._check_version(answer)
        length = answer["ContentLength"]
        said = answer.get("ContentRange", "")
        if not said:
            if length != size:
                raise self._wrong_size(length)
            if (start, stop) != (0, size):
                raise RangesIgnoredError
            return
        # Told by the header and not by the status: there are servers that answer a range with 200 and with
        # nothing but the range.
        found = _CONTENT_RANGE.fullmatch(said.strip())
        if found is None or (int(found[1]), int(found[2])) != (start, stop - 1) or length != stop - start:
            raise self._bad_range(f"{start}-{stop - 1}", said, length)
        if int(found[3]) != size:
            raise self._wrong_size(int(found[3]))

    def _check_version(self, answer: GetObjectOutputTypeDef) -> None:
        """Also where it was asked for: not every server heeds what it does not know."""
        listed = self._spec.version
        if listed.startswith(_VERSION):
            version_id = answer.get("VersionId", "")
            found = version_id and _VERSION + version_id
        else:
            found = answer.get("ETag", "")
        if listed and found and found != listed:
            raise permanent(
                ErrorKind.FAILED,
                ORIGIN_CHANGED,
                f"{self._url} was changed after it was listed: it was {listed}, and is {found}",
                "ask again, and it is listed anew; better, write each version under a prefix of its own",
            )

    def _bad_range(self, asked: str, said: str, length: int) -> CachedError:
        return permanent(
            ErrorKind.DATA_LOSS,
            "BAD_RANGE",
            f"{self._url}: bytes {asked} were asked for, and the server answered with "
            f"Content-Range {said[:80]!r} and {length} bytes",
            "the server, or a proxy before it, does not do ranges as HTTP has them: mend or go round it",
        )

    def _wrong_size(self, found: int) -> CachedError:
        return permanent(
            ErrorKind.DATA_LOSS,
            "SIZE_MISMATCH",
            f"{self._url} was listed with {self._spec.size_bytes} bytes, and the server has {found}",
            "the server lists another size than it serves: see its log, and what is between it and this node",
        )

    def _broken_off(self, got_bytes: int, asked_bytes: int) -> CachedError:
        return temporary(
            "ORIGIN_BROKE_OFF",
            f"{self._url}: the server closed the connection after {got_bytes} of {asked_bytes} bytes",
            "see the server's log, and what is between it and this node",
            RETRY_S,
        )


def _place(ref: Ref) -> tuple[str, str]:
    """The bucket, and what every key in it begins with: nothing, or a text that ends in ``/``."""
    bucket, _, prefix = ref.removeprefix("s3://").partition("/")
    return bucket, prefix


def _under(prefix: str, key: str, ref: Ref) -> str:
    if not key.startswith(prefix):
        raise permanent(
            ErrorKind.FAILED,
            "BAD_LISTING",
            f"{ref}: the server lists {key[:120]!r}, which is not under the prefix that was asked for",
            "this server does not list by prefix as S3 does: put SHA256SUMS beside the objects",
        )
    return key.removeprefix(prefix)


@contextlib.contextmanager
def _body(stream: StreamingBody) -> Iterator[Callable[[memoryview], int]]:
    """What reads the next bytes of it."""
    raw = getattr(stream, "_raw_stream", None)
    if not isinstance(raw, BaseHTTPResponse):
        yield stream.readinto  # type: ignore[misc]  # its stubs are wrong there
        return
    with contextlib.closing(Body(raw)) as body:
        yield body.read_into


def _attested(found: HeadObjectOutputTypeDef) -> Digest | None:
    """The sha256 of the whole object, where the store keeps one."""
    told = _checksum(found, found.get("ChecksumSHA256", ""), 32)
    return Digest(told) if told else None


def _crc(found: HeadObjectOutputTypeDef) -> str:
    """A CRC of the whole object, as ``FileSpec.checksum`` has it, where the store keeps one."""
    for kind, told, size_bytes in (
        ("crc64nvme", found.get("ChecksumCRC64NVME", ""), 8),
        ("crc32c", found.get("ChecksumCRC32C", ""), 4),
        ("crc32", found.get("ChecksumCRC32", ""), 4),
    ):
        if digits := _checksum(found, told, size_bytes):
            return f"{kind}:{digits}"
    return ""


def _checksum(found: HeadObjectOutputTypeDef, told: str, size_bytes: int) -> str:
    """The hex digits of what is told in base64; empty where it is not about the whole object."""
    kind: str = found.get("ChecksumType", "")
    # A store that does not tell the kind may give the checksum of the parts' checksums of what came in parts.
    if kind != "FULL_OBJECT" and (kind or _OF_PARTS.search(found.get("ETag", ""))):
        return ""
    try:
        data = base64.b64decode(told, validate=True)
    except binascii.Error:
        return ""
    return data.hex() if len(data) == size_bytes else ""


def _version(found: HeadObjectOutputTypeDef) -> str:
    version_id = found.get("VersionId", "")
    # "null" is the version that an unversioned write replaces.
    return _VERSION + version_id if version_id not in ("", "null") else found.get("ETag", "")


def _secrets(credentials: Credentials | None) -> tuple[str | None, ...] | None:
    if credentials is None:
        return None
    frozen = credentials.get_frozen_credentials()
    return frozen.access_key, frozen.secret_key, frozen.token


def _too_many(ref: Ref) -> CachedError:
    return permanent(
        ErrorKind.FAILED,
        "TOO_MANY_FILES",
        f"{ref} holds more than {MAX_FILES} objects, or is listed in more than {MAX_PAGES} pages",
        "name the model's own prefix",
    )
