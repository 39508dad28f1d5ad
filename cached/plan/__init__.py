"""Decisions are pure: ``apply`` works events into the state, ``plan`` says what to do about it.

Owns all policy, in ``decide``, ``gpus`` and ``pools``; the records and vocabulary are in ``types``, the state
and its indexes in ``state``. Imports only the words of ``model``: no clock, no I/O, no logging.
"""

from cached.plan.apply import apply
from cached.plan.decide import access_problem, evict_problem, host_swap_problem, is_read_soon, plan
from cached.plan.gpus import sharing_problem, swap_problem
from cached.plan.state import Place, State, is_gpu
from cached.plan.words import STANDBY_WAIT_S

__all__ = [
    "STANDBY_WAIT_S",
    "Place",
    "State",
    "access_problem",
    "apply",
    "evict_problem",
    "host_swap_problem",
    "is_gpu",
    "is_read_soon",
    "plan",
    "sharing_problem",
    "swap_problem",
]
