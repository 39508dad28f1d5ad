"""The daemon beside a GPU's standby: what it keeps, gives back, asks anew and lets go.

The standby is one that does as it is told: the real protocol on real sockets, without a device.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from cached import fds
from cached.config import StandbySettings
from cached.durable import RealFs
from cached.handoff import Package
from cached.leases import Leases
from cached.metrics import Metrics
from cached.model import (
    DISK,
    Artifact,
    ArtifactId,
    CachedError,
    Claim,
    ClaimId,
    ClaimKind,
    Device,
    Digest,
    Note,
    Ref,
    RevisionKey,
)
from cached.node.core import Core
from cached.node.disk import Disk
from cached.node.effects import Effects
from cached.node.grants import Grants
from cached.node.standbys import Standbys
from cached.node.views import ModelView
from cached.plan import State
from cached.plan import types as t
from cached.standby import UNKNOWN_UID
from preloader.v1 import standby_pb2 as pb
from preloader.v1 import standby_pb2_grpc as pb_grpc

GPU = Device("cuda:GPU-1a")
MIB = 2**20
X, Y = (ArtifactId(f"sha256:{digit * 64}") for digit in "ab")


@dataclass
class Keeper(pb_grpc.StandbyServicer):
    """One GPU's standby. ``held`` are its residents' descriptors; what it is asked goes to ``asked``."""

    run_dir: Path
    held: dict[ArtifactId, tuple[int, ...]] = field(default_factory=dict)
    free_bytes: int = 70 * 2**30
    unfit: str = ""
    outside: int = 0
    given: int = -1
    hidden: ArtifactId | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)
    open_at_release: list[int] = field(default_factory=list)
    at_release: Callable[[], Awaitable[None]] | None = None
    lacking: bool = False
    """Whether it has no descriptors left for handoffs."""

    async def __aenter__(self) -> Keeper:
        folder = self.run_dir / "standby"
        folder.mkdir(exist_ok=True)
        self._changed = asyncio.Condition()
        self._listener = socket.socket(socket.AF_UNIX)
        (folder / "cuda-GPU-1a.fds.sock").unlink(missing_ok=True)
        self._listener.bind(str(folder / "cuda-GPU-1a.fds.sock"))
        self._listener.listen()
        threading.Thread(target=self._answer, daemon=True).start()
        self._server = grpc.aio.server()
        pb_grpc.add_StandbyServicer_to_server(self, self._server)
        self._server.add_insecure_port(f"unix:{folder / 'cuda-GPU-1a.sock'}")
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        await self._server.stop(None)

    def fill(self, artifact: ArtifactId) -> None:
        self.held[artifact] = tuple(os.memfd_create(name) for name in ("layout", "block"))

    async def tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def Watch(self, request: pb.WatchRequest, context: object) -> AsyncIterator[pb.Inventory]:
        while True:
            yield self._inventory()
            async with self._changed:
                await self._changed.wait()

    def _inventory(self) -> pb.Inventory:
        residents = [
            pb.Resident(artifact_id=a, bytes=MIB, locked=True) for a in self.held if a != self.hidden
        ]
        gpu = pb.Gpu(
            index=0, name="Fake", total_bytes=80 * 2**30, free_bytes=self.free_bytes, unfit_reason=self.unfit
        )
        return pb.Inventory(device=GPU, pid=7, limit_bytes=80 * 2**30, residents=residents, gpu=gpu)

    async def Load(self, request: pb.LoadRequest, context: object) -> AsyncIterator[pb.LoadEvent]:
        self.fill(ArtifactId(request.artifact_id))
        yield pb.LoadEvent(done=pb.Resident(artifact_id=request.artifact_id, bytes=MIB, locked=True))

    async def Release(
        self, request: pb.ReleaseRequest, context: grpc.aio.ServicerContext
    ) -> pb.ReleaseResponse:
        if self.outside:
            self.outside -= 1
            trailing = (("cached-reason", "HELD_OUTSIDE"), ("cached-retry-after-s", "1"))
            await context.abort(grpc.StatusCode.UNAVAILABLE, "somebody has it mapped", trailing)
        if self.at_release is not None:
            await self.at_release()
        self.open_at_release = [fd for fd in TAKEN if is_open(fd)]
        self.held.pop(ArtifactId(request.artifact_id), None)
        return pb.ReleaseResponse()

    def _answer(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                request, received = fds.receive(connection)
                if "node" in request:
                    with Path("/dev/null").open() as node:
                        fds.send(connection, {"node": True}, (node.fileno(),))
                    continue
                self.asked.append(request)
                if "adopt" in request and self.unfit:
                    words = {"reason": "GPU_UNFIT", "message": self.unfit, "hint": ""}
                    fds.send(connection, {"error": words | {"kind": "unavailable", "retry_after_s": 1}})
                elif self.lacking:
                    words = {"reason": "TOO_MANY_FILES", "message": "none is left", "hint": ""}
                    fds.send(connection, {"error": words | {"kind": "unavailable", "retry_after_s": 5}})
                elif "adopt" in request:
                    self.held[ArtifactId(request["adopt"])] = tuple(received)
                    fds.send(connection, {"adopted": True})
                elif request["id"] in self.held:
                    self.given = self.given if request["uid"] == -1 else request["uid"]
                    fds.send(connection, {"id": request["id"], "uid": self.given}, self.held[request["id"]])
                else:
                    words = {"reason": "NOT_RESIDENT", "message": "it is not resident", "hint": ""}
                    fds.send(connection, {"error": words | {"kind": "not_found", "retry_after_s": None}})


TAKEN: list[int] = []
"""Descriptors that the daemon had."""


def is_open(fd: int) -> bool:
    return Path(f"/proc/self/fd/{fd}").exists()


async def eventually(happens: Callable[[], bool]) -> None:
    for _ in range(1000):
        if happens():
            return
        await asyncio.sleep(0.01)
    pytest.fail("it did not happen within 10 s")


@dataclass
class Shell:
    """As much of the daemon as follows standbys. Plans, but for what a test asks for, are not carried out."""

    core: Core
    effects: Effects
    standbys: Standbys
    planned: list[t.Action]

    def resident(self, artifact: ArtifactId = X) -> bool:
        return self.core.state.is_resident(GPU, artifact)

    def kept(self, artifact: ArtifactId = X) -> tuple[int, ...]:
        kept = self.standbys._kept.get(GPU, {}).get(artifact)
        return kept.fds if kept else ()


@pytest.fixture
async def shell(tmp_path: Path) -> AsyncIterator[Shell]:
    planned: list[t.Action] = []
    core, metrics = Core(State(1), planned.append), Metrics("0")
    effects = Effects(None, None, None, metrics)  # type: ignore[arg-type]
    effects.core = core
    common = (Digest("c" * 64), MIB)
    artifacts = tuple(Artifact(a, (common, (Digest(a[-64:]), 1)), 0.0, (common,)) for a in (X, Y))
    notes = tuple(Note(Ref(f"file:///{a}/"), RevisionKey(a[-64:]), a, True, 0.0) for a in (X, Y))
    core.post(t.Recovered(artifacts, notes, (), ()), t.CapacitySet(Device("disk"), 2**30))
    standbys = Standbys(tmp_path, core, effects, metrics, StandbySettings(gpu_capacity_bytes=79 * 2**30))
    core.spawn(core.run(), "core")
    core.spawn(standbys.run(), "standbys")
    yield Shell(core, effects, standbys, planned)
    await core.stop()
    assert not core.failed.done()


class Shelf:
    """As much of a store as a handoff reads."""

    def manifest_bytes(self, artifact: ArtifactId) -> bytes:
        return b"{}"

    def tree_path(self, artifact: ArtifactId) -> Path:
        return Path("/data/trees") / artifact


async def test_a_copy_is_shared_within_one_uid_and_proven_for_the_next(tmp_path: Path, shell: Shell) -> None:
    (tmp_path / "leases").mkdir()
    leases, disk = Leases(tmp_path / "leases", RealFs()), Disk(lambda error: None)
    grants = Grants(shell.core, shell.effects, Shelf(), disk, leases)  # type: ignore[arg-type]

    async def handed(artifact: ArtifactId, uid: int) -> Package:
        """A replica of this uid acquires it from the disk, and prefers the GPU."""
        ref = Ref(f"file:///{artifact}/")
        claim = Claim(ClaimId(secrets.token_hex(4)), ClaimKind.LEASE, ref, DISK, 0.0, prefers=(GPU,))
        shell.core.post(t.ClaimMade(claim))
        await eventually(lambda: t.Grant(claim.id, GPU) in shell.planned)
        granted = await grants.grant(claim.id, ModelView(ref, "verified"), None, True)
        assert (granted.device, granted.blobs) == (GPU, 2)
        return await grants.redeem(granted.token, uid)

    async with Keeper(tmp_path) as keeper:
        keeper.fill(X)
        keeper.fill(Y)
        await eventually(lambda: bool(shell.kept(X) and shell.kept(Y)))
        first = await handed(X, 1000)
        assert first.header["device"] == GPU and first.blob_fds == shell.kept(X)
        second = await handed(Y, 1000)
        asked = len(keeper.asked)
        # Y has a content of X's, which uid 1000 could write to.
        for artifact in (X, Y):
            with pytest.raises(CachedError) as caught:
                await handed(artifact, 2000)
            problem = caught.value.problem
            assert (problem.reason, problem.temporary) == ("HELD_BY_OTHER_UID", True)
            assert "declares" not in problem.message and "1000" not in problem.message  # nor who it is
        assert len(keeper.asked) == asked
        for package in (first, second):
            shell.core.end(ClaimId(str(package.header["lease_id"])))
        await handed(X, 2000)
        assert keeper.asked[-1] == {"id": X, "uid": 2000, "fds": 0}
        # What it was given may have been written to: nothing that was kept for uid 1000 is good any more.
        with pytest.raises(CachedError, match="holds it"):
            await handed(Y, 1000)
        assert shell.standbys._kept[GPU][Y].uid == UNKNOWN_UID


async def test_memory_outlives_its_standby_and_is_given_back_to_the_next(
    tmp_path: Path, shell: Shell
) -> None:
    async with Keeper(tmp_path) as keeper:
        keeper.fill(X)
        await eventually(lambda: shell.resident() and bool(shell.kept()))
        assert shell.core.state.places[GPU].capacity_bytes == 79 * 2**30
        assert keeper.asked == [{"id": X, "uid": -1, "fds": 0}]  # kept for nobody
        memory = [os.fstat(fd).st_ino for fd in shell.kept()]
        standby = shell.effects.standbys[GPU]
        assert await standby.descriptors(X, 1000) == shell.kept()
        assert keeper.asked[-1]["uid"] == 1000
        await standby.descriptors(X, 1000)
        assert len(keeper.asked) == 2  # the same uid has it at once; another does not
        await standby.descriptors(X, 2000)
        assert keeper.asked[-1]["uid"] == 2000 and len(keeper.asked) == 3
    for fd in keeper.held[X]:
        os.close(fd)
    await eventually(lambda: not shell.resident())
    async with Keeper(tmp_path) as keeper:
        await eventually(shell.resident)
        assert keeper.asked[0] == {"adopt": X, "uid": 2000, "fds": 2}
        assert [os.fstat(fd).st_ino for fd in keeper.held[X]] == memory
    await eventually(lambda: not shell.resident())
    assert shell.kept() and os.fstat(shell.standbys._nodes[GPU])
    shell.standbys._gone_at[GPU] -= 3601
    await eventually(lambda: not shell.kept() and not shell.standbys._nodes)
    (tmp_path / "standby/cuda-GPU-1a.sock").unlink(missing_ok=True)
    await eventually(lambda: not shell.standbys._followed)


async def test_what_cannot_be_given_back_is_let_go(tmp_path: Path, shell: Shell) -> None:
    async with Keeper(tmp_path) as keeper:
        keeper.fill(X)
        await eventually(lambda: bool(shell.kept()))
        TAKEN[:] = shell.kept()
    await eventually(lambda: not shell.resident())
    assert all(map(is_open, TAKEN))
    async with Keeper(tmp_path, unfit="XID 79"):
        await eventually(lambda: GPU in shell.effects.standbys)
        assert not shell.kept() and not shell.resident()


async def test_what_a_standby_gives_up_by_itself_is_told_apart_from_old_news(
    tmp_path: Path, shell: Shell
) -> None:
    async with Keeper(tmp_path) as keeper:
        keeper.fill(X)
        keeper.fill(Y)
        await eventually(lambda: bool(shell.kept(X) and shell.kept(Y)))
        keeper.free_bytes = 60 * 2**30
        await keeper.tell()
        await eventually(lambda: shell.core.state.places[GPU].inventory.gpu.free_bytes == 60 * 2**30)
        # An inventory from before a load is no news: the standby has it when it is asked.
        keeper.hidden, keeper.free_bytes, asked = Y, 61 * 2**30, len(keeper.asked)
        await keeper.tell()
        await eventually(lambda: len(keeper.asked) > asked)
        keeper.hidden = None
        await asyncio.sleep(0.1)
        assert shell.resident(Y) and shell.kept(Y)
        lost = keeper.held.pop(Y)
        await keeper.tell()
        await eventually(lambda: not shell.resident(Y))
        assert shell.resident(X) and shell.kept(X) and not shell.kept(Y)
        lost += keeper.held.pop(X)
        keeper.unfit = "XID 79"
        await keeper.tell()
        await eventually(lambda: not shell.kept(X))
        assert not shell.resident(X) and shell.core.state.places[GPU].unfit_reason == "XID 79"
        for fd in lost:
            os.close(fd)


async def test_a_release_closes_our_duplicates_first_and_is_asked_until_it_is_free(
    tmp_path: Path, shell: Shell
) -> None:
    async with Keeper(tmp_path, outside=1) as keeper:
        keeper.fill(X)
        await eventually(lambda: bool(shell.kept()))
        TAKEN[:] = shell.kept()
        asked = len(keeper.asked)

        async def keep_it_again() -> None:
            """As whoever keeps what stands may, who does not know yet."""
            with pytest.raises(CachedError, match="leaves") as caught:
                await shell.effects.standbys[GPU].descriptors(X)
            assert caught.value.problem.reason == "WITHDRAWN" and len(keeper.asked) == asked

        keeper.at_release = keep_it_again
        release = t.Release(GPU, X, "room")
        shell.core.post(t.Started(release))
        shell.effects.start(release)
        await eventually(lambda: not shell.kept())
        await eventually(lambda: _problem(shell) == "HELD_OUTSIDE")
        await eventually(lambda: (GPU, X) not in shell.core.state.residencies)
        assert keeper.open_at_release == []
        with pytest.raises(CachedError, match="not resident"):
            await shell.effects.standbys[GPU].descriptors(X, 1000)


async def test_what_was_loaded_and_cannot_be_kept_takes_no_room(tmp_path: Path, shell: Shell) -> None:
    async with Keeper(tmp_path, lacking=True) as keeper:
        await eventually(lambda: GPU in shell.effects.standbys)
        load = t.Load(GPU, X)
        shell.core.post(t.Started(load))
        shell.effects.start(load)
        await eventually(lambda: (GPU, X) in shell.core.state.residencies and _problem(shell) != "")
        assert _problem(shell) == "TOO_MANY_FILES" and not keeper.held


def _problem(shell: Shell) -> str:
    residency = shell.core.state.residencies[GPU, X]
    return residency.problem.reason if residency.problem else ""
