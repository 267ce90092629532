"""A look at a prompt without a lease: what of it is here, in which pages, and which of those nothing may evict."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .explain import Explanation, explain
from .matching import closest_page, follow
from .node import Int32, Namespace, Root

if TYPE_CHECKING:
    from .tree import RadixTree


class Inspection(NamedTuple):
    """``pages``: those of the reusable tokens, in order; of the last one only some tokens may be meant."""

    report: Explanation
    pages: Int32
    locked: int  # of the reusable tokens, how many are leased or held: always the first ones


def inspect(tree: RadixTree, tokens: Int32, namespace: Namespace, limit: int) -> Inspection:
    """See `RadixTree.inspect`. Nothing is split, locked, counted or made younger, not even an empty namespace made."""
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
    return Inspection(report, np.concatenate(pages) if pages else np.empty(0, np.int32), locked)
