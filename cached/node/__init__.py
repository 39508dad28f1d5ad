"""The shell around the planner: one owner of the state, one queue of events, dull effects.

Owns the running node: it turns requests and results into events, asks the planner, and starts what
the planner says. Decides nothing itself.
"""

from cached.node.service import Node

__all__ = ["Node"]
