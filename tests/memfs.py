"""A file system in memory that forgets what was not synced, for replaying crashes.

A real ``Fs`` that passes the same suite as the kernel's (test_durable.py), as seen by a user who is
not root. Beside what its callers see it keeps what a disk would: a file's content as of its last
``sync_file``, a directory's names as of its last ``sync_dir``, and the changes since, each of which
a crash keeps or loses as a ``Fate`` decides. Stricter than any journaling file system: changes may
survive in any combination, and a file that was never synced may come back empty or torn.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cached.durable import DIR_MODE, FILE_MODE, world_error
from cached.model import ErrorKind, permanent

DISK_BYTES = 1_000_000


@dataclass(eq=False, slots=True)
class File:
    content: bytes = b""
    synced: bytes = b""
    mode: int = FILE_MODE
    modified_at: float = 0.0


@dataclass(eq=False, slots=True)
class Dir:
    names: dict[str, Node] = field(default_factory=dict)
    synced: dict[str, Node] = field(default_factory=dict)
    pending: list[Change] = field(default_factory=list)
    mode: int = DIR_MODE


Node = File | Dir


@dataclass(frozen=True, slots=True)
class Change:
    """One change of a directory since its last sync: names that go and names that come, atomically."""

    gone: tuple[str, ...]
    came: tuple[tuple[str, Node], ...]


class Fate:
    """What a power cut does. This one loses everything that was not synced."""

    def keeps(self, change: Change) -> bool:
        """Whether an unsynced change of a directory survived; asked in their order."""
        return False

    def content(self, file: File) -> bytes:
        """What is in a file that was changed since its last sync."""
        return file.synced


class Kill(Fate):
    """Only the process died: the kernel still has everything."""

    def keeps(self, change: Change) -> bool:
        return True

    def content(self, file: File) -> bytes:
        return file.content


class NamesOnly(Fate):
    """Names survived, contents did not: delayed allocation at its worst."""

    def keeps(self, change: Change) -> bool:
        return True


class Doubles(Fate):
    """New names survived and old ones came back: what was moved has two."""

    def keeps(self, change: Change) -> bool:
        return bool(change.came)


class Losses(Fate):
    """Old names went and new ones did not survive: what was moved has none."""

    def keeps(self, change: Change) -> bool:
        return not change.came


class Chance(Fate):
    """Any combination; contents may be torn."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def keeps(self, change: Change) -> bool:
        return self._random.random() < 0.5

    def content(self, file: File) -> bytes:
        torn = file.content[: self._random.randint(0, len(file.content))]
        return self._random.choice((file.synced, file.content, torn))


class MemFs:
    """``before_change`` is called before every mutation, syncs included. ``deaf`` ignores every sync,
    for showing that a test would notice."""

    def __init__(self, before_change: Callable[[], None] | None = None, deaf: bool = False) -> None:
        self.before_change = before_change
        self.deaf = deaf
        self._root = Dir()
        self._locks: dict[int, File] = {}
        self._clock = 1.0

    # --- crashes ----------------------------------------------------------------------------

    def after(self, fate: Fate) -> MemFs:
        """The file system as the next start finds it. This one stays as it is."""
        then = MemFs()
        then._clock = self._clock
        then._root = _survivor(self._root, fate, {})
        return then

    def copy(self) -> MemFs:
        """The same, synced and unsynced, without locks or a listener."""
        then = MemFs(deaf=self.deaf)
        then._clock = self._clock
        then._root = _clone(self._root, {})
        return then

    def spoil(self, path: Path, content: bytes) -> None:
        """What a sick disk does to a file: no mutation of ours."""
        file = self._file(path)
        file.content = file.synced = content

    def same_file(self, one: Path, other: Path) -> bool:
        """Whether these are two names of one file."""
        return self._file(one) is self._file(other)

    # --- looking up -------------------------------------------------------------------------

    def _find(self, path: Path) -> Node | None:
        node: Node = self._root
        for name in path.parts[1:]:
            if not isinstance(node, Dir) or name not in node.names:
                return None
            node = node.names[name]
        return node

    def _dir(self, path: Path) -> Dir:
        node = self._find(path)
        if node is None:
            raise _refused(errno.ENOENT, path)
        if not isinstance(node, Dir):
            raise _refused(errno.ENOTDIR, path)
        return node

    def _file(self, path: Path) -> File:
        node = self._find(path)
        if node is None:
            raise _refused(errno.ENOENT, path)
        if not isinstance(node, File):
            raise _refused(errno.EISDIR, path)
        return node

    def _writable_parent(self, path: Path) -> Dir:
        parent = self._dir(path.parent)
        if not parent.mode & 0o200:
            raise _refused(errno.EACCES, path)
        return parent

    def _begin(self) -> None:
        if self.before_change is not None:
            self.before_change()
        self._clock += 1.0

    @staticmethod
    def _change(directory: Dir, gone: tuple[str, ...] = (), came: tuple[tuple[str, Node], ...] = ()) -> None:
        change = Change(gone, came)
        _apply(change, directory.names)
        directory.pending.append(change)

    # --- changing ---------------------------------------------------------------------------

    def make_dir(self, path: Path, mode: int = DIR_MODE) -> None:
        if self._find(path) is not None:
            self._dir(path)
            return
        self.make_dir(path.parent)
        self._begin()
        self._change(self._writable_parent(path), came=((path.name, Dir(mode=mode)),))

    def write_file(self, path: Path, data: bytes, mode: int = FILE_MODE) -> None:
        node = self._find(path)
        if node is not None and not self._file(path).mode & 0o200:
            raise _refused(errno.EACCES, path)
        self._begin()
        file = node if isinstance(node, File) else File()
        if node is None:
            self._change(self._writable_parent(path), came=((path.name, file),))
        file.content, file.mode, file.modified_at = data, mode, self._clock

    def rename(self, source: Path, target: Path) -> None:
        node, there = self._find(source), self._find(target)
        if node is None:
            raise _refused(errno.ENOENT, source)
        if node is there:
            return
        if isinstance(there, Dir) and (not isinstance(node, Dir) or there.names):
            raise _refused(errno.ENOTEMPTY, source)
        if isinstance(there, File) and isinstance(node, Dir):
            raise _refused(errno.ENOTDIR, source)
        old, new = self._writable_parent(source), self._writable_parent(target)
        self._begin()
        if old is new:
            self._change(old, (source.name,), ((target.name, node),))
        else:
            self._change(old, gone=(source.name,))
            self._change(new, came=((target.name, node),))

    def link(self, source: Path, target: Path) -> None:
        file, parent = self._file(source), self._writable_parent(target)
        if target.name in parent.names:
            raise _refused(errno.EEXIST, target)
        self._begin()
        self._change(parent, came=((target.name, file),))

    def unlink(self, path: Path, missing_ok: bool = False) -> None:
        node = self._find(path)
        if node is None and missing_ok:
            return
        self._file(path)
        parent = self._writable_parent(path)
        self._begin()
        self._change(parent, gone=(path.name,))

    def rmdir(self, path: Path) -> None:
        if self._dir(path).names:
            raise _refused(errno.ENOTEMPTY, path)
        parent = self._writable_parent(path)
        self._begin()
        self._change(parent, gone=(path.name,))

    def chmod(self, path: Path, mode: int) -> None:
        node = self._find(path)
        if node is None:
            raise _refused(errno.ENOENT, path)
        self._begin()
        node.mode = mode

    def touch(self, path: Path, at_unix_s: float) -> None:
        file = self._file(path)
        self._begin()
        file.modified_at = at_unix_s

    def sync_file(self, path: Path) -> None:
        file = self._file(path)
        self._begin()
        if not self.deaf:
            file.synced = file.content

    def sync_dir(self, path: Path) -> None:
        directory = self._dir(path)
        self._begin()
        if not self.deaf:
            directory.synced, directory.pending = dict(directory.names), []

    def lock(self, path: Path) -> int:
        if self.is_locked(path):
            pid = self.read_file(path).decode().strip()
            raise permanent(ErrorKind.PRECONDITION, "STORE_LOCKED", f"{path} is locked by {pid}", "stop it")
        self.write_file(path, f"{os.getpid()}\n".encode())
        handle = max(self._locks, default=0) + 1
        self._locks[handle] = self._file(path)
        return handle

    def unlock(self, handle: int) -> None:
        del self._locks[handle]

    # --- looking ----------------------------------------------------------------------------

    def is_locked(self, path: Path) -> bool:
        node = self._find(path)
        return any(node is held for held in self._locks.values())

    def read_file(self, path: Path) -> bytes:
        return self._file(path).content

    def read_pieces(self, path: Path, piece_bytes: int) -> Iterator[memoryview]:
        content = memoryview(self._file(path).content)
        for start in range(0, len(content), piece_bytes):
            yield content[start : start + piece_bytes]

    def list_dir(self, path: Path) -> list[str]:
        return sorted(self._dir(path).names)

    def files_under(self, path: Path) -> dict[str, int]:
        return dict(_files(self._dir(path), ""))

    def allocated_bytes(self, path: Path) -> int:
        return sum(self.files_under(path).values())

    def size_bytes(self, path: Path) -> int | None:
        node = self._find(path)
        return len(node.content) if isinstance(node, File) else None

    def is_dir(self, path: Path) -> bool:
        return isinstance(self._find(path), Dir)

    def modified_at(self, path: Path) -> float:
        return self._file(path).modified_at

    def disk_bytes(self, path: Path) -> tuple[int, int]:
        self._dir(path)
        return DISK_BYTES, DISK_BYTES - sum(self.files_under(Path("/")).values())


def _refused(number: int, path: Path) -> Exception:
    return world_error(OSError(number, os.strerror(number)), path)


def _files(directory: Dir, prefix: str) -> Iterator[tuple[str, int]]:
    for name, node in directory.names.items():
        if isinstance(node, File):
            yield prefix + name, len(node.content)
        else:
            yield from _files(node, f"{prefix}{name}/")


def _apply(change: Change, names: dict[str, Node]) -> None:
    for name in change.gone:
        names.pop(name, None)
    names.update(change.came)


def _clone(directory: Dir, known: dict[int, Node]) -> Dir:
    """An exact copy, what is not synced included; many times faster than ``copy.deepcopy``."""

    def of(node: Node) -> Node:
        if id(node) not in known:
            if isinstance(node, File):
                known[id(node)] = File(node.content, node.synced, node.mode, node.modified_at)
            else:
                _clone(node, known)
        return known[id(node)]

    then = known[id(directory)] = Dir(mode=directory.mode)
    then.names = {name: of(node) for name, node in directory.names.items()}
    then.synced = {name: of(node) for name, node in directory.synced.items()}
    for change in directory.pending:
        then.pending.append(Change(change.gone, tuple((name, of(node)) for name, node in change.came)))
    return then


def _survivor(directory: Dir, fate: Fate, known: dict[int, Node]) -> Dir:
    """A copy of what a crash leaves of a directory. ``known`` keeps two names of one file together."""
    names = dict(directory.synced)
    for change in directory.pending:
        if fate.keeps(change):
            _apply(change, names)
    then = Dir(mode=directory.mode)
    known[id(directory)] = then
    for name, node in names.items():
        if id(node) not in known:
            known[id(node)] = _survivor(node, fate, known) if isinstance(node, Dir) else _settled(node, fate)
        then.names[name] = known[id(node)]
    then.synced = dict(then.names)
    return then


def _settled(file: File, fate: Fate) -> File:
    content = file.content if file.content == file.synced else fate.content(file)
    return File(content, content, file.mode, file.modified_at)
