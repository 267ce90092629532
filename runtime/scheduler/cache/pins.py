"""Pins: prefixes that stay in the cache until they expire.

A pin is never given up because memory is short. It ends when it expires, when its owner unpins it, when the operator
flushes the cache, or when the engine fails and the KV is invalid. So the pages of all pins together are limited to a
share of the pool, and those of each key to a share of that. Pages that several pins share count once.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ....radix.hold import Hold
from ....radix.node import Namespace, Node
from ....radix.tree import RadixTree
from ...errors import InvalidRequest
from ...fleet.instances import PIN
from ...step import Int32
from ..branches.ids import BranchIds

MAX_PINS = 4096  # of one key
FULL = 429  # HTTP status: the request is valid and may succeed later


class Pin:
    """One pinned prefix. Only `Pins` changes it."""

    __slots__ = ("expires", "hold", "id", "namespace", "pages")

    def __init__(self, id: str, namespace: Namespace, hold: Hold, pages: Int32) -> None:
        self.id = id  # "" for a breakpoint's, which no client can name
        self.namespace = namespace
        self.hold = hold
        self.pages = pages
        self.expires = 0.0  # on the registry's clock


class Pins:
    """All pins. Errors are `InvalidRequest` with an HTTP status: 404, 409 or 429."""

    def __init__(
        self,
        tree: RadixTree,
        *,
        share: float,
        share_per_key: float,
        max_ttl: float,
        now: Callable[[], float],
        instance: str = "",
    ) -> None:
        """``share``: of the pool; ``share_per_key``: of that; ``max_ttl``, ``now``: seconds; ``instance``: see
        `BranchIds`."""
        self._ids = BranchIds(instance)
        self._tree = tree
        self.max_pages = int(share * tree.allocator.total)
        self.max_pages_per_key = int(share_per_key * self.max_pages)
        self.max_ttl = max_ttl
        self._now = now
        self._pins: dict[Pin, None] = {}
        self._named: dict[str, Pin] = {}
        # By where the hold ends, and its tokens: a breakpoint that comes again extends the pin that it made.
        self._breakpoints: dict[tuple[Node, int], Pin] = {}
        self._deadlines: list[
            tuple[float, int, Pin]
        ] = []  # heap; the entry of an extended pin is too early, never too late
        self._serial = itertools.count()
        self._times = np.zeros(tree.allocator.total, np.int32)  # pins of each page
        self.pages = 0  # pages with a pin
        self._by_owner: dict[str, tuple[int, int]] = {}  # (pins, pages)

    def __len__(self) -> int:
        return len(self._pins)

    def __iter__(self) -> Iterator[Pin]:
        return iter(self._pins)

    # -- creating and ending -------------------------------------------------------------------------------------------

    def pin(self, tokens: Int32, namespace: Namespace, ttl: float) -> Pin:
        """Pins the cached prefix of ``tokens`` for ``ttl`` seconds; ``pin.hold.tokens`` is its length."""
        self._check_ttl(ttl)
        self.sweep()
        hold = self._tree.hold(tokens, namespace)
        if hold is None:
            raise InvalidRequest(
                None,
                f"none of these {len(tokens)} tokens is cached, so there is nothing to pin (warm: true computes them)",
                status=409,
            )
        return self._add(PIN + self._ids.make(namespace[0], 1)[0][1:], namespace, hold, ttl)

    def pin_breakpoints(self, tokens: Int32, namespace: Namespace, breakpoints: Sequence[tuple[int, float]]) -> int:
        """Pins the prefixes of ``tokens`` that end at ``breakpoints``: (position, seconds); position -1 is the end.

        Leaves out those that exceed the quota. Returns the length in tokens of the longest pinned prefix.
        """
        self.sweep()
        pinned = 0
        for position, ttl in sorted(breakpoints):
            hold = self._tree.hold(tokens[:position] if position >= 0 else tokens, namespace)
            if hold is None:
                continue
            known = self._breakpoints.get((hold.node, hold.tokens))
            if known is not None:
                self._tree.unhold(hold)
                known.expires = max(known.expires, self._now() + min(ttl, self.max_ttl))
                pinned = max(pinned, known.hold.tokens)
                continue
            try:
                pin = self._add("", namespace, hold, min(ttl, self.max_ttl))
            except InvalidRequest:
                continue
            self._breakpoints[hold.node, hold.tokens] = pin
            pinned = max(pinned, hold.tokens)
        return pinned

    def unpin(self, id: str, owner: str) -> Pin:
        """Ends a pin of ``owner``. 404 if it does not exist or belongs to another key."""
        self.sweep()
        pin = self._named.get(id)
        if pin is None or pin.namespace[0] != owner:
            raise InvalidRequest("id", f"{id[:64]} is not a pin: it has expired or never existed", status=404)
        self._end(pin)
        return pin

    def sweep(self) -> float | None:
        """Ends expired pins. Returns the seconds until the next may expire; None: there are no pins."""
        now = self._now()
        while self._deadlines:
            when, _, pin = self._deadlines[0]
            if pin not in self._pins:
                heapq.heappop(self._deadlines)
            elif when > now:
                return when - now
            elif pin.expires > now:
                heapq.heapreplace(self._deadlines, (pin.expires, next(self._serial), pin))
            else:
                heapq.heappop(self._deadlines)
                self._end(pin)
        return None

    def forget(self) -> int:
        """Ends all pins, because the cache is flushed or invalid. Returns how many there were."""
        count = len(self._pins)
        for pin in list(self._pins):
            self._end(pin)
        self._deadlines.clear()
        return count

    def _add(self, id: str, namespace: Namespace, hold: Hold, ttl: float) -> Pin:
        """Makes a pin of the hold, or ends the hold and raises `InvalidRequest` (429)."""
        pages = hold.pages
        new = int(np.count_nonzero(self._times[pages] == 0))
        pins, used = self._by_owner.get(namespace[0], (0, 0))
        problem = None
        if pins >= MAX_PINS:
            problem = f"this key has {pins} pins, as many as one may have"
        elif used + new > self.max_pages_per_key or self.pages + new > self.max_pages:
            size = self._tree.page_size
            room = min(self.max_pages_per_key - used, self.max_pages - self.pages)
            problem = (
                f"{new * size} more tokens to pin, and there is room for {max(0, room) * size} of the "
                f"{self.max_pages_per_key * size} one key may pin (--max-pinned-share, --pinned-share-per-key); "
                "unpin some, or try again when others have expired"
            )
        if problem is not None:
            self._tree.unhold(hold)
            raise InvalidRequest(None, problem, status=FULL)
        hold.pinned = True
        pin = Pin(id, namespace, hold, pages)
        self._times[pages] += 1
        self.pages += new
        self._by_owner[namespace[0]] = pins + 1, used + new
        self._pins[pin] = None
        if id:
            self._named[id] = pin
        pin.expires = self._now() + ttl
        heapq.heappush(self._deadlines, (pin.expires, next(self._serial), pin))
        return pin

    def _end(self, pin: Pin) -> None:
        del self._pins[pin]
        self._named.pop(pin.id, None)
        key = pin.hold.node, pin.hold.tokens
        if self._breakpoints.get(key) is pin:
            del self._breakpoints[key]
        self._times[pin.pages] -= 1
        freed = int(np.count_nonzero(self._times[pin.pages] == 0))
        self.pages -= freed
        pins, used = self._by_owner[pin.namespace[0]]
        self._by_owner[pin.namespace[0]] = pins - 1, used - freed
        if pins == 1:
            del self._by_owner[pin.namespace[0]]
        self._tree.unhold(pin.hold)
        if len(self._deadlines) > 2 * len(self._pins) + 64:  # most entries belong to pins that ended early
            self._deadlines = [entry for entry in self._deadlines if entry[2] in self._pins]
            heapq.heapify(self._deadlines)

    def _check_ttl(self, ttl: float) -> None:
        if not 0 < ttl <= self.max_ttl:
            raise InvalidRequest(
                "ttl",
                f"must be greater than 0 and at most {self.max_ttl:g} seconds (--max-pin-ttl), got {ttl:g}",
            )

    # -- reading -------------------------------------------------------------------------------------------------------

    def of(self, owner: str) -> tuple[int, int]:
        """(pins, pages) of one owner."""
        return self._by_owner.get(owner, (0, 0))

    def pinned(self, pages: Int32) -> int:
        """How many of a prefix's pages are pinned. They are always the first ones."""
        return int(np.count_nonzero(self._times[pages]))

    def check(self) -> None:
        """Raises RuntimeError if holds, counts or limits disagree with the pins. The tree checks the locks."""
        if {pin.hold for pin in self} != {hold for hold in self._tree.holds if hold.pinned}:
            raise RuntimeError("the tree's pinned holds are not those of the pins")
        times = np.zeros_like(self._times)
        owners: dict[str, int] = {}
        pages: dict[str, set[int]] = {}
        for pin in self:
            if pin.hold.count != 1 or not np.array_equal(pin.pages, pin.hold.pages):
                raise RuntimeError(f"pin {pin.id}: its hold is shared, or protects other pages than at first")
            times[pin.pages] += 1
            owners[pin.namespace[0]] = owners.get(pin.namespace[0], 0) + 1
            pages.setdefault(pin.namespace[0], set()).update(pin.pages.tolist())
        if not np.array_equal(times, self._times) or self.pages != np.count_nonzero(times):
            raise RuntimeError("the count of pinned pages is wrong")
        if self._by_owner != {owner: (count, len(pages[owner])) for owner, count in owners.items()}:
            raise RuntimeError("the count of a key's pins or pages is wrong")
        if self.pages > self.max_pages or any(used > self.max_pages_per_key for _, used in self._by_owner.values()):
            raise RuntimeError("more pages are pinned than the limits allow")
        if not {entry[2] for entry in self._deadlines} >= set(self._pins):
            raise RuntimeError("a pin without a deadline")
        if not set(self._named.values()) | set(self._breakpoints.values()) == set(self._pins):
            raise RuntimeError("a pin is missing from the lookup tables, or one that has ended is still there")
