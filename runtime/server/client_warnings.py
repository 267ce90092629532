"""Keeps clients from filling the log: lines that any client can cause, without a key, are limited."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

LOG_SECONDS = 10.0  # least time between two lines of one kind
_ACCEPT = "socket.accept() out of system resource"  # how asyncio's error begins


class ClientWarnings(logging.Filter):
    """Passes one warning of each kind every `LOG_SECONDS`, with the number of those that were left out before it.

    A kind is a logger's format string. Errors, which have tracebacks of their own, always pass, except asyncio's about
    a server that is out of descriptors or memory: it reports each attempt of a burst to accept a connection.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._kinds: dict[str, tuple[float, int]] = {}  # when the last one passed, and how many were left out since

    def filter(self, record: logging.LogRecord) -> bool:
        kind = str(record.msg)
        if kind.startswith(_ACCEPT):
            reason, kind = record.exc_info and record.exc_info[1], _ACCEPT
            record.msg, record.exc_info = f"cannot accept connections: {reason}", None
        elif record.levelno != logging.WARNING:
            return True
        now = self._clock()
        passed, left_out = self._kinds.get(kind, (now - LOG_SECONDS, 0))
        if now - passed < LOG_SECONDS:
            self._kinds[kind] = passed, left_out + 1
            return False
        self._kinds[kind] = now, 0
        if left_out:
            record.msg = f"{record.msg} ({left_out} more since the last such line)"
        return True


client_warnings = ClientWarnings()  # added to a logger twice, it stays one filter
