"""Stores with artifacts in them, as the preloader finds them, and what the kernel says of locked memory."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

import msgspec
import xxhash

from cached.model import (
    CHUNK_BYTES,
    ArtifactId,
    Blob,
    Digest,
    Manifest,
    ManifestFile,
    Ref,
    RevisionKey,
    artifact_id,
)

MIB = 2**20


def content(size_bytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size_bytes)


def blob_of(data: bytes) -> Blob:
    chunks = [data[i : i + CHUNK_BYTES] for i in range(0, len(data), CHUNK_BYTES)]
    return Blob(
        Digest(hashlib.sha256(data).hexdigest()), len(data), tuple(map(xxhash.xxh3_128_hexdigest, chunks))
    )


def blob_path(data_dir: Path, digest: str) -> Path:
    return data_dir / "blobs/sha256" / digest[:2] / digest


def put_blob(data_dir: Path, data: bytes) -> Blob:
    blob = blob_of(data)
    path = blob_path(data_dir, blob.sha256)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        with path.open("wb") as file:
            file.write(data)
            os.fsync(file.fileno())
        path.chmod(0o444)
    return blob


def put_artifact(data_dir: Path, files: dict[str, bytes]) -> Manifest:
    """An artifact as the store commits it."""
    listed = tuple(ManifestFile(path, put_blob(data_dir, data)) for path, data in sorted(files.items()))
    artifact = artifact_id((f.path, f.blob.size_bytes, f.blob.sha256) for f in listed)
    manifest = Manifest(artifact, Ref("file:///x/"), RevisionKey("0" * 64), True, listed, ())
    path = manifest_path(data_dir, artifact)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.encode(manifest))
    return manifest


def manifest_path(data_dir: Path, artifact: ArtifactId) -> Path:
    return data_dir / "artifacts" / f"{artifact.removeprefix('sha256:')}.json"


def drop_cache(data_dir: Path, manifest: Manifest) -> None:
    for blob in manifest.distinct_blobs():
        fd = os.open(blob_path(data_dir, blob.sha256), os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def locked_bytes(pid: int | str = "self") -> int:
    """What a process has locked, as the kernel counts it."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmLck:"))


def disk_read_bytes(pid: int) -> int:
    """What a process has had read from disks."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def rounded(size_bytes: int) -> int:
    """To whole pages, as memory is locked."""
    page = os.sysconf("SC_PAGE_SIZE")
    return -(-size_bytes // page) * page


def may_mount_read_only() -> bool:
    """Whether this process has what the store's read-only view takes; says nothing of whether it works."""
    lines = Path("/proc/self/status").read_text().splitlines()
    effective = next(int(line.split()[1], 16) for line in lines if line.startswith("CapEff:"))
    linux = tuple(int(part) for part in os.uname().release.split(".")[:2])
    return bool(effective >> 21 & 1) and linux >= (5, 12)
