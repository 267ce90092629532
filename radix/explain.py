"""Why a match stopped where it did."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal, NamedTuple, get_args

from .node import TOKEN_BYTES, Namespace

Reason = Literal["hit", "evicted", "diverged", "namespace", "cold", "disabled"]
REASONS: tuple[Reason, ...] = get_args(Reason)


class Explanation(NamedTuple):
    """What a match reused and why not more.

    ``hit``        everything it was allowed to reuse was here
    ``evicted``    the next page was here once and was evicted
    ``diverged``   something is cached after the reused tokens, and its next token is another one
    ``namespace``  nothing is cached under this salt, though something is under others of the same owner. Whether it
                   is the same prompt is not said: a salt is there to stop exactly that question
    ``cold``       what comes next was never cached here, or so long ago that nobody remembers
    ``disabled``   the cache is switched off
    """

    hit_tokens: int
    reason: Reason
    diverged_at: int | None = None  # index of the first differing token, with reason "diverged" only


class EvictionRecord:
    """The latest evictions: at which place of the tree (`Node.serial`) which page (its key) went. Bounded."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._went: OrderedDict[tuple[int | Namespace, bytes], None] = OrderedDict()  # oldest first

    def __len__(self) -> int:
        return len(self._went)

    def note(self, place: int | Namespace, key: bytes) -> None:
        entry = (place, key)
        self._went[entry] = None
        self._went.move_to_end(entry)
        if len(self._went) > self._capacity:
            self._went.popitem(last=False)

    def went(self, place: int | Namespace, key: bytes, held: int) -> bool:
        """Did a page or stub go from this place that began this page with more than the ``held`` tokens still here?"""
        return any((place, key[:end]) in self._went for end in range(len(key), held * TOKEN_BYTES, -TOKEN_BYTES))
