"""A model that was acquired: its path, its tensors, and the lease that keeps them.

Owns the descriptors of one handoff and the mappings made of them. Knows neither gRPC nor the daemon.
"""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from cached.client.errors import CachedError
from cached.client.handoff import File, Handoff
from cached.client.tensors import Tensors, map_blob

DISK = "disk"


class Model:
    """What ``acquire`` returns. The lease is a descriptor: it ends with ``close``, or with the last process
    that has it open, forked and exec'd ones included. Dropping the object does not end it.

    ``path`` is a directory with the files under their original names, ``id`` the content's (``sha256:…``),
    ``attested`` whether the origin vouched for every file, ``device`` where it stands; ``files`` has each
    file's name, size and sha256. ``lease_fd`` may be passed on to other processes; it is -1 once closed.
    """

    def __init__(
        self,
        handoff: Handoff,
        *,
        path: Path,
        ref: str,
        revision: str,
        attested: bool,
        device: str,
        lease_id: str,
    ) -> None:
        """Takes over the handoff's descriptors."""
        os.set_inheritable(handoff.lease_fd, True)  # a server that execs itself keeps its model
        self.path = path
        self.id = handoff.index.id
        self.ref = ref
        self.revision = revision
        self.attested = attested
        self.device = device
        self.files: tuple[File, ...] = handoff.index.files
        self.lease_id = lease_id
        self.lease_fd = handoff.lease_fd
        self._index = handoff.index
        self._blob_fds = handoff.blob_fds
        self._maps: dict[str, mmap.mmap | None] = {}
        self._tensors: Tensors | None = None
        self._lock = threading.Lock()

    @property
    def tensors(self) -> Tensors:
        """Every tensor by name, mapped at the first use: ``net.load_state_dict(model.tensors, assign=True)``.

        What is written into a tensor stays this process's own. Raises CachedError once closed, for a name
        that two files have, and where a file cannot be mapped.
        """
        with self._lock:
            if self.lease_fd < 0:
                hint = "take the tensors that you need before close(); those stay valid"
                raise CachedError("FAILED_PRECONDITION", "MODEL_CLOSED", f"{self.ref} is closed", hint)
            if self._tensors is None:
                self._map()
                self._tensors = Tensors(self._index, self._maps)
            return self._tensors

    def close(self) -> None:
        """End this process's hold on the lease. Tensors already taken stay valid."""
        with self._lock:
            self._drop_blobs()
            self._maps, self._tensors = {}, None
            if self.lease_fd >= 0:
                os.close(self.lease_fd)
                self.lease_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.lease_fd < 0 else f"lease {self.lease_id}"
        return f"<Model {self.ref} {self.id} on {self.device}, {state}>"

    def _map(self) -> None:
        """Map every file that has tensors. What is mapped stays, so that it can go on after a failure."""
        wanted = {self.files[place.file].sha256 for place in self._index.places}
        for file in self.files:
            if file.sha256 in wanted and file.sha256 not in self._maps:
                self._maps[file.sha256] = self._map_file(file)
        self._drop_blobs()

    def _map_file(self, file: File) -> mmap.mmap | None:
        if self.device == DISK:
            fd = _open(self.path / file.path)
            try:
                return map_blob(fd, file.size_bytes, file.path)
            finally:
                os.close(fd)
        mapped = map_blob(self._blob_fds[file.sha256], file.size_bytes, file.path)
        os.close(self._blob_fds.pop(file.sha256))
        return mapped

    def _drop_blobs(self) -> None:
        while self._blob_fds:
            os.close(self._blob_fds.popitem()[1])


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        hint = (
            "mount the data directory read-only at the path that the daemon has it at, or set CACHED_DATA_DIR"
        )
        message = f"{path} cannot be opened: {error.strerror}"
        raise CachedError("FAILED_PRECONDITION", "PATH_NOT_VISIBLE", message, hint) from error
