"""The waiting requests, and as columns the numbers that order them.

Admission orders the queue in every step, because the clock is one of those numbers. Reading them from the request
objects would cost milliseconds a step with thousands of waiting requests; reading columns costs microseconds.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .request import Request

Int64 = npt.NDArray[np.int64]

_LEAST = 64  # slots
_NUMBERS = 6  # of a request: see `WaitingQueue._numbers`


class Columns(NamedTuple):
    """Waiting requests in order of arrival, all [n]. Later changes of the queue do not change it."""

    requests: list[Request]  # by slot
    slots: Int64
    arrived: Int64  # tokens that the engine had scheduled
    retracted: Int64  # 0 or 1
    priority: Int64
    hit: Int64  # tokens cached at the last lookup
    tokens: Int64
    owner: Int64  # index into ``owners``
    owners: list[str]

    def __len__(self) -> int:
        return len(self.slots)

    def request(self, position: int) -> Request:
        """The request at a position in order of arrival."""
        return self.requests[self.slots[position]]


class WaitingQueue(MutableMapping[int, Request]):
    """Waiting requests by id, in order of arrival.

    Each has a slot, a column of one array. Slots of requests that left are reused when the array is rebuilt, so adding
    and removing take O(1) amortised.
    """

    def __init__(self) -> None:
        self._slots: dict[int, int] = {}  # by id
        self._rebuild([])

    def _rebuild(self, requests: list[Request]) -> None:
        """Replaces the arrays, which `Columns` may still refer to."""
        self._requests: list[Request] = []
        self._values = np.zeros((_NUMBERS, max(_LEAST, 2 * len(requests))), np.int64)
        self._present = np.zeros(self._values.shape[1], np.bool_)
        self._owners: dict[str, int] = {}
        self._slots.clear()
        for request in requests:
            self[request.id] = request

    def __getitem__(self, id: int) -> Request:
        return self._requests[self._slots[id]]

    def __setitem__(self, id: int, request: Request) -> None:
        if id in self._slots:
            raise ValueError(f"request {id} is waiting already")
        if len(self._requests) == len(self._present):
            self._rebuild(list(self.values()))
        slot = len(self._requests)
        self._slots[id] = slot
        self._requests.append(request)
        self._values[:, slot] = self._numbers(request)
        self._present[slot] = True

    def __delitem__(self, id: int) -> None:
        self._present[self._slots.pop(id)] = False
        # An empty queue is rebuilt: its old slots would keep the requests that left, and their prompts, in memory.
        if not self._slots or len(self._requests) > max(_LEAST, 4 * len(self)):
            self._rebuild(list(self.values()))

    def __iter__(self) -> Iterator[int]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def restore(self, request: Request) -> None:
        """Adds a request that has waited before, and restores the order of arrival, in which ids ascend. O(n): for
        retractions, which are rare."""
        self._rebuild(sorted([*self.values(), request], key=lambda each: each.id))

    def changed(self, request: Request) -> None:
        """A request has another ``hit_estimate``, or one token more, from a step that ran when it was retracted. No
        effect if it does not wait."""
        slot = self._slots.get(request.id)
        if slot is not None:
            self._values[:, slot] = self._numbers(request)

    def some(self, start: int, count: int) -> list[Request]:
        """At most ``count`` requests in order of arrival, beginning at a position and again at 0 after the last."""
        slots = np.flatnonzero(self._present)
        return [self._requests[slots[(start + i) % len(slots)]] for i in range(min(count, len(slots)))]

    def columns(self) -> Columns:
        """The queue as it is now. O(n), in NumPy."""
        slots = np.flatnonzero(self._present)
        arrived, retracted, priority, hit, tokens, owner = self._values[:, slots]
        return Columns(self._requests, slots, arrived, retracted, priority, hit, tokens, owner, list(self._owners))

    def work(self) -> dict[str, int]:
        """Tokens to compute of each owner's waiting requests."""
        columns = self.columns()
        sums = np.zeros(len(columns.owners), np.int64)
        np.add.at(sums, columns.owner, columns.tokens - columns.hit)
        return {name: int(sums[code]) for code, name in enumerate(columns.owners) if sums[code]}

    def _numbers(self, request: Request) -> tuple[int, ...]:
        owner = self._owners.setdefault(request.namespace[0], len(self._owners))
        retracted, tokens = int(request.retractions > 0), request.num_tokens
        return request.arrival_clock, retracted, request.priority, request.hit_estimate, tokens, owner

    def check(self) -> None:
        """Raises RuntimeError if a column differs from its request."""
        for id, slot in self._slots.items():
            request = self._requests[slot]
            if request.id != id or not self._present[slot] or tuple(self._values[:, slot]) != self._numbers(request):
                raise RuntimeError(f"waiting request {id}: its columns differ from it")
        if np.count_nonzero(self._present) != len(self):
            raise RuntimeError("the queue has columns of requests that do not wait")
