"""The filler as a process, on the fake GPU: what it seals is proven, and nothing else stays of it."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import gpukit
import pytest
from fillerkit import FillerProcess, Outcome, put_tensors, tensors_on
from residentkit import MIB, blob_path, content, drop_cache

from cached.cuda import Driver, Gpu
from cached.model import CHUNK_BYTES, ErrorKind, Manifest
from preloader import wire

KIB = 1024
UNIT = 64 * KIB
ONE = content(CHUNK_BYTES + 3 * MIB + 5, seed=1)
TWO = content(300_000, seed=2)
THREE = content(200_000, seed=3)
FILES = {
    "a.safetensors": (ONE, (100, 3 * MIB, 0, 7, 256, CHUNK_BYTES)),
    "again.safetensors": (TWO, (1,)),
    "b.safetensors": (TWO, (1,)),
    "config.json": (b"{}", ()),
}


@pytest.fixture
def gpus() -> Iterator[gpukit.Gpus]:
    with gpukit.machine() as machine:
        yield machine


@pytest.fixture
def uuid(gpus: gpukit.Gpus) -> str:
    return gpus.add(total_bytes=64 * MIB)


@pytest.fixture
def filler(gpus: gpukit.Gpus, uuid: str, tmp_path: Path) -> Iterator[FillerProcess]:
    with FillerProcess(gpus, uuid, tmp_path, block_bytes=2 * MIB) as process:
        yield process


@pytest.fixture
def gpu(gpus: gpukit.Gpus, uuid: str, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """The device, in this process."""
    monkeypatch.setenv("FAKE_GPU_DIR", str(gpus.directory))
    return Driver().gpus()[0]


def expected(manifest: Manifest, data: dict[str, bytes], file: str) -> dict[str, bytes]:
    number = [f.path for f in manifest.files].index(file)
    mine = [t for t in manifest.tensors if t.file == number]
    return {t.name: data[file][t.offset_bytes : t.offset_bytes + t.size_bytes] for t in mine}


def test_a_load_seals_blob_after_blob_and_what_is_shared_is_not_filled_again(
    gpus: gpukit.Gpus, uuid: str, filler: FillerProcess, gpu: Gpu, tmp_path: Path
) -> None:
    data = {path: each for path, (each, _) in FILES.items()}
    manifest = put_tensors(tmp_path, FILES)
    one, two = manifest.files[0].blob, manifest.files[1].blob
    drop_cache(tmp_path, manifest)
    with blob_path(tmp_path, one.sha256).open("rb") as file:
        file.read(5 * MIB + 100)  # from RAM as far as it stands there, the rest from the disk
    loaded = filler.load(manifest.id)
    assert loaded.last == {
        "done": True,
        "granularity": UNIT,
        "blobs": [one.sha256, two.sha256],
        "fds": 0,
    }
    assert loaded.progress[-1] == [len(ONE) + len(TWO)] * 2
    assert set(loaded.sealed) == {one.sha256, two.sha256}
    layout, fds = loaded.sealed[one.sha256]
    assert len(layout.blocks) == len(fds) > 9 and max(layout.blocks) == 2 * MIB  # over seams
    assert tensors_on(gpu, layout, fds) == expected(manifest, data, "a.safetensors")
    assert tensors_on(gpu, *loaded.sealed[two.sha256]) == expected(manifest, data, "b.safetensors")
    images = sum(sum(layout.blocks) for layout, _ in loaded.sealed.values())
    assert gpus.used_bytes(uuid) == images  # no context, no more

    gpus.fail("cuDevicePrimaryCtxRetain", "CUDA_ERROR_UNKNOWN")  # no context for nothing
    assert filler.load(manifest.id, have=list(loaded.sealed)).last["done"]
    gpus.heal("cuDevicePrimaryCtxRetain")
    more = put_tensors(tmp_path, {**FILES, "c.safetensors": (THREE, (5,))})
    third = filler.load(more.id, have=list(loaded.sealed))
    assert list(third.sealed) == [more.files[-2].blob.sha256]
    assert third.last["blobs"] == [one.sha256, two.sha256, *third.sealed]
    third.close()
    assert gpus.used_bytes(uuid) == images

    # The same memory is proven from the device alone; then somebody writes to it.
    blob_path(tmp_path, one.sha256).unlink()
    assert filler.prove(loaded).last == {"done": True, "fds": 0}
    os.pwrite(fds[3], b"!", 77)
    problem = filler.prove(loaded).problem
    assert (problem.kind, problem.reason) == (ErrorKind.DATA_LOSS, "GPU_MEMORY_CHANGED")
    assert one.sha256 in problem.message and "t5" in problem.message
    assert any(digest in problem.message for digest in layout.digests)
    assert gpus.used_bytes(uuid) == images
    loaded.close()
    assert gpus.used_bytes(uuid) == 0


def test_killed_midway_it_leaves_what_it_sealed_and_nothing_else(
    gpus: gpukit.Gpus, uuid: str, filler: FillerProcess, gpu: Gpu, tmp_path: Path
) -> None:
    manifest = put_tensors(tmp_path, {"a.safetensors": (TWO, (len(TWO),)), "b.safetensors": (ONE, (1,))})
    gpus.fail("cuMemcpyHtoDAsync", after=1, sleep_s=60)  # the small one comes through, for it is read first
    wire.send(filler.sock, {"do": "load", "id": manifest.id, "have": []})
    outcome = Outcome({})
    while not outcome.sealed:
        outcome.take(*wire.receive(filler.sock))
    assert not outcome.last
    assert gpus.used_bytes(uuid) > len(ONE) + len(TWO)
    filler.process.kill()
    filler.process.wait()
    layout, fds = outcome.sealed[manifest.files[0].blob.sha256]
    assert tensors_on(gpu, layout, fds) == expected(manifest, {"a.safetensors": TWO}, "a.safetensors")
    assert gpus.used_bytes(uuid) == sum(layout.blocks)
    outcome.close()


def test_what_is_wrong_is_said_and_leaves_nothing(
    gpus: gpukit.Gpus, uuid: str, filler: FillerProcess, tmp_path: Path
) -> None:
    manifest = put_tensors(tmp_path, {**FILES, "b.safetensors": (THREE, (1,))})
    digest = manifest.files[0].blob.sha256

    with gpus.others(uuid, 48 * MIB):
        refused = filler.load(manifest.id).problem
        assert (refused.kind, refused.reason, refused.temporary) == (
            ErrorKind.NO_ROOM,
            "GPU_OUT_OF_MEMORY",
            True,
        )
        assert f"{15 * MIB} of {64 * MIB} bytes free" in refused.message, refused.message
    bad = blob_path(tmp_path, digest)
    bad.chmod(0o644)
    with bad.open("r+b") as file:
        file.seek(3)  # in what is no tensor's
        file.write(bytes([ONE[3] ^ 1]))
    rotten = filler.load(manifest.id)
    assert (rotten.problem.kind, rotten.problem.reason) == (ErrorKind.DATA_LOSS, "CHUNK_MISMATCH")
    assert digest in rotten.problem.message and "chunk 0" in rotten.problem.message
    rotten.close()
    bad.unlink()
    assert filler.load(manifest.id).problem.reason == "BLOB_MISSING"
    plain = put_tensors(tmp_path, {"config.json": (b"{}", ())})
    assert filler.load(plain.id).problem.reason == "NO_TENSORS"
    gpus.fail("cuMemCreate", "CUDA_ERROR_NOT_SUPPORTED")
    unsupported = filler.load(put_tensors(tmp_path, {"c.safetensors": (THREE, (1,))}).id).problem
    assert (unsupported.reason, unsupported.temporary) == ("GPU_NOT_SUPPORTED", False)
    assert gpus.used_bytes(uuid) == 0 and filler.process.poll() is None

    gpus.heal("cuMemCreate")
    gpus.fail("cuMemcpyHtoDAsync", "CUDA_ERROR_ECC_UNCORRECTABLE", late=True)
    sick = filler.load(put_tensors(tmp_path, {"c.safetensors": (THREE, (1,))}).id)
    assert sick.problem.reason == "GPU_UNFIT" and "ECC_UNCORRECTABLE" in sick.problem.message
    assert not sick.sealed
    assert filler.process.wait(10) == 1  # the driver is of no more use to it


def test_too_many_open_files_are_a_refusal(gpus: gpukit.Gpus, uuid: str, tmp_path: Path) -> None:
    manifest = put_tensors(tmp_path, FILES)
    with FillerProcess(gpus, uuid, tmp_path, block_bytes=UNIT) as filler:
        resource.prlimit(filler.process.pid, resource.RLIMIT_NOFILE, (64, 64))
        problem = filler.load(manifest.id).problem
        assert (problem.reason, problem.temporary) == ("TOO_MANY_FILES", True)
        assert gpus.used_bytes(uuid) == 0


def test_ten_thousand_tensors(
    gpus: gpukit.Gpus, uuid: str, filler: FillerProcess, gpu: Gpu, tmp_path: Path
) -> None:
    data = content(10_000 * 1_001 + 8, seed=4)
    manifest = put_tensors(tmp_path, {"a.safetensors": (data, (1_001,) * 9_999)})
    filler.load(manifest.id, have=[manifest.files[0].blob.sha256])  # so that it is up
    began = time.monotonic()
    loaded = filler.load(manifest.id)
    took_s = time.monotonic() - began
    (layout, fds), *_ = loaded.sealed.values()
    found = tensors_on(gpu, layout, fds)
    assert len(found) == 10_000 and b"".join(found.values()) == data[8:]
    loaded.close()
    assert took_s < 5, took_s  # on a busy machine, most of it in the fake


def test_it_ends_when_nobody_asks(gpus: gpukit.Gpus, uuid: str, tmp_path: Path) -> None:
    with FillerProcess(gpus, uuid, tmp_path, idle_s=0.05) as idle:
        assert idle.process.wait(10) == 0
    with FillerProcess(gpus, uuid, tmp_path) as orphan:
        orphan.sock.close()
        assert orphan.process.wait(10) == 0
