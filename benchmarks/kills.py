"""SIGKILL of the real daemon amid fetching, evicting and pinning, with the store checked after each.

Owns the chance (one seed, printed) and the rules that it checks. At each death, before the next start:

- ``sha256sum`` finds every blob to be what its name says;
- every artifact has all its blobs, and its whole tree, made of them;
- every pin that was acknowledged is written down, and none that was acknowledged to be gone;
- nothing was quarantined, no transfer is left but those of the models that there are, and no worker lives on.

After each start: ready within a bound, and every acknowledged pin is back. At the end every model is fetched
and read once more, everything is removed, and nothing is left on disk or running.

``python -m benchmarks.kills --kills 200 --seed 7``; exits with 0 when all held.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import grpc

from benchmarks.origin import Origin
from cached import CachedError
from cached.client.rpc import connect, resolve_address
from cached.v1 import model_cache_pb2 as pb
from cached.v1 import operator_pb2 as op
from cached.v1.model_cache_pb2_grpc import ModelCacheStub
from cached.v1.operator_pb2_grpc import OperatorStub
from tests.e2e.kit import NodeKit, eventually, is_gone, sha256, write_model, write_safetensors, write_sums

MIB = 1 << 20
SIZES_MIB = (1, 2, 4, 8, 12, 20)
SHARED_MIB = 6
RATE_BYTES_PER_S = 90e6
READY_WITHIN_S = 20.0
DEATH_WITHIN_S = 5.0
DURING_START = 0.2
"""The share of deaths that come while the daemon starts."""
START_S = 1.0
DURING_WORK = 0.8
"""The share of the other deaths that come after bytes of a model have come."""
WORK_WITHIN_S = 2.0
LIFE_S = 0.4
"""From then to death, on average."""
PAUSE_S = 0.2
MOST_PINS = 2
BEARABLE = {1, 3, 5, 6, 8}
"""Exit codes of refusals that deaths and full disks explain; all others are wrong here."""
NOT_FOUND = 3

CONFIG = f"""
[store]
capacity_bytes = "{sum(SIZES_MIB) + SHARED_MIB - 8}MiB"
[transfer]
connections = 2
workers = 3
"""


class WrongError(Exception):
    """Something that must hold does not."""


class Pins:
    """What operators were told of their pins. One thread writes; it is read once that one has stopped."""

    def __init__(self) -> None:
        self.told: dict[str, bool] = {}
        self.unsure: set[str] = set()
        """Asked, and died before the answer: either is right."""

    def ask(self, ref: str, pinned: bool, call: Callable[[], object]) -> None:
        self.unsure.add(ref)
        try:
            call()
        except CachedError as error:
            if pinned or error.exit_code != NOT_FOUND:
                raise
        self.told[ref] = pinned
        self.unsure.discard(ref)

    def check(self, found: set[str], where: str) -> None:
        """Against the refs that ``where`` has pins of. What was unsure is known from here on."""
        for ref, pinned in self.told.items():
            if ref not in self.unsure and pinned != (ref in found):
                raise WrongError(f"{where}: the pin of {ref} was told to be {pinned}, and is not so")
        for ref in self.unsure:
            self.told[ref] = ref in found
        self.unsure.clear()


class Kills:
    """One run."""

    def __init__(self, root: Path, seed: int, say: Callable[[str], None]) -> None:
        self._chance = random.Random(seed)
        self._say = say
        self.node = NodeKit(root)
        (root / "origin").mkdir()
        (root / "cached.toml").write_text(CONFIG)
        self._origin = Origin(root / "origin", RATE_BYTES_PER_S)
        self._sums = dict(self._write_models(root / "origin"))
        self._pins = Pins()
        self._wrong: list[BaseException] = []
        self.counts: Counter[str] = Counter()
        self.slowest_start_s = 0.0

    def _write_models(self, root: Path) -> list[tuple[str, dict[str, str]]]:
        """Models by ref with their digests; the first half of them has one large blob in common."""
        found = []
        for number, size_mib in enumerate(SIZES_MIB):
            folder = root / f"m{number}"
            write_model(folder, size_mib * MIB, number)
            if number < len(SIZES_MIB) // 2:
                write_safetensors(folder / "shared.safetensors", {"base": SHARED_MIB * MIB // 4}, 99)
            found.append((f"{self._origin.url}m{number}/", write_sums(folder)))
        return found

    def run(self, kills: int) -> None:
        for number in range(1, kills + 1):
            self._live_and_die()
            self._check_store()
            if number % 25 == 0:
                self._say(f"{number} kills: {self.figures()}")
        self._end()

    def figures(self) -> str:
        counted = ", ".join(f"{count} {name}" for name, count in sorted(self.counts.items()))
        return f"{counted}; slowest start {self.slowest_start_s:.1f} s"

    # --- one life ---------------------------------------------------------------------------

    def _live_and_die(self) -> None:
        began = time.monotonic()
        self.node.serve("--config", str(self.node.root / "cached.toml"), with_preloader=False, wait=False)
        if self._chance.random() < DURING_START:
            time.sleep(self._chance.uniform(0, START_S))
            self.counts["deaths during a start"] += 1
            self._kill([])
            return
        self._await_ready(began)
        over = threading.Event()
        chances = [random.Random(self._chance.random()) for _ in range(3)]
        work = (self._keep_pinning, self._keep_fetching, self._keep_removing)
        threads = [
            threading.Thread(target=self._guarded, args=(one, chance, over))
            for one, chance in zip(work, chances, strict=True)
        ]
        sent_bytes = self._origin.bytes_sent
        for thread in threads:
            thread.start()
        if self._chance.random() < DURING_WORK:
            # However long a worker takes to start: from here on something is under way.
            with contextlib.suppress(AssertionError):
                eventually(lambda: self._origin.bytes_sent > sent_bytes + MIB, WORK_WITHIN_S, 0.01)
        over.wait(self._chance.expovariate(1 / LIFE_S))
        over.set()
        self._kill(threads)

    def _await_ready(self, began: float) -> None:
        eventually(self.node.is_ready, within_s=READY_WITHIN_S, every_s=0.02)
        self.slowest_start_s = max(self.slowest_start_s, time.monotonic() - began)
        with self._channel() as channel:
            models = ModelCacheStub(channel).List(pb.ListRequest(), timeout=10).models
        pinned = {model.ref for model in models if any(claim.kind == "pin" for claim in model.claims)}
        self._pins.check(pinned, "after a start")

    def _kill(self, threads: list[threading.Thread]) -> None:
        workers = self.node.processes("cached.fetch.worker")
        self.node.kill_daemon()
        self.counts["kills"] += 1
        eventually(lambda: all(is_gone(pid) for pid in workers), within_s=DEATH_WITHIN_S, every_s=0.01)
        for thread in threads:
            thread.join(30)
            if thread.is_alive():
                raise WrongError("a call did not end with its daemon")
        if self._wrong:
            raise self._wrong[0]

    # --- work -------------------------------------------------------------------------------

    def _guarded(
        self, work: Callable[[random.Random], None], chance: random.Random, over: threading.Event
    ) -> None:
        while not over.is_set():
            try:
                work(chance)
            except CachedError as error:
                if error.exit_code not in BEARABLE:
                    self._wrong.append(WrongError(f"refused: {error.reason}: {error}"))
            except BaseException as error:
                self._wrong.append(error)
            over.wait(chance.uniform(0, PAUSE_S))

    def _channel(self) -> contextlib.AbstractContextManager[grpc.Channel]:
        return connect(resolve_address(self.node.run_dir, operator=True))

    def _operate(self, work: Callable[[OperatorStub], object]) -> None:
        with self._channel() as channel:
            work(OperatorStub(channel))

    def _keep_pinning(self, chance: random.Random) -> None:
        pinned = [ref for ref, told in self._pins.told.items() if told]
        ref = chance.choice(list(self._sums))
        if ref in pinned or len(pinned) >= MOST_PINS:
            ref = chance.choice(pinned)
            unpin = op.UnpinRequest(ref=ref)
            self._pins.ask(ref, False, lambda: self._operate(lambda stub: stub.Unpin(unpin, timeout=10)))
            self.counts["unpins"] += 1
        else:
            pin = op.PinRequest(ref=ref, device="disk")
            self._pins.ask(ref, True, lambda: self._operate(lambda stub: list(stub.Pin(pin, timeout=10))))
            self.counts["pins"] += 1

    def _keep_fetching(self, chance: random.Random) -> None:
        request = op.PrefetchRequest(ref=chance.choice(list(self._sums)))
        self._operate(lambda stub: list(stub.Prefetch(request, timeout=10)))
        self.counts["prefetches"] += 1

    def _keep_removing(self, chance: random.Random) -> None:
        request = op.EvictRequest(ref=chance.choice(list(self._sums)))
        with contextlib.suppress(CachedError):  # claimed, or not here: most of the time
            self._operate(lambda stub: stub.Evict(request, timeout=5))
            self.counts["evictions asked for"] += 1

    # --- what may never be ------------------------------------------------------------------

    def _check_store(self) -> None:
        data_dir = self.node.data_dir
        if not (data_dir / "VERSION").exists():
            return  # killed before the store was made
        blobs = self._check_blobs(data_dir)
        for path in (data_dir / "artifacts").glob("[!.]*.json"):
            self._check_artifact(path, blobs)
        claims = [json.loads(path.read_bytes()) for path in (data_dir / "claims").glob("[!.]*.json")]
        self._pins.check({claim["ref"] for claim in claims if claim["kind"] == "pin"}, "on disk")
        transfers = list((data_dir / "ingest").iterdir())
        self.counts["deaths amid transfers"] += any(True for path in transfers if list(path.glob("*.part")))
        if len(transfers) > len(self._sums):
            raise WrongError(f"{len(transfers)} transfers are left of {len(self._sums)} models")
        if list((data_dir / "quarantine").iterdir()):
            raise WrongError("good content was quarantined")
        if "Traceback" in self.node.log() or "cannot go on" in self.node.log():
            raise WrongError("a traceback in the log")

    def _check_blobs(self, data_dir: Path) -> dict[str, Path]:
        """By digest, once the real ``sha256sum`` has read them all."""
        blobs = {path.name: path for path in (data_dir / "blobs" / "sha256").glob("*/*")}
        lines = "".join(f"{digest}  {path}\n" for digest, path in blobs.items())
        command = ["sha256sum", "--check", "--strict", "--quiet", "-"]
        if blobs:
            done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=60)
            if done.returncode != 0:
                raise WrongError(f"sha256sum: {done.stdout}{done.stderr}")
        self.counts["blobs checked"] += len(blobs)
        return blobs

    def _check_artifact(self, path: Path, blobs: dict[str, Path]) -> None:
        manifest = json.loads(path.read_bytes())
        should = {file["path"]: file["blob"]["sha256"] for file in manifest["files"]}
        if should != self._sums[manifest["ref"]]:
            raise WrongError(f"{path} does not say what its origin has")
        tree = self.node.data_dir / "trees" / path.stem
        found = {str(entry.relative_to(tree)) for entry in tree.rglob("*") if not entry.is_dir()}
        if found != set(should):
            raise WrongError(f"{tree} has {sorted(found)}, and should have {sorted(should)}")
        for name, digest in should.items():
            if digest not in blobs or not (tree / name).samefile(blobs[digest]):
                raise WrongError(f"{tree / name} is not the blob {digest}")
        self.counts["artifacts checked"] += 1

    # --- the end ----------------------------------------------------------------------------

    def _end(self) -> None:
        self._origin.rate.bytes_per_s = None
        began = time.monotonic()
        self.node.serve("--config", str(self.node.root / "cached.toml"), with_preloader=False, wait=False)
        self._await_ready(began)
        for ref in [ref for ref, told in self._pins.told.items() if told]:
            self.node.ctl("unpin", ref)
        for ref, sums in self._sums.items():
            self.node.ctl("prefetch", ref, "--wait")
            tree = Path(self.node.ctl("path", ref).stdout.strip())
            if {name: sha256(tree / name) for name in sums} != sums:
                raise WrongError(f"{ref} is not what its origin has")
        self.node.ctl("verify", "--all")
        eventually(lambda: not any(row["claims"] for row in self.node.rows()))
        for row in self.node.rows():
            if row["state"] == "verified":
                self.node.ctl("evict", row["ref"])
        if self.node.stop_daemon() != 0 or self.node.processes(str(self.node.run_dir)):
            raise WrongError("the end left something running")
        self.counts["evictions"] = sum(line["event"] == "evicting" for line in self.node.log_events())
        for name in ("blobs/sha256/*", "artifacts", "trees", "ingest", "claims", "quarantine"):
            left = [entry for place in self.node.data_dir.glob(name) for entry in place.iterdir()]
            if left:
                raise WrongError(f"the end left {left[0]}")

    def close(self) -> None:
        self.node.close()
        self._origin.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.kills", description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=200, help="how many (default %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="the same chance again (default: a new one)")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}", flush=True)
    if shutil.which("sha256sum") is None:
        sys.exit("error: there is no sha256sum on this machine\nhint: install coreutils")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cached-kills-") as root:
        kills = Kills(Path(root), seed, lambda words: print(words, flush=True))
        try:
            kills.run(options.kills)
        except (WrongError, AssertionError, CachedError, subprocess.TimeoutExpired) as error:
            print(f"{kills.node.log()[-12_000:]}\nerror: {error}\nhint: --seed {seed}", file=sys.stderr)
            sys.exit(1)
        finally:
            kills.close()
    print(f"all held in {time.monotonic() - began:.0f} s: {kills.figures()}")


if __name__ == "__main__":
    main()
