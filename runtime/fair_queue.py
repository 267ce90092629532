"""A queue in which owners (API keys) take turns."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """First in, first out for each owner; owners take turns, so that the work of one delays another's by one item."""

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

    def discard(self, item: T) -> None:
        """Removes every entry of an item, whichever owners have put it."""
        for owner, items in list(self._owners.items()):
            self._owners[owner] = deque(each for each in items if each is not item)
            if not self._owners[owner]:
                del self._owners[owner]
