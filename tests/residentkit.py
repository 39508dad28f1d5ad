"""Stores with artifacts in them, as the preloader finds them, and what the kernel says of locked memory."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import random
import re
import resource
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
    Tensor,
    artifact_id,
)
from preloader.groups import PER_CPU_SLACK_BYTES, SLACK_BYTES, Groups
from preloader.memory.host import HostMemory, lock_allowance

MIB = 2**20
PAGE_BYTES = mmap.PAGESIZE
SLACK = SLACK_BYTES + (os.cpu_count() or 1) * PER_CPU_SLACK_BYTES
"""How far the kernel's figures are taken to be off on this machine."""


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
    return put_manifest(
        data_dir, tuple(ManifestFile(path, put_blob(data_dir, data)) for path, data in sorted(files.items()))
    )


def put_manifest(
    data_dir: Path, listed: tuple[ManifestFile, ...], tensors: tuple[Tensor, ...] = ()
) -> Manifest:
    artifact = artifact_id((f.path, f.blob.size_bytes, f.blob.sha256) for f in listed)
    manifest = Manifest(artifact, Ref("file:///x/"), RevisionKey("0" * 64), True, listed, tensors)
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


def may_lock(size_bytes: int) -> bool:
    """Whether this process, or one that it starts, may lock that much: root may, others within their limit.

    What a test locks in any case is at most 64 KiB, which Linux has always given to everybody.
    """
    lock_allowance()  # raises the limit as far as it goes, as a standby does
    limit_bytes, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return _has_capability(14) or limit_bytes == resource.RLIM_INFINITY or size_bytes <= limit_bytes


def disk_read_bytes(pid: int) -> int:
    """What a process has had read from disks."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes:"))


def rounded(size_bytes: int) -> int:
    """To whole pages, as memory is locked."""
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES


def may_mount_read_only() -> bool:
    """Whether this process has what the store's read-only view takes; says nothing of whether it works."""
    return _has_capability(21) and mounts_can_be_copied()


def mounts_can_be_copied() -> bool:
    """Whether this Linux has what the read-only view takes, for whoever has the right."""
    linux = tuple(int(part) for part in re.findall(r"\d+", os.uname().release)[:2])
    return linux >= (5, 12)


def _has_capability(number: int) -> bool:
    lines = Path("/proc/self/status").read_text().splitlines()
    effective = next(int(line.split()[1], 16) for line in lines if line.startswith("CapEff:"))
    return bool(effective >> number & 1)


def resident_share(path: Path) -> float:
    """The share of a file's pages that is in memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        with mmap.mmap(file.fileno(), size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as area:
            pages = (ctypes.c_ubyte * -(-size // PAGE_BYTES))()
            address = ctypes.c_char.from_buffer(area)
            assert libc.mincore(ctypes.byref(address), ctypes.c_size_t(size), pages) == 0
            del address
    return sum(page & 1 for page in pages) / len(pages)


def drops_pages(folder: Path) -> bool:
    """Whether the file system gives up a file's pages when asked to; one in memory (tmpfs) cannot."""
    with (folder / "probe").open("w+b", buffering=0) as file:
        file.write(bytes(MIB))
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return resident_share(folder / "probe") == 0


def charged_elsewhere(folder: Path, limit: str = "max", **more: object) -> HostMemory:
    """Memory that may lock, of a group whose figures tell that whatever is locked is charged elsewhere.

    They fall by all that is put down to imprecision, so the first locked page is one too many.
    """
    folder.mkdir()
    for name, text in (("memory.max", limit), ("memory.current", "0")):
        (folder / name).write_text(text)
    (folder / "memory.stat").write_text(f"unevictable {SLACK}\n")
    memory = HostMemory(Groups((folder,), 2), None, **more)  # type: ignore[arg-type]
    (folder / "memory.stat").write_text("unevictable 0\n")
    return memory
