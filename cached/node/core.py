"""The owner of the state: one queue of events, one loop that applies them and starts what is planned.

Owns the planner's state and who waits for which claim. Every change of the state goes through
``post``. Decides nothing: the planner does.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

from cached.model import CachedError, Claim, ClaimId, ErrorKind, Problem, temporary
from cached.plan import State, apply, plan
from cached.plan import types as t

TICK_S = 0.5
MAX_CLAIMS = 20_000
MAX_PLANS_A_TICK = 100
MAX_TASKS = 50_000

log = structlog.get_logger("cached.node")


class Core:
    """State, events and waiters. ``start_action`` begins an action's effect; it must not block or raise."""

    def __init__(
        self, state: State, start_action: Callable[[t.Action], None], most_claims: int = MAX_CLAIMS
    ) -> None:
        self.state = state
        self._most_claims = most_claims
        self._start_action = start_action
        self._events: deque[t.Event] = deque()
        self._wake = asyncio.Event()
        self._waiters: dict[ClaimId, asyncio.Future[None]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    # --- events -----------------------------------------------------------------------------

    def post(self, *events: t.Event) -> None:
        """Something happened. Worked in, in order, at the loop's next turn."""
        self._events.extend(events)
        self._wake.set()

    async def run(self) -> None:
        """Apply, plan, start; for ever. An exception here is a bug of ours and ends the daemon."""
        while True:
            self._wake.clear()
            self.turn(time.time())
            try:
                async with asyncio.timeout(TICK_S):
                    await self._wake.wait()
            except TimeoutError:
                continue

    def turn(self, now: float) -> None:
        """One round: what happened, then what to do about it."""
        while self._events:
            apply(self.state, self._events.popleft(), now)
        for _ in range(MAX_PLANS_A_TICK):
            actions = plan(self.state, now)
            if not actions:
                return
            for action in actions:
                apply(self.state, t.Started(action), now)
                self._start_action(action)
        raise AssertionError(f"the planner does not come to rest: {actions[:5]}")

    # --- claims and their makers ------------------------------------------------------------

    def check_room(self) -> None:
        """To be asked before any new claim is made or promised. Raises CachedError (NO_ROOM)."""
        if len(self.state.claims) + len(self._events) >= self._most_claims:
            raise _too_many_claims(self._most_claims)

    def claim(self, claim: Claim) -> asyncio.Future[None]:
        """Make a claim. The future ends when it is granted, or raises the CachedError that refuses it."""
        self.check_room()
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters[claim.id] = future
        self.post(t.ClaimMade(claim))
        return future

    def end(self, claim_id: ClaimId) -> None:
        self._waiters.pop(claim_id, None)
        self.post(t.ClaimEnded(claim_id))

    def answer(self, claim_id: ClaimId, problem: Problem | None = None) -> None:
        """Tell whoever waits for the claim, if anybody still does."""
        future = self._waiters.pop(claim_id, None)
        if future is None or future.done():
            return
        if problem is None:
            future.set_result(None)
        else:
            future.set_exception(CachedError(problem))
            future.exception()  # marked as seen: its waiter may be gone by now

    # --- tasks ------------------------------------------------------------------------------

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Run ``work`` beside the loop. An exception that it lets out is a bug, or a disk that cannot be
        trusted any more (a failed fsync): it ends the daemon, whose next start recovers."""
        assert len(self._tasks) < MAX_TASKS
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.fail(task.exception())

    def fail(self, error: BaseException | None) -> None:
        if not self.failed.done():
            self.failed.set_exception(error or RuntimeError("unknown"))
            self.failed.exception()  # marked as seen: at a start nobody waits for it yet

    async def stop(self) -> None:
        """Cancel everything that runs and wait for it."""
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        for future in self._waiters.values():
            if not future.done():
                future.cancel()


def _too_many_claims(most: int) -> CachedError:
    return temporary(
        "TOO_MANY_CLAIMS",
        f"{most} claims are on this node already",
        "end what is not needed; 'cachectl ls' shows the claims",
        10.0,
        ErrorKind.NO_ROOM,
    )
