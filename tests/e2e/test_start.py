"""The first minute: a bare machine, and every way to start that has to be refused in clear words."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
from kit import BIN, NodeKit, eventually, expect, free_port, sha256, write_model

NOBODY = 65534

# No option, no variable, no file: default directories, on file systems that have never been used.
BARE_MACHINE = """
set -eu
mount -t tmpfs -o size=64m none /var/lib
mount -t tmpfs -o size=8m none /run
cached serve --with-preloader --http 127.0.0.1:$2 &
until cachectl status >status 2>/dev/null; do sleep 0.05; done
cachectl prefetch "$1" --wait
cp "$(cachectl path "$1")/model.safetensors" copy
kill -TERM $!
wait $!
"""

# Only root can become another user; who is not, stays. The interpreter need not be readable for others, so
# everything is imported before the user is changed.
AS_NOBODY = """
import os, sys, cached.daemon
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
cached.daemon.main()
"""

WITHOUT_TORCH = """
import sys, time

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "numpy"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
began = time.perf_counter()
import cached
cached.acquire
print("light" if time.perf_counter() - began < 0.3 else "heavy", flush=True)
for on in ("disk", "host"):
    with cached.acquire(sys.argv[1], on=on, timeout_s=60) as model:
        print(sorted(file.name for file in model.path.iterdir()), flush=True)
        try:
            model.tensors["first"]
        except cached.CachedError as error:
            print(error.reason, "cached[torch]" in error.hint, flush=True)
"""


def _refused(*command: str, code: int, env: dict[str, str] | None = None) -> str:
    """What a start that fails says; it says it in two lines and without a traceback."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL, env=env
    )
    assert done.returncode == code, done.stderr
    assert "error: " in done.stderr and "hint: " in done.stderr and "Traceback" not in done.stderr
    return done.stderr


def _serve(data_dir: Path, run_dir: Path, *more: str) -> list[str]:
    return [str(BIN / "cached"), "serve", "--data-dir", str(data_dir), "--run-dir", str(run_dir), *more]


# --- starts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["cached", "cachectl"])
def test_version(command: str) -> None:
    done = subprocess.run([BIN / command, "--version"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and version("cached") in done.stdout


def test_a_bare_machine_needs_no_configuration(tmp_path: Path) -> None:
    sums = write_model(tmp_path / "m", 1 << 20)
    known = {name: value for name, value in os.environ.items() if not name.startswith("CACHED_")}
    script = ["sh", "-c", BARE_MACHINE, "sh", f"file://{tmp_path}/m/", str(free_port())]
    done = subprocess.run(
        ["unshare", "-Urm", *script],
        cwd=tmp_path,
        env={**known, "PATH": f"{BIN}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert sha256(tmp_path / "copy") == sums["model.safetensors"]
    assert "/var/lib/cached" in (tmp_path / "status").read_text()


def test_it_is_ready_in_two_seconds(cold_node: NodeKit) -> None:
    """The best of three: the machine that runs the tests may be busy with something else."""
    took_s = []
    for _ in range(3):
        began = time.monotonic()
        cold_node.serve()
        took_s.append(time.monotonic() - began)
        if took_s[-1] < 2:
            return
        cold_node.stop_daemon()
    raise AssertionError(f"ready after {took_s} s")


def test_the_client_works_without_torch(node: NodeKit, tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    replica = node.replica(WITHOUT_TORCH, f"file://{tmp_path}/m/")
    expect(replica, "light")
    for _ in ("disk", "host"):
        expect(replica, "['config.json', 'model.safetensors']", "NO_TORCH True")
    assert replica.wait(10) == 0


def test_a_relative_directory_is_meant_from_where_it_was_started(cold_node: NodeKit, tmp_path: Path) -> None:
    node = cold_node
    write_model(tmp_path / "m")
    command = _serve(Path("data"), node.run_dir, "--http", f"127.0.0.1:{node.http_port}", "--with-preloader")
    with (tmp_path / "daemon.log").open("ab") as log:
        # Names of modules that a careless start would import from here.
        for name in ("grpc", "cached", "preloader", "json"):
            (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the current directory')")
        node.daemon = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
    eventually(node.is_ready)
    node.ctl("pin", f"file://{tmp_path}/m/", "--on", "host", "--wait")
    assert (tmp_path / "data" / "VERSION").exists()


# --- refusals ---------------------------------------------------------------------------------


def test_a_directory_that_is_served_already_is_refused(node: NodeKit, tmp_path: Path) -> None:
    assert node.daemon is not None
    pid = str(node.daemon.pid)
    words = _refused(*_serve(node.data_dir, tmp_path / "r"), code=1)
    assert pid in words and str(node.data_dir) in words
    words = _refused(*_serve(tmp_path / "other", node.run_dir, "--with-preloader"), code=1)
    assert pid in words and str(node.run_dir) in words
    # The one that was there has noticed nothing, nor has its preloader.
    assert node.is_ready()
    eventually(lambda: len(node.processes("-m preloader.serve")) == 1)
    write_model(tmp_path / "m")
    node.ctl("pin", f"file://{tmp_path}/m/", "--on", "host", "--wait")


def test_a_second_preloader_is_refused(node: NodeKit) -> None:
    eventually(lambda: node.processes("-m preloader.serve"))
    (parent,) = node.processes("-m preloader serve")
    command = [str(BIN / "preloader"), "serve", "--run-dir", str(node.run_dir)]
    assert str(parent) in _refused(*command, "--data-dir", str(node.data_dir), code=1)


def test_a_run_directory_that_is_too_long_is_refused(tmp_path: Path) -> None:
    long = tmp_path / ("r" * 100)
    assert str(long) in _refused(*_serve(tmp_path / "data", long), code=2)
    assert not long.exists() and not (tmp_path / "data").exists()
    preloader = [str(BIN / "preloader"), "serve", "--run-dir", str(long)]
    assert str(long) in _refused(*preloader, "--data-dir", str(tmp_path / "data"), code=1)
    ls = [str(BIN / "cachectl"), "ls", "--run-dir", str(long)]
    assert str(long) in _refused(*ls, code=2)


def test_a_data_directory_that_its_mode_keeps_closed_is_refused(tmp_path: Path, cold_node: NodeKit) -> None:
    data_dir = tmp_path / "data"
    ours = os.geteuid()
    data_dir.mkdir(mode=0o700 if ours == 0 else 0)
    cold_node.run_dir.chmod(0o777)
    as_nobody = [sys.executable, "-c", AS_NOBODY, *_serve(data_dir, cold_node.run_dir)[1:]]
    words = _refused(*as_nobody, code=7)
    assert str(data_dir) in words and f"uid {NOBODY if ours == 0 else ours}" in words


def test_an_http_port_that_is_taken_is_refused(node: NodeKit, cold_node: NodeKit, tmp_path: Path) -> None:
    address = f"127.0.0.1:{node.http_port}"
    serve = _serve(tmp_path / "second", cold_node.run_dir, "--http", address, "--with-preloader")
    assert address in _refused(*serve, code=1)
    assert not cold_node.processes(str(cold_node.run_dir))


@pytest.mark.parametrize("content", ["99\n", "not ours"])
def test_a_data_directory_of_another_version_is_refused(
    tmp_path: Path, cold_node: NodeKit, content: str
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "VERSION").write_text(content)
    words = _refused(*_serve(tmp_path / "data", cold_node.run_dir), code=1)
    assert repr(content.strip()) in words and "VERSION" in words
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["VERSION"]


def test_a_directory_with_something_else_in_it_is_refused(tmp_path: Path, cold_node: NodeKit) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.tex").write_text("do not lose")
    assert "thesis.tex" in _refused(*_serve(tmp_path / "data", cold_node.run_dir), code=1)
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("data_dri = '/x'\n", ["data_dri", "data_dir"]),
        ("[store]\ncapacity_bytes = 'much'\n", ["capacity_bytes", "much"]),
        ("[store\n", ["cached.toml"]),
    ],
)
def test_a_wrong_configuration_is_refused(
    tmp_path: Path, cold_node: NodeKit, text: str, names: list[str]
) -> None:
    config = tmp_path / "cached.toml"
    config.write_text(text)
    words = _refused(*_serve(tmp_path / "data", cold_node.run_dir, "--config", str(config)), code=2)
    assert all(name in words for name in [str(config), *names]), words
