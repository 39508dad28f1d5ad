"""How a wait looks: one live line on a terminal, plain lines elsewhere; always on stderr.

Owns the drawing only. What is known comes from the daemon: its rate and its estimate are shown, none
is made here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Protocol

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from cached.cli import tables, words

if TYPE_CHECKING:
    from cached.v1 import model_cache_pb2 as pb

LINE_EVERY_S = 1.0


class Shown(Protocol):
    """What a wait is shown by."""

    def show(self, progress: pb.Progress) -> None:
        """Show how far it is now."""

    def aside(self) -> AbstractContextManager[None]:
        """For a ``with`` block that prints something else."""


@contextmanager
def shown(console: Console | None = None, doing: str = "") -> Iterator[Shown]:
    """Shows how far something is until the block ends; ``doing`` stands for the phase where it is given."""
    console = console or tables.console(stderr=True)
    if tables.on_terminal(console) and console.is_interactive:
        with Bar(console, doing) as bar:
            yield bar
    else:
        yield Lines(console, doing)


class Bar(Progress):
    """One live line: phase, bar, bytes, rate, time left; under it why it waits, if it does."""

    _message = ""  # of the class, as rich draws once while it is made

    def __init__(self, console: Console, doing: str = "") -> None:
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[amounts]}", markup=False),
            console=console,
            expand=True,
            transient=True,
            # What is meant for stdout must get there, not to this console, which is stderr's.
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._doing = doing
        self._line = self.add_task(doing or words.PHASES[0], total=None, amounts="")

    def show(self, progress: pb.Progress) -> None:
        self._message = progress.message
        self.update(
            self._line,
            description=self._doing or words.phase(progress),
            completed=progress.bytes_done,
            amounts="  ".join(words.amounts(progress)),
        )
        # update() takes None for "leave it", and a task whose total is unknown has None.
        self.tasks[0].total = progress.bytes_total or None

    @contextmanager
    def aside(self) -> Iterator[None]:
        # The line may be on the same terminal as what is printed, which would be drawn over.
        self.stop()
        yield
        self.start()

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self._message:
            yield Text(self._message, style="yellow", overflow="fold")


class Lines:
    """Plain lines, at most one a second and only when something changed."""

    def __init__(
        self, console: Console, doing: str = "", clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._console = console
        self._doing = doing
        self._clock_s = clock_s
        self._last = ""
        self._next_at_s = 0.0

    def show(self, progress: pb.Progress) -> None:
        line = words.progress_line(progress, self._doing)
        now_s = self._clock_s()
        if line == self._last or now_s < self._next_at_s:
            return
        self._last = line
        self._next_at_s = now_s + LINE_EVERY_S
        tables.say(self._console, line)

    def aside(self) -> AbstractContextManager[None]:
        return nullcontext()
