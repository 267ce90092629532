"""Queues in which owners (API keys) take turns, so that the work of one delays another's by one item at most."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """First in, first out for each owner; owners take turns."""

    def __init__(self) -> None:
        self._owners: OrderedDict[str, deque[T]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._owners.values()))

    def __bool__(self) -> bool:
        return bool(self._owners)

    def __contains__(self, owner: str) -> bool:
        """Whether the owner has an item in the queue."""
        return owner in self._owners

    def put(self, owner: str, item: T) -> None:
        """Appends an item to the owner's."""
        self._owners.setdefault(owner, deque()).append(item)

    def take(self) -> T:
        """Removes and returns the next item. IndexError if the queue is empty."""
        if not self._owners:
            raise IndexError("the queue is empty")
        owner, items = next(iter(self._owners.items()))
        item = items.popleft()
        self._owners.move_to_end(owner)
        if not items:
            del self._owners[owner]
        return item


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
