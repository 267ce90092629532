"""Why a match stopped where it did."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from .matching import Partial, Walk
from .node import TOKEN_BYTES, Int32, Namespace, page_key

if TYPE_CHECKING:
    from .tree import RadixTree

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


def explain(
    tree: RadixTree, namespace: Namespace, tokens: Int32, limit: int, walk: Walk, partial: Partial
) -> Explanation:
    """Why a match of ``tokens[:limit]`` went as far as ``walk`` and ``partial`` say, and no further."""
    hit, held = walk.length + partial.tokens, walk.length + partial.common
    if not tree.enabled:
        return Explanation(0, "disabled")
    if hit == limit > 0:
        return Explanation(hit, "hit")
    next_page = page_key(tokens[walk.length : walk.length + tree.page_size])
    at_the_end = held < limit and not walk.stopped_inside  # of a node: only there something can be missing
    if at_the_end and tree.evictions.went(walk.node.serial, next_page, partial.common):
        return Explanation(hit, "evicted")
    if hit and hit == held and partial.diverges:
        return Explanation(hit, "diverged", hit)
    if not hit and tree.salts_in_use.get(namespace[0]) and not walk.node.children:
        return Explanation(hit, "namespace")
    return Explanation(hit, "cold")
