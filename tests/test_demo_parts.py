"""The demo's parts, each by itself: the models, the ways to weights, the server, and the tidying up.

The whole demo needs the daemon and is not run here. Models are tiny ones of the real architectures.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from json import loads
from pathlib import Path
from typing import Any

import pytest

from benchmarks.demo import models, processes, server, show, weights
from benchmarks.demo.models import RECIPE, SUMS, Model, Shape, ensure, flaw
from benchmarks.demo.processes import DemoError, Process
from benchmarks.origin import Origin

ROOT = Path(__file__).parents[1]
TINY = Shape(
    layers=2,
    hidden=64,
    intermediate=96,
    heads=4,
    key_value_heads=2,
    vocabulary=200,
    seed=7,
    shard_bytes=60_000,
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tiny checkpoints, ``qwen2`` and ``bert``."""
    root = tmp_path_factory.mktemp("served")
    (root / "qwen2").mkdir()
    models.generate(root / "qwen2", TINY)
    models.write_sums(root / "qwen2")
    save_bert(root / "bert")
    return root


def save_bert(directory: Path) -> None:
    """A tiny BERT as older libraries saved it: with a buffer that the model computes by itself."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import BertConfig, BertModel

    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=100,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        architectures=["BertModel"],
    )
    BertModel(config).save_pretrained(directory)
    file = directory / "model.safetensors"
    tensors = load_file(file) | {"embeddings.position_ids": torch.arange(32).expand((1, -1)).contiguous()}
    save_file(tensors, file, metadata={"format": "pt"})


def load_tensors(directory: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {
        name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()
    }


# --- models ---------------------------------------------------------------------------------


def test_a_generated_model_is_sharded_listed_and_always_the_same(served: Path, tmp_path: Path) -> None:
    directory = served / "qwen2"
    shards = sorted(directory.glob("*.safetensors"))
    index = loads((directory / "model.safetensors.index.json").read_text())
    assert len(shards) > 1 and {p.name for p in shards} == set(index["weight_map"].values())
    assert all(p.stat().st_mode & 0o777 == 0o644 for p in shards)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in load_tensors(directory).values())
    checked = subprocess.run(["sha256sum", "-c", SUMS], cwd=directory, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    models.generate(tmp_path, TINY)
    models.write_sums(tmp_path)
    assert (tmp_path / SUMS).read_text() == (directory / SUMS).read_text()


def test_the_real_model_has_its_weights_and_tokenizer(tmp_path: Path) -> None:
    models.copy_minilm(tmp_path)
    files = models.listed_files(tmp_path)
    assert {"config.json", "model.safetensors", "tokenizer.json", "1_Pooling/config.json"} <= set(files)


def test_the_default_shape_takes_at_least_a_gigabyte() -> None:
    shape = Shape()
    kv = shape.hidden * shape.key_value_heads // shape.heads
    layer = 2 * shape.hidden**2 + 2 * shape.hidden * kv + 3 * shape.hidden * shape.intermediate
    assert 2 * (shape.layers * layer + shape.vocabulary * shape.hidden) > 1024**3


def write_two(directory: Path) -> None:
    (directory / "sub").mkdir()
    (directory / "a.bin").write_bytes(b"aaaa")
    (directory / "sub" / "b.bin").write_bytes(b"bbbb")


def two_files(tmp_path: Path) -> tuple[Model, dict[str, object]]:
    model, recipe = Model("two", "two files", "embed", tmp_path / "models" / "two"), {"version": 1}
    ensure(model, dict(recipe), write_two, tmp_path, lambda line: None)
    return model, dict(recipe)


def test_a_whole_model_is_reused(tmp_path: Path) -> None:
    model, recipe = two_files(tmp_path)
    assert flaw(model.directory, recipe) is None
    assert model.size_bytes == 8
    ensure(model, recipe, lambda directory: pytest.fail("it was written again"), tmp_path, lambda line: None)


def flip(directory: Path) -> None:
    (directory / "a.bin").write_bytes(b"aaab")


def remove(directory: Path) -> None:
    (directory / "sub" / "b.bin").unlink()


def add(directory: Path) -> None:
    (directory / "c.bin").write_bytes(b"c")


def remake(directory: Path) -> None:
    (directory / RECIPE).write_text('{"version": 0}')


def cut_list(directory: Path) -> None:
    (directory / SUMS).write_text("")


@pytest.mark.parametrize(
    ("damage", "words"),
    [(flip, "a.bin has sha256"), (remove, "files"), (add, "files"), (remake, "recipe"), (cut_list, "list")],
)
def test_a_model_that_is_not_whole_is_written_again(
    tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    model, recipe = two_files(tmp_path)
    damage(model.directory)
    assert words in str(flaw(model.directory, recipe))
    ensure(model, recipe, write_two, tmp_path, lambda line: None)
    assert flaw(model.directory, recipe) is None


def test_what_was_being_written_is_no_model(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def die(directory: Path) -> None:
        write_two(directory)
        raise Killed

    model = Model("two", "two files", "embed", tmp_path / "models" / "two")
    with pytest.raises(Killed):
        ensure(model, {}, die, tmp_path, lambda line: None)
    assert flaw(model.directory, {}) == "it is not there yet"


# --- weights --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2", "bert"])
def test_a_model_around_tensors_equals_the_librarys_to_the_last_bit(served: Path, name: str) -> None:
    import torch

    tensors = load_tensors(served / name)
    usual = weights.from_directory(served / name)
    ours = weights.from_tensors(served / name, tensors)
    ids = torch.arange(1, 17)[None]
    with torch.inference_mode():
        assert server.exactly(usual(ids)[0]) == server.exactly(ours(ids)[0])
    theirs = dict(weights.everything(usual))
    assert theirs.keys() == dict(weights.everything(ours)).keys()
    for key, tensor in weights.everything(ours):
        assert tensor.dtype == theirs[key].dtype and torch.equal(tensor, theirs[key]), key


@pytest.mark.parametrize("name", ["qwen2", "bert"])
def test_no_tensor_is_copied(served: Path, name: str) -> None:
    tensors = load_tensors(served / name)
    model = weights.from_tensors(served / name, tensors)
    places = {tensor.data_ptr() for tensor in tensors.values()}
    assert [key for key, parameter in model.named_parameters() if parameter.data_ptr() not in places] == []


def test_tied_weights_stay_one(served: Path) -> None:
    model = weights.from_tensors(served / "qwen2", load_tensors(served / "qwen2"))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_checkpoint_that_lacks_a_tensor_is_refused(served: Path) -> None:
    tensors = load_tensors(served / "qwen2")
    del tensors["model.norm.weight"]
    with pytest.raises(ValueError, match=r"lacks model\.norm\.weight"):
        weights.from_tensors(served / "qwen2", tensors)


def test_a_checkpoint_of_another_model_is_refused(served: Path) -> None:
    tensors = load_tensors(served / "qwen2")
    with pytest.raises(ValueError, match=r"no place for surplus\.weight"):
        weights.from_tensors(served / "qwen2", tensors | {"surplus.weight": tensors["model.norm.weight"]})


def test_a_download_has_every_listed_byte(served: Path, tmp_path: Path) -> None:
    with Origin(served) as origin:
        weights.download(origin.url + "qwen2/", tmp_path)
        assert origin.stats()["bytes_sent"] == sum(p.stat().st_size for p in (served / "qwen2").iterdir())
    for path in models.read_sums(served / "qwen2"):
        assert (tmp_path / path).read_bytes() == (served / "qwen2" / path).read_bytes()


# --- the server -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def running(served: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, server.Status]]:
    """A server of the tiny Qwen2 that has downloaded it."""
    status = server.Status()
    http = server.listen(0, status)
    downloads = str(tmp_path_factory.mktemp("downloads"))
    with Origin(served) as origin:
        argv = ["forward", origin.url + "qwen2/", "--weights", "download", "--downloads", downloads]
        server.start(server.parse([*argv, "--threads", "1"]), status)
    yield f"http://127.0.0.1:{http.server_port}/", status
    http.shutdown()
    http.server_close()


def test_the_server_answers_the_same_again(running: tuple[str, server.Status]) -> None:
    url, _ = running
    first = show.ask(url + "forward", {"token_ids": [1, 2, 3]})
    assert first == show.ask(url + "forward", {"token_ids": [1, 2, 3]})
    assert first[0] == 200 and first[1]["shape"] == [3, TINY.vocabulary]
    assert first[1]["sha256"] != show.ask(url + "forward", {"token_ids": [1, 2, 4]})[1]["sha256"]


def test_readiness_tells_the_times_in_order(running: tuple[str, server.Status]) -> None:
    status, body = show.ask(running[0] + "health/ready")
    times = body["times_s"]
    assert status == 200 and body["ready"]
    assert 0 < times["imports"] <= times["weights"] <= times["ready"] <= server.since_start_s()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "not JSON"),
        (b"[]", "not a JSON object"),
        (b'{"token_ids": []}', "1 to 512"),
        (b'{"token_ids": [true]}', "integers from 0 to 199"),
        (b'{"token_ids": [200]}', "integers from 0 to 199"),
        (b" " * 70_000, "at most 65536 bytes"),
    ],
)
def test_a_bad_request_is_refused_with_the_reason(
    running: tuple[str, server.Status], body: bytes, words: str
) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(running[0] + "forward", body, timeout=10)
    assert refused.value.code == 400 and words in refused.value.read().decode()


def test_unknown_routes_are_named(running: tuple[str, server.Status]) -> None:
    status, body = show.ask(running[0] + "embed", {"texts": ["a"]})
    assert (status, body["error"]) == (404, "there is no /embed; this model has /forward")


def test_before_it_is_ready_a_server_says_so() -> None:
    http = server.listen(0, server.Status())
    url = f"http://127.0.0.1:{http.server_port}/"
    try:
        assert show.ask(url + "health/ready")[0] == 503
        assert show.ask(url + "forward", {"token_ids": [1]})[0] == 503
    finally:
        http.shutdown()
        http.server_close()


def test_the_clock_starts_with_the_process() -> None:
    code = "import time; time.sleep(0.3); from benchmarks.demo.server import since_start_s as s; print(s())"
    began = time.monotonic()
    told = float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).stdout)
    assert 0.3 <= told <= time.monotonic() - began + 0.02


# --- nothing stays behind -------------------------------------------------------------------

# A show that starts what is hard to end: a child in a session of its own whose child is in another,
# read-only directories, and, if asked, a process that ignores SIGTERM.
SHOW = """
import os, subprocess, sys, time
from pathlib import Path
from benchmarks.demo import processes
polite_s = float(sys.argv[3]) if len(sys.argv) > 3 else 10.0
nested = '''
import subprocess
sleeper = subprocess.Popen(['sleep', '60'], start_new_session=True)
print('up', flush=True)
sleeper.wait()
'''
stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
def show(places):
    tree = places.work / "trees" / "deep"
    tree.mkdir(parents=True)
    (tree / "file").write_text("x")
    tree.chmod(0o555)
    def start(name, code):
        log = places.work / f"{name}.log"
        return processes.start(name, [sys.executable, "-c", code], log, dict(os.environ), Path.cwd())
    start("nested", nested).wait_for("(up)", 10)
    if sys.argv[2] == "stubborn":
        start("deaf", stubborn).wait_for("(deaf)", 10)
    print("playing", places.work, places.run, flush=True)
    if sys.argv[2].isdecimal():
        return int(sys.argv[2])
    time.sleep(60)
try:
    code = processes.supervise(Path(sys.argv[1]), show, polite_s)
except processes.DemoError as error:
    print("refused:", error, flush=True)
    code = 1
sys.exit(code)
"""


class Playing:
    """A supervisor with its show, recognisable by a mark in the environment of all it starts."""

    def __init__(self, cache: Path, *arguments: str) -> None:
        self.cache = cache
        self.mark = uuid.uuid4().hex
        self.tmp = cache.parent / "tmp"
        self.tmp.mkdir(exist_ok=True)
        self.popen = subprocess.Popen(
            [sys.executable, "-c", SHOW, str(cache), *arguments],
            cwd=ROOT,
            env={**os.environ, "DEMO_TEST_MARK": self.mark, "TMPDIR": str(self.tmp)},
            stdout=subprocess.PIPE,
            text=True,
        )

    def line(self) -> str:
        assert self.popen.stdout is not None
        return self.popen.stdout.readline()

    def end(self) -> tuple[int, str]:
        output, _ = self.popen.communicate(timeout=20)
        return self.popen.returncode, output

    def living(self) -> dict[int, str]:
        """Pid and command line of every process that still has the mark."""
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdecimal() and self.mark.encode() in (entry / "environ").read_bytes():
                    found[int(entry.name)] = (entry / "cmdline").read_text()
            except OSError:
                continue
        return found

    def leavings(self) -> list[Path]:
        return [*self.cache.glob("work-*"), *self.tmp.iterdir()]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing(tmp_path: Path, signum: signal.Signals) -> None:
    playing = Playing(tmp_path / "cache", "play")
    playing.line()
    assert playing.living() and playing.leavings()
    playing.popen.send_signal(signum)
    assert playing.end()[0] == 128 + signum
    assert (playing.living(), playing.leavings()) == ({}, [])


def test_a_signal_at_any_moment_leaves_nothing(tmp_path: Path) -> None:
    for step in range(12):
        playing = Playing(tmp_path / "cache", "play")
        time.sleep(0.03 * step)
        playing.popen.send_signal(signal.SIGTERM)
        assert playing.end()[0] in (128 + signal.SIGTERM, -signal.SIGTERM)  # the latter before it is up
        assert (playing.living(), playing.leavings()) == ({}, [])


@pytest.mark.parametrize("code", [0, 3])
def test_an_ended_show_leaves_nothing(tmp_path: Path, code: int) -> None:
    playing = Playing(tmp_path / "cache", str(code))
    assert playing.end()[0] == code
    assert (playing.living(), playing.leavings()) == ({}, [])


def test_what_ignores_sigterm_is_killed_and_named(tmp_path: Path) -> None:
    playing = Playing(tmp_path / "cache", "stubborn", "0.5")
    playing.line()
    (show_pid,) = children_of(playing.popen.pid)
    os.kill(show_pid, signal.SIGKILL)
    code, output = playing.end()
    assert code == 1 and "did not end within 0.5 s of SIGTERM" in output and "import signal" in output
    assert (playing.living(), playing.leavings()) == ({}, [])


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_second_signal_is_not_made_to_wait(tmp_path: Path) -> None:
    playing = Playing(tmp_path / "cache", "stubborn")
    playing.line()
    playing.popen.send_signal(signal.SIGINT)
    time.sleep(0.3)
    began = time.monotonic()
    playing.popen.send_signal(signal.SIGINT)
    assert playing.end()[0] == 128 + signal.SIGINT
    assert time.monotonic() - began < 3
    assert (playing.living(), playing.leavings()) == ({}, [])


def test_a_killed_supervisor_takes_its_processes_along_and_the_next_demo_tidies(tmp_path: Path) -> None:
    playing = Playing(tmp_path / "cache", "play")
    playing.line()
    playing.popen.kill()
    playing.end()
    until = time.monotonic() + 5
    while len(living := playing.living()) > 1 and time.monotonic() < until:
        time.sleep(0.05)
    # What we start ends with us; what that starts does so only if it sees to it.
    ((orphan, command),) = living.items()
    assert command.startswith("sleep")
    os.kill(orphan, signal.SIGKILL)
    assert len(playing.leavings()) == 2
    following = Playing(tmp_path / "cache", "0")
    assert following.end()[0] == 0
    assert following.leavings() == []


def test_two_demos_do_not_share_a_cache(tmp_path: Path) -> None:
    first = Playing(tmp_path / "cache", "play")
    first.line()
    second = Playing(tmp_path / "cache", "0")
    code, output = second.end()
    assert code == 1 and "another demo is using" in output
    assert len(first.leavings()) == 2
    first.popen.terminate()
    first.end()


def test_a_tree_is_removed_without_following_links(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("x")
    tree = tmp_path / "tree"
    (tree / "locked").mkdir(parents=True)
    (tree / "locked" / "link").symlink_to(outside)
    (tree / "locked").chmod(0o555)
    processes.remove_tree(tree)
    assert not tree.exists() and (outside / "kept").exists()


# --- the show -------------------------------------------------------------------------------


def started(tmp_path: Path, code: str) -> Process:
    return processes.start(
        "a thing", [sys.executable, "-c", code], tmp_path / "log", dict(os.environ), tmp_path
    )


def test_a_process_that_ends_is_reported_with_its_last_words(tmp_path: Path) -> None:
    process = started(tmp_path, "print('no room left'); raise SystemExit(5)")
    with pytest.raises(DemoError, match="a thing ended with exit status 5:\n    no room left"):
        show.wait_until_ready([process], "http://127.0.0.1:1/", 20)


def test_a_process_that_says_nothing_is_given_up(tmp_path: Path) -> None:
    process = started(tmp_path, "import time; time.sleep(60)")
    with pytest.raises(DemoError, match="not up within"):
        process.wait_for("(never)", 0.2)
    process.stop()
    assert process.popen.returncode == -signal.SIGTERM


def test_a_missing_command_names_the_mending(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="make venv"):
        processes.run([str(tmp_path / "cachectl")], dict(os.environ), tmp_path, 5)


def test_a_failing_command_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="`false x` ended with exit status 1"):
        processes.run(["/bin/false", "x"], dict(os.environ), tmp_path, 5)


def test_unequal_outputs_fail_the_demo() -> None:
    model = Model("m", "a model", "forward", Path("m"))

    def made(way: weights.Way, sha256: str) -> show.Measured:
        return show.Measured(model, way, 1.0, 2.0, 3.0, 0, {"sha256": sha256})

    assert "equal to the last bit" in show.compare([made("download", "a"), made("path", "a")])
    with pytest.raises(DemoError, match="download: a, path: b"):
        show.compare([made("download", "a"), made("path", "b")])


def test_outside_configuration_does_not_reach_the_demo(tmp_path: Path) -> None:
    options = show.Options(tmp_path, 1000, 2, None)
    env = show.environment(
        options, processes.Places(tmp_path, tmp_path / "run"), {"CACHED_ADDRESS": "x:1", "HOME": "/h"}
    )
    assert (
        "CACHED_ADDRESS" not in env and env["HOME"] == "/h" and env["CACHED_RUN_DIR"] == str(tmp_path / "run")
    )


@pytest.mark.parametrize(
    ("size_bytes", "words"),
    [(0, "0 B"), (1015, "1.0 kB"), (91_617_456, "91.6 MB"), (1_107_430_504, "1.11 GB")],
)
def test_sizes_are_decimal(size_bytes: int, words: str) -> None:
    assert show.size(size_bytes) == words


def test_a_slow_origin_is_given_the_time_it_needs(tmp_path: Path) -> None:
    assert show.Options(tmp_path, 100, 2, None).transfer_limit_s(10**9) > 2 * 80


def test_the_command_line_is_checked() -> None:
    wrong = subprocess.run(
        [sys.executable, "-m", "benchmarks.demo", "--rate-mbit", "0"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert wrong.returncode == 2 and "not between" in wrong.stderr
