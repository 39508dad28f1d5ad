"""How cachectl looks and ends: words, tables and progress as drawn, and its real processes and terminals."""

from __future__ import annotations

import io
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_daemon import Daemon
from rich.console import Console, RenderableType

from cached.cli import progress, tables, words
from cached.v1 import model_cache_pb2 as pb
from cached.v1 import operator_pb2 as op

CACHECTL = [sys.executable, "-c", "from cached.cli import main; main()"]
REF = "https://models.example.com/sentence-transformers/all-MiniLM-L6-v2/"
FETCHING = pb.Progress(
    phase=pb.PHASE_FETCHING,
    bytes_done=1_200_000_000,
    bytes_total=2_900_000_000,
    rate_bytes_per_s=118e6,
    eta_s=14,
)


# --- words ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size_bytes", "said"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (90_900_000, "90.9 MB"),
        (2**64 - 1, "18.4 EB"),
    ],
)
def test_sizes(size_bytes: int, said: str) -> None:
    assert words.size(size_bytes) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (-3, "0s"),
        (0.4, "0s"),
        (59.6, "1m"),
        (200, "3m 20s"),
        (3600, "1h"),
        (9000, "2h 30m"),
        (273_600, "3d 4h"),
    ],
)
def test_spans(seconds: float, said: str) -> None:
    assert words.span(seconds) == said


def test_ages() -> None:
    assert [words.ago(at, 10_000) for at in (0, 9_988, 9_000, 10_050)] == [
        "never",
        "12s ago",
        "16m ago",
        "0s ago",
    ]


def test_progress_says_no_more_than_is_known() -> None:
    resolving = pb.Progress(phase=pb.PHASE_RESOLVING, eta_s=-1)
    assert words.progress_line(resolving) == "resolving"
    stalled = pb.Progress(
        phase=pb.PHASE_FETCHING, bytes_done=5, bytes_total=1000, eta_s=-1, message="reset by peer"
    )
    assert words.progress_line(stalled) == "fetching 0%, 5 B of 1.0 kB (reset by peer)"
    nearly = pb.Progress(phase=pb.PHASE_LOADING, bytes_done=999, bytes_total=1000)
    assert words.percent(nearly) == "99%"


def test_every_phase_of_the_wire_has_its_word() -> None:
    names = [name.removeprefix("PHASE_").lower() for name in pb.Phase.DESCRIPTOR.values_by_name]
    assert [words.phase(pb.Progress(phase=value)) for value in pb.Phase.values()] == ["starting", *names[1:]]
    assert words.phase(pb.Progress(phase=99)) == "working"  # type: ignore[arg-type]


def test_a_device_that_is_being_loaded_is_shown_as_such() -> None:
    loading = pb.Model(devices=["disk"], residencies=[pb.Residency(device="host", state="loading")])
    assert words.places(loading) == "disk, host (loading)"


# --- drawn ----------------------------------------------------------------------------------


def drawn(what: RenderableType, columns: int = 80) -> list[str]:
    out = io.StringIO()
    console = Console(file=out, width=columns, markup=False, emoji=False, highlight=False)
    console.print(what)
    return [line.rstrip() for line in out.getvalue().splitlines()]


def test_ls_fits_80_columns_and_breaks_refs_behind_slashes() -> None:
    warm = pb.Model(
        ref=REF,
        state="verified",
        attested=False,
        bytes=90_900_000,
        devices=["disk", "host"],
        claims=[pb.Claim(kind="pin"), pb.Claim(kind="lease"), pb.Claim(kind="lease")],
        residencies=[pb.Residency(device="host", state="resident", locked=False)],
    )
    lines = drawn(tables.models([warm], folded=True))
    assert max(map(len, lines)) <= 80
    assert [line[:32].rstrip() for line in lines[1:]] == [
        "https://models.example.com/",
        "sentence-transformers/",
        "all-MiniLM-L6-v2/",
    ]
    assert "verified" in lines[1] and "(unattested)" in lines[2]


def test_nothing_of_a_ref_is_lost_in_a_narrow_cell() -> None:
    text = "file:///" + "x" * 50 + "/y/"
    assert "".join(drawn(tables.Slashed(text), columns=12)) == text


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_live_line_fits_and_says_why_it_waits(columns: int) -> None:
    console = Console(file=io.StringIO(), width=columns, force_terminal=True)
    bar = progress.Bar(console)
    waiting = pb.Progress()
    waiting.CopyFrom(FETCHING)
    waiting.message = "connection reset by peer; attempt 3 of 5 in 2 s"
    bar.show(waiting)
    line, why = drawn(bar.get_renderable(), columns)
    assert line.startswith("fetching ") and "━" in line
    assert line.endswith("1.2 GB of 2.9 GB  118.0 MB/s  14s left")
    assert why == "connection reset by peer; attempt 3 of 5 in 2 s"
    bar.show(pb.Progress(phase=pb.PHASE_QUEUED))
    (line,) = drawn(bar.get_renderable(), columns)
    assert line.startswith("queued ") and "GB" not in line


def test_plain_lines_come_once_a_second_and_only_when_something_changed() -> None:
    out = io.StringIO()
    clock = iter([0.0, 0.5, 1.1, 2.5, 2.6])
    lines = progress.Lines(Console(file=out, width=200), clock_s=lambda: next(clock))
    for done in (100, 200, 300, 300, 400):
        lines.show(pb.Progress(phase=pb.PHASE_FETCHING, bytes_done=done, bytes_total=1000))
    assert out.getvalue().splitlines() == [
        "fetching 10%, 100 B of 1.0 kB",
        "fetching 30%, 300 B of 1.0 kB",
        "fetching 40%, 400 B of 1.0 kB",
    ]


# --- processes ------------------------------------------------------------------------------


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with Daemon(tmp_path / "run") as daemon:
        yield daemon


def environment(daemon: Daemon, **more: str) -> dict[str, str]:
    foreign = (
        "NO_COLOR",
        "FORCE_COLOR",
        "GRPC_VERBOSITY",
        "CACHED_ADDRESS",
        "CACHED_DATA_DIR",
        "PYTHONUNBUFFERED",
    )
    known = {k: v for k, v in os.environ.items() if k not in foreign}
    return known | {"CACHED_RUN_DIR": str(daemon.run_dir), "TERM": "xterm", "COLUMNS": "80"} | more


def endless(daemon: Daemon) -> list[object]:
    return [op.ClaimEvent(progress=FETCHING), lambda: daemon.gone.wait(60)]


def test_help_imports_no_grpc_and_every_command_shows_an_example() -> None:
    code = """
import sys
from cached import cli
for command in "prefetch pin unpin path ls show status verify evict".split():
    assert cli.run([command, "--help"]) == 0
assert cli.run(["--help"]) == 0
assert cli.run(["--version"]) == 0
assert not [m for m in ("grpc", "google.protobuf", "torch") if m in sys.modules]
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert len(re.findall(r"Example: .*cachectl", ran.stdout)) == 9
    assert re.search(r"^cachectl \S+$", ran.stdout, re.MULTILINE)


def test_no_command_at_all_is_a_usage_error_that_helps() -> None:
    ran = subprocess.run(CACHECTL, capture_output=True, text=True, timeout=30)
    assert ran.returncode == 2
    assert "prefetch" in ran.stdout and "Exit codes" in ran.stdout


def test_the_environment_says_where_the_daemon_and_its_data_are(daemon: Daemon, tmp_path: Path) -> None:
    tree = tmp_path / "mounted" / "trees" / ("ab" * 32)
    tree.mkdir(parents=True)
    model = pb.Model(id="sha256:" + "ab" * 32, path="/not/here", state="verified")
    daemon.answers["Acquire"] = pb.AcquireEvent(grant=pb.Grant(model=model))
    env = environment(daemon, CACHED_DATA_DIR=str(tmp_path / "mounted"))
    ran = subprocess.run([*CACHECTL, "path", REF], capture_output=True, text=True, timeout=30, env=env)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"{tree}\n", "")


def test_ctrl_c_exits_130_and_says_nothing(daemon: Daemon) -> None:
    daemon.answers["Prefetch"] = endless(daemon)
    command = [*CACHECTL, "prefetch", REF, "--wait"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(daemon)
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("fetching 41%")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (130, "", "")


def test_a_daemon_that_ends_is_told_of_in_our_words_only(daemon: Daemon) -> None:
    daemon.answers["Pin"] = endless(daemon)
    with subprocess.Popen(
        [*CACHECTL, "pin", REF, "--wait"], stderr=subprocess.PIPE, text=True, env=environment(daemon)
    ) as process:
        assert process.stderr is not None
        process.stderr.readline()
        daemon.stop()
        _, err = process.communicate(timeout=10)
    assert process.returncode == 6
    assert [line.split(" ")[0] for line in err.splitlines()] == ["error:", "hint:"]


class Terminal:
    """A command on a terminal of 80 columns; its stdout is a pipe unless it is asked onto the terminal."""

    def __init__(self, arguments: list[str], env: dict[str, str], stdout_too: bool = False) -> None:
        self._shown = b""
        self._changed = threading.Condition()
        self._end, other = pty.openpty()
        self.process = subprocess.Popen(
            [*CACHECTL, *arguments],
            stdin=other,
            stdout=other if stdout_too else subprocess.PIPE,
            stderr=other,
            env=env,
            start_new_session=True,
        )
        os.close(other)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                part = os.read(self._end, 65536)
            except OSError:  # the last process has left the terminal
                part = b""
            with self._changed:
                self._shown += part
                self._changed.notify_all()
            if not part:
                return

    def wait_for(self, text: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: text.encode() in self._shown, timeout=15), self._shown

    def end(self) -> str:
        """All that the terminal has shown, once the command is over."""
        self.process.wait(timeout=15)
        self._reader.join(timeout=15)
        os.close(self._end)
        return self._shown.decode()


def test_on_a_terminal_a_live_line_shows_and_leaves_nothing_on_stdout(daemon: Daemon) -> None:
    shown = threading.Event()
    daemon.answers["Prefetch"] = [
        op.ClaimEvent(progress=FETCHING),
        lambda: shown.wait(15),
        op.ClaimEvent(done=pb.Model(ref=REF, state="verified", attested=True, bytes=5)),
    ]
    terminal = Terminal(["prefetch", REF, "--wait"], environment(daemon))
    terminal.wait_for("1.2 GB of 2.9 GB  118.0 MB/s  14s left")
    shown.set()
    assert terminal.process.stdout is not None
    assert terminal.process.stdout.read().decode() == f"{REF} is on disk and proven: 5 B\n"
    terminal.process.stdout.close()
    assert "━" in terminal.end()
    assert terminal.process.returncode == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_live_line_that_is_interrupted_gives_the_cursor_back(
    daemon: Daemon, number: signal.Signals, code: int
) -> None:
    daemon.answers["Pin"] = endless(daemon)
    terminal = Terminal(["pin", REF, "--wait"], environment(daemon), stdout_too=True)
    terminal.wait_for("118.0 MB/s")
    terminal.process.send_signal(number)
    shown = terminal.end()
    assert terminal.process.returncode == code
    hidden, given_back = shown.rfind("\x1b[?25l"), shown.rfind("\x1b[?25h")
    assert 0 <= hidden < given_back
    assert "Traceback" not in shown and "Aborted" not in shown


def test_outcomes_are_not_drawn_over_by_the_live_line(daemon: Daemon) -> None:
    outcome = op.VerifyEvent(verified=op.Verified(ref=REF, ok=True, bytes=5))
    daemon.answers["Verify"] = [op.VerifyEvent(progress=FETCHING), outcome, op.VerifyEvent(progress=FETCHING)]
    terminal = Terminal(["verify", "--all"], environment(daemon), stdout_too=True)
    shown = terminal.end()
    before = shown[: shown.index("ok  ")]
    # The live line is taken down (its line erased) before the outcome is printed.
    assert before.rindex("\x1b[2K") > before.rindex("━")
    assert terminal.process.returncode == 0


@pytest.mark.parametrize(("more", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_colours_are_left_out_where_none_are_wanted(
    daemon: Daemon, more: dict[str, str], coloured: bool
) -> None:
    daemon.answers["List"] = pb.ListResponse(models=[pb.Model(ref=REF, state="verified", attested=True)])
    terminal = Terminal(["ls"], environment(daemon, **more), stdout_too=True)
    assert bool(re.search(r"\x1b\[[0-9;]*3[0-7]m", terminal.end())) is coloured


def test_colours_that_are_forced_into_a_pipe_bring_no_live_line_and_no_folding(daemon: Daemon) -> None:
    model = pb.Model(ref=REF, state="verified", attested=True, bytes=5)
    daemon.answers |= {
        "List": pb.ListResponse(models=[model]),
        "Pin": [op.ClaimEvent(progress=FETCHING), op.ClaimEvent(done=model)],
    }
    env = environment(daemon, FORCE_COLOR="1")
    listed = subprocess.run([*CACHECTL, "ls"], capture_output=True, text=True, timeout=30, env=env)
    assert REF in listed.stdout and "\x1b[32m" in listed.stdout
    pinned = subprocess.run([*CACHECTL, "pin", REF], capture_output=True, text=True, timeout=30, env=env)
    assert pinned.stderr == "fetching 41%, 1.2 GB of 2.9 GB, 118.0 MB/s, 14s left\n"


def test_a_reader_that_has_seen_enough_is_no_error(daemon: Daemon) -> None:
    # More than a pipe and the reader's buffer take, so that the writer does find it closed.
    models = [pb.Model(ref=f"https://h/{n}/{'x' * 1000}/", state="verified") for n in range(500)]
    daemon.answers["List"] = pb.ListResponse(models=models)
    for output in ("json", "table"):
        with subprocess.Popen(
            [*CACHECTL, "ls", "-o", output],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(daemon),
        ) as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.read(1)
            process.stdout.close()
            assert process.stderr.read() == b""
            assert process.wait(timeout=10) == 1


def test_help_is_quick() -> None:
    def took_s() -> float:
        before = os.times()
        subprocess.run([*CACHECTL, "--help"], check=True, stdout=subprocess.DEVNULL, timeout=30)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    # Of the processor, not of the clock, as the machine may be busy; 0.2 s is usual, gRPC would add as much.
    assert min(took_s() for _ in range(2)) < 0.7
