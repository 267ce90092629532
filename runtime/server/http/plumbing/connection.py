"""Notices that a request's client has left, without a task for each request that waits for ``http.disconnect``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.types import Scope

KEY = "branchwise.connection"  # in the scope of a request


class Connection:
    """One connection, which serves one request at a time."""

    def __init__(self) -> None:
        self.is_lost = False
        self._on_loss: Callable[[], None] | None = None

    def lost(self) -> None:
        """To be called once, when the connection has ended."""
        self.is_lost = True
        if self._on_loss is not None:
            self._on_loss()

    @contextmanager
    def watched(self, on_loss: Callable[[], None]) -> Iterator[None]:
        """While inside, the loss of the connection calls ``on_loss``: at once if it has been lost already."""
        self._on_loss = on_loss
        try:
            if self.is_lost:
                on_loss()
            yield
        finally:
            self._on_loss = None


def connection_of(scope: Scope) -> Connection:
    """The connection of an HTTP request; one that is never lost for an ASGI server other than ours."""
    connection: Connection = scope.get(KEY) or Connection()
    return connection
