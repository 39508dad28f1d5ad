"""A disk that returns EIO: what it damages is told and never served, and once it is well everything is.

The daemon is real; between it and the disk a small library makes chosen calls fail as the kernel does (a sick
device itself needs a privileged machine). A failed fsync ends the daemon, whose next start recovers.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from kit import NodeKit, check_blobs, check_data_dir, eventually, sha256, write_model

from cached import CachedError

EIO = "Input/output error"


class SickNode:
    """A node and what its disk does wrong."""

    def __init__(self, root: Path, library: Path) -> None:
        self.node = NodeKit(root)
        self._rules = root / "rules"
        self._env = {**os.environ, "LD_PRELOAD": str(library), "SICK_DISK": str(self._rules)}
        self._models = 0

    def serve(self, wait: bool = True) -> None:
        self.node.serve(with_preloader=False, wait=wait, env=self._env)

    def fail(self, call: str, words: str) -> None:
        """From now on ``call`` (read, write, fsync) fails for every path with ``words`` in it."""
        self._rules.write_text(f"{call} {words}\n")

    def mend(self) -> None:
        self._rules.unlink(missing_ok=True)

    def model(self) -> str:
        """A new one; its ref."""
        self._models += 1
        folder = self.node.root / f"m{self._models}"
        write_model(folder, 1 << 20, seed=self._models)
        return f"file://{folder}/"

    def is_right(self, ref: str) -> None:
        """On disk, proven, what its origin has; and so is all else."""
        model = self.node.model(ref)
        origin = Path(ref.removeprefix("file://")) / "model.safetensors"
        assert model.state == "verified"
        assert sha256(Path(model.path) / "model.safetensors") == sha256(origin)
        assert self.node.is_ready()
        check_data_dir(self.node.data_dir)

    def comes(self, ref: str) -> None:
        """What is pinned, by itself."""
        eventually(lambda: self.node.model(ref).state == "verified")
        self.is_right(ref)

    def is_pinned(self, ref: str) -> bool:
        try:
            return any(claim.kind == "pin" for claim in self.node.model(ref).claims)
        except CachedError as error:
            assert error.reason == "NOT_HERE"
            return False

    def ends(self, *words: str) -> None:
        """By itself, saying why."""
        assert self.node.daemon is not None
        assert self.node.daemon.wait(20) == 1
        last = self.node.log().splitlines()[-1]
        assert "cannot go on" in last and all(word in last for word in words), last


@pytest.fixture(scope="module")
def sick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SickNode]:
    root = tmp_path_factory.mktemp("sick")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    assert compiler is not None, "a C compiler makes the library that fails calls: install gcc"
    library = root / "sick_disk.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", str(library)]
    subprocess.run([*command, str(Path(__file__).with_name("sick_disk.c")), "-ldl"], check=True, timeout=60)
    found = SickNode(root, library)
    try:
        found.serve()
        yield found
    finally:
        found.node.close()


@pytest.fixture(autouse=True)
def _healthy_again(sick: SickNode) -> Iterator[None]:
    yield
    sick.mend()


SICK_FETCHES = [("write", "/ingest/"), ("write", "0.part"), ("write", ".journal"), ("read", "1.part")]


@pytest.mark.parametrize(("call", "words"), [*SICK_FETCHES, ("write", "/artifacts/")])
def test_a_fetch_that_meets_a_sick_disk_is_refused(sick: SickNode, call: str, words: str) -> None:
    ref = sick.model()
    sick.fail(call, words)
    refused = sick.node.prefetch(ref)
    assert refused is not None and (refused.exit_code, refused.reason) == (1, "STORE_IO")
    assert EIO in refused.message and words.strip("/") in refused.message and "kernel's log" in refused.hint
    # What cannot be read back is no beginning for the next attempt.
    assert call != "read" or not list((sick.node.data_dir / "ingest").rglob(words))
    sick.mend()
    assert sick.node.prefetch(ref) is None
    sick.is_right(ref)


@pytest.mark.parametrize("words", ["0.part", "/artifacts/"])
def test_a_failed_fsync_ends_the_daemon_and_the_next_start_recovers(sick: SickNode, words: str) -> None:
    ref = sick.model()
    sick.fail("fsync", words)
    assert sick.node.pin(ref) is None
    sick.ends("fsync", words, EIO)
    check_blobs(sick.node.data_dir)
    sick.mend()
    sick.serve()
    sick.comes(ref)


def test_a_start_on_a_sick_disk_says_so(sick: SickNode) -> None:
    assert sick.node.stop_daemon() == 0
    sick.fail("fsync", "/claims")
    sick.serve(wait=False)
    sick.ends("fsync", "/claims", EIO)
    sick.mend()
    sick.serve()


def test_a_claim_that_cannot_be_written_is_refused_and_not_promised(sick: SickNode) -> None:
    ref, claims = sick.model(), str(sick.node.data_dir / "claims")
    sick.fail("write", "/claims/")
    refused = sick.node.pin(ref)
    assert refused is not None and (refused.exit_code, refused.reason) == (1, "STORE_IO")
    assert EIO in refused.message and claims in refused.message
    assert EIO in sick.node.ctl("path", ref, "--ttl", "60", code=1).stderr
    assert not sick.is_pinned(ref)
    sick.mend()
    assert sick.node.pin(ref) is None and sick.is_pinned(ref)
    sick.comes(ref)


@pytest.mark.parametrize("what", ["pin", "unpin"])
def test_a_claim_whose_fsync_failed_ends_the_daemon_and_is_not_promised(sick: SickNode, what: str) -> None:
    ref = sick.model()
    if what == "unpin":
        assert sick.node.pin(ref) is None
    sick.fail("fsync", "/claims")
    refused = (sick.node.pin if what == "pin" else sick.node.unpin)(ref)
    assert refused is not None and refused.exit_code in (1, 6) and refused.hint
    sick.ends("fsync", "/claims", EIO)
    sick.mend()
    sick.serve()
    # It is so or not, as nothing was promised. What is asked again is.
    assert sick.node.pin(ref) is None
    sick.comes(ref)
    assert sick.node.unpin(ref) is None and not sick.is_pinned(ref)


def test_content_that_cannot_be_read_is_quarantined_and_fetched_anew(sick: SickNode) -> None:
    ref = sick.model()
    assert sick.node.pin(ref) is None
    sick.comes(ref)
    path = Path(sick.node.model(ref).path) / "model.safetensors"
    digest = sha256(path)
    sick.fail("read", str(path))
    verified = sick.node.ctl("verify", ref, code=4)
    told = verified.stdout + verified.stderr
    assert "model.safetensors" in told and EIO in told
    sick.mend()
    sick.comes(ref)
    (aside,) = (sick.node.data_dir / "quarantine").iterdir()
    record = json.loads((aside / "reason.json").read_text())
    assert record["digest"] == digest and EIO in record["reason"] and sha256(aside / "blob") == digest


def test_a_manifest_that_cannot_be_read_is_told(sick: SickNode) -> None:
    ref = sick.model()
    assert sick.node.prefetch(ref) is None
    sick.fail("read", "/artifacts/")
    with pytest.raises(AssertionError, match=f"/artifacts/.*{EIO}"):
        sick.node.holder(ref)
    sick.mend()
    sick.node.holder(ref).kill()
    sick.is_right(ref)
