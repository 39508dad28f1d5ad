"""What a caller of the client or of the commands can catch.

Owns the one exception of the client, and its exit codes. Imports nothing, so that it is there at
no cost; knows nothing of gRPC beyond the names of its statuses.
"""

from __future__ import annotations

UNREACHABLE = "DAEMON_UNREACHABLE"
"""The reason when our own daemon does not answer; an origin that does not has a reason of its own."""

_EXIT_CODES = {
    "INVALID_ARGUMENT": 2,
    "NOT_FOUND": 3,
    "DATA_LOSS": 4,
    "RESOURCE_EXHAUSTED": 5,
    "PERMISSION_DENIED": 7,
    "DEADLINE_EXCEEDED": 8,
}


class CachedError(Exception):
    """One error: what happened and where, and how to mend it.

    ``code`` is the name of a gRPC status (``NOT_FOUND``), ``reason`` a stable word for programs
    (``DIGEST_MISMATCH``), ``message`` says what and where, ``hint`` how to mend it.
    ``retry_after_s`` is None where trying again cannot help.
    """

    def __init__(
        self, code: str, reason: str, message: str, hint: str = "", retry_after_s: float | None = None
    ) -> None:
        # All of them are args, so that the error survives pickling between a replica's processes.
        super().__init__(code, reason, message, hint, retry_after_s)
        self.code = code
        self.reason = reason
        self.message = message
        self.hint = hint
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.message} (hint: {self.hint})" if self.hint else self.message

    @property
    def exit_code(self) -> int:
        """What a command ends with: 6 where our daemon is not reachable, 1 where nothing else fits."""
        return 6 if self.reason == UNREACHABLE else _EXIT_CODES.get(self.code, 1)
