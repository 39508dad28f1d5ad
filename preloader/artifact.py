"""What an artifact is made of, read from the store: its files, its contents, and where their tensors lie.

Owns the reading and checking of manifests and the opening of blobs, both through a view (see ``view``).
Writes nothing, and has nothing in memory but what it returns.
"""

from __future__ import annotations

import errno
import json
import os
from dataclasses import dataclass
from typing import Any

from cached.model import (
    CHUNK_BYTES,
    MAX_FILES,
    ArtifactId,
    Blob,
    CachedError,
    Digest,
    ErrorKind,
    Tensor,
    artifact_id,
    is_digest,
    permanent,
    temporary,
)

MAX_MANIFEST_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Content:
    """One distinct content of an artifact: its blob, the first file that has it, and that file's tensors.

    The tensors follow one on the other without a gap, in the order of the file.
    """

    blob: Blob
    name: str
    tensors: tuple[Tensor, ...] = ()


def read_contents(view: int, artifact: ArtifactId) -> list[Content]:
    """Each distinct content, in the manifest's order, without its tensors.

    Raises CachedError: NOT_FOUND where there is no such artifact, DATA_LOSS unless it is its manifest.
    """
    named: dict[Digest, Content] = {}
    for name, blob in _read(view, artifact)[1]:
        named.setdefault(blob.sha256, Content(blob, name))
    return list(named.values())


def read_tensors(view: int, artifact: ArtifactId) -> list[Content]:
    """Each distinct content that has tensors, in the manifest's order. Raises CachedError like the other."""
    manifest, files = _read(view, artifact)
    try:
        tensors = _tensors(manifest, files)
    except (KeyError, TypeError, ValueError) as error:
        raise _bad_manifest(artifact, f"its tensors are malformed ({error!r})") from error
    named: dict[Digest, Content] = {}
    for file, (name, blob) in enumerate(files):
        if file in tensors:
            named.setdefault(blob.sha256, Content(blob, name, tensors[file]))
    return list(named.values())


def open_blob(view: int, blob: Blob, name: str) -> int:
    """The blob's descriptor, read-only, once it was seen to have the right size."""
    path = f"blobs/sha256/{blob.sha256[:2]}/{blob.sha256}"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=view)
    except FileNotFoundError as error:
        raise lost("BLOB_MISSING", name, blob, "is not in the store") from error
    except OSError as error:
        raise _unopened(path, error) from error
    size_bytes = os.fstat(fd).st_size
    if size_bytes != blob.size_bytes:
        os.close(fd)
        raise lost("BLOB_SIZE", name, blob, f"has {size_bytes} bytes where {blob.size_bytes} were proven")
    return fd


def lost(reason: str, name: str, blob: Blob, what: str) -> CachedError:
    """What is wrong with a blob: ``what`` goes on after its name."""
    hint = "the daemon quarantines it and fetches it anew; look at the disk's health"
    return permanent(ErrorKind.DATA_LOSS, reason, f"{name} (blob {blob.sha256}) {what}", hint)


def _tensors(manifest: dict[str, Any], files: list[tuple[str, Blob]]) -> dict[int, tuple[Tensor, ...]]:
    """The tensors of every file that has some. Raises ValueError unless as a fetch records them."""
    found: dict[int, list[Tensor]] = {}
    for entry in manifest["tensors"]:
        tensor = Tensor(
            str(entry["name"]),
            str(entry["dtype"]),
            tuple(entry["shape"]),
            int(entry["file"]),
            int(entry["offset_bytes"]),
            int(entry["size_bytes"]),
        )
        before = found.setdefault(tensor.file, [])
        expected = before[-1].offset_bytes + before[-1].size_bytes if before else max(0, tensor.offset_bytes)
        if tensor.offset_bytes != expected or tensor.size_bytes < 0:
            raise ValueError(f"{tensor.name!r} at byte {tensor.offset_bytes}, where {expected} is next")
        before.append(tensor)
    for file, tensors in found.items():
        end = tensors[-1].offset_bytes + tensors[-1].size_bytes
        if not 0 <= file < len(files) or end > files[file][1].size_bytes:
            raise ValueError(f"{tensors[-1].name!r} ends at byte {end} of file {file}")
    return {file: tuple(tensors) for file, tensors in found.items()}


def _read(view: int, artifact: ArtifactId) -> tuple[dict[str, Any], list[tuple[str, Blob]]]:
    """The manifest, and (path, blob) of every file. Raises CachedError unless it is this artifact's."""
    try:
        manifest = json.loads(_read_manifest(view, artifact))
        files = [_parse_file(entry) for entry in manifest["files"][: MAX_FILES + 1]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _bad_manifest(artifact, f"it is malformed ({error!r})") from error
    found = artifact_id((path, blob.size_bytes, blob.sha256) for path, blob in files)
    if len(files) > MAX_FILES or found != artifact:
        raise _bad_manifest(artifact, f"its files make up {found}")
    return manifest, files


def _read_manifest(view: int, artifact: ArtifactId) -> bytes:
    name = f"artifacts/{artifact.removeprefix('sha256:')}.json"
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=view)
    except FileNotFoundError as error:
        raise permanent(
            ErrorKind.NOT_FOUND,
            "NO_ARTIFACT",
            f"the store has no artifact {artifact}",
            "fetch it first; daemon and preloader need the same --data-dir",
        ) from error
    except OSError as error:
        raise _unopened(name, error) from error
    with os.fdopen(fd, "rb") as file:
        data = file.read(MAX_MANIFEST_BYTES + 1)
    if len(data) > MAX_MANIFEST_BYTES:
        raise _bad_manifest(artifact, f"it is larger than {MAX_MANIFEST_BYTES} bytes")
    return data


def _parse_file(entry: dict[str, Any]) -> tuple[str, Blob]:
    blob = entry["blob"]
    parsed = Blob(Digest(blob["sha256"]), int(blob["size_bytes"]), tuple(map(str, blob["chunks"])))
    if not is_digest(parsed.sha256) or len(parsed.chunks) != -(-parsed.size_bytes // CHUNK_BYTES):
        raise ValueError(f"a file of {parsed.size_bytes} bytes with {len(parsed.chunks)} chunk digests")
    return str(entry["path"]), parsed


def _bad_manifest(artifact: ArtifactId, why: str) -> CachedError:
    hint = "restart the daemon, which takes it down and fetches it anew"
    return permanent(ErrorKind.DATA_LOSS, "BAD_MANIFEST", f"the manifest of {artifact}: {why}", hint)


def _unopened(path: str, error: OSError) -> CachedError:
    message = f"{path} cannot be opened: {error.strerror}"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        hint = "raise the preloader's limit on open files (RLIMIT_NOFILE)"
        return temporary("TOO_MANY_FILES", message, hint, retry_after_s=5.0)
    return permanent(
        ErrorKind.DENIED, "STORE_DENIED", message, "run the preloader as a user that may read the store"
    )
