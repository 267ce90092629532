"""Read-only queries without a lease: how much of a prompt is cached, and why a match stops where it does."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .explain import Explanation
from .matching import Partial, Walk, closest_page, follow
from .node import EMPTY, Int32, Namespace, Root, common_tokens, join, page_key
from .structure import PrefixTree

SHOWN = 16  # tokens


class Inspection(NamedTuple):
    """``pages``: the pages of the reusable tokens, in order; the last page may be reusable only in part. ``instead``:
    the first cached tokens after those, at most `SHOWN`: of several continuations, the one nearest to the prompt's."""

    report: Explanation
    pages: Int32
    instead: Int32
    locked: int  # how many of the reusable tokens are leased or held: always the first ones


def explain(
    tree: PrefixTree, namespace: Namespace, tokens: Int32, limit: int, walk: Walk, partial: Partial
) -> Explanation:
    """The reason why a match of ``tokens[:limit]`` ended where ``walk`` and ``partial`` ended."""
    hit, common = walk.length + partial.tokens, partial.common
    if hit == limit > 0:
        return Explanation(hit, "hit")
    if not walk.stopped_inside:  # pages can be missing only after the end of a node
        end = walk.length + tree.page_size
        wanted = page_key(tokens[walk.length : min(end, limit)])
        below = walk.node.nearest_below(wanted)
        stored = 0 if below is None else common_tokens(below.key, wanted)
        known, next_page = max(common, stored), page_key(tokens[walk.length : end])
        if walk.length + known < limit and tree.evictions.evicted(walk.node.serial, next_page, known):
            return Explanation(hit, "evicted")
        if stored > partial.tokens:
            return Explanation(hit, "tier")
    if hit and hit == walk.length + common and partial.diverges:
        return Explanation(hit, "diverged", hit)
    if not hit and tree.salts_in_use.get(namespace[0]) and not walk.node.children:
        return Explanation(hit, "namespace")
    return Explanation(hit, "cold")


def inspect(tree: PrefixTree, tokens: Int32, namespace: Namespace, limit: int) -> Inspection:
    """See `RadixTree.inspect`. Changes nothing: no split, lock, count or time, and no new namespace."""
    root = tree.roots.get(namespace) or Root(namespace)
    walk = follow(root, tokens, 0, limit, tree.page_size)
    partial = closest_page(walk, tokens, limit, tree.page_size, lambda _page: True)
    report = explain(tree, namespace, tokens, limit, walk, partial)
    pages = [*walk.pages, *([] if partial.node is None else [np.array([partial.page], np.int32)])]
    path = [node for node in walk.node.upwards() if not isinstance(node, Root)]
    locked = sum(len(pages) for node, pages in zip(reversed(path), walk.pages, strict=True) if node.locks)
    locked *= tree.page_size
    if partial.node is not None and partial.node.locks:
        locked += partial.tokens
    wanted = page_key(tokens[walk.length : min(walk.length + tree.page_size, limit)])
    return Inspection(report, join(pages), _instead(walk, partial, wanted, tree.page_size), locked)


def _instead(walk: Walk, partial: Partial, wanted: bytes, page_size: int) -> Int32:
    if walk.stopped_inside:
        after = walk.node.tokens[walk.inside * page_size :]
    elif partial.node is not None:
        after = partial.node.tokens
    else:
        before, behind = walk.node.nearest_first(wanted)
        nearest = next(behind, None) or next(before, None)
        after = EMPTY if nearest is None else nearest.tokens
    return after[partial.common : partial.common + SHOWN]
