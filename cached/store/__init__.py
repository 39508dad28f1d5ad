"""Disk truth: what is proven on this node's disk, how it got there, and how it goes away again.

Owns everything below the data directory but the bytes inside partial blobs, which fetch workers write.
Decides nothing: what to fetch, evict or keep is the planner's. Synchronous, and never called from two
threads at once. Nothing here answers before what it promises is durable.

``layout`` names the files and their records, ``shelf`` brings content up and takes it down, ``scan``
is the start, ``store`` is the room's face.
"""

from cached.store.layout import Head, Ingest, IngestPlan, Room, Scan, ScrubMark, TakenDown, Withdrawn
from cached.store.store import Store

__all__ = ["Head", "Ingest", "IngestPlan", "Room", "Scan", "ScrubMark", "Store", "TakenDown", "Withdrawn"]
