"""The tree as data, for `/cache/tree` and for people."""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Any

from .node import Node

if TYPE_CHECKING:
    from .tree import RadixTree

MAX_DEPTH = 100  # JSON encoders recurse


def dump_tree(tree: RadixTree, max_nodes: int = 1000, preview: int | None = None) -> dict[str, Any]:
    """``{"namespaces": [{"owner", "salt", "leases", "children": [node...]}...], "omitted", "totals"}``, JSON-able.

    A node: ``tokens`` and ``pages`` (counts), ``preview`` (its first token ids; by default a page and eight more, for
    siblings may share all but the last of a page), ``leases`` (locks), ``hits``, ``last_access`` (logical time),
    ``stub``, ``children``; ``omitted`` counts children left out. Level by level, so that what ``max_nodes`` cuts off
    is what hangs deepest. Namespaces are as many at most (and one at least); the first ``omitted`` counts the others.
    """
    preview = tree.page_size + 8 if preview is None else preview
    namespaces: list[dict[str, Any]] = []
    queue: deque[tuple[Node, dict[str, Any], int]] = deque()
    for (owner, salt), root in islice(tree.roots.items(), max(1, max_nodes)):
        namespaces.append({"owner": owner, "salt": salt, "leases": root.locks, "children": []})
        queue.append((root, namespaces[-1], 0))
    room = max_nodes
    while queue:
        node, shown, depth = queue.popleft()
        for child in node.children.values():
            if room <= 0 or depth >= MAX_DEPTH:
                shown["omitted"] = len(node.children) - len(shown["children"])
                break
            room -= 1
            shown["children"].append(_describe(tree, child, preview))
            queue.append((child, shown["children"][-1], depth + 1))
    return {"namespaces": namespaces, "omitted": len(tree.roots) - len(namespaces), "totals": _totals(tree)}


def _describe(tree: RadixTree, node: Node, preview: int) -> dict[str, Any]:
    return {
        "tokens": len(node.tokens),
        "pages": len(node.pages),
        "preview": node.tokens[:preview].tolist(),
        "leases": node.locks,
        "hits": node.hits,
        "last_access": node.last_access,
        "stub": len(node.tokens) < tree.page_size,
        "children": [],
    }


def _totals(tree: RadixTree) -> dict[str, Any]:
    return {
        "page_size": tree.page_size,
        "pages": tree.allocator.total,
        "free": tree.allocator.free,
        "quarantined": tree.allocator.quarantined,
        "cached": tree.cached,
        "evictable": tree.evictable,
        "evicted": tree.evicted_total,
        "nodes": tree.num_nodes,
        "leases": len(tree.leases),
        "reasons": dict(tree.reasons),
    }
