"""The most used prefixes, for another engine to compute before it takes requests."""

from __future__ import annotations

import heapq

from .node import Int32, Namespace, Node, join
from .structure import PrefixTree


def hottest(tree: PrefixTree, count: int, namespace: Namespace | None = None) -> list[tuple[Namespace, Int32]]:
    """Namespace and tokens of the ``count`` prefixes that matches have used most, the most used first: whole pages, of
    one namespace or of all. Of one that continues another only the longer counts, as it includes it. Changes nothing;
    O(nodes)."""
    names = list(tree.roots) if namespace is None else [namespace] if namespace in tree.roots else []
    found: list[tuple[Namespace, Node]] = []
    for name in names:
        below = list(tree.roots[name].children.values())
        while below:
            node = below.pop()
            if node.hits and not tree.is_partial(node) and len(node.pages):
                found.append((name, node))
            below += node.children.values()
    best = heapq.nlargest(count, found, key=lambda each: (each[1].hits, each[1].last_access))
    covered = {each for _, node in best if node.parent is not None for each in node.parent.upwards()}
    return [
        (name, join([each.tokens for each in reversed(list(node.upwards()))]))
        for name, node in best
        if node not in covered
    ]
