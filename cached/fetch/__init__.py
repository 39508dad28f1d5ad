"""Everything that moves or proves bulk bytes on disk: a bounded pool of worker processes.

Owns the way of bytes from an origin into sealed partial blobs, and the reading of blobs to prove
them. The pool (in the daemon) starts workers, passes jobs on, and kills what is no longer wanted; the
workers (processes of their own) ask origins, write, hash. Nothing here commits anything: the store does,
blob by blob, as it is told of them.
"""

from cached.fetch.pool import FetchPool
from cached.fetch.wire import FetchJob, Mismatch

__all__ = ["FetchJob", "FetchPool", "Mismatch"]
