"""A model that was acquired: its path, its tensors, and the lease that keeps them.

Owns the lease's descriptor and, until they are mapped, the memory's. Knows neither gRPC nor the daemon.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from cached.client.errors import CachedError
from cached.client.files import Files
from cached.client.handoff import File, Index
from cached.client.pages import Pages
from cached.client.tensors import Memory, Tensors

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Order:
    """What was asked of ``acquire``, as far as a process asks for it again that was sent the model."""

    ref: str
    on: str
    timeout_s: float
    run_dir: str | None
    address: str | None
    private: tuple[str, ...]


class Model:
    """What ``acquire`` returns. The lease is a descriptor: it ends with ``close``, or with the last process
    that has it open, forked and exec'd ones included. Dropping the object does not end it.

    ``path`` is a directory with the files under their original names, ``id`` the content's (``sha256:…``),
    ``attested`` whether the origin vouched for every file; ``files`` has each file's name, size and sha256.
    ``device`` is where it is handed out from: ``disk``, ``host``, or ``cuda:GPU-…``, whose one copy all
    replicas on that GPU share. ``streamed`` says that tensors are copied from there to this process's GPU.
    ``lease_fd`` may be passed on to other processes; it is -1 once closed.

    A model that is pickled, as to a spawned process, is acquired anew where it is unpickled.
    """

    def __init__(
        self,
        index: Index,
        lease_fd: int,
        *,
        path: Path,
        ref: str,
        revision: str,
        attested: bool,
        device: str,
        lease_id: str,
        memory: Memory | Files,
        order: Order,
        acquire_again: Callable[[Order, str], Model],
        tell_ready: Callable[[], None],
    ) -> None:
        """Takes over ``lease_fd``, and ``memory``: files that are mapped once tensors are asked for, or what
        stands or is copied elsewhere."""
        os.set_inheritable(lease_fd, True)  # a server that execs itself keeps its model
        self.path = path
        self.id = index.id
        self.ref = ref
        self.revision = revision
        self.attested = attested
        self.device = device
        self.streamed = not isinstance(memory, Files) and not memory.shared
        self.files: tuple[File, ...] = index.files
        self.lease_id = lease_id
        self.lease_fd = lease_fd
        self._index = index
        self._files = memory if isinstance(memory, Files) else None
        self._memory: Memory | None = Pages(memory) if isinstance(memory, Files) else memory
        self._tensors: Tensors | None = None
        self._order = order
        self._acquire_again = acquire_again
        self._tell_ready = tell_ready
        self._lock = threading.Lock()

    @property
    def tensors(self) -> Tensors:
        """Every tensor by name, mapped at the first use: ``net.load_state_dict(model.tensors, assign=True)``.

        On the host, what is written into a tensor stays this process's own. In a GPU's shared memory a write
        ends this process's use of CUDA: name what is written to in ``private``. Raises CachedError once
        closed, for a name that two files have, and where a file cannot be mapped.
        """
        with self._lock:
            if self.lease_fd < 0:
                hint = "take the tensors that you need before close(); those stay valid"
                raise CachedError("FAILED_PRECONDITION", "MODEL_CLOSED", f"{self.ref} is closed", hint)
            if self._tensors is None:
                self._map()
                assert self._memory is not None
                self._tensors = Tensors(self._index, self._memory, self._order.private)
            return self._tensors

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Every tensor in a dict of their names; where the model is streamed, the fastest way to have all."""
        return self.tensors.state_dict()

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor. Raises KeyError besides what ``tensors`` does."""
        return self.tensors[name]

    def slice(self, name: str, dim: int, start: int, stop: int) -> torch.Tensor:
        """``start`` to ``stop`` of one dimension, as a tensor-parallel rank needs it; see Tensors.slice."""
        return self.tensors.slice(name, dim, start, stop)

    def prefault(self) -> None:
        """Map every page of the tensors now, so that no first touch waits. Only pages on the host need it."""
        _ = self.tensors
        if isinstance(self._memory, Pages):
            self._memory.prefault()

    def ready(self) -> None:
        """Tell the daemon that this process has taken the memory that it needs on its GPU, after which others
        may be loaded there again. Without it, they are after some minutes. Raises CachedError."""
        self._tell_ready()

    def close(self) -> None:
        """End this process's hold on the lease. Tensors already taken stay valid."""
        with self._lock:
            if self._files is not None:
                self._files.close()
            self._memory = self._tensors = None
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

    def __reduce__(self) -> tuple[Any, ...]:
        return self._acquire_again, (self._order, self.id)

    def _map(self) -> None:
        """Map every file that has tensors. What is mapped stays, so that it can go on after a failure."""
        if self._files is None or not isinstance(self._memory, Pages):
            return
        for number in sorted({place.file for place in self._index.places}):
            self._memory.map(number)
            self._files.drop(number)
        self._files.close()
