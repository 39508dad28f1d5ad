"""``oci://registry/repo:tag@sha256:…``: models in OCI registries, as ModelPack and plain layers have them.

Owns the conversation with a registry: which manifest a tag is, which files its layers are, the way to their
bytes, and what a refusal means. A layer that is a file is vouched for by its own digest, which the
manifest's digest covers. A layer that is an archive is not unpacked here: it is refused by name.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated

import msgspec
from urllib3.response import BaseHTTPResponse

from cached.config import SourceSettings
from cached.model import (
    CachedError,
    Digest,
    ErrorKind,
    FileSpec,
    Ref,
    Revision,
    is_digest,
    permanent,
    revision_key,
)
from cached.sources.client import HttpClient, check_plain, check_status, final_url, same_host
from cached.sources.filters import select
from cached.sources.http import HttpReader
from cached.sources.network import LOOPBACK, kind_of
from cached.sources.oci_auth import RegistryAuth, hint_of
from cached.sources.sums import check_names

MAX_MANIFEST_BYTES = 4 * 1024 * 1024
"""As registries have it."""
MAX_INDEX_ENTRIES = 1000
MAX_ERROR_BYTES = 64 * 1024
MOST_LISTED = 8

MANIFESTS = frozenset(
    {"application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json"}
)
INDEXES = frozenset(
    {"application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json"}
)
MODEL_MANIFESTS = frozenset(
    {"application/vnd.cncf.model.manifest.v1+json", "application/vnd.cnai.model.manifest.v1+json"}
)
# ModelPack's own (and its former name) before that of plain layers: with both, the first has the folders.
FILE_PATHS = ("org.cncf.model.filepath", "org.cnai.model.filepath")
TITLE = "org.opencontainers.image.title"
UNPACK = "io.deis.oras.content.unpack"
"""ORAS's mark of a folder that it packed. Without it a title is a file's, whatever the media type: by default
ORAS calls every file a tar."""
_ARCHIVE = re.compile(r"[./+-]tar(\+(gzip|zstd))?$")
_ATTESTATION = "vnd.docker.reference.type"

_Size = Annotated[int, msgspec.Meta(ge=0, le=2**60)]


class _Platform(msgspec.Struct, frozen=True):
    os: str = ""
    architecture: str = ""


class _Descriptor(msgspec.Struct, frozen=True, rename="camel"):
    media_type: str
    digest: str
    size: _Size
    annotations: dict[str, str] | None = None
    platform: _Platform | None = None
    artifact_type: str = ""


class _Manifest(msgspec.Struct, frozen=True, rename="camel"):
    """An image's manifest has ``layers``, an index has ``manifests``."""

    media_type: str = ""
    layers: list[_Descriptor] | None = None
    manifests: list[_Descriptor] | None = None


class _Error(msgspec.Struct, frozen=True):
    code: str = ""
    message: str = ""


class _Errors(msgspec.Struct, frozen=True):
    errors: list[_Error] | None = None


@dataclass(frozen=True, slots=True)
class _Place:
    """A repository, and what of it: ``asked`` is a tag or ``sha256:…``."""

    registry: str
    repo: str
    base: str
    asked: str

    @property
    def tags(self) -> str:
        return f"{self.base}/v2/{self.repo}/tags/list"

    def manifest(self, asked: str) -> str:
        return f"{self.base}/v2/{self.repo}/manifests/{asked}"

    def blob(self, digest: str) -> str:
        return f"{self.base}/v2/{self.repo}/blobs/sha256:{digest}"


class OciSource:
    """Thread-safe."""

    def __init__(
        self, settings: SourceSettings, connections: int, timeout_s: float, env: Mapping[str, str]
    ) -> None:
        self._settings = settings
        self._client = HttpClient(connections, timeout_s, env)
        self._auth = RegistryAuth(self._client, settings, env)

    def resolve(self, ref: Ref) -> Revision:
        """The manifest that the ref's tag is now, and the files that its layers are."""
        place = _place(ref, self._settings)
        manifest = self._manifest(place, place.asked)
        if manifest.manifests is not None:
            manifest = self._manifest(place, _chosen(manifest.manifests, ref).digest)
            if manifest.manifests is not None:
                raise _bad_manifest(ref, "its index leads to another index")
        layers = _named(manifest.layers or [], ref)
        check_names(layers, ref, _bad_manifest)
        chosen = select(layers, self._settings, ref)
        files = tuple(_spec(path, layer, ref) for path, layer in sorted(layers.items()) if path in chosen)
        return Revision(ref, revision_key(ref, files), files)

    def open(self, ref: Ref, spec: FileSpec) -> HttpReader:
        assert spec.sha256 is not None, "every file of a registry is named by its digest"
        place = _place(ref, self._settings)
        url = place.blob(spec.sha256)

        def ask(headers: Mapping[str, str]) -> AbstractContextManager[BaseHTTPResponse]:
            return self._request(place, url, headers)

        # A digest's address never has other content, so no ETag is compared; the digest is checked anyway.
        return HttpReader(ask, url, spec, etag="")

    def close(self) -> None:
        self._client.close()

    # --- the conversation -------------------------------------------------------------------

    def _manifest(self, place: _Place, asked: str) -> _Manifest:
        url = place.manifest(asked)
        with self._request(place, url, {"Accept": ", ".join(sorted(MANIFESTS | INDEXES))}) as response:
            check_plain(response, url)
            data = bytearray()
            while len(data) <= MAX_MANIFEST_BYTES and (piece := response.read(64 * 1024)):
                data += piece
            told = response.headers.get("Docker-Content-Digest", "")
            kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if len(data) > MAX_MANIFEST_BYTES:
            raise _bad_manifest(url, f"its manifest is larger than {MAX_MANIFEST_BYTES} bytes")
        _check_digest(bytes(data), told, asked, url)
        return _parse(bytes(data), kind, url)

    @contextlib.contextmanager
    def _request(self, place: _Place, url: str, headers: Mapping[str, str]) -> Iterator[BaseHTTPResponse]:
        """An answer that carries content, or that says what is wrong with a range."""
        shown = self._auth.header(place.registry, place.repo, time.monotonic())
        with self._send(url, headers, shown) as response:
            if not self._own(response, place) or response.status != HTTPStatus.UNAUTHORIZED:
                self._check(response, place, url)
                yield response
                return
            challenges = response.headers.getlist("WWW-Authenticate")
            renewed = self._auth.answer(place.registry, place.repo, url, shown, challenges)
            if not renewed:
                self._check(response, place, url)
        with self._send(url, headers, renewed) as response:
            self._check(response, place, url)
            yield response

    def _send(
        self, url: str, headers: Mapping[str, str], shown: str
    ) -> AbstractContextManager[BaseHTTPResponse]:
        return self._client.request("GET", url, {**({"Authorization": shown} if shown else {}), **headers})

    def _own(self, response: BaseHTTPResponse, place: _Place) -> bool:
        """Whether the registry answered itself, and not the store that it led to."""
        return same_host(final_url(response), place.base)

    # --- what a refusal means ---------------------------------------------------------------

    def _check(self, response: BaseHTTPResponse, place: _Place, url: str) -> None:
        """Raises CachedError for a refusal, except for a range's: that is its reader's."""
        status = response.status
        if status < HTTPStatus.BAD_REQUEST or status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return
        if self._own(response, place):
            if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
                raise permanent(
                    ErrorKind.DENIED,
                    "ORIGIN_DENIED",
                    f"{place.registry}/{place.repo}: the registry answered {status}{_said(response)[1]}",
                    hint_of(self._auth.known(place.registry)),
                )
            if status == HTTPStatus.NOT_FOUND:
                code, told = _said(response)
                raise _missing(place, url, code == "MANIFEST_UNKNOWN" and self._has_repo(place), told)
        check_status(response, url)

    def _has_repo(self, place: _Place) -> bool:
        """Registries tell a missing repository from a missing tag only where they list tags."""
        shown = self._auth.header(place.registry, place.repo, time.monotonic())
        with self._send(f"{place.tags}?n=1", {}, shown) as response:
            return response.status != HTTPStatus.NOT_FOUND


_MANIFEST = msgspec.json.Decoder(_Manifest)
_ERRORS = msgspec.json.Decoder(_Errors)


def _place(ref: Ref, settings: SourceSettings) -> _Place:
    name, _, digest = ref.removeprefix("oci://").partition("@")
    registry, _, rest = name.partition("/")
    repo, _, tag = rest.partition(":")
    return _Place(registry, repo, (settings.endpoint or _usual(registry)).rstrip("/"), digest or tag)


def _usual(registry: str) -> str:
    """As docker has it: with TLS, but for this machine's own registries; and the Hub is elsewhere."""
    if registry == "docker.io":
        return "https://registry-1.docker.io"
    host = urllib.parse.urlsplit(f"//{registry}").hostname or ""
    with contextlib.suppress(ValueError):
        if kind_of(host) == LOOPBACK:
            return f"http://{registry}"
    return f"{'http' if host == 'localhost' else 'https'}://{registry}"


def _check_digest(data: bytes, told: str, asked: str, url: str) -> None:
    found = f"sha256:{hashlib.sha256(data).hexdigest()}"
    for expected, whose in ((asked, "was asked for"), (told, "is what the registry says")):
        if expected.startswith("sha256:") and expected != found:
            raise permanent(
                ErrorKind.DATA_LOSS,
                "DIGEST_MISMATCH",
                f"{url}: {expected[:80]} {whose}, and the manifest that came is {found}",
                "the registry, or what is between it and this node, changes manifests: mend or go round it",
            )


def _parse(data: bytes, kind: str, url: str) -> _Manifest:
    try:
        found = _MANIFEST.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _bad_manifest(url, f"what it answers is no manifest: {error}") from error
    kind = found.media_type or kind
    # What is both could be read as one thing here, and as another elsewhere.
    is_index, is_image = found.manifests is not None, found.layers is not None
    if is_index == is_image or kind not in (INDEXES if is_index else MANIFESTS):
        raise _bad_manifest(
            url, f"what it answers is neither an image's manifest nor an index, but {kind[:100]!r}"
        )
    if found.manifests is not None and len(found.manifests) > MAX_INDEX_ENTRIES:
        raise _bad_manifest(
            url, f"its index has {len(found.manifests)} entries, and {MAX_INDEX_ENTRIES} are the most"
        )
    return found


def _chosen(entries: list[_Descriptor], ref: Ref) -> _Descriptor:
    """A model's files are the same on every platform, so none is preferred: only what stands out is taken."""
    usable = [
        entry
        for entry in entries
        if entry.media_type in MANIFESTS and _ATTESTATION not in (entry.annotations or {})
    ]
    models = [entry for entry in usable if entry.artifact_type in MODEL_MANIFESTS]
    bare = [entry for entry in usable if entry.platform is None]
    for some in (usable, models, bare):
        if len(some) == 1:
            _digest(some[0], ref)
            return some[0]
    listed = "; ".join(_words(entry) for entry in entries[:MOST_LISTED])
    more = f"; and {len(entries) - MOST_LISTED} more" if len(entries) > MOST_LISTED else ""
    raise permanent(
        ErrorKind.INVALID,
        "AMBIGUOUS_INDEX",
        f"{ref} is an index in which no one manifest stands out as the model: "
        f"{listed or 'it is empty'}{more}",
        "name one of them: oci://registry/repo@sha256:…",
    )


def _words(entry: _Descriptor) -> str:
    platform = f"{entry.platform.os}/{entry.platform.architecture}" if entry.platform else "no platform"
    return f"{entry.digest[:80]} ({(entry.artifact_type or entry.media_type)[:80]}, {platform[:40]})"


def _named(layers: list[_Descriptor], ref: Ref) -> dict[str, _Descriptor]:
    """Each layer by the path of the file that it is."""
    found: dict[str, _Descriptor] = {}
    for layer in layers:
        path = _path(layer)
        if path is None:
            raise _no_file(layer, ref, "has no file's name")
        if path in found:
            raise _bad_manifest(ref, f"two of its layers are the file {path[:120]!r}")
        found[path] = layer
    return found


def _path(layer: _Descriptor) -> str | None:
    notes = layer.annotations or {}
    return next((notes[name] for name in (*FILE_PATHS, TITLE) if notes.get(name)), None)


def _spec(path: str, layer: _Descriptor, ref: Ref) -> FileSpec:
    notes = layer.annotations or {}
    packed = notes.get(UNPACK, "").lower() == "true"
    modelled = any(name in notes for name in FILE_PATHS) or layer.media_type.startswith(
        "application/vnd.cncf.model."
    )
    if packed or (modelled and _ARCHIVE.search(layer.media_type)):
        raise _no_file(layer, ref, f"is an archive of {path[:120]!r}, not the file itself")
    return FileSpec(path, layer.size, _digest(layer, ref))


def _digest(entry: _Descriptor, ref: Ref) -> Digest:
    digest = entry.digest.removeprefix("sha256:")
    if not is_digest(digest):
        raise _bad_manifest(
            ref, f"it names {entry.digest[:80]!r}, and sha256 is the only digest that is proven here"
        )
    return Digest(digest)


def _no_file(layer: _Descriptor, ref: Ref, what: str) -> CachedError:
    return permanent(
        ErrorKind.FAILED,
        "NOT_A_FILE",
        f"{ref}: layer {layer.digest[:80]} ({layer.media_type[:100]}) {what}: what is in "
        "it cannot be proven file by file",
        "push each file as a layer of its own: modctl build --raw, or oras push; or, if it has a name, leave "
        "it out with exclude",
    )


def _said(response: BaseHTTPResponse) -> tuple[str, str]:
    """The code that the registry gives for a refusal, and its words in brackets; empty without them."""
    try:
        errors = _ERRORS.decode(response.read(MAX_ERROR_BYTES)).errors
    except (msgspec.DecodeError, UnicodeDecodeError):
        return "", ""
    if not errors:
        return "", ""
    words = f"{errors[0].code}: {errors[0].message}"[:200]
    return errors[0].code, f" ({words})" if words.isprintable() else ""


def _missing(place: _Place, url: str, in_repo: bool, told: str) -> CachedError:
    name = f"{place.registry}/{place.repo}"
    if in_repo:
        return permanent(
            ErrorKind.NOT_FOUND,
            "NO_SUCH_REVISION",
            f"{name} has no {url.rpartition('/')[2]}{told}",
            f"see {place.tags} for the tags that it has",
        )
    if "/blobs/" in url:
        return permanent(
            ErrorKind.NOT_FOUND,
            "MISSING_FILE",
            f"{url} is missing at the registry, whose manifest lists it{told}",
            "push the model anew: its layers were removed, or never came",
        )
    return permanent(
        ErrorKind.NOT_FOUND,
        "NO_SUCH_REPO",
        f"there is no {name}{told}",
        "correct the name; if it is private, give this node credentials: token_env or token_file in a "
        "[[source]] table",
    )


def _bad_manifest(where: str, what: str) -> CachedError:
    return permanent(
        ErrorKind.FAILED,
        "BAD_MANIFEST",
        f"{where}: {what}",
        "see whether this is a registry, and push the model anew with modctl or oras",
    )
