"""The most used prefixes, for another engine to compute before it takes requests."""

from __future__ import annotations

import heapq

from .node import Int32, Namespace, Node, join
from .structure import PrefixTree


def hottest(tree: PrefixTree, namespace: Namespace, count: int) -> list[Int32]:
    """Tokens of the ``count`` prefixes of a namespace that matches have used most, whole pages, the most used first. Of
    one that continues another only the longer counts, as it includes it. Changes nothing; O(nodes)."""
    root = tree.roots.get(namespace)
    found: list[Node] = []
    below = [] if root is None else list(root.children.values())
    while below:
        node = below.pop()
        if node.hits and not tree.is_partial(node) and len(node.pages):
            found.append(node)
        below += node.children.values()
    best = heapq.nlargest(count, found, key=lambda node: (node.hits, node.last_access))
    covered = {each for node in best if node.parent is not None for each in node.parent.upwards()}
    return [join([each.tokens for each in reversed(list(node.upwards()))]) for node in best if node not in covered]
