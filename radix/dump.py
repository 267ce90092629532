"""The tree as JSON-able data, for ``/cache/tree``."""

from __future__ import annotations

from collections import deque
from typing import Any

from .node import Node
from .structure import PrefixTree

MAX_DEPTH = 100  # JSON encoders recurse


def dump_namespaces(
    tree: PrefixTree, max_nodes: int, preview: int | None, owner: str | None = None
) -> tuple[list[dict[str, Any]], int]:
    """``[{"owner", "salt", "leases", "children": [node...]}...]``, and the number of namespaces left out.

    ``owner``: only namespaces of this owner; None: all. A node: ``id`` (until it grows), ``tokens`` (count), ``pages``,
    ``host`` and ``disk`` (slots in each memory tier), ``preview`` (its first token ids; by default a page and eight
    more, as siblings may share all but the last token of a page), ``leases`` (locks), ``hits``, ``last_access``
    (logical time), ``stub`` (it is a partial page), ``children``; ``omitted`` counts children left out. Breadth-first,
    so that ``max_nodes`` cuts off the deepest nodes. At most ``max_nodes`` namespaces are listed, and at least one.
    """
    preview = tree.page_size + 8 if preview is None else preview
    namespaces: list[dict[str, Any]] = []
    queue: deque[tuple[Node, dict[str, Any], int]] = deque()
    roots = [(name, root) for name, root in tree.roots.items() if owner is None or name[0] == owner]
    for (of, salt), root in roots[: max(1, max_nodes)]:
        namespaces.append({"owner": of, "salt": salt, "leases": root.locks, "children": []})
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
    return namespaces, len(roots) - len(namespaces)


def _describe(tree: PrefixTree, node: Node, preview: int) -> dict[str, Any]:
    return {
        "id": node.serial,
        "tokens": len(node.tokens),
        "pages": len(node.pages),
        "host": len(node.host),
        "disk": len(node.disk),
        "preview": node.tokens[:preview].tolist(),
        "leases": node.locks,
        "hits": node.hits,
        "last_access": node.last_access,
        "stub": tree.is_partial(node),
        "children": [],
    }
