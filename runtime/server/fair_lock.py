"""A lock that owners (API keys) get in turn."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from ..fair_queue import FairQueue


class FairLock:
    """A lock for tasks of one event loop that owners get in turn."""

    def __init__(self) -> None:
        self._locked = False
        self._waiting: FairQueue[asyncio.Future[None]] = FairQueue()

    @contextlib.asynccontextmanager
    async def of(self, owner: str) -> AsyncIterator[None]:
        """Holds the lock while inside."""
        if self._locked:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.put(owner, turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._pass_on()  # it was this task's turn already
                raise
        self._locked = True
        try:
            yield
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        while self._waiting:
            turn = self._waiting.take()
            if not turn.done():  # else its task was cancelled
                turn.set_result(None)
                return
        self._locked = False
