"""The file that goes with every GPU resident: which blocks are which blob's, and where its tensors lie.

Owns that file's form, making it (sealed: nobody can change it any more) and reading it back. Opens no device.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import dataclass
from typing import Any

from cached.blocks import ALIGN_BYTES, BLOCK_BYTES
from cached.model import ArtifactId, CachedError, Device, Digest, ErrorKind, permanent
from preloader.standing import too_many_files
from preloader.wire import MAX_MESSAGE_BYTES, parse_layout

VERSION = 1
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@dataclass(frozen=True, slots=True)
class Laid:
    """One blob on a device: its blocks' sizes, and all that is told of it, as JSON."""

    sha256: Digest
    blocks: tuple[int, ...]
    entry: str

    @property
    def size_bytes(self) -> int:
        return sum(self.blocks)


@dataclass(frozen=True, slots=True)
class Layout:
    artifact: ArtifactId
    device: Device
    granularity_bytes: int
    blobs: tuple[Laid, ...]

    def words(self) -> dict[str, Any]:
        """What the file says."""
        return {
            "version": VERSION,
            "id": self.artifact,
            "device": self.device,
            "granularity": self.granularity_bytes,
            "blobs": [json.loads(laid.entry) for laid in self.blobs],
        }


def laid(entry: Any) -> Laid:
    """One blob as its filler or a layout file tells of it. Raises ValueError."""
    blob = parse_layout(entry)
    if not all(0 < size_bytes <= BLOCK_BYTES for size_bytes in blob.blocks):
        raise ValueError(f"blob {blob.sha256} has blocks of {blob.blocks} bytes")
    return Laid(blob.sha256, blob.blocks, json.dumps(blob.to_json(), separators=(",", ":")))


def write_layout(layout: Layout) -> int:
    """A descriptor of the file; the caller closes it. Raises CachedError (TOO_MANY_FILES)."""
    try:
        fd = os.memfd_create("layout", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        raise too_many_files(f"no descriptor is left for a layout: {error.strerror}") from error
    with os.fdopen(fd, "wb", closefd=False) as file:
        file.write(json.dumps(layout.words(), separators=(",", ":")).encode())
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    return fd


def read_layout(fd: int) -> Layout:
    """Raises CachedError (INVALID) unless it is such a file, sealed."""
    try:
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS != SEALS:
            raise ValueError("it is not sealed")
        size_bytes = os.fstat(fd).st_size
        if size_bytes > MAX_MESSAGE_BYTES:
            raise ValueError(f"it is larger than {MAX_MESSAGE_BYTES} bytes")
        return _parse(json.loads(os.pread(fd, size_bytes, 0)))
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise bad_layout(repr(error)) from error


def bad_layout(why: str) -> CachedError:
    hint = "nothing is lost but time: it is loaded again"
    return permanent(ErrorKind.INVALID, "BAD_LAYOUT", f"a resident's layout is refused: {why}", hint)


def _parse(words: Any) -> Layout:
    granularity = words["granularity"]
    if words["version"] != VERSION or type(granularity) is not int or granularity < ALIGN_BYTES:
        raise ValueError("its version or granularity")
    blobs = tuple(laid(entry) for entry in words["blobs"])
    if any(size % granularity for blob in blobs for size in blob.blocks):
        raise ValueError("a block is no multiple of the granularity")
    if not blobs or len({blob.sha256 for blob in blobs}) != len(blobs):
        raise ValueError("its blobs")
    return Layout(ArtifactId(words["id"]), Device(words["device"]), granularity, blobs)
