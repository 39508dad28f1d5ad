"""A node with fake GPUs for end-to-end tests: the daemon, a preloader of its own, replicas that use torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

from gpukit import Gpus, machine
from kit import NodeKit, eventually, said, write_model

# Says where its model stands, then the digest of its tensors each time it is asked.
REPLICA = """
import hashlib, json, sys, torch, cached
try:
    model = cached.acquire(sys.argv[1], timeout_s=60, **json.loads(sys.argv[2]))
except cached.CachedError as error:
    print(error.reason, error.message, flush=True)
    sys.exit()
tensors = model.state_dict()
print(model.device, flush=True)
for line in sys.stdin:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].view(torch.uint8).numpy())
    print(digest.hexdigest(), flush=True)
"""


class GpuNode:
    """A node with two GPUs. Closing it is ``running``'s."""

    def __init__(self, root: Path, gpus: Gpus, gpu_bytes: int, config: str) -> None:
        self.gpus = gpus
        self.uuids = [gpus.add(gpu_bytes) for _ in range(2)]
        self.kit = NodeKit(root)
        self.kit.base = gpus.env()
        (root / "gpu.toml").write_text(config)

    def serve(self) -> None:
        self.kit.serve("--config", str(self.kit.root / "gpu.toml"), with_preloader=False)

    def preload(self) -> None:
        # What else locks pages in this control group meanwhile would be taken for charged elsewhere.
        self.kit.start_preloader("--dev-dir", str(self.gpus.dev), "--same-group")

    def device(self, number: int) -> str:
        return f"cuda:{self.uuids[number]}"

    def model(self, seed: int, size_bytes: int) -> tuple[str, str]:
        """A new model's ref, and the digest of its tensors."""
        folder = self.kit.root / f"origin-{seed}"
        write_model(folder, size_bytes, seed=seed)
        whole = (folder / "model.safetensors").read_bytes()
        tensors = whole[8 + int.from_bytes(whole[:8], "little") :]
        return f"file://{folder}/", hashlib.sha256(tensors).hexdigest()

    def pin(self, ref: str, on: str, *more: str) -> None:
        self.kit.ctl("pin", ref, "--on", on, "--unclaimed", "--wait", *more)

    def stands(self, ref: str, number: int) -> bool:
        return self.device(number) in self.kit.row(ref).get("devices", [])

    def await_standing(self, ref: str, number: int) -> None:
        eventually(lambda: self.stands(ref, number))

    def replica(self, ref: str, **options: object) -> subprocess.Popen[str]:
        return self.kit.replica(REPLICA, ref, json.dumps(options))

    def loads(self, number: int) -> float:
        """Since the daemon's start."""
        name = f'cached_loads_total{{device="{self.device(number)}",outcome="done"}}'
        return self.kit.metrics().get(name, 0.0)


@contextlib.contextmanager
def running(root: Path, gpu_bytes: int, config: str) -> Iterator[GpuNode]:
    """Daemon and preloader run; everything ends with it."""
    with machine() as gpus:
        node = GpuNode(root, gpus, gpu_bytes, config)
        try:
            node.serve()
            node.preload()
            yield node
        finally:
            node.kit.close()


def reads(replica: subprocess.Popen[str]) -> str:
    """The digest of what the replica has, read now."""
    assert replica.stdin is not None
    replica.stdin.write("read\n")
    replica.stdin.flush()
    return said(replica)


def end(*replicas: subprocess.Popen[str]) -> None:
    for replica in replicas:
        replica.kill()
        replica.wait()
