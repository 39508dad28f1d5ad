"""Processes and directories that are gone when the demo is, however it ends.

Owns the watch over everything the demo starts, and its removal. Knows nothing of what is shown.

The demo is two processes. The *supervisor* has all signals blocked and takes them one by one, so
that none can come between making a thing and remembering it. It is a subreaper: whatever the demo
starts, and whatever those start, becomes its child at the latest when its own parent dies, so
"no child is left" means that no process is left. The *show* is its child and does everything else.
Should the supervisor itself be killed with SIGKILL, the kernel kills the show and then signals what the show
started; directories then stay until the next demo, which removes them.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn

WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
WORK_PREFIX = "work-"
RUN_PREFIX = "cached-demo-"
POLITE_S = 10.0
"""What a process gets between SIGTERM and SIGKILL: the daemon parks within this."""
KILL_S = 10.0
TAIL_LINES = 15

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
_LIBC = ctypes.CDLL(None, use_errno=True)


class DemoError(Exception):
    """Why the demo cannot go on, in words for whoever started it."""


@dataclass(frozen=True, slots=True)
class Places:
    """``work`` is for bulk data, beside the models; ``run`` has a path short enough for sockets."""

    work: Path
    run: Path


# --- the supervisor -------------------------------------------------------------------------


def supervise(cache: Path, show: Callable[[Places], int], polite_s: float = POLITE_S) -> int:
    """Run ``show`` in a process of its own; end and remove all that came of it. Returns the exit status.

    128 + the signal's number after a signal. Raises DemoError when another demo uses ``cache``. To be
    called by a process with one thread and no children.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, [*WATCHED, signal.SIGCHLD])
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    lock = _lock(cache)
    try:
        remove_leftovers(cache)
        places = _make_places(cache)
        try:
            return _watch(_fork(show, places), polite_s)
        finally:
            remove_places(places)
    finally:
        os.close(lock)


def _watch(show_pid: int, polite_s: float) -> int:
    """Wait for the show or a signal, then end every process. Returns the exit status."""
    status: int | None = None
    caught: int | None = None
    while status is None and caught is None:
        received = signal.sigwait([*WATCHED, signal.SIGCHLD])
        if received == signal.SIGCHLD:
            status = _reap().get(show_pid)
        else:
            caught = received
    if status is None:
        os.kill(show_pid, signal.SIGKILL)  # it has nothing to tidy up, and must start nothing more
    killed = _end_all(polite_s, asked_before=caught is not None)
    if caught is not None:
        return 128 + caught
    if killed:
        raise DemoError(f"{', '.join(killed)} did not end within {polite_s:g} s of SIGTERM")
    assert status is not None
    if status < 0:
        raise DemoError(f"the demo itself ended with {_exit_words(status)}")
    return status


def _end_all(polite_s: float, asked_before: bool) -> list[str]:
    """End every process below this one, politely at first. Returns who had to be killed.

    Only own children are signalled; what those leave behind becomes a child and gets its turn. Whoever
    asks a second time (``asked_before``: this is the first) gets everything killed at once.
    """
    asked: set[int] = set()
    killed: list[str] = []
    polite_until = time.monotonic() + polite_s
    give_up_at = polite_until + KILL_S
    while children := _children():
        impatient = time.monotonic() > polite_until
        for pid in children:
            if impatient:
                killed.append(_name(pid))
            if impatient or pid not in asked:
                os.kill(pid, signal.SIGKILL if impatient else signal.SIGTERM)
                asked.add(pid)
        if time.monotonic() > give_up_at:
            raise DemoError(f"processes {', '.join(map(str, children))} cannot be killed; see them with ps")
        received = signal.sigtimedwait([*WATCHED, signal.SIGCHLD], 0.2)
        if received is not None and received.si_signo != signal.SIGCHLD:
            polite_until = 0.0 if asked_before else polite_until
            asked_before = True
        _reap()
    return sorted(set(killed))


def _reap() -> dict[int, int]:
    """pid -> exit status (negative: a signal) of every child that has ended."""
    ended: dict[int, int] = {}
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            ended[pid] = os.waitstatus_to_exitcode(status)
    return ended


def _children() -> list[int]:
    """The pids of this process's own children, zombies included."""
    own = str(os.getpid())
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):  # it ended while being looked at
                if (entry / "stat").read_text().rpartition(")")[2].split()[1] == own:
                    found.append(int(entry.name))
    return found


def _name(pid: int) -> str:
    try:
        words = (Path("/proc") / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return f"process {pid}"
    return f"process {pid} ({' '.join([Path(words[0]).name, *words[1:]])[:60].strip()})"


def _fork(show: Callable[[Places], int], places: Places) -> int:
    supervisor = os.getpid()
    sys.stdout.flush()  # or what waits there would be printed by both
    pid = os.fork()
    if pid == 0:
        _be_the_show(show, places, supervisor)
    return pid


def _be_the_show(show: Callable[[Places], int], places: Places, supervisor: int) -> NoReturn:
    code = 1
    try:
        _tether(signal.SIGKILL, supervisor)
        for number in WATCHED:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        code = show(places)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)  # never back into the supervisor's code


# --- its directories ------------------------------------------------------------------------


def _lock(cache: Path) -> int:
    cache.mkdir(parents=True, exist_ok=True)
    fd = os.open(cache / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise DemoError(f"another demo is using {cache}; wait for its end, or give --cache-dir") from error
    return fd


def _make_places(cache: Path) -> Places:
    work = Path(tempfile.mkdtemp(prefix=WORK_PREFIX, dir=cache))
    run = Path(tempfile.mkdtemp(prefix=RUN_PREFIX))
    (work / "run").symlink_to(run)  # so that a later demo finds both
    return Places(work, run)


def remove_leftovers(cache: Path) -> None:
    """Remove what a demo left that was killed with SIGKILL. The caller holds the lock."""
    for work in cache.glob(WORK_PREFIX + "*"):
        run = work / "run"
        target = run.readlink() if run.is_symlink() else work
        if target.name.startswith(RUN_PREFIX) and target.parent == Path(tempfile.gettempdir()):
            remove_tree(target)
        remove_tree(work)


def remove_places(places: Places) -> None:
    """``work`` last: as long as it is there, a later demo finds both."""
    remove_tree(places.run)
    remove_tree(places.work)


def remove_tree(root: Path) -> None:
    """Remove ``root``, read-only directories included; links are removed, never followed."""
    if not root.is_dir() or root.is_symlink():
        return
    for directory, _, _ in os.walk(root):
        Path(directory).chmod(0o700)
    shutil.rmtree(root)


# --- what the show starts -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Process:
    """A background process; all that it says is in ``log``."""

    name: str
    popen: subprocess.Popen[bytes]
    log: Path

    def check(self) -> None:
        """Raise DemoError if it has ended."""
        code = self.popen.poll()
        if code is not None:
            raise DemoError(f"{self.name} ended with {_exit_words(code)}:\n{tail(self.log)}")

    def wait_for(self, pattern: str, timeout_s: float) -> str:
        """The first match of ``pattern`` in its log; the pattern's first group."""
        until = time.monotonic() + timeout_s
        while (found := re.search(pattern, self.log.read_text(errors="replace"))) is None:
            self.check()
            if time.monotonic() > until:
                raise DemoError(f"{self.name} was not up within {timeout_s:.0f} s:\n{tail(self.log)}")
            time.sleep(0.02)
        return found[1]

    def stop(self) -> None:
        """End it with SIGTERM. Raises DemoError when it does not heed that."""
        self.popen.terminate()
        try:
            self.popen.wait(POLITE_S)
        except subprocess.TimeoutExpired as error:
            self.popen.kill()  # the supervisor waits for its end
            raise DemoError(f"{self.name} did not end within {POLITE_S:.0f} s of SIGTERM") from error


def start(name: str, argv: list[str], log: Path, env: Mapping[str, str], cwd: Path) -> Process:
    """Start a process in the background, out of reach of the terminal's Ctrl-C. Raises DemoError."""
    with log.open("wb") as file:
        popen = _popen(argv, env, cwd, background=True, stdout=file)
    return Process(name, popen, log)


def run(argv: list[str], env: Mapping[str, str], cwd: Path, timeout_s: float, capture: bool = False) -> str:
    """Run a command in the foreground, on the terminal or captured. Raises DemoError when it fails."""
    popen = _popen(argv, env, cwd, background=False, stdout=subprocess.PIPE if capture else None)
    words = " ".join([Path(argv[0]).name, *argv[1:]])
    try:
        output, _ = popen.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        popen.kill()
        raise DemoError(f"`{words}` did not end within {timeout_s:.0f} s") from error
    if popen.returncode != 0:
        raise DemoError(f"`{words}` ended with {_exit_words(popen.returncode)}")
    return (output or b"").decode()


def _popen(
    argv: list[str],
    env: Mapping[str, str],
    cwd: Path,
    background: bool,
    stdout: int | IO[bytes] | None,
) -> subprocess.Popen[bytes]:
    parent = os.getpid()
    try:
        return subprocess.Popen(
            argv,
            env=env,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.STDOUT if background else None,
            start_new_session=background,
            # Safe here: the show has one thread. What is set survives the exec.
            preexec_fn=lambda: _tether(signal.SIGTERM, parent),
        )
    except OSError as error:
        raise DemoError(f"cannot start {argv[0]}: {error.strerror}; `make venv` installs it") from error


def _tether(signum: int, parent: int) -> None:
    """Have this process signalled when ``parent`` dies, also if it is dead already."""
    _prctl(PR_SET_PDEATHSIG, signum)
    if os.getppid() != parent:
        os._exit(1)


def _prctl(option: int, value: int) -> None:
    if _LIBC.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed")


def _exit_words(code: int) -> str:
    return f"exit status {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


def tail(log: Path) -> str:
    """The last lines of a log, indented; or that there are none."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "\n".join(f"    {line[:300]}" for line in lines[-TAIL_LINES:]) or "    (it logged nothing)"
