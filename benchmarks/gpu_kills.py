"""SIGKILL of everything of ours around two fake GPUs, amid pins, swaps and replicas; what stands is read.

Owns the chance (one seed, printed) and the rules that it checks. The GPUs are fakes (tests/fakegpu), which
behave as the driver does across processes, so this says nothing of a real device. In each round something is
asked, something dies (a filler, the inventory, the host's standby, the preloader, the daemon) or is stopped
and started anew, at a moment of chance's choice; then, within a bound:

- every replica that lives reads its model's digest;
- what pins want stands on their GPU, unless what is held there leaves no room for it;
- what is shown to stand has the right bytes, also for another uid, which has it copied back and proven;
- nothing stands twice: what is used is the distinct contents of what is shown, and what replicas have.

At the end everything is removed: nothing is used, no descriptor and no process is left.

``python -m benchmarks.gpu_kills --rounds 100 --seed 7``; exits with 0 when all held.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cached import CachedError, fds
from cached.blocks import image_of
from cached.client.rpc import connect, resolve_address
from cached.v1 import model_cache_pb2 as pb
from cached.v1 import operator_pb2 as op
from cached.v1.model_cache_pb2_grpc import ModelCacheStub
from cached.v1.operator_pb2_grpc import OperatorStub

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "e2e"), str(TESTS / "fakegpu")]

from gpukit import KIB, MIB, Gpus, machine  # noqa: E402
from gpunode import REPLICA  # noqa: E402
from kit import NodeKit, eventually, is_gone, said, write_model, write_safetensors, write_sums  # noqa: E402

GPU_BYTES = 384 * MIB
"""Enough for what replicas have of their own, so that nothing has to leave for want of memory."""
CAPACITY_BYTES = 60 * MIB
"""Less than the models have together."""
ROUNDING_BYTES = 6 * MIB
"""The planner counts in larger granules than this device has."""
GRANULARITY_BYTES = 64 * KIB
SHARED_MIB = 8
OWN_MIB = {"a": 10, "b": 12, "c": 6, "d": 20, "e": 36}
SHARING = "abc"
MOST_REPLICAS = 3
WITHIN_S = 60.0
SLOW_S = 8.0
"""What takes longer is told, with what was waited for."""
OTHER_UID = 65534
BEARABLE = {"STANDBY_GONE", "WITHDRAWN", "HELD_BY_OTHER_UID", "DAEMON_UNREACHABLE", "NOT_HERE"}
FAULTS = (
    ("cuMemCreate", "CUDA_ERROR_OUT_OF_MEMORY"),
    ("cuMemSetAccess", "CUDA_ERROR_UNKNOWN"),
    ("cuMemExportToShareableHandle", "killed"),
    ("cuMemImportFromShareableHandle", "killed"),
    ("cuDevicePrimaryCtxRetain", "CUDA_ERROR_OUT_OF_MEMORY"),
    ("nvmlDeviceGetMemoryInfo", "NVML_ERROR_UNKNOWN"),
    ("nvmlDeviceGetHandleByIndex", "NVML_ERROR_UNKNOWN"),
)
"""What fails once in some rounds; killed is who called."""
CYCLES = 4
COPY_S = 0.2
"""What each copy to a device takes, so that deaths come amid loads."""

CONFIG = f"""
[store]
keep_free = 0.0
[standby]
gpu_reserve_bytes = "4 MiB"
gpu_capacity_bytes = "{CAPACITY_BYTES // MIB} MiB"
[pressure]
cpu_percent = 100
io_percent = 100
memory_percent = 100
"""


class WrongError(Exception):
    """Something that must hold does not."""


@dataclass(frozen=True)
class Model:
    """``digest`` is of all its tensors; ``images`` what each content takes on a GPU, in bytes."""

    ref: str
    digest: str
    images: dict[str, int]


@dataclass
class Replica:
    process: subprocess.Popen[str]
    model: Model
    device: str = ""


class GpuKills:
    """One run."""

    def __init__(self, root: Path, gpus: Gpus, seed: int, say: Callable[[str], None]) -> None:
        self._chance = random.Random(seed)
        self._say = say
        self._gpus = gpus
        self._uuids = [gpus.add(GPU_BYTES, granularity=GRANULARITY_BYTES) for _ in range(2)]
        self.node = NodeKit(root)
        self.node.base = gpus.env()
        self.node.run_dir.chmod(0o755)  # another uid collects there too
        (root / "gpu.toml").write_text(CONFIG)
        self._models = [_write(root / "origin" / name, name) for name in OWN_MIB]
        self._pins: dict[str, int] = {}
        self._replicas: list[Replica] = []
        self._lost = False
        """Whether memory that a replica has may have been loaded again: both that kept it died at once."""
        self.counts: Counter[str] = Counter()
        self.slowest_s = 0.0

    def run(self, rounds: int) -> None:
        self._serve()
        self._preload()
        for model in self._models:
            self.node.prefetch(model.ref)
        eventually(lambda: len(self._gpu_places()) == 2)
        self._gpus.fail("cuMemcpyHtoDAsync", sleep_s=COPY_S)
        for number in range(1, rounds + 1):
            self._round()
            if number % 10 == 0:
                self._say(f"{number} rounds: {self.figures()}")
        self._end()

    def figures(self) -> str:
        counted = ", ".join(f"{count} {name}" for name, count in sorted(self.counts.items()))
        return f"{counted}; slowest return {self.slowest_s:.1f} s"

    # --- one round --------------------------------------------------------------------------

    def _round(self) -> None:
        for _ in range(self._chance.randrange(3)):
            self._chance.choice([self._pin, self._pin, self._unpin, self._swap, self._evict])()
        if self._chance.random() < 0.4:
            self._replica()
        elif self._chance.random() < 0.5:
            self._fault()
        time.sleep(self._chance.choice([0.0, 0.1, 0.4, 1.0]) * self._chance.random())
        self._die()
        if self._replicas and self._chance.random() < 0.3:
            self._kill_replica()
        for call, _ in FAULTS:
            self._gpus.heal(call)
        began = time.monotonic()
        self._settle()
        self.slowest_s = max(self.slowest_s, time.monotonic() - began)
        self._check_bytes()

    def _fault(self) -> None:
        if any(not replica.device for replica in self._replicas):
            return  # it is for us, and not for one that acquires
        call, error = self._chance.choice(FAULTS)
        self._gpus.fail(call, "" if error == "killed" else error, times=1, kill=error == "killed")
        self._lost = bool(self._replicas)  # what cannot be proven now may be loaded anew
        self.counts["faults"] += 1

    def _settle(self) -> None:
        wrong, began = "", time.monotonic()

        def settled() -> bool:
            nonlocal wrong
            before = wrong
            try:
                wrong = self._unsettled()
            except CachedError as error:
                wrong = f"{error.reason}: {error}"
            if before != wrong and time.monotonic() > began + SLOW_S:
                self._say(f"waited {time.monotonic() - began:.0f} s: {before}")
            return not wrong

        try:
            eventually(settled, WITHIN_S, 0.1)
        except AssertionError as error:
            raise WrongError(wrong) from error

    def _die(self) -> None:
        deaths = [self._kill_filler] * 3 + [self._kill_parent] * 3 + [self._kill_daemon] * 3
        deaths += [self._kill_inventory, self._kill_host, self._restart_parent, self._restart_daemon]
        death = self._chance.choice([*deaths, self._kill_filler_and_parent, self._kill_both])
        death()
        self.counts[death.__name__.strip("_")] += 1

    # --- what is asked ------------------------------------------------------------------------

    def _operate(self, work: Callable[[OperatorStub], object]) -> None:
        with connect(resolve_address(self.node.run_dir, operator=True)) as channel:
            work(OperatorStub(channel))

    def _pin(self) -> None:
        model, number = self._chance.choice(self._models), self._chance.randrange(2)
        if model.ref in self._pins:
            return
        request = op.PinRequest(ref=model.ref, device=self._device(number), unclaimed=True)
        with contextlib.suppress(CachedError):  # it cannot fit beside what else is pinned
            self._pins[model.ref] = number
            self._operate(lambda stub: list(stub.Pin(request, timeout=20)))
            self.counts["pins"] += 1

    def _unpin(self) -> None:
        if self._pins:
            ref = self._chance.choice(sorted(self._pins))
            self._operate(lambda stub: stub.Unpin(op.UnpinRequest(ref=ref), timeout=20))
            del self._pins[ref]
            self.counts["unpins"] += 1

    def _swap(self) -> None:
        out = self._chance.choice(sorted(self._pins)) if self._pins else ""
        model = self._chance.choice(self._models)
        if not out or model.ref in self._pins:
            return
        number = self._pins[out]
        request = op.SwapRequest(out=out, ref=model.ref, device=self._device(number))
        try:
            self._operate(lambda stub: list(stub.Swap(request, timeout=20)))
        except CachedError as error:
            self.counts[f"swaps refused ({error.reason})"] += 1
            return
        del self._pins[out]
        self._pins[model.ref] = number
        self.counts["swaps"] += 1

    def _evict(self) -> None:
        ref = self._chance.choice(self._models).ref
        if ref in self._pins:
            return
        with contextlib.suppress(CachedError):
            self._operate(lambda stub: stub.Evict(op.EvictRequest(ref=ref), timeout=20))
            self.counts["evictions"] += 1
        self._operate(lambda stub: list(stub.Prefetch(op.PrefetchRequest(ref=ref), timeout=20)))

    def _replica(self) -> None:
        model, number = self._chance.choice(self._models), self._chance.randrange(2)
        if len(self._replicas) < MOST_REPLICAS:
            process = self.node.replica(REPLICA, model.ref, json.dumps({"on": f"cuda:{number}"}))
            self._replicas.append(Replica(process, model))
            self.counts["replicas"] += 1

    def _kill_replica(self) -> None:
        replica = self._replicas.pop(self._chance.randrange(len(self._replicas)))
        replica.process.kill()
        replica.process.wait()

    # --- deaths -------------------------------------------------------------------------------

    def _kill(self, words: str) -> None:
        for pid in self._ours(words):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _kill_filler(self) -> None:
        self._kill("preloader.filler")

    def _kill_inventory(self) -> None:
        self._kill("preloader.inventory")

    def _kill_host(self) -> None:
        self._kill("preloader.serve")

    def _kill_parent(self) -> None:
        self.node.kill_preloader()
        time.sleep(self._chance.random())
        self._preload()

    def _kill_filler_and_parent(self) -> None:
        self._kill_filler()
        self._kill_parent()

    def _kill_both(self) -> None:
        """Before the one can have given back to the other, or after."""
        self._lost = bool(self._replicas)
        self._kill_parent()
        time.sleep(self._chance.choice([0.0, 1.0, 2.0]))
        self._kill_daemon()

    def _restart_parent(self) -> None:
        if self.node.stop_preloader() != 0:
            raise WrongError("the preloader did not end well")
        self._preload()

    def _kill_daemon(self) -> None:
        self.node.kill_daemon()
        time.sleep(self._chance.random())
        self._serve()

    def _restart_daemon(self) -> None:
        if self.node.stop_daemon() != 0:
            raise WrongError("the daemon did not end well")
        self._serve()

    def _serve(self) -> None:
        self.node.serve("--config", str(self.node.root / "gpu.toml"), with_preloader=False)

    def _preload(self) -> None:
        self.node.start_preloader("--dev-dir", str(self._gpus.dev), "--same-group")

    # --- what must hold ---------------------------------------------------------------------

    def _unsettled(self) -> str:
        """What is not as it should be yet."""
        if len(self._gpu_places()) < 2:
            return "a GPU's standby is not connected"
        shown = {model.ref: self.node.model(model.ref) for model in self._models}
        for number in range(2):
            device = self._device(number)
            steps = {
                ref: residency.state
                for ref, model in shown.items()
                for residency in model.residencies
                if residency.device == device and residency.state != "failed"  # for want of room, if at all
            }
            if set(steps.values()) - {"resident"}:
                return f"{steps} on {device}"
            standing = {model.ref: model for model in self._models if model.ref in steps}
            wrong = self._short(number, standing) or self._twice(number, standing)
            if wrong:
                return f"{wrong}; on {device} there are {sorted(standing)}"
        return ""

    def _short(self, number: int, standing: dict[str, Model]) -> str:
        """A pin that has not its due."""
        for model in self._models:
            if self._pins.get(model.ref) != number or model.ref in standing:
                continue
            held = [m for m in standing.values() if m.ref in self._pins or self._leased(m.ref)]
            if _distinct_bytes([*held, model]) <= CAPACITY_BYTES - ROUNDING_BYTES:
                return f"{model.ref} is pinned and does not stand"
        return ""

    def _leased(self, ref: str) -> bool:
        return bool(self.node.leases(ref))

    def _twice(self, number: int, standing: dict[str, Model]) -> str:
        others = {str(replica.process.pid) for replica in self._replicas}
        memory = self._gpus.directory / "memory" / self._uuids[number]
        self._gpus.used_bytes(self._uuids[number])  # what nobody holds is removed
        found = [path for path in memory.glob("mem-*") if path.name.split("-")[1] not in others]
        used_bytes, due_bytes = _bytes_of(found), _distinct_bytes(standing.values())
        if used_bytes == due_bytes:
            return ""
        self._lost = self._lost and bool(self._replicas)
        maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in others) if self._lost else ""
        if _bytes_of([path for path in found if str(path) not in maps]) <= due_bytes < used_bytes:
            return ""
        return f"{used_bytes} bytes are used where {due_bytes} are shown"

    def _check_bytes(self) -> None:
        for replica in self._replicas:
            if not replica.device:
                replica.device = said(replica.process)
                if not replica.device.startswith(("cuda:", "host", "disk")):
                    raise WrongError(f"a replica was refused: {replica.device}")
            assert replica.process.stdin is not None
            replica.process.stdin.write("read\n")
            replica.process.stdin.flush()
            if said(replica.process) != replica.model.digest:
                raise WrongError(f"a replica on {replica.device} reads what is not {replica.model.ref}")
            self.counts["replicas read"] += 1
        for model in self._models:
            for residency in self.node.model(model.ref).residencies:
                if residency.device.startswith("cuda:"):
                    self._check_handoff(model, residency.device)

    def _check_handoff(self, model: Model, device: str) -> None:
        try:
            found = self._handed(model.ref, device)
        except CachedError as error:
            if error.reason not in BEARABLE:
                raise
            self.counts[f"handoffs refused ({error.reason})"] += 1
            return
        if found and found != model.digest:
            raise WrongError(f"{model.ref} on {device} is not what it should be")
        self.counts["handoffs read"] += 1

    def _handed(self, ref: str, device: str) -> str:
        """The digest of what a handoff's blocks have; empty where it came from elsewhere."""
        request = pb.AcquireRequest(ref=ref, device="disk", prefers=[device])
        with connect(resolve_address(self.node.run_dir)) as channel:
            grant = list(ModelCacheStub(channel).Acquire(request, timeout=30))[-1].grant
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(30)
            with self._as_somebody():
                connection.connect(str(self.node.run_dir / "replicas/handoff.sock"))
            fds.send(connection, {"token": grant.token})
            header, received = fds.receive(connection)
        try:
            if "error" in header:
                raise CachedError("", header["error"]["reason"], header["error"]["message"])
            return _digest(received[2:]) if header["device"] == device else ""
        finally:
            for fd in received:
                os.close(fd)

    @contextlib.contextmanager
    def _as_somebody(self) -> Iterator[None]:
        """Now and then as another uid, where this one may become it."""
        change = os.geteuid() == 0 and self._chance.random() < 0.3
        if change:
            os.seteuid(OTHER_UID)
        try:
            yield
        finally:
            if change:
                os.seteuid(0)

    # --- the end ----------------------------------------------------------------------------

    def _end(self) -> None:
        while self._replicas:
            self._kill_replica()
        while self._pins:
            self._unpin()
        self._clear()
        before = self._descriptors()
        for _ in range(CYCLES):
            for model in self._models[:3]:
                request = op.PinRequest(ref=model.ref, device=self._device(0), unclaimed=True, wait=True)
                self._operate(lambda stub, request=request: list(stub.Pin(request, timeout=30)))
                self._check_handoff(model, self._device(0))
                self._pins[model.ref] = 0
            self._kill_filler()
            self._kill_inventory()
            while self._pins:
                self._unpin()
            self._clear()
        try:
            eventually(lambda: self._descriptors() <= before, 20)
        except AssertionError as error:
            raise WrongError(f"descriptors: {before} before, {self._descriptors()} after") from error
        if self.node.stop_preloader() != 0 or self.node.stop_daemon() != 0:
            raise WrongError("the end was not orderly")
        try:
            eventually(lambda: not self._ours(""), 10)
        except AssertionError as error:
            raise WrongError(f"processes are left: {self._ours('')}") from error

    def _clear(self) -> None:
        for model in self._models:
            eventually(lambda model=model: not self.node.model(model.ref).claims)
            self._operate(lambda stub, ref=model.ref: stub.Evict(op.EvictRequest(ref=ref), timeout=30))
        try:
            eventually(lambda: not any(map(self._gpus.used_bytes, self._uuids)), 20)
        except AssertionError as error:
            raise WrongError(f"{[*map(self._gpus.used_bytes, self._uuids)]} bytes are left") from error
        for model in self._models:
            self.node.prefetch(model.ref)

    def _descriptors(self) -> tuple[int, int]:
        assert self.node.daemon is not None and self.node.preloader is not None
        pids = self.node.daemon.pid, self.node.preloader.pid
        daemon, parent = (len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids)
        return daemon, parent

    def _ours(self, words: str) -> list[int]:
        """Living processes on these GPUs with ``words`` in their command, replicas apart."""
        found, mark = [], f"FAKE_GPU_DIR={self._gpus.directory}".encode()
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes():
                    command = (entry / "cmdline").read_bytes().decode("utf-8", "replace")
                    if words in command and not is_gone(int(entry.name)):
                        found.append(int(entry.name))
        return found

    def _device(self, number: int) -> str:
        return f"cuda:{self._uuids[number]}"

    def _gpu_places(self) -> list[str]:
        with connect(resolve_address(self.node.run_dir, operator=True)) as channel:
            status = OperatorStub(channel).Status(op.StatusRequest(), timeout=10)
        return [p.device for p in status.places if p.device.startswith("cuda:") and p.connected]


def _write(folder: Path, name: str) -> Model:
    seed = ord(name)
    write_model(folder, OWN_MIB[name] * MIB, seed)
    files = {"model": OWN_MIB[name] * MIB // 8 * 4}
    if name in SHARING:
        half = SHARED_MIB * MIB // 8
        write_safetensors(folder / "shared.safetensors", {"x": half, "y": half}, 99)
        files["shared"] = half * 4
    write_sums(folder)
    digest, images = hashlib.sha256(), {}
    for file, tensor_bytes in sorted(files.items()):
        whole = (folder / f"{file}.safetensors").read_bytes()
        digest.update(whole[8 + int.from_bytes(whole[:8], "little") :])
        content = file if file == "shared" else name
        images[content] = image_of([tensor_bytes] * 2, GRANULARITY_BYTES).size_bytes
    return Model(f"file://{folder}/", digest.hexdigest(), images)


def _distinct_bytes(models: Iterable[Model]) -> int:
    return sum({content: size for model in models for content, size in model.images.items()}.values())


def _bytes_of(paths: list[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def _digest(descriptors: list[int]) -> str:
    """Of the tensors by name, as a replica computes it: the fake's memory are files."""
    layout, *blocks = descriptors
    tensors: dict[str, bytes] = {}
    for blob in json.loads(os.pread(layout, 1 << 24, 0))["blobs"]:
        image = b"".join(os.pread(blocks.pop(0), size, 0) for size in blob["blocks"])
        tensors |= {name: image[at : at + size] for name, at, size in blob["tensors"]}
    return hashlib.sha256(b"".join(tensors[name] for name in sorted(tensors))).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu_kills", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=100, help="how many (default %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="the same chance again (default: a new one)")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cached-gpu-kills-") as root, machine() as gpus:
        kills = GpuKills(Path(root), gpus, seed, lambda words: print(words, flush=True))
        try:
            kills.run(options.rounds)
        except (WrongError, AssertionError, CachedError, subprocess.TimeoutExpired) as error:
            preloader = (Path(root) / "preloader.log").read_text()
            print(f"{kills.node.log()[-12_000:]}\n{preloader[-6_000:]}", file=sys.stderr)
            print(f"error: {error!r}\nhint: --seed {seed}", file=sys.stderr)
            sys.exit(1)
        finally:
            kills.node.close()
    print(f"all held in {time.monotonic() - began:.0f} s: {kills.figures()}")


if __name__ == "__main__":
    main()
