"""A node under random mixed work, with everything of it killed again and again.

Owns the chance (one seed, printed) and the rules that it checks:

- nobody is handed a wrong byte, and who holds a model reads it rightly until it lets go;
- the daemon ends only when it is ended, and nothing of ours writes a traceback;
- what lies on disk is what its name says, at any instant of a death;
- once the deaths are over, everything is met or refused, and a stop leaves no process.

``python -m benchmarks.soak --seconds 120 --seed 7``; exits with 0 when all held.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from benchmarks.origin import Origin
from cached import CachedError
from cached.client.rpc import connect, resolve_address
from cached.v1 import operator_pb2 as op
from cached.v1.operator_pb2_grpc import OperatorStub
from tests.e2e.kit import BIN, NodeKit, check_blobs, check_store, eventually, write_model

MIB = 1 << 20
SIZES_MIB = (1, 3, 6, 12, 24, 40)
REPLICAS = 3
RATE_BYTES_PER_S = 60e6
SETTLE_EVERY = 25
PAUSE_S = 0.08
"""Between two steps, on average."""
BEARABLE = {1, 3, 5, 6, 8}
"""Exit codes of a refusal that deaths and full devices explain; all others are wrong here."""

CONFIG = """
[store]
capacity_bytes = "64MiB"
[standby]
host_capacity_bytes = "48MiB"
[transfer]
connections = 2
"""

# Does what it is told, line by line, and says one line for each; torch is imported once.
REPLICA = """
import hashlib, sys, torch, cached
model = None
for line in sys.stdin:
    word, *more = line.split()
    try:
        if word == "acquire":
            model = cached.acquire(more[0], on=more[1], timeout_s=float(more[2]))
            print("held", flush=True)
        elif word == "read":
            digest = hashlib.sha256()
            for name in sorted(model.tensors):
                digest.update(model.tensors[name].view(torch.uint8).numpy())
            print(digest.hexdigest(), flush=True)
        elif word == "close":
            model = model.close()
            print("closed", flush=True)
    except cached.CachedError as error:
        print("refused", error.exit_code, error.reason, error.message.replace("\\n", " "), flush=True)
"""


class WrongError(Exception):
    """Something that must hold does not."""


class Model:
    def __init__(self, origin: Origin, name: str, size_bytes: int, seed: int) -> None:
        folder = origin.root / name
        write_model(folder, size_bytes, seed)
        self.ref = f"{origin.url}{name}/"
        whole = (folder / "model.safetensors").read_bytes()
        self.digest = hashlib.sha256(whole[8 + int.from_bytes(whole[:8], "little") :]).hexdigest()


class Replica:
    """One process that acquires, reads and closes; it is asked and answers later."""

    def __init__(self, node: NodeKit) -> None:
        self._process = node.replica(REPLICA)
        os.set_blocking(self._process.stdout.fileno(), False)  # type: ignore[union-attr]
        self._text = ""
        self.model: Model | None = None
        self.held = False
        self._awaited = ""

    @property
    def is_busy(self) -> bool:
        return bool(self._awaited)

    def ask(self, word: str, *more: str) -> None:
        assert self._process.stdin is not None and not self.is_busy
        self._awaited = word
        self._process.stdin.write(" ".join((word, *more)) + "\n")
        self._process.stdin.flush()

    def hear(self) -> str | None:
        """The answer, once it has come; checked against what was asked."""
        assert self._process.stdout is not None
        with contextlib.suppress(TypeError, BlockingIOError):
            self._text += self._process.stdout.read() or ""
        if "\n" not in self._text:
            self._must_live()
            return None
        answer, _, self._text = self._text.partition("\n")
        self._check(answer)
        self._awaited = ""
        return answer

    def _must_live(self) -> None:
        if self._process.poll() is not None:
            raise WrongError(f"a replica ended: {self._process.stderr.read()}")  # type: ignore[union-attr]

    def _check(self, answer: str) -> None:
        words = answer.split()
        match self._awaited, words[0]:
            case "acquire", "refused":
                if int(words[1]) not in BEARABLE:
                    raise WrongError(f"an acquire was refused: {answer}")
            case "acquire", "held":
                self.held = True
            case "close", "closed":
                self.held = False
            case "read", digest if self.model is not None and digest == self.model.digest:
                pass
            case asked, _:
                raise WrongError(f"{asked} of {self.model and self.model.ref} was answered with {answer}")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


class Soak:
    """One run. Every step is a method; the weights say how often each comes."""

    def __init__(self, root: Path, seed: int, say: Callable[[str], None]) -> None:
        self._chance = random.Random(seed)
        self._say = say
        self.node = NodeKit(root)
        (root / "origin").mkdir()
        (root / "cached.toml").write_text(CONFIG)
        self.origin = Origin(root / "origin", RATE_BYTES_PER_S)
        self._models = [
            Model(self.origin, f"m{n}", size_mib * MIB, n) for n, size_mib in enumerate(SIZES_MIB)
        ]
        # The same content under another name: blobs that artifacts share.
        self._models.append(Model(self.origin, "twin", SIZES_MIB[2] * MIB, 2))
        self._replicas: list[Replica] = []
        self._proof: subprocess.Popen[bytes] | None = None
        self.steps: Counter[str] = Counter()

    def run(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        self._start()
        weights = {
            self._prefetch: 6,
            self._pin: 4,
            self._unpin: 4,
            self._evict: 6,
            self._verify: 4,
            self._use_a_replica: 20,
            self._kill_a_replica: 1,
            self._kill_daemon: 3,
            self._stop_daemon: 1,
            self._kill_worker: 4,
            self._kill_standby: 2,
            self._kill_parent: 1,
        }
        while time.monotonic() < deadline:
            (step,) = self._chance.choices(list(weights), list(weights.values()))
            self.steps[step.__name__.strip("_")] += 1
            step()
            self._look()
            if self.steps.total() % SETTLE_EVERY == 0:
                self._settle()
            time.sleep(self._chance.expovariate(1 / PAUSE_S))
        self._end()

    # --- work -------------------------------------------------------------------------------

    def _operate(self, work: Callable[[OperatorStub], object]) -> None:
        """One call of an operator; what deaths and full devices explain is borne."""
        try:
            with connect(resolve_address(self.node.run_dir, operator=True)) as channel:
                work(OperatorStub(channel))
        except CachedError as error:
            if error.exit_code not in BEARABLE:
                raise WrongError(f"an operator was refused: {error}") from error

    def _any_ref(self) -> str:
        return self._chance.choice(self._models).ref

    def _prefetch(self) -> None:
        ref = self._any_ref()
        self._operate(lambda stub: list(stub.Prefetch(op.PrefetchRequest(ref=ref), timeout=10)))

    def _pin(self) -> None:
        ref, device = self._any_ref(), self._chance.choice(("disk", "host"))
        self._operate(lambda stub: list(stub.Pin(op.PinRequest(ref=ref, device=device), timeout=10)))

    def _unpin(self) -> None:
        ref = self._any_ref()
        self._operate(lambda stub: stub.Unpin(op.UnpinRequest(ref=ref), timeout=10))

    def _evict(self) -> None:
        ref = self._any_ref()
        self._operate(lambda stub: stub.Evict(op.EvictRequest(ref=ref), timeout=2))

    def _verify(self) -> None:
        """Beside everything else; nothing is ever made corrupt here, so nothing may be found so."""
        if self._proof is None or self._proof.poll() is not None:
            command = [str(BIN / "cachectl"), "verify", "--all"]
            log = (self.node.root / "verify.log").open("ab")
            with log:
                self._proof = subprocess.Popen(command, env=self.node.env(), stdout=log, stderr=log)

    def _use_a_replica(self) -> None:
        replica = self._chance.choice(self._replicas)
        replica.hear()
        if replica.is_busy:
            return
        if not replica.held:
            replica.model = self._chance.choice(self._models)
            patience_s = self._chance.choice(("2", "20"))
            replica.ask("acquire", replica.model.ref, self._chance.choice(("disk", "host")), patience_s)
        else:
            replica.ask(self._chance.choice(("read", "read", "read", "close")))

    # --- deaths -----------------------------------------------------------------------------

    def _kill_a_replica(self) -> None:
        index = self._chance.randrange(REPLICAS)
        self._replicas[index].kill()
        self._replicas[index] = Replica(self.node)

    def _kill_daemon(self) -> None:
        self.node.kill_daemon()
        check_blobs(self.node.data_dir)
        time.sleep(self._chance.choice((0.0, 0.0, 0.5)))
        self._serve()

    def _stop_daemon(self) -> None:
        began = time.monotonic()
        code = self.node.stop_daemon()
        if code != 0 or time.monotonic() - began > 10:
            raise WrongError(f"parking ended with {code} after {time.monotonic() - began:.1f} s")
        check_blobs(self.node.data_dir)
        self._serve()

    def _kill_worker(self) -> None:
        self._kill_one("cached.fetch.worker")

    def _kill_standby(self) -> None:
        self._kill_one("-m preloader.serve")

    def _kill_parent(self) -> None:
        self._kill_one("-m preloader serve")

    def _kill_one(self, words: str) -> None:
        pids = self.node.processes(words)
        if pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._chance.choice(pids), signal.SIGKILL)

    # --- life -------------------------------------------------------------------------------

    def _start(self) -> None:
        self._serve()
        self._replicas = [Replica(self.node) for _ in range(REPLICAS)]

    def _serve(self) -> None:
        self.node.serve("--config", str(self.node.root / "cached.toml"))

    def _look(self) -> None:
        """What may never be, whatever was killed."""
        if self.node.daemon is not None and self.node.daemon.poll() is not None:
            raise WrongError(f"the daemon ended by itself with {self.node.daemon.returncode}")
        code = self._proof.poll() if self._proof is not None else None
        if code not in {None, 0, *BEARABLE}:
            raise WrongError(
                f"verify ended with {code}: {(self.node.root / 'verify.log').read_text()[-2000:]}"
            )
        self._look_at_log()

    def _look_at_log(self) -> None:
        log = self.node.log()
        if "Traceback" in log or "cannot go on" in log:
            raise WrongError("a traceback in the log")
        if "corrupt content" in log or "quarantine" in log:
            raise WrongError("good content was taken for corrupt")

    def _settle(self) -> None:
        """Let everything that moves come to its end, then check the whole store."""
        for replica in self._replicas:
            eventually(lambda replica=replica: replica.hear() or not replica.is_busy, within_s=60)
        eventually(self._is_quiet, within_s=60, every_s=0.2)
        check_store(self.node)
        self._say(f"{self.steps.total()} steps, the store is whole: {self._stands()}")

    def _is_quiet(self) -> bool:
        metrics = self.node.metrics()
        states = {row["state"] for row in self.node.rows()}
        return metrics["cached_transfers_in_progress"] == 0 and not states & {"fetching", "evicting"}

    def _stands(self) -> str:
        rows = self.node.rows()
        verified = [row for row in rows if row["state"] == "verified"]
        in_memory = [row for row in verified if "host" in row["devices"]]
        claims = sum(len(row["claims"]) for row in rows)
        return f"{len(verified)} on disk, {len(in_memory)} in memory, {claims} claims"

    def _end(self) -> None:
        """The deaths are over: all claims end, one of everything works, and a stop leaves nothing."""
        self._settle()
        for replica in self._replicas:
            replica.kill()
        for model in self._models:
            self._operate(lambda stub, ref=model.ref: stub.Unpin(op.UnpinRequest(ref=ref), timeout=10))
        eventually(lambda: not any(row["claims"] for row in self.node.rows()), within_s=60)
        largest = self._models[len(SIZES_MIB) - 1]
        self.node.ctl("pin", largest.ref, "--on", "host", "--wait")
        check_store(self.node)
        if self.node.stop_daemon() != 0 or self.node.processes(str(self.node.run_dir)):
            raise WrongError("the end left something running")
        self._look_at_log()

    def close(self) -> None:
        if self._proof is not None:
            self._proof.kill()
            self._proof.wait()
        self.node.close()
        self.origin.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.soak", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to go on (default %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="the same chance again (default: a new one)")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="cached-soak-") as root:
        soak = Soak(Path(root), seed, lambda words: print(words, flush=True))
        try:
            soak.run(options.seconds)
        except (WrongError, AssertionError, subprocess.TimeoutExpired) as error:
            print(f"{soak.node.log()[-12_000:]}\nerror: {error}\nhint: --seed {seed}", file=sys.stderr)
            sys.exit(1)
        finally:
            soak.close()
    print("all held:", ", ".join(f"{count} {name}" for name, count in sorted(soak.steps.items())))


if __name__ == "__main__":
    main()
