"""The fetch pool with real workers against a real local origin: transfers, lies, deaths, resumption."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import os
import random
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import xxhash
from residentkit import drops_pages, resident_share

from benchmarks.origin import Fault, Origin
from cached.config import TransferSettings
from cached.durable import Partial
from cached.fetch import FetchJob, FetchPool
from cached.fetch.pace import (
    BACKOFF_MOST_S,
    SLOW_BYTES_PER_S,
    SLOW_S,
    Came,
    RateLimit,
    backoff_s,
    patiently,
)
from cached.model import (
    CHUNK_BYTES,
    Blob,
    CachedError,
    Digest,
    ErrorKind,
    Manifest,
    Problem,
    Revision,
    artifact_id,
    parse_ref,
    permanent,
    temporary,
)

SETTINGS = TransferSettings(workers=2, connections=4, attempts=2, timeout_s=2.0)
BIG_BYTES = 2 * CHUNK_BYTES + 12345


@pytest.fixture(scope="module")
def big() -> bytes:
    """Two chunks and a bit, every chunk different."""
    return random.Random(2).randbytes(BIG_BYTES)


@functools.lru_cache
def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def safetensors(tensors: dict[str, int]) -> bytes:
    """A file of byte tensors with these sizes."""
    header, position = {}, 0
    for name, size in tensors.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(position)


@dataclass
class Room:
    """An origin, a pool, and a folder for ingest: what a test needs to fetch."""

    origin: Origin
    pool: FetchPool
    data_dir: Path
    sealed: list[tuple[int, Blob]] = field(default_factory=list)
    progress: list[tuple[int, int]] = field(default_factory=list)
    advanced: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, files: dict[str, bytes], sums: dict[str, str] | None = None) -> str:
        """Publish files; ``sums`` replaces what SHA256SUMS says of some."""
        folder = self.origin.root / "m"
        lines = []
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
            lines.append(f"{(sums or {}).get(name) or sha256(data)}  {name}\n")
        (folder / "SHA256SUMS").write_text("".join(lines))
        return self.origin.url + "m/"

    async def resolve(self, ref: str) -> Revision:
        return await self.pool.resolve(parse_ref(ref))

    def ingest_dir(self, revision: Revision) -> Path:
        path = self.data_dir / "ingest" / revision.key
        path.mkdir(parents=True, exist_ok=True)
        return path

    async def fetch(
        self,
        revision: Revision,
        have: dict[int, Blob] | None = None,
        background: bool = False,
        on_blob: Callable[[int, Blob], Awaitable[None]] | None = None,
        read_soon: bool = False,
    ) -> Manifest:
        async def note(index: int, blob: Blob) -> None:
            self.sealed.append((index, blob))

        job = FetchJob(
            revision,
            str(self.ingest_dir(revision)),
            tuple((have or {}).get(index) for index in range(len(revision.files))),
            background,
            read_soon,
        )
        return await self.pool.fetch(job, self.on_progress, on_blob or note)

    def on_progress(self, done_bytes: int, origin_bytes: int) -> None:
        self.progress.append((done_bytes, origin_bytes))
        self.advanced.set()

    async def refused(self, revision: Revision) -> Problem:
        with pytest.raises(CachedError) as caught:
            await self.fetch(revision)
        assert caught.value.problem.hint
        return caught.value.problem

    async def until_progress(self, done_bytes: int) -> None:
        """Wait until the last report is at least ``done_bytes``."""
        async with asyncio.timeout(20):
            while not self.progress or self.progress[-1][0] < done_bytes:
                self.advanced.clear()
                await self.advanced.wait()

    def part(self, revision: Revision, index: int) -> Path:
        return self.ingest_dir(revision) / f"{index}.part"

    def journal(self, revision: Revision, index: int) -> Path:
        return self.ingest_dir(revision) / f"{index}.journal"

    def busy_pid(self) -> int:
        """The worker that has open a partial blob."""
        for pid in self.pool.worker_pids():
            for link in Path(f"/proc/{pid}/fd").iterdir():
                if link.is_symlink() and str(link.readlink()).endswith(".part"):
                    return pid
        raise AssertionError("no worker has a partial blob open")


@pytest.fixture
async def room(tmp_path: Path) -> AsyncIterator[Room]:
    (tmp_path / "origin" / "m").mkdir(parents=True)
    pool = FetchPool(SETTINGS)
    with Origin(tmp_path / "origin") as origin:
        yield Room(origin, pool, tmp_path / "data")
    await pool.close()


def check_blob(blob: Blob, data: bytes) -> None:
    chunks = [data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES)]
    assert blob.sha256 == sha256(data)
    assert blob.size_bytes == len(data)
    assert blob.chunks == tuple(xxhash.xxh3_128_hexdigest(chunk) for chunk in chunks)


# --- what a fetch makes ---------------------------------------------------------------------


async def test_a_revision_comes_whole_proven_and_sealed(room: Room, big: bytes) -> None:
    model = safetensors({"x": 100, "y": 50})
    files = {"a/model.safetensors": model, "big.dat": big, "config.json": b"{}", "empty": b""}
    revision = await room.resolve(room.put(files))
    manifest = await room.fetch(revision)

    assert [file.path for file in manifest.files] == sorted(files)
    for index, file in enumerate(manifest.files):
        data = files[file.path]
        check_blob(file.blob, data)
        part = room.part(revision, index)
        assert part.read_bytes() == data
        assert stat.S_IMODE(part.stat().st_mode) == 0o444
        assert room.journal(revision, index).read_text().endswith(f"done {sha256(data)}\n")
    assert manifest.id == artifact_id((path, len(data), sha256(data)) for path, data in files.items())
    assert (manifest.ref, manifest.revision, manifest.attested) == (revision.ref, revision.key, True)
    assert [(t.name, t.file, t.size_bytes) for t in manifest.tensors] == [("x", 0, 100), ("y", 0, 50)]

    total = revision.size_bytes
    assert sorted(index for index, _ in room.sealed) == [0, 1, 2, 3]
    assert room.progress[-1] == (total, total)
    assert room.progress == sorted(room.progress)
    # Every byte came once, and the large file in ranges.
    assert room.origin.bytes_sent - room.origin.sent["m/SHA256SUMS"] == total
    assert room.origin.requests["m/big.dat"] == 1 + 3


async def test_a_folder_without_sums_is_copied_and_unattested(room: Room, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_bytes(b"hello")
    revision = await room.resolve(f"file://{folder}")
    manifest = await room.fetch(revision)
    assert not manifest.attested
    check_blob(manifest.files[0].blob, b"hello")
    # Copied, not linked: the folder is its owner's to change.
    assert room.part(revision, 0).stat().st_ino != (folder / "a").stat().st_ino


async def test_one_content_under_two_names_is_fetched_once(room: Room) -> None:
    model = safetensors({"x": 1000})
    ref = room.put({"1.safetensors": model, "2.safetensors": model, "copy.dat": b"c", "d.dat": b"c"})
    manifest = await room.fetch(await room.resolve(ref))
    assert room.origin.sent["m/1.safetensors"] + room.origin.sent["m/2.safetensors"] == len(model)
    assert manifest.files[0].blob == manifest.files[1].blob
    assert [(t.name, t.file) for t in manifest.tensors] == [("x", 0), ("x", 1)]
    assert sorted(index for index, _ in room.sealed) == [0, 2]
    assert room.progress[-1][0] == sum(file.blob.size_bytes for file in manifest.files)


async def test_what_the_store_has_is_not_fetched_but_indexed(room: Room) -> None:
    model, rest = safetensors({"x": 1000}), b"rest"
    revision = await room.resolve(room.put({"m.safetensors": model, "rest": rest}))
    digest = sha256(model)
    committed = room.data_dir / "blobs" / "sha256" / digest[:2] / digest
    committed.parent.mkdir(parents=True)
    committed.write_bytes(model)
    blob = Blob(Digest(digest), len(model), ("0" * 32,))
    manifest = await room.fetch(revision, have={0: blob})
    assert manifest.files[0].blob == blob
    assert [t.name for t in manifest.tensors] == ["x"]
    assert room.origin.sent["m/m.safetensors"] == 0
    assert [index for index, _ in room.sealed] == [1]
    assert room.progress[-1] == (len(model) + 4, 4)


async def test_many_small_files_come_quickly(room: Room) -> None:
    files = {f"dir{n % 7}/file{n}": f"content {n}".encode() for n in range(200)}
    revision = await room.resolve(room.put(files))
    started = time.monotonic()
    manifest = await room.fetch(revision)
    assert time.monotonic() - started < 10
    assert {file.path: file.blob.sha256 for file in manifest.files} == {
        path: sha256(data) for path, data in files.items()
    }


async def test_the_rate_is_kept(tmp_path: Path) -> None:
    (tmp_path / "origin" / "m").mkdir(parents=True)
    pool = FetchPool(TransferSettings(workers=1, rate_bytes_per_s=4_000_000))
    with Origin(tmp_path / "origin") as origin:
        room = Room(origin, pool, tmp_path / "data")
        revision = await room.resolve(room.put({"a": bytes(3_000_000), "b": bytes(1_000_000) + b"b"}))
        started = time.monotonic()
        await room.fetch(revision)
        assert 0.9 < time.monotonic() - started < 5
    await pool.close()


@pytest.mark.parametrize("background", [False, True])
async def test_only_what_is_read_soon_is_left_in_the_page_cache(
    room: Room, big: bytes, tmp_path: Path, background: bool
) -> None:
    revision = await room.resolve(room.put({"big.dat": big}))
    await room.fetch(revision, background=background)
    assert (resident_share(room.part(revision, 0)) < 0.5) is drops_pages(tmp_path)
    soon = await room.resolve(room.put({"soon.dat": b"soon" + big}))
    await room.fetch(soon, background=background, read_soon=True)
    assert resident_share(room.part(soon, 0)) > 0.9


# --- origins that lie or fail ---------------------------------------------------------------


async def test_a_wrong_digest_is_refused_with_both_values_and_removed(room: Room) -> None:
    expected = "ab" * 32
    ref = room.put({"bad.dat": b"wrong", "good.dat": b"right"}, sums={"bad.dat": expected})
    revision = await room.resolve(ref)
    problem = await room.refused(revision)
    assert (problem.kind, problem.reason) == (ErrorKind.DATA_LOSS, "DIGEST_MISMATCH")
    assert not problem.temporary
    for value in ("bad.dat", expected, sha256(b"wrong")):
        assert value in problem.message
    assert not room.part(revision, 0).exists()
    assert not room.journal(revision, 0).exists()
    assert 0 not in [index for index, _ in room.sealed]


async def test_one_flipped_byte_is_found(room: Room, big: bytes) -> None:
    revision = await room.resolve(room.put({"big.dat": big}))
    room.origin.faults["m/big.dat"] = Fault("corrupt", at_bytes=CHUNK_BYTES + 7)
    problem = await room.refused(revision)
    assert problem.reason == "DIGEST_MISMATCH" and sha256(big) in problem.message
    # Nothing of it is left to be resumed: with the origin mended it comes right.
    room.origin.faults.clear()
    check_blob((await room.fetch(revision)).files[0].blob, big)


async def test_a_broken_safetensors_header_is_refused_and_removed(room: Room) -> None:
    whole = safetensors({"embed.weight": 500})
    revision = await room.resolve(room.put({"model.safetensors": whole[:-100]}))
    problem = await room.refused(revision)
    assert (problem.kind, problem.reason) == (ErrorKind.DATA_LOSS, "BAD_SAFETENSORS")
    for value in ("model.safetensors", "embed.weight", str(len(whole)), str(len(whole) - 100)):
        assert value in problem.message
    assert not room.part(revision, 0).exists()
    assert room.sealed == []


async def test_a_file_that_vanished_is_named(room: Room) -> None:
    revision = await room.resolve(room.put({"a": b"a", "gone.dat": b"b"}))
    (room.origin.root / "m" / "gone.dat").unlink()
    problem = await room.refused(revision)
    assert (problem.kind, problem.reason) == (ErrorKind.NOT_FOUND, "MISSING_FILE")
    assert "gone.dat" in problem.message
    assert (await resolve_refused(room, str(revision.ref))).reason == "MISSING_FILE"


async def resolve_refused(room: Room, ref: str) -> Problem:
    with pytest.raises(CachedError) as caught:
        await room.resolve(ref)
    return caught.value.problem


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault("wrong_range", methods=("GET",)), "BAD_RANGE"),
        (Fault("wrong_total", at_bytes=99), "SIZE_MISMATCH"),
        (Fault("changed"), "ORIGIN_CHANGED"),
        (Fault("status", status=403), "ORIGIN_DENIED"),
    ],
    ids=lambda value: value.kind if isinstance(value, Fault) else value,
)
async def test_a_lie_is_refused_at_once(room: Room, big: bytes, fault: Fault, reason: str) -> None:
    revision = await room.resolve(room.put({"big.dat": big}))
    room.origin.faults["m/big.dat"] = fault
    problem = await room.refused(revision)
    assert problem.reason == reason
    assert "big.dat" in problem.message
    # Asking again would not have helped: no range was asked for twice.
    assert room.origin.requests["m/big.dat"] <= 1 + SETTINGS.connections


@pytest.mark.parametrize(
    "fault",
    [
        Fault("reset", at_bytes=5_000_000, times=1),
        Fault("truncate", at_bytes=5_000_000, times=1),
        Fault("status", status=503, times=1),
        Fault("no_ranges"),
        Fault("no_ranges", skip=2),
        Fault("no_ranges", times=2),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.times}-{fault.skip}",
)
async def test_what_an_origin_does_once_or_cannot_do_is_survived(
    room: Room, big: bytes, fault: Fault
) -> None:
    revision = await room.resolve(room.put({"a": b"a", "big.dat": big, "c": b"c"}))
    room.origin.faults["m/big.dat"] = fault
    manifest = await room.fetch(revision)
    check_blob(manifest.files[1].blob, big)
    assert room.progress[-1][0] == revision.size_bytes
    if fault.kind in ("reset", "truncate"):
        # It went on where it broke off; what was on its way when the connection broke may come again.
        assert room.origin.sent["m/big.dat"] < len(big) + 5_000_000


async def test_a_stream_without_ranges_that_breaks_off_is_started_again(room: Room, big: bytes) -> None:
    revision = await room.resolve(room.put({"big.dat": big}))
    room.origin.faults["m/big.dat"] = Fault("no_ranges")
    cut = room.origin.rate  # slow enough to cut in time
    cut.bytes_per_s = 60e6
    fetching = asyncio.create_task(room.fetch(revision))
    await room.until_progress(CHUNK_BYTES + 1_000_000)
    room.origin._server.cut_connections()
    cut.bytes_per_s = None
    check_blob((await fetching).files[0].blob, big)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("truncate", at_bytes=1000),
        Fault("reset", at_bytes=0),
        Fault("status", status=500),
    ],
    ids=lambda fault: fault.kind,
)
async def test_every_range_has_its_attempts_and_no_more(room: Room, fault: Fault) -> None:
    revision = await room.resolve(room.put({"a.dat": bytes(100_000)}))
    room.origin.reset_counters()
    room.origin.faults["m/a.dat"] = fault
    problem = await room.refused(revision)
    assert problem.kind is ErrorKind.UNAVAILABLE and problem.temporary
    assert "a.dat" in problem.message and "tried 2 times" in problem.message
    assert room.origin.requests["m/a.dat"] == 2


async def test_a_stall_is_given_up_and_resumed(room: Room, big: bytes) -> None:
    revision = await room.resolve(room.put({"big.dat": big}))
    room.origin.faults["m/big.dat"] = Fault("stall", at_bytes=1_000_000, times=1)
    check_blob((await room.fetch(revision)).files[0].blob, big)


async def test_the_origins_wish_to_wait_is_heeded(room: Room) -> None:
    revision = await room.resolve(room.put({"a.dat": b"a"}))
    room.origin.faults["m/a.dat"] = Fault("status", status=429, retry_after_s=1, times=1)
    started = time.monotonic()
    await room.fetch(revision)
    assert time.monotonic() - started >= 1


async def test_an_origin_that_is_gone_is_temporary(room: Room) -> None:
    ref = room.put({"a.dat": b"a"})
    revision = await room.resolve(ref)
    room.origin.close()
    for problem in (await room.refused(revision), await resolve_refused(room, ref)):
        assert problem.temporary and problem.reason == "ORIGIN_UNREACHABLE"
        assert ref in problem.message


# --- deaths and resumption ------------------------------------------------------------------


async def test_a_killed_worker_is_temporary_and_the_next_resumes(tmp_path: Path, big: bytes) -> None:
    (tmp_path / "origin" / "m").mkdir(parents=True)
    data = big + big + big
    pool = FetchPool(replace(SETTINGS, connections=2))
    with Origin(tmp_path / "origin", rate_bytes_per_s=150e6) as origin:
        room = Room(origin, pool, tmp_path / "data")
        revision = await room.resolve(room.put({"a.dat": b"a", "big.dat": data}))
        missing = len(data)
        for share in (0.1, 0.5, 0.8):
            await fetch_and_kill(room, revision, int(share * len(data)))
            before, missing = missing, missing_bytes(room, revision, 1)
            assert missing <= before
        assert 0 < missing < len(data)
        check_blob((await room.fetch(revision)).files[1].blob, data)
        # The last worker asked for what was missing, and for nothing else.
        assert room.progress[-1] == (revision.size_bytes, missing)
    await pool.close()


async def fetch_and_kill(room: Room, revision: Revision, at_bytes: int) -> None:
    room.progress.clear()
    fetching = asyncio.create_task(room.fetch(revision))
    await room.until_progress(at_bytes)
    os.kill(room.busy_pid(), signal.SIGKILL)
    with pytest.raises(CachedError) as caught:
        await fetching
    problem = caught.value.problem
    assert problem.reason == "WORKER_DIED" and problem.temporary
    assert "SIGKILL" in problem.message and str(revision.ref) in problem.message


def missing_bytes(room: Room, revision: Revision, index: int) -> int:
    """What the journal does not claim."""
    chunks = {int(line.split()[0]) for line in room.journal(revision, index).read_text().splitlines()}
    size = revision.files[index].size_bytes
    return size - sum(min(CHUNK_BYTES, size - chunk * CHUNK_BYTES) for chunk in chunks)


async def test_a_sealed_part_that_was_not_committed_is_proven_again_without_the_origin(
    room: Room, big: bytes
) -> None:
    revision = await room.resolve(room.put({"big.dat": big}))
    await room.fetch(revision)
    room.origin.reset_counters()
    check_blob((await room.fetch(revision)).files[0].blob, big)
    assert room.origin.bytes_sent == 0


def cut_power(part: Path, journal: Path) -> None:
    """Leave chunk 1 other than the journal has it; the journal is wrong about 2, and torn at its end."""
    part.chmod(0o644)
    with part.open("r+b") as file:
        file.seek(CHUNK_BYTES + 5)
        file.write(b"what a power cut left here")
    with journal.open("a") as file:
        file.write("2 " + "0" * 32 + "\nnonsense\n77 " + "0" * 32 + "\n0 12")


async def test_a_journal_that_claims_too_much_is_not_believed(room: Room, big: bytes) -> None:
    revision = await room.resolve(room.put({"big.dat": big}))
    await room.fetch(revision)
    room.origin.reset_counters()
    cut_power(room.part(revision, 0), room.journal(revision, 0))
    check_blob((await room.fetch(revision)).files[0].blob, big)
    # Exactly the two chunks that were not what the journal said.
    assert room.origin.sent["m/big.dat"] == CHUNK_BYTES + 12345


async def test_a_cancelled_fetch_kills_its_worker_and_frees_its_locks(room: Room, big: bytes) -> None:
    revision = await room.resolve(room.put({"big.dat": big}))
    room.origin.rate.bytes_per_s = 50e6
    fetching = asyncio.create_task(room.fetch(revision))
    await room.until_progress(1)
    pid = room.busy_pid()
    assert room.pool.busy == 1
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    assert has_ended(pid)
    assert room.pool.busy == 0
    room.origin.rate.bytes_per_s = None
    check_blob((await room.fetch(revision)).files[0].blob, big)


async def test_a_part_that_another_process_writes_is_left_alone(room: Room) -> None:
    revision = await room.resolve(room.put({"a.dat": b"aaaa"}))
    with Partial.open(room.part(revision, 0), room.journal(revision, 0), 4):
        problem = await room.refused(revision)
    assert problem.reason == "INGEST_BUSY" and problem.temporary
    check_blob((await room.fetch(revision)).files[0].blob, b"aaaa")


async def test_a_failing_commit_ends_the_fetch(room: Room) -> None:
    revision = await room.resolve(room.put({"a": b"a", "b": b"b"}))

    async def fail(index: int, blob: Blob) -> None:
        raise ValueError("no commit today")

    with pytest.raises(ValueError, match="no commit today"):
        await room.fetch(revision, on_blob=fail)
    assert room.pool.busy == 0
    await room.fetch(revision)


async def test_blobs_are_told_one_after_the_other_and_before_the_manifest(room: Room) -> None:
    revision = await room.resolve(room.put({str(n): bytes([n]) for n in range(20)}))
    at_once, finished = 0, 0

    async def slowly(index: int, blob: Blob) -> None:
        nonlocal at_once, finished
        at_once += 1
        assert at_once == 1
        await asyncio.sleep(0.005)
        at_once -= 1
        finished += 1

    await room.fetch(revision, on_blob=slowly)
    assert finished == 20


async def test_workers_are_reused_and_a_dead_idle_one_is_replaced(room: Room) -> None:
    ref = room.put({"a": b"a"})
    await room.resolve(ref)
    pids = room.pool.worker_pids()
    assert len(pids) == 1
    await room.resolve(ref)
    assert room.pool.worker_pids() == pids
    os.kill(pids[0], signal.SIGKILL)
    for _ in range(500):
        if not room.pool.worker_pids():
            break
        await asyncio.sleep(0.01)
    assert (await room.resolve(ref)).files[0].path == "a"


async def test_there_are_never_more_workers_than_allowed(room: Room) -> None:
    ref = room.put({"a": b"a"})
    resolving = [asyncio.create_task(room.resolve(ref)) for _ in range(6)]
    most = 0
    while not all(task.done() for task in resolving):
        most = max(most, len(room.pool.worker_pids()))
        await asyncio.sleep(0.005)
    await asyncio.gather(*resolving)
    assert most == 2


async def test_a_worker_that_cannot_start_says_why(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'no module of that name' >&2\nexit 3\n")
    python.chmod(0o755)
    pool = FetchPool(SETTINGS, str(python))
    with pytest.raises(CachedError) as caught:
        await pool.resolve(parse_ref("file:///nowhere"))
    message = caught.value.problem.message
    assert "status 3" in message and "no module of that name" in message
    await pool.close()


async def test_a_missing_interpreter_is_an_error_that_names_it(tmp_path: Path) -> None:
    pool = FetchPool(SETTINGS, str(tmp_path / "gone"))
    with pytest.raises(CachedError, match="gone"):
        await pool.resolve(parse_ref("file:///nowhere"))
    await pool.close()


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "a").write_bytes(b"a")
    script = textwrap.dedent(
        """
        import asyncio, sys
        from cached.config import TransferSettings
        from cached.fetch import FetchPool
        from cached.model import parse_ref

        async def main():
            pool = FetchPool(TransferSettings())
            await pool.resolve(parse_ref(sys.argv[1]))
            print(*pool.worker_pids(), flush=True)
            await asyncio.sleep(60)

        asyncio.run(main())
        """
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, f"file://{tmp_path}/m"], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert Path(f"/proc/{pid}/stat").exists()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: has_ended(pid))


def has_ended(pid: int) -> bool:
    # Where nobody reaps orphans, an ended one stays as a zombie.
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- verifying ------------------------------------------------------------------------------


@pytest.fixture
def blobs(tmp_path: Path, big: bytes) -> Iterator[list[tuple[str, Digest, int]]]:
    found = []
    for name, data in (("big", big), ("small", b"small"), ("empty", b""), ("odd", bytes(5000))):
        (tmp_path / name).write_bytes(data)
        found.append((str(tmp_path / name), Digest(sha256(data)), len(data)))
    yield found


def damage(big: Path, small: Path, empty: Path) -> None:
    with big.open("r+b") as file:
        file.seek(CHUNK_BYTES)
        file.write(b"\0\1\2\3")
    small.unlink()
    empty.write_bytes(b"grown")


async def test_verify_passes_what_is_right(room: Room, blobs: list[tuple[str, Digest, int]]) -> None:
    seen: list[int] = []
    assert await room.pool.verify(tuple(blobs), seen.append) == ()
    assert seen == sorted(seen) and seen[-1] == sum(size for _, _, size in blobs)


async def test_verify_finds_what_is_wrong_and_says_in_which_way(
    room: Room, blobs: list[tuple[str, Digest, int]]
) -> None:
    damage(*(Path(path) for path, _, _ in blobs[:3]))
    found = {m.digest: m.reason for m in await room.pool.verify(tuple(blobs), lambda _: None)}
    assert set(found) == {blobs[0][1], blobs[1][1], blobs[2][1]}
    assert "has the sha256" in found[blobs[0][1]]
    assert "missing" in found[blobs[1][1]]
    assert "has 5 bytes and should have 0" in found[blobs[2][1]]


async def test_verify_reports_what_says_nothing_about_content_as_an_error(room: Room, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CachedError):
        await room.pool.verify(((str(tmp_path / "loop"), Digest("ab" * 32), 1),), lambda _: None)


async def test_a_proof_that_has_a_rate_keeps_to_it_and_nobody_waits_behind_it(
    room: Room, blobs: list[tuple[str, Digest, int]]
) -> None:
    big_bytes = blobs[0][2]
    began = time.monotonic()
    slow = asyncio.create_task(room.pool.verify(tuple(blobs[:1]), lambda _: None, big_bytes // 2))
    assert await room.pool.verify(tuple(blobs[1:]), lambda _: None) == ()
    assert not slow.done()
    assert await slow == ()
    assert time.monotonic() - began >= 1.9


# --- pace -----------------------------------------------------------------------------------


def test_backoff_doubles_within_bounds() -> None:
    assert [backoff_s(attempt, 0.0, 0.5) for attempt in (1, 2, 3)] == [0.2, 0.4, 0.8]
    assert backoff_s(50, 0.0, 0.999) <= 1.5 * BACKOFF_MOST_S
    assert backoff_s(1, 3.0, 0.5) == 3.0
    assert backoff_s(1, 1e9, 0.5) == 30.0


def test_who_brings_next_to_nothing_is_given_up_and_who_is_slow_is_not() -> None:
    slow = Came("w.bin")
    for _ in range(1000):
        slow.add(SLOW_BYTES_PER_S, 1.0)
    slow.add(10**9, 0.1)
    dribbling = Came("w.bin")
    dribbling.add(10**9, SLOW_S)  # it was quick once
    for _ in range(59):
        dribbling.add(1, 1.0)
    with pytest.raises(CachedError) as caught:
        dribbling.add(1, 1.0)
    assert caught.value.problem.reason == "ORIGIN_TOO_SLOW" and caught.value.problem.temporary
    assert "w.bin" in str(caught.value) and "60 bytes came in 60 s" in str(caught.value)


def test_a_rate_is_shared_and_not_saved_up() -> None:
    limit = RateLimit(1000)
    assert limit.book(500, 10.0) == pytest.approx(0.5)
    assert limit.book(500, 10.0) == pytest.approx(1.0)
    assert limit.book(500, 100.0) == pytest.approx(0.5)
    assert RateLimit(None).book(10**12, 0.0) == 0.0


def test_only_what_the_origin_may_mend_is_asked_for_again() -> None:
    pauses: list[float] = []

    def failing(error: CachedError, times: int) -> Callable[[], str]:
        errors = iter([error] * times)

        def call() -> str:
            for failure in errors:
                raise failure
            return "done"

        return call

    passing = temporary("ORIGIN_UNAVAILABLE", "busy", "wait", 0.0)
    assert patiently(failing(passing, 4), 5, pauses.append) == "done"
    assert len(pauses) == 4
    # The jitter is wider than one doubling, so that a later pause may be the shorter one.
    for attempt, pause_s in enumerate(pauses, start=1):
        assert backoff_s(attempt, 0.0, 0.0) <= pause_s <= backoff_s(attempt, 0.0, 1.0)
    with pytest.raises(CachedError, match=r"busy \(tried 5 times\)") as caught:
        patiently(failing(passing, 5), 5, pauses.append)
    assert caught.value.problem.temporary and caught.value.problem.retry_after_s

    pauses.clear()
    for error in (
        permanent(ErrorKind.DATA_LOSS, "BAD_RANGE", "lie", "mend"),
        temporary("DISK_FULL", "full", "free", 30.0, ErrorKind.NO_ROOM),
    ):
        with pytest.raises(CachedError) as caught:
            patiently(failing(error, 1), 5, pauses.append)
        assert caught.value is error
    assert pauses == []
