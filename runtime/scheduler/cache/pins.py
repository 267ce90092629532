"""Pins: prefixes that stay in the cache until a time, whatever else is needed.

A pin is a promise. It ends when its time is over, when its owner unpins it, when the operator flushes the cache, or
when the engine fails and the cache is worthless; never because memory is short. That is why pins are bounded: all of
them together by a share of the pool, and each key's by a quota of that. What pins share counts once.
"""

from __future__ import annotations

import heapq
import itertools
import secrets
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ....radix.hold import Hold
from ....radix.node import Namespace, Node
from ....radix.tree import RadixTree
from ...errors import InvalidRequest
from ...step import Int32

MAX_PINS = 4096  # of one key
FULL = 429  # status: nothing is wrong with the request, and it may be granted later


class Pin:
    """One kept prefix. Only `Pins` changes it."""

    __slots__ = ("expires", "hold", "id", "namespace", "pages")

    def __init__(self, id: str, namespace: Namespace, hold: Hold, pages: Int32) -> None:
        self.id = id  # "" for a breakpoint's: nobody can name it
        self.namespace = namespace
        self.hold = hold
        self.pages = pages
        self.expires = 0.0  # on the registry's clock


class Pins:
    """The registry. Errors are `InvalidRequest` with the HTTP status they become: 404, 409, 429."""

    def __init__(
        self,
        tree: RadixTree,
        *,
        share: float,
        share_per_key: float,
        max_ttl: float,
        now: Callable[[], float],
    ) -> None:
        """``share``: of the pool; ``share_per_key``: of that; ``max_ttl``: seconds."""
        self._tree = tree
        self.max_pages = int(share * tree.allocator.total)
        self.max_pages_per_key = int(share_per_key * self.max_pages)
        self.max_ttl = max_ttl
        self._now = now
        self._pins: dict[Pin, None] = {}
        self._named: dict[str, Pin] = {}
        # A breakpoint met again prolongs the pin it made: by where the hold ends, and with how many tokens.
        self._breakpoints: dict[tuple[Node, int], Pin] = {}
        self._deadlines: list[tuple[float, int, Pin]] = []  # heap; a prolonged pin's entry is outdated, never too late
        self._serial = itertools.count()
        self._times = np.zeros(tree.allocator.total, np.int32)  # of each page: pins that keep it
        self.pages = 0  # pages that some pin keeps
        self._by_owner: dict[str, tuple[int, int]] = {}  # (pins, pages)

    def __len__(self) -> int:
        return len(self._pins)

    def __iter__(self) -> Iterator[Pin]:
        return iter(self._pins)

    # -- making and ending ---------------------------------------------------------------------------------------------

    def pin(self, tokens: Int32, namespace: Namespace, ttl: float) -> Pin:
        """Keeps what the cache has of ``tokens`` for ``ttl`` seconds; ``pin.hold.tokens`` says how much that is."""
        self._check_ttl(ttl)
        self.sweep()
        hold = self._tree.hold(tokens, namespace)
        if hold is None:
            raise InvalidRequest(
                None,
                f"none of these {len(tokens)} tokens is cached: there is nothing to pin (warm: true computes them)",
                status=409,
            )
        return self._keep(f"pin-{secrets.token_hex(12)}", namespace, hold, ttl)

    def keep(self, tokens: Int32, namespace: Namespace, breakpoints: Sequence[tuple[int, float]]) -> int:
        """Keeps the prefixes of ``tokens`` that end at ``breakpoints``: (position, seconds); -1 is the end.

        One that the quota has no room for is left out. Returns the tokens of the longest prefix that is kept.
        """
        self.sweep()
        kept = 0
        for position, ttl in sorted(breakpoints):
            hold = self._tree.hold(tokens[:position] if position >= 0 else tokens, namespace)
            if hold is None:
                continue
            known = self._breakpoints.get((hold.node, hold.tokens))
            if known is not None:
                self._tree.unhold(hold)
                known.expires = max(known.expires, self._now() + min(ttl, self.max_ttl))
                kept = max(kept, known.hold.tokens)
                continue
            try:
                pin = self._keep("", namespace, hold, min(ttl, self.max_ttl))
            except InvalidRequest:
                continue
            self._breakpoints[hold.node, hold.tokens] = pin
            kept = max(kept, hold.tokens)
        return kept

    def unpin(self, id: str, owner: str) -> Pin:
        """Ends one of the owner's. 404 for any other, be it another key's or nobody's."""
        self.sweep()
        pin = self._named.get(id)
        if pin is None or pin.namespace[0] != owner:
            raise InvalidRequest("id", f"{id[:64]} is not a pin: it has expired or never existed", status=404)
        self._end(pin)
        return pin

    def sweep(self) -> float | None:
        """Ends what has expired. Returns the seconds until there may be more to end; None: there is nothing."""
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
        """Ends all of them: the cache is being flushed, or is worthless. Returns how many there were."""
        count = len(self._pins)
        for pin in list(self._pins):
            self._end(pin)
        self._deadlines.clear()
        return count

    def _keep(self, id: str, namespace: Namespace, hold: Hold, ttl: float) -> Pin:
        """Takes over the hold, or ends it and raises."""
        pages = hold.pages
        new = int(np.count_nonzero(self._times[pages] == 0))
        pins, held = self._by_owner.get(namespace[0], (0, 0))
        problem = None
        if pins >= MAX_PINS:
            problem = f"this key has {pins} pins, as many as one may have"
        elif held + new > self.max_pages_per_key or self.pages + new > self.max_pages:
            size = self._tree.page_size
            room = min(self.max_pages_per_key - held, self.max_pages - self.pages)
            problem = (
                f"{new * size} tokens more to pin, and there is room for {max(0, room) * size} of the "
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
        self._by_owner[namespace[0]] = pins + 1, held + new
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
        pins, held = self._by_owner[pin.namespace[0]]
        self._by_owner[pin.namespace[0]] = pins - 1, held - freed
        if pins == 1:
            del self._by_owner[pin.namespace[0]]
        self._tree.unhold(pin.hold)
        if len(self._deadlines) > 2 * len(self._pins) + 64:  # most entries are of pins that ended early
            self._deadlines = [entry for entry in self._deadlines if entry[2] in self._pins]
            heapq.heapify(self._deadlines)

    def _check_ttl(self, ttl: float) -> None:
        if not 0 < ttl <= self.max_ttl:
            raise InvalidRequest(
                "ttl",
                f"must be greater than 0 and at most {self.max_ttl:g} seconds (--max-pin-ttl), got {ttl:g}",
            )

    # -- looking -------------------------------------------------------------------------------------------------------

    def of(self, owner: str) -> tuple[int, int]:
        """One owner's pins, and the pages they keep."""
        return self._by_owner.get(owner, (0, 0))

    def pinned(self, pages: Int32) -> int:
        """How many of a prefix's pages are pinned: always the first ones."""
        return int(np.count_nonzero(self._times[pages]))

    def check(self) -> None:
        """Raises RuntimeError unless holds, counts and bounds are what the pins explain. The tree counts the locks."""
        if {pin.hold for pin in self} != {hold for hold in self._tree.holds if hold.pinned}:
            raise RuntimeError("the tree's pinned holds are not those of the pins")
        times = np.zeros_like(self._times)
        owners: dict[str, int] = {}
        pages: dict[str, set[int]] = {}
        for pin in self:
            if pin.hold.count != 1 or not np.array_equal(pin.pages, pin.hold.pages):
                raise RuntimeError(f"pin {pin.id}: its hold is shared, or keeps other pages than it did")
            times[pin.pages] += 1
            owners[pin.namespace[0]] = owners.get(pin.namespace[0], 0) + 1
            pages.setdefault(pin.namespace[0], set()).update(pin.pages.tolist())
        if not np.array_equal(times, self._times) or self.pages != np.count_nonzero(times):
            raise RuntimeError("the count of pinned pages is wrong")
        if self._by_owner != {owner: (count, len(pages[owner])) for owner, count in owners.items()}:
            raise RuntimeError("the count of a key's pins or pages is wrong")
        if self.pages > self.max_pages or any(held > self.max_pages_per_key for _, held in self._by_owner.values()):
            raise RuntimeError("more is pinned than may be")
        if not {entry[2] for entry in self._deadlines} >= set(self._pins):
            raise RuntimeError("a pin without a deadline")
        if not set(self._named.values()) | set(self._breakpoints.values()) == set(self._pins):
            raise RuntimeError("a pin that nobody can find, or one that is gone and still found")
