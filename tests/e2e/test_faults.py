"""Origins that lie, break and attack, all before one daemon: each ends in the right error.

After each family of them the daemon is at full health: ready, another model of the same origin comes and
is what it should be, no descriptor and no memory is lost, and around its directories nothing has changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import stat
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from kit import BIN, NodeKit, check_data_dir, eventually
from wildkit import Asked, Odd, Talk, Wild

from cached import CachedError
from tests.hubkit import Hub

MIB = 1 << 20
TIMEOUT_S = 0.5
RESOLVE_S = 5.0
WAIT_S = 60
AT_ONCE = 6
MOST_DAEMON_GROWTH_BYTES = 40 * MIB
MOST_WORKER_BYTES = 300 * MIB
CONFIG = f"""
[store]
capacity_bytes = "200MiB"
[transfer]
attempts = 2
connections = 2
timeout_s = {TIMEOUT_S}
resolve_timeout_s = {RESOLVE_S}
"""
WIDE = bytes(16 * MIB) + b"the second chunk"
"""A file that comes in ranges."""
MODEL = b'{"model_type": "test"}'
FRESH_BYTES = 22


@dataclass(frozen=True)
class Case:
    """What asking for ``ref`` ends with; ``words`` stand in the message."""

    ref: str
    code: int
    reason: str
    words: tuple[str, ...]


class Faults:
    """One node and its origins."""

    def __init__(self, root: Path, wild: Wild, env: dict[str, str]) -> None:
        self.root = root
        self.wild = wild
        (root / "around").mkdir()
        self.node = NodeKit(root / "around")
        self._env = env
        self._folders = 0
        self._seen_lines = 0
        self._most_worker_bytes = 0
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch)

    def start(self) -> None:
        (self.root / "cached.toml").write_text(CONFIG)
        node = self.node
        command = [str(BIN / "cached"), "serve", "--config", str(self.root / "cached.toml")]
        command += ["--data-dir", str(node.data_dir), "--run-dir", str(node.run_dir)]
        command += ["--http", f"127.0.0.1:{node.http_port}"]
        if os.geteuid() == 0:
            # Root that has to obey modes, as users have to.
            without = "-dac_override,-dac_read_search"
            command = ["setpriv", f"--bounding-set={without}", f"--inh-caps={without}", *command]
        with (node.root / "daemon.log").open("wb") as log:
            node.daemon = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self._env
            )
        eventually(node.is_ready)
        self._around = self._look_around()
        self._watcher.start()
        self.good()
        self._rss_bytes = self._daemon_bytes()
        self._fds = self._open_files()

    def stop(self) -> None:
        self._over.set()
        if self._watcher.is_alive():
            self._watcher.join()
        self.node.close()

    # --- asking -----------------------------------------------------------------------------

    def check(self, *cases: Case) -> None:
        """All of them, some at once; then the node must be well."""
        with ThreadPoolExecutor(AT_ONCE) as executor:
            answers = list(executor.map(lambda case: self.node.prefetch(case.ref, WAIT_S), cases))
        wrong = [
            words for case, answer in zip(cases, answers, strict=True) for words in _differs(case, answer)
        ]
        assert not wrong, "\n".join(wrong)
        self.check_health()

    def comes(self, ref: str, files: dict[str, bytes]) -> None:
        """It is fetched, and every file is as it should be."""
        assert (refused := self.node.prefetch(ref, WAIT_S)) is None, refused
        path = Path(self.node.model(ref).path)
        assert {name: (path / name).read_bytes() for name in files} == files

    def good(self) -> None:
        """A model that nobody had before comes from the same server, and is right."""
        files = {"config.json": os.urandom(16), "model.dat": os.urandom(MIB)}
        self.comes(self.folder(files), files)

    def check_health(self) -> None:
        assert self.node.is_ready()
        self.good()
        check_data_dir(self.node.data_dir)
        assert self._look_around() == self._around
        assert not list((self.node.data_dir / "quarantine").iterdir())
        faults_of_ours = [
            line
            for line in self._new_log()
            if "Traceback" in line or "WORKER_DIED" in line or '"error"' in line
        ]
        assert not faults_of_ours, "\n".join(faults_of_ours)
        eventually(lambda: self._open_files() <= self._fds + 4, within_s=5)
        assert self._daemon_bytes() - self._rss_bytes < MOST_DAEMON_GROWTH_BYTES
        assert self._most_worker_bytes < MOST_WORKER_BYTES

    def _new_log(self) -> list[str]:
        lines = self.node.log().splitlines()
        start, self._seen_lines = self._seen_lines, len(lines)
        return lines[start:]

    # --- what is published ------------------------------------------------------------------

    def folder(
        self, files: dict[str, bytes], odd: dict[str, Odd] | None = None, sums: bytes | None = None
    ) -> str:
        """A new folder of the server; ``sums`` in the place of what is right. Returns its ref."""
        self._folders += 1
        name = f"m{self._folders}"
        lines = "".join(f"{hashlib.sha256(data).hexdigest()}  {path}\n" for path, data in files.items())
        self.wild.files[f"{name}/SHA256SUMS"] = lines.encode() if sums is None else sums
        self.wild.files.update({f"{name}/{path}": data for path, data in files.items()})
        self.wild.odd.update({f"{name}/{path}": how for path, how in (odd or {}).items()})
        return f"{self.wild.url}{name}/"

    # --- what must stay as it is ------------------------------------------------------------

    def _look_around(self) -> dict[str, tuple[int, int, int]]:
        """Everything beside the data and the run directory, and what is directly in them."""
        inside = ("blobs", "artifacts", "trees", "refs", "ingest", "claims", "quarantine", "leases")
        found = {}
        for top in (self.root / "around", self.node.run_dir):
            for folder, folders, names in os.walk(top):
                folders[:] = [name for name in folders if name not in inside]
                for name in [".", *names]:
                    state = Path(folder, name).lstat()
                    if name not in ("daemon.log",):
                        found[f"{folder}/{name}"] = (state.st_mode, state.st_size, state.st_mtime_ns)
        return found

    def _open_files(self) -> int:
        """But for a worker's three pipes and the handle on it."""
        assert self.node.daemon is not None
        count = len(os.listdir(f"/proc/{self.node.daemon.pid}/fd"))
        return count - 4 * len(self.node.processes("cached.fetch.worker"))

    def _daemon_bytes(self) -> int:
        assert self.node.daemon is not None
        return _memory(self.node.daemon.pid, "VmRSS")

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            for pid in self.node.processes("cached.fetch.worker"):
                with contextlib.suppress(OSError, StopIteration):
                    self._most_worker_bytes = max(self._most_worker_bytes, _memory(pid, "VmHWM"))


def _memory(pid: int, what: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(what))


def _differs(case: Case, answer: CachedError | None) -> list[str]:
    if answer is None:
        return [f"{case.ref} came, and should end with {case.reason}"]
    told = f"{case.ref}: {answer.exit_code} {answer.reason}: {answer.message} (hint: {answer.hint})"
    wrong = []
    if (answer.exit_code, answer.reason) != (case.code, case.reason):
        wrong.append(f"{told}\n    should end with {case.code} {case.reason}")
    wrong += [f"{told}\n    does not say {word!r}" for word in case.words if word not in answer.message]
    if not answer.hint or not (answer.message + answer.hint).isprintable():
        wrong.append(f"{told!r}\n    has no hint, or is not fit to be printed")
    return wrong


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faults]:
    root = tmp_path_factory.mktemp("faults")
    with Wild() as wild, Hub() as hub:
        _fill_hub(hub)
        env = {**os.environ, "HF_ENDPOINT": hub.url}
        found = Faults(root, wild, env)
        try:
            found.start()
            yield found
        finally:
            found.stop()


# --- bytes ----------------------------------------------------------------------------------


def fresh() -> bytes:
    """What the node cannot have."""
    return os.urandom(FRESH_BYTES // 2).hex().encode()


def on_get(how: Callable[[Talk], object]) -> Odd:
    """Only a GET is odd."""

    def odd(talk: Talk, asked: Asked) -> bool:
        return asked.method == "GET" and how(talk) is not False

    return odd


def midway(status: str, **headers: object) -> Odd:
    """Of a file that was listed rightly."""
    return on_get(lambda talk: talk.head(status, Content_Length=0, **headers))


def half(talk: Talk) -> None:
    talk.head("200 OK", Content_Length=len(talk.data), ETag='"one"')
    talk.send(talk.data[: len(talk.data) // 2])


def chunked(talk: Talk, data: bytes) -> None:
    talk.head("200 OK", Transfer_Encoding="chunked", ETag='"one"')
    talk.send(b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data))


def endless_chunks(talk: Talk, piece: bytes) -> None:
    talk.head("200 OK", Transfer_Encoding="chunked", ETag='"one"')
    talk.endlessly(b"%x\r\n%s\r\n" % (len(piece), piece))


def test_answers_that_break_off_or_lie(faults: Faults) -> None:
    def reset(talk: Talk) -> None:
        half(talk)
        talk.reset()

    def stall(talk: Talk) -> None:
        half(talk)
        talk.wait()

    def length(size_bytes: int) -> Odd:
        return on_get(lambda talk: talk.head("200 OK", Content_Length=size_bytes, ETag='"one"'))

    def flipped(talk: Talk) -> None:
        talk.head("200 OK", Content_Length=len(talk.data), ETag='"one"')
        talk.send(bytes(byte ^ 1 for byte in talk.data))

    def case(odd: Odd, code: int, reason: str, *words: str) -> Case:
        ref = faults.folder({"config.json": fresh()}, {"config.json": odd})
        return Case(ref, code, reason, ("config.json", *words))

    size = FRESH_BYTES
    faults.check(
        case(on_get(reset), 1, "ORIGIN_UNREACHABLE", "reset", "tried 2 times"),
        case(on_get(half), 1, "ORIGIN_BROKE_OFF", "tried 2 times"),
        case(on_get(stall), 1, "ORIGIN_UNREACHABLE", "timed out", "tried 2 times"),
        case(length(size - 1), 4, "SIZE_MISMATCH", str(size), str(size - 1)),
        case(length(2**63), 4, "SIZE_MISMATCH", str(size), str(2**63)),
        case(on_get(lambda t: chunked(t, t.data + b"more")), 4, "SIZE_MISMATCH", str(size), "more"),
        case(on_get(lambda t: endless_chunks(t, b"x" * 999)), 4, "SIZE_MISMATCH", str(size), "more"),
        case(on_get(lambda t: chunked(t, t.data[:5])), 1, "ORIGIN_BROKE_OFF", "tried 2 times"),
        case(on_get(flipped), 4, "DIGEST_MISMATCH", "sha256", "the origin says"),
        case(
            on_get(lambda t: t.head("200 OK", Content_Length=size, ETag='"two"')),
            1,
            "ORIGIN_CHANGED",
            '"one"',
            '"two"',
        ),
        case(
            on_get(lambda t: t.head("200 OK", Content_Length=size, Content_Encoding="gzip")),
            1,
            "ORIGIN_ENCODES",
            "gzip",
        ),
    )
    files = {"config.json": fresh()}
    faults.comes(faults.folder(files, {"config.json": on_get(lambda t: chunked(t, t.data))}), files)


def test_ranges_that_are_none(faults: Faults) -> None:
    def ranged(said: str, size_bytes: int = 16) -> Odd:
        """Of the second chunk; the first comes rightly."""

        def odd(talk: Talk, asked: Asked) -> bool:
            wanted = asked.range(len(WIDE))
            if wanted is None or wanted[0] == 0:
                return False
            talk.head("206 Partial Content", Content_Length=size_bytes, ETag='"one"', **_content_range(said))
            talk.send(bytes(size_bytes))
            return True

        return odd

    def case(said: str, reason: str, *words: str, size_bytes: int = 16) -> Case:
        ref = faults.folder({"wide.dat": WIDE}, {"wide.dat": ranged(said, size_bytes)})
        return Case(ref, 4, reason, ("wide.dat", *words))

    end, size = len(WIDE) - 1, len(WIDE)
    faults.check(
        case(f"bytes {end - 14}-{end}/{size}", "BAD_RANGE", str(end - 14), size_bytes=15),
        case(f"bytes {end - 15}-{end}/{2**63}", "SIZE_MISMATCH", str(size), str(2**63)),
        case(f"bytes {end - 15}-{end}/{'9' * 5000}", "BAD_RANGE", "999999"),
        case("", "BAD_RANGE", "206"),
    )


def _content_range(said: str) -> dict[str, str]:
    return {"Content_Range": said} if said else {"Content_Type": "multipart/byteranges; boundary=x"}


def test_statuses_and_redirects(faults: Faults) -> None:
    def case(odd: Odd, code: int, reason: str, *words: str) -> Case:
        ref = faults.folder({"config.json": fresh()}, {"config.json": odd})
        return Case(ref, code, reason, words)

    def to(location: str, reason: str, *words: str, code: int = 7) -> Case:
        return case(midway("302 Found", Location=location), code, reason, *words)

    began = time.monotonic()
    faults.check(
        case(
            midway("429 Slow Down", Retry_After=1), 1, "ORIGIN_UNAVAILABLE", "429", "config.json", "2 times"
        ),
        case(midway("503 Not Now"), 1, "ORIGIN_UNAVAILABLE", "503", "config.json", "tried 2 times"),
        case(midway("404 Not Found"), 3, "MISSING_FILE", "config.json"),
        case(midway("401 Who"), 7, "ORIGIN_DENIED", "config.json", "401"),
        case(midway("418 \x1b[2J\x9b31m\x07"), 1, "ORIGIN_REFUSED", "config.json", "418"),
        to("config.json", "TOO_MANY_REDIRECTS", "config.json", "5 times", code=1),
        to("file:///etc/passwd", "UNSAFE_REDIRECT", "config.json", "file"),
        to("http://169.254.169.254/latest/meta-data/", "UNSAFE_REDIRECT", "169.254.169.254", "metadata"),
        to("http://[fe80::1]/", "UNSAFE_REDIRECT", "fe80::1", "link-local"),
        to("http://[::ffff:169.254.10.1]/", "UNSAFE_REDIRECT", "link-local"),
        to("http://[x/", "BAD_REDIRECT", "config.json", code=1),
    )
    assert time.monotonic() - began > 1  # Retry-After was heeded


def test_servers_that_do_not_speak_http(faults: Faults) -> None:
    """What never ends is ended: no timeout between two reads does that, and few workers resolve."""
    line = b"%064d  x\n" % 0

    def case(odd: Odd, code: int, reason: str, *words: str) -> Case:
        ref = faults.folder({"x": b"x"}, {"SHA256SUMS": odd})
        return Case(ref, code, reason, ("SHA256SUMS", *words))

    def slow(odd: Odd) -> Case:
        ref = faults.folder({"x": b"x"}, {"SHA256SUMS": odd})
        return Case(ref, 1, "ORIGIN_TOO_SLOW", (ref, f"{RESOLVE_S:g} s"))

    faults.check(
        case(lambda t, _: t.send(b"SSH-2.0-OpenSSH_9.2\r\n"), 1, "ORIGIN_UNREACHABLE", "tried 2 times"),
        case(lambda t, _: t.endlessly(b"x" * 1000), 1, "ORIGIN_UNREACHABLE"),
        case(
            lambda t, _: (t.send(b"HTTP/1.1 200 OK\r\n"), t.endlessly(b"A: b\r\n"))[1],
            1,
            "ORIGIN_UNREACHABLE",
        ),
        case(lambda t, _: endless_chunks(t, line * 100), 1, "BAD_SHA256SUMS", "8388608"),
        slow(lambda t, _: (t.send(b"HTTP/1.1 200 OK\r\n"), t.endlessly(b"A", 0.1))[1]),
        slow(lambda t, _: t.endlessly(b"HTTP/1.1 100 Continue\r\n\r\n", 0.001)),
    )


def test_sizes_that_cannot_be(faults: Faults) -> None:
    def head(**headers: object) -> Odd:
        def odd(talk: Talk, asked: Asked) -> None:
            # Said beforehand, or it would be a race: whether the next request still finds the connection.
            talk.head("200 OK", Connection="close", **headers)

        return odd

    def case(odd: Odd, code: int, reason: str, *words: str) -> Case:
        return Case(faults.folder({"config.json": fresh()}, {"config.json": odd}), code, reason, words)

    # Also of a content that is here, and known to be smaller: that must not make room that there is not.
    known = fresh()
    faults.comes(faults.folder({"config.json": known}), {"config.json": known})
    huge = faults.folder({"config.json": known}, {"config.json": head(Content_Length=2**59)})
    faults.check(
        Case(huge, 5, "DISK_CAPACITY", ("576460752.30 GB", "209.72 MB")),
        case(head(Content_Length=2**59), 5, "DISK_CAPACITY", "576460752.30 GB", "209.72 MB"),
        case(head(Content_Length=2**63), 1, "BAD_SIZE", "config.json", str(2**63)),
        case(head(Content_Length="9" * 5000), 1, "NO_SIZE", "config.json"),
        case(head(Transfer_Encoding="chunked"), 1, "NO_SIZE", "config.json"),
        case(head(Content_Length=-1), 1, "NO_SIZE", "config.json"),
    )


# --- listings -------------------------------------------------------------------------------


def test_listings_that_leave_their_folder_or_have_no_end(faults: Faults) -> None:
    digest = hashlib.sha256(MODEL).hexdigest().encode()

    def case(sums: bytes, code: int, reason: str, *words: str) -> Case:
        return Case(faults.folder({"a": MODEL}, sums=sums), code, reason, words)

    def named(name: bytes, code: int = 2, reason: str = "UNSAFE_PATH", *words: str) -> Case:
        escaped = b"\\" if b"\\" in name else b""
        return case(b"%s%s  %s\n" % (escaped, digest, name), code, reason, *words)

    sums = "SHA256SUMS"
    faults.check(
        named(b"../../etc/passwd", 2, "UNSAFE_PATH", "../../etc/passwd"),
        named(b"a/../../../../tmp/x", 2, "UNSAFE_PATH", "a/../../../../tmp/x"),
        named(b"/etc/cron.d/x", 2, "UNSAFE_PATH", "/etc/cron.d/x"),
        named(b"a\0b", 2, "UNSAFE_PATH", r"a\x00b"),
        named(rb"a\nb", 2, "UNSAFE_PATH", r"a\nb"),
        named(b"a\x1b[2Jb", 2, "UNSAFE_PATH", r"a\x1b[2Jb"),
        named("a\u202eb".encode(), 2, "UNSAFE_PATH"),
        named(b"." * 300, 2, "UNSAFE_PATH"),
        named(b"a\xff", 1, "BAD_SHA256SUMS", sums, "UTF-8"),
        case(b"%s  a\n%s  a\n" % (digest, digest), 1, "BAD_SHA256SUMS", sums, "line 2", "'a'"),
        case(b"%s  a\n%s  a/b\n" % (digest, digest), 1, "BAD_SHA256SUMS", sums, "'a'", "a/b"),
        case(
            b"".join(b"%s  %d\n" % (digest, n) for n in range(100_000)),
            1,
            "BAD_SHA256SUMS",
            "100000",
            "10000",
        ),
        case(b"\x1f\x8b\x08\0", 1, "BAD_SHA256SUMS", sums),
        case(b"\n", 3, "NO_FILES", sums),
    )
    # Odd, and harmless: a backslash is a letter like others here.
    ref = faults.folder({r"a\b": MODEL}, sums=b"\\%s  a\\\\b\n" % digest)
    faults.wild.files[f"{ref.removeprefix(faults.wild.url)}a%5Cb"] = MODEL
    faults.comes(ref, {r"a\b": MODEL})


# --- headers --------------------------------------------------------------------------------


def test_safetensors_that_are_none(faults: Faults) -> None:
    def case(header: bytes, *words: str, claimed_bytes: int | None = None) -> Case:
        size_bytes = len(header) if claimed_bytes is None else claimed_bytes
        data = struct.pack("<Q", size_bytes) + header + bytes(16)
        ref = faults.folder({"model.safetensors": data})
        return Case(ref, 4, "BAD_SAFETENSORS", ("model.safetensors", *words))

    def tensor(**changes: object) -> bytes:
        entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **changes}
        return json.dumps({"weight": entry}).encode()

    faults.check(
        case(tensor(), str(10 * 10**9), "100000000", claimed_bytes=10 * 10**9),
        case(tensor(data_offsets=[0, 2**63]), "'weight'", str(2**63)),
        case(tensor(data_offsets=[2**62, 2**62 + 16]), "'weight'", "gap"),
        case(b'{"weight":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,16]}}', "JSON"),
        case(b'{"a":' + b"[" * 1_000_000, "JSON"),
        case(b'{"a":[' + b"[]," * 2_100_000 + b"0]}", "2000000 values"),
    )


# --- folders --------------------------------------------------------------------------------


def test_folders_with_more_than_files(faults: Faults) -> None:
    top = faults.root / "folders"
    count = iter(range(100))

    def folder(fill: Callable[[Path], object]) -> Path:
        path = top / f"f{next(count)}"
        path.mkdir(parents=True)
        (path / "config.json").write_bytes(MODEL)
        fill(path)
        return path

    def case(fill: Callable[[Path], object], code: int, reason: str, *words: str) -> Case:
        return Case(f"file://{folder(fill)}/", code, reason, words)

    def listen(path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as made, contextlib.chdir(path):
            made.bind("weights")

    def odd_name(path: Path) -> None:
        (path / "inner").mkdir()
        os.symlink(b"inner", os.fsencode(path) + b"/to-\xff\x1b[2J")

    def hidden(path: Path) -> None:
        os.mkdir(os.fsencode(path) + b"/d-\xff")
        os.chmod(os.fsencode(path) + b"/d-\xff", 0)

    def listed(path: Path) -> None:
        os.mkfifo(path / "weights")
        (path / "SHA256SUMS").write_text(f"{'0' * 64}  weights\n")

    cases = [
        case(lambda p: (p / "weights").symlink_to("/etc/passwd"), 7, "UNSAFE_LINK", "weights", "/etc/passwd"),
        case(lambda p: (p / "weights").symlink_to("../f0/config.json"), 7, "UNSAFE_LINK", "weights"),
        case(lambda p: (p / "loop").symlink_to("."), 7, "UNSAFE_LINK", "loop"),
        case(lambda p: (p / "self").symlink_to("self"), 7, "UNSAFE_LINK", "self"),
        case(lambda p: (p / "SHA256SUMS").symlink_to("/dev/zero"), 7, "UNSAFE_LINK", "SHA256SUMS"),
        case(lambda p: os.mkfifo(p / "weights"), 1, "NOT_A_FILE", "weights"),
        case(lambda p: os.mkfifo(p / "SHA256SUMS"), 1, "NOT_A_FILE", "SHA256SUMS"),
        case(listed, 1, "NOT_A_FILE", "weights"),
        case(listen, 1, "NOT_A_FILE", "weights"),
        case(lambda p: (p / "weights").symlink_to("gone"), 3, "MISSING_FILE", "weights"),
        case(lambda p: p.chmod(0), 7, "ORIGIN_DENIED"),
        case(lambda p: (p / "config.json").chmod(0), 7, "ORIGIN_DENIED", "config.json"),
        case(hidden, 7, "ORIGIN_DENIED", "d-"),
        case(odd_name, 7, "UNSAFE_LINK", "to-"),
        case(lambda p: os.mkfifo(os.fsencode(p) + b"/w-\xff"), 2, "UNSAFE_PATH", "w-"),
        Case("file:///dev/", 7, "UNSAFE_LINK", ("/dev/",)),
    ]
    if os.geteuid() == 0:
        cases.append(
            case(
                lambda p: os.mknod(p / "null", 0o600 | stat.S_IFCHR, os.makedev(1, 3)),
                1,
                "NOT_A_FILE",
                "null",
            )
        )
    faults.check(*cases)
    for path in top.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)


@pytest.mark.parametrize("how", ["grows", "shrinks"])
def test_a_file_that_changes_while_it_is_read(faults: Faults, how: str) -> None:
    folder = faults.root / how
    folder.mkdir()
    (folder / "weights").write_bytes(bytes(64 * MIB))
    over = threading.Event()

    def change() -> None:
        size_bytes = 64 * MIB
        while not over.wait(0.005):
            size_bytes += 1 if how == "grows" else -1
            os.truncate(folder / "weights", size_bytes)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        faults.check(Case(f"file://{folder}/", 1, "ORIGIN_CHANGED", ("weights",)))
    finally:
        over.set()
        thread.join()


# --- the hub --------------------------------------------------------------------


_HUB = {"climbs": "../../x", "twice": "a//b", "rooted": "/etc/x", "nul": "a\0b", "both": "config.json/b"}


def _fill_hub(hub: Hub) -> None:
    for repo, name in _HUB.items():
        hub.repo(f"org/{repo}").commit({"config.json": MODEL, name: b"x"})


def test_names_of_the_hub(faults: Faults) -> None:
    climbs, twice, rooted, nul = (
        Case(f"hf://org/{repo}@main", 2, "UNSAFE_PATH", (repr(_HUB[repo]),))
        for repo in ("climbs", "twice", "rooted", "nul")
    )
    both = Case("hf://org/both@main", 1, "BAD_SHA256SUMS", ("config.json",))
    faults.check(climbs, twice, rooted, nul, both)
