"""Reasons why a match stopped where it did, and the record of evictions that one of them needs."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import Literal, NamedTuple, get_args

from .node import TOKEN_BYTES, Namespace

Reason = Literal["hit", "tier", "evicted", "diverged", "namespace", "cold", "disabled"]
REASONS: tuple[Reason, ...] = get_args(Reason)


class Explanation(NamedTuple):
    """The tokens that a match reused, and why it did not reuse more.

    ``hit``        everything it was allowed to reuse was cached
    ``tier``       more tokens, of a whole page or of a part, are on the host or the disk, and were not loaded
    ``evicted``    of the next page, more tokens were cached than now, and have been evicted
    ``diverged``   something is cached after the reused tokens, and its next token differs
    ``namespace``  nothing is cached under this salt, but something is under another salt of the same owner. It does
                   not say whether that is the same prompt: a salt exists to hide exactly this
    ``cold``       what comes next was never cached, or its eviction is no longer on record
    ``disabled``   the cache is switched off
    """

    hit_tokens: int
    reason: Reason
    diverged_at: int | None = None  # index of the first differing token, with reason "diverged" only


class EvictionRecord:
    """The latest evictions, as (position of the tree: `Node.serial`, key of the evicted page). Bounded."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._evicted: OrderedDict[tuple[int | Namespace, bytes], None] = OrderedDict()  # oldest first
        self._places: Counter[int | Namespace] = Counter()  # entries of each place

    def __len__(self) -> int:
        return len(self._evicted)

    def note(self, place: int | Namespace, key: bytes) -> None:
        """Records an eviction, and drops the oldest beyond the capacity."""
        entry = (place, key)
        self._places[place] += entry not in self._evicted
        self._evicted[entry] = None
        self._evicted.move_to_end(entry)
        if len(self._evicted) > self._capacity:
            (oldest, _), _ = self._evicted.popitem(last=False)
            self._places[oldest] -= 1
            if not self._places[oldest]:
                del self._places[oldest]

    def elsewhere(self, place: int | Namespace, key: bytes) -> bool:
        """Whether a page other than ``key`` was evicted from this place."""
        return self._places.get(place, 0) > ((place, key) in self._evicted)

    def evicted(self, place: int | Namespace, key: bytes, present: int) -> bool:
        """Whether a page that begins page ``key`` was evicted from this place, with more than its first ``present``
        tokens, which are still cached."""
        ends = range(len(key), present * TOKEN_BYTES, -TOKEN_BYTES)
        return any((place, key[:end]) in self._evicted for end in ends)
