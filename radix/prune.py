"""Removing one prompt and everything that continues it, by request."""

from __future__ import annotations

from .matching import follow
from .node import EMPTY, Int32, Namespace, Node, join, page_key
from .structure import PrefixTree


def prune(tree: PrefixTree, tokens: Int32, namespace: Namespace) -> Int32:
    """Removes every unlocked node below the prefix ``tokens``, then the part of the prefix that leads nowhere else.

    What another prompt shares, up to where it diverges from this one, stays; so does whatever is leased or held, and
    the path to it. If the prefix is not cached to its end, nothing is removed. No tokens: the whole namespace.
    Returns the pages removed.
    """
    root = tree.roots.get(namespace)
    if root is None:
        return EMPTY
    walk = follow(root, tokens, 0, len(tokens), tree.page_size, below=True)
    rest = tokens[walk.length :]
    if walk.stopped_inside:
        below = [walk.node] if walk.beyond >= len(rest) else []
    else:
        below = _children_beginning_with(walk.node, page_key(rest))
    if not below and (walk.node is root or len(rest)):
        return EMPTY
    subtree: list[Node] = []
    while below:
        node = below.pop()
        subtree.append(node)
        below += node.children.values()
    # Children before their parents. `walk.node` may be in the subtree; the loop below skips it if it was removed.
    freed = [tree.remove(node, "pruned") for node in reversed(subtree) if not node.locks]
    end: Node | None = walk.node
    while end is not None and end.parent is not None and not end.locks and not end.children:
        parent = end.parent
        if parent.children.get(end.key) is end:
            freed.append(tree.remove(end, "pruned"))
        end = parent
    return join(freed)


def _children_beginning_with(node: Node, key: bytes) -> list[Node]:
    """The children whose keys begin with ``key``: they are neighbours in the order of keys."""
    found = []
    for child in node.nearest_first(key)[1]:
        if not child.key.startswith(key):
            break
        found.append(child)
    return found
