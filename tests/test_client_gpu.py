"""What a replica sees on a GPU: one shared copy, or memory of its own, on the fake driver."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import gpukit
import pytest
import torch
from client_fake import REF, FakeDaemon
from gpukit import KIB, MIB

import cached
from cached.blocks import image_of
from cached.client.devices import wish
from cached.client.files import Files
from cached.client.handoff import File, Place
from cached.client.streaming import Streamed
from cached.client.tensors import DTYPES
from cached.cuda import Driver, Gpu
from cached.model import ErrorKind, Manifest, Problem

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = MIB
BLOCK = 128 * KIB
"""So small that the larger tensors lie over several."""


def packed(**tensors: tuple[str, tuple[int, ...], bytes]) -> bytes:
    """A safetensors file, of dtypes that its own library cannot write, too."""
    header, at = {}, 0
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(content)]}
        at += len(content)
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + b"".join(content for *_, content in tensors.values())


def some(count: int, seed: int) -> bytes:
    return (
        torch.randint(256, (count,), dtype=torch.uint8, generator=torch.manual_seed(seed)).numpy().tobytes()
    )


def weights() -> dict[str, bytes]:
    each: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for number, (name, torch_name) in enumerate(DTYPES.items()):
        size = 12 if name == "F4" else 24 * getattr(torch, torch_name).itemsize
        content = some(size, number)
        each[f"t.{name}"] = (name, (6, 4), bytes(b & 1 for b in content) if name == "BOOL" else content)
    large = {
        f"large.{n}": ("BF16", (100, 50 * KIB // 100), some(100 * (50 * KIB // 100) * 2, n)) for n in range(4)
    }
    large["wide"] = ("U8", (3, 100 * KIB), some(300 * KIB, 9))
    none = {"none": ("F32", (0, 4), b""), "one": ("F64", (), some(8, 1))}
    return {"a.safetensors": packed(**each), "b.safetensors": packed(**large, **none), "config.json": b"{}"}


@pytest.fixture(scope="module")
def gpus() -> Iterator[gpukit.Gpus]:
    with gpukit.machine() as machine, pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAKE_GPU_DIR", str(machine.directory))
        yield machine
        gc.collect()  # what the errors' tracebacks hold is given back while there is a driver


@pytest.fixture(scope="module")
def uuid(gpus: gpukit.Gpus) -> str:
    gpus.add()
    return gpus.add(context_bytes=CONTEXT)


@pytest.fixture(scope="module")
def gpu(uuid: str) -> Gpu:
    return Driver().gpus()[1]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    fake = FakeDaemon(tmp_path, weights())
    fake.start()
    yield fake
    fake.stop()


@pytest.fixture
def resident(daemon: FakeDaemon, gpu: Gpu, uuid: str) -> Iterator[int]:
    """The model stands on the GPU; the bytes that it takes there."""
    fds = fill(gpu, daemon.manifest, daemon.tree, f"cuda:{uuid}")
    daemon.residents[f"cuda:{uuid}"] = fds
    yield sum(os.fstat(fd).st_size for fd in fds[1:])
    for fd in fds:
        os.close(fd)


def fill(gpu: Gpu, manifest: Manifest, tree: Path, device: str) -> tuple[int, ...]:
    """What the standby of a GPU sends for a model: the layout and the blocks."""
    blobs, fds = [], []
    for number, file in enumerate(manifest.files):
        tensors = [t for t in manifest.tensors if t.file == number]
        if not tensors:
            continue
        content = (tree / file.path).read_bytes()
        image = image_of([t.size_bytes for t in tensors], gpu.granularity_bytes(), BLOCK)
        whole = bytearray(image.size_bytes)
        for tensor, offset in zip(tensors, image.offsets, strict=True):
            whole[offset : offset + tensor.size_bytes] = content[tensor.offset_bytes :][: tensor.size_bytes]
        at = 0
        for size in image.blocks:
            fds.append(block(gpu, bytes(whole[at : at + size])))
            at += size
        places = [[t.name, offset, t.size_bytes] for t, offset in zip(tensors, image.offsets, strict=True)]
        blobs.append({"sha256": file.blob.sha256, "blocks": image.blocks, "tensors": places, "digests": []})
    layout = os.memfd_create("layout")
    body = {"version": 1, "id": manifest.id, "device": device, "granularity": gpu.granularity_bytes()}
    os.write(layout, json.dumps({**body, "blobs": blobs}).encode())
    assert len(fds) > 6, "there are seams to be seen"
    return (layout, *fds)


def block(gpu: Gpu, content: bytes) -> int:
    handle = gpu.create(len(content))
    address = gpu.reserve(len(content))
    gpu.map(address, len(content), handle)
    with gpu.context():
        gpu.allow(address, len(content), write=True)
    ctypes.memmove(address, content, len(content))
    gpu.unmap(address, len(content))
    gpu.free(address, len(content))
    fd = gpu.export(handle)
    gpu.release(handle)
    return fd


def raw(tensor: torch.Tensor) -> bytes:
    flat = tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)
    return flat.numpy().tobytes()


def acquire(daemon: FakeDaemon, on: str, **options: object) -> cached.Model:
    return cached.acquire(REF, on=on, run_dir=daemon.run_dir, timeout_s=30, **options)  # type: ignore[arg-type]


def same(one: cached.Model, other: cached.Model) -> bool:
    """Whether all tensors of two models have the same names, kinds and bits, however they are had."""
    theirs = other.state_dict()
    return list(one.tensors) == list(theirs) and all(
        (mine.dtype, mine.shape, raw(mine)) == (theirs[name].dtype, theirs[name].shape, raw(theirs[name]))
        for name, mine in one.tensors.items()
    )


def test_replicas_share_what_stands_on_the_gpu_to_the_last_bit(
    daemon: FakeDaemon, gpus: gpukit.Gpus, uuid: str, gpu: Gpu, resident: int
) -> None:
    assert gpus.used_bytes(uuid) == resident
    host = acquire(daemon, "host")
    one = acquire(daemon, "cuda:1", private=["t.F*", "large.3"])
    assert one.device == f"cuda:{uuid}" and not one.streamed
    assert same(host, one)
    two = acquire(daemon, f"cuda:GPU-{gpu.uuid}", private="large.2")
    assert two.tensor("large.2").data_ptr() != two.tensor("large.2").data_ptr(), "one glob is no sequence"
    assert two.device == f"cuda:{uuid}" and same(one, two)
    assert gpus.used_bytes(uuid) == resident + CONTEXT, "one copy, and this process's context"
    own = one.tensor("large.3")
    own.zero_()
    assert not own.any() and same(host, two), "what is private may be written to"
    part = one.slice("large.0", 1, 3, 50)
    assert raw(part) == raw(host.tensor("large.0")[:, 3:50])
    assert part.data_ptr() == one.tensor("large.0").data_ptr() + 6
    assert torch.equal(one.slice("wide", 0, 1, 3), host.tensor("wide")[1:])

    # Memory is given back with the last of what was made of it, whatever torch made of it.
    net = torch.nn.Linear(512, 100, bias=False, device="meta", dtype=torch.bfloat16)
    net.load_state_dict({"weight": two.tensor("large.1")}, assign=True)
    expected = raw(host.tensor("large.1"))
    for model in (one, two):
        model.close()
    del model, part
    gc.collect()
    assert raw(net.weight.detach()) == expected
    assert gpus.used_bytes(uuid) == resident + CONTEXT
    view = net.weight.detach()[1:3]
    del net
    assert raw(view) == expected[1024:3072]
    del view
    gc.collect()
    assert gpus.used_bytes(uuid) == resident, "nor is the context held any longer"
    host.close()


REPLICA = """
import os, sys, cached
model = cached.acquire(sys.argv[1], on="auto", timeout_s=30)
print(model.lease_id, model.device, flush=True)
if sys.argv[2] == "waits":
    sys.stdin.readline()
tensor = model.tensor("large.1")

def child(work):
    pid = os.fork()
    if not pid:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def ask():
    try:
        model.tensor("large.1")
    except cached.CachedError as error:
        print(error.reason, flush=True)

print(child(ask), child(tensor.zero_), flush=True)
if sys.stdin.readline():
    sys.exit()  # with the tensor alive
"""


def test_what_ends_gives_its_memory_back_and_a_write_ends_only_the_writer(
    daemon: FakeDaemon, gpus: gpukit.Gpus, uuid: str, resident: int
) -> None:
    env = gpus.env({**os.environ, "PYTHONPATH": str(ROOT), "CACHED_RUN_DIR": str(daemon.run_dir)})
    replicas = [
        subprocess.Popen(
            [sys.executable, "-c", REPLICA, REF, does],
            env={**env, "CUDA_VISIBLE_DEVICES": uuid},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for does in ("waits", "touches")
    ]
    leases = []
    for replica in replicas:
        assert replica.stdout is not None
        lease, device = replica.stdout.readline().split()
        assert device == f"cuda:{uuid}", "what this process sees as its first GPU"
        leases.append(lease)
    assert replicas[1].stdout is not None
    assert replicas[1].stdout.readline() == "FORKED\n"
    assert replicas[1].stdout.readline() == f"0 {-signal.SIGSEGV}\n"
    assert gpus.used_bytes(uuid) == resident + 2 * CONTEXT
    replicas[0].kill()
    _, said = replicas[1].communicate("end\n", timeout=30)
    assert (replicas[1].returncode, said) == (0, "")
    assert replicas[0].wait(30) == -signal.SIGKILL
    assert all(daemon.is_freed(lease) for lease in leases)
    assert gpus.used_bytes(uuid) == resident
    for replica in replicas:
        replica.communicate()
    with acquire(daemon, "host") as host, acquire(daemon, "cuda:1") as model:
        assert same(host, model), "nobody has changed what all share"


SPAWN = """
import multiprocessing, sys, cached

def child(model, pipe):
    pipe.send((model.device, model.lease_id, len(model.tensors)))

if __name__ == "__main__":
    with cached.acquire(sys.argv[1], on="cuda:1", timeout_s=30) as model:
        here, there = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=child, args=(model, there))
        process.start()
        device, lease, count = here.recv()
        process.join()
        print(device, lease != model.lease_id, count == len(model.tensors))
"""


def test_a_spawned_child_maps_it_again(
    daemon: FakeDaemon, gpus: gpukit.Gpus, uuid: str, resident: int, tmp_path: Path
) -> None:
    (tmp_path / "spawn.py").write_text(SPAWN)
    env = gpus.env({**os.environ, "PYTHONPATH": str(ROOT), "CACHED_RUN_DIR": str(daemon.run_dir)})
    said = subprocess.check_output(
        [sys.executable, tmp_path / "spawn.py", REF], env=env, text=True, timeout=60
    )
    assert said == f"cuda:{uuid} True True\n"


def test_the_current_gpu_is_that_of_the_thread_that_awaits(
    daemon: FakeDaemon, gpus: gpukit.Gpus, uuid: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = threading.get_ident()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: int(threading.get_ident() == main))
    asyncio.run(cached.acquire_async(REF, on="cuda", run_dir=daemon.run_dir, timeout_s=30)).close()
    assert daemon.requests[-1].prefers[0] == f"cuda:{uuid}"


@pytest.mark.parametrize("host", ["host", "no host"])
def test_where_it_does_not_stand_it_is_streamed(
    daemon: FakeDaemon, gpus: gpukit.Gpus, uuid: str, host: str
) -> None:
    expected = acquire(daemon, "host")
    if host != "host":
        daemon.refused["host"] = Problem(ErrorKind.NO_ROOM, "DEVICE_CAPACITY", "it does not fit", "")
    with pytest.raises(cached.CachedError, match="room_bytes=-1"):
        acquire(daemon, "cuda:1", room_bytes=-1)
    with acquire(daemon, "cuda:1", room_bytes=1000) as model:
        asked = daemon.requests[-1]
        assert list(asked.prefers) == [f"cuda:{uuid}", f"cuda:MIG-{uuid[4:]}"]
        assert (asked.room_device, asked.room_bytes) == (f"cuda:{uuid}", 1000)
        assert model.device == ("host" if host == "host" else "disk") and model.streamed
        assert same(expected, model)
        model.tensor("wide").zero_()
        assert same(expected, model), "each access is a copy"
        kept = model.tensor("large.2")
    expected_bytes = raw(expected.tensor("large.2"))
    del model
    gc.collect()
    assert raw(kept) == expected_bytes and gpus.used_bytes(uuid) == 0
    expected.close()


@pytest.mark.parametrize("fault", ["held", "import", "mapping"])
def test_a_copy_that_may_not_or_cannot_be_shared_is_streamed(
    daemon: FakeDaemon, gpus: gpukit.Gpus, uuid: str, resident: int, fault: str
) -> None:
    call = {"import": "cuMemImportFromShareableHandle", "mapping": "cuMemSetAccess"}.get(fault)
    if call is None:
        problem = Problem(ErrorKind.UNAVAILABLE, "HELD_BY_OTHER_UID", "uid 7 holds it", "", 5.0)
        daemon.refused[f"cuda:{uuid}"] = problem
    else:
        gpus.fail(call, "CUDA_ERROR_INVALID_VALUE", after=2 if fault == "import" else 0, times=1)
    before = len(os.listdir("/proc/self/fd"))
    with acquire(daemon, "cuda:1") as model, acquire(daemon, "host") as host:
        assert (model.device, model.streamed) == ("host", True)
        assert same(host, model)
    assert [list(r.prefers) for r in daemon.requests][:2] == [[f"cuda:{uuid}", f"cuda:MIG-{uuid[4:]}"], []]
    del model, host
    gc.collect()
    assert gpus.used_bytes(uuid) == resident
    assert len(os.listdir("/proc/self/fd")) <= before + len(daemon.manifest.distinct_blobs()) + 12
    if call:
        gpus.heal(call)


def test_streaming_through_small_buffers_and_parts_of_every_kind(gpu: Gpu, tmp_path: Path) -> None:
    content = some(3 * MIB + 17, 1)
    (tmp_path / "file").write_bytes(content)
    file = File("file", len(content), "digest")
    memory = Streamed(gpu, Files((file,), tmp_path), buffer_bytes=64 * KIB)
    spots = [(0, 0), (5, 1), (17, 70_001), (70_018, 64 * KIB), (200_000, 2 * MIB), (len(content) - 3, 3)]
    places = [Place(str(n), "U8", (size,), 0, at, size) for n, (at, size) in enumerate(spots)]
    for tensor, (at, size) in zip(memory.tensors(places, [torch.uint8] * len(spots)), spots, strict=True):
        assert tensor.numpy().tobytes() == content[at : at + size]
    for shape in [(4, 300, 50), (3, 2, 80_000), (2, 3, 5, 7)]:
        whole = Place("t", "I16", shape, 0, 3, 2 * int(torch.tensor(shape).prod()))
        raw_whole = bytearray(content[3 : 3 + whole.size_bytes])
        tensor = torch.frombuffer(raw_whole, dtype=torch.int16).view(shape)
        for dim in range(1, len(shape)):
            for start, stop in [(0, 1), (1, shape[dim]), (0, shape[dim]), (1, 1)]:
                part = memory.part(whole, torch.int16, dim, start, stop)
                assert torch.equal(part, tensor.narrow(dim, start, stop - start))
    (tmp_path / "file").write_bytes(content[:-1])
    with pytest.raises(cached.CachedError) as caught:
        memory.tensor(places[-1], torch.uint8)
    assert caught.value.reason == "SIZE_CHANGED"


def test_a_copy_that_fails_says_so(gpu: Gpu, gpus: gpukit.Gpus, daemon: FakeDaemon) -> None:
    gpus.fail("cuMemcpyHtoDAsync", "CUDA_ERROR_ECC_UNCORRECTABLE", late=True)
    try:
        with acquire(daemon, "cuda:1") as model, pytest.raises(cached.CachedError, match="ECC") as caught:
            model.state_dict()
        assert caught.value.reason == "GPU_FAILED"
    finally:
        gpus.heal("cuMemcpyHtoDAsync")


def test_which_gpu_is_meant(gpus: gpukit.Gpus, uuid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    second = (f"cuda:{uuid}", f"cuda:MIG-{uuid[4:]}")
    first, *_ = wish("cuda").prefers
    assert first.startswith("cuda:GPU-") and first not in second
    assert wish("cuda:1").prefers == second == wish(f"cuda:{uuid}").prefers
    assert wish("auto").prefers == (*wish("cuda").prefers, "host") and wish("auto").device == "disk"
    assert wish("host", 5).room_device == first and wish("auto", 5, "cuda:1").room_device == second[0]
    for word, reason in [
        ("cuda:2", "NO_GPU"),
        (f"cuda:GPU-{'0' * 8}-{'0' * 4}-{'0' * 4}-{'0' * 4}-{'0' * 12}", "NO_GPU"),
        ("cuda:x", "BAD_DEVICE"),
    ]:
        with pytest.raises(cached.CachedError) as caught:
            wish(word)
        assert caught.value.reason == reason
    monkeypatch.delenv("FAKE_GPU_DIR")
    assert (wish("auto").device, wish("auto").prefers, wish("auto").gpu) == ("disk", ("host",), None)
    with pytest.raises(cached.CachedError, match="cuInit") as caught:
        wish("cuda:0")
    assert caught.value.reason == "NO_GPU"
