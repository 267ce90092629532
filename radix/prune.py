"""Forgetting one prompt and all that follows it, at somebody's wish and not for want of memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .matching import follow
from .node import Int32, Namespace, Node, page_key

if TYPE_CHECKING:
    from .tree import RadixTree


def prune(tree: RadixTree, tokens: Int32, namespace: Namespace) -> int:
    """Evicts every unlocked node below the prefix ``tokens``, and of the prefix what then leads nowhere else.

    What another prompt shares, up to the place where it parts from this one, stays; so does whatever is leased or
    held, and the path to it. If the prefix is not cached to its end, nothing is evicted. No tokens: the whole
    namespace. Returns the pages evicted.
    """
    root = tree.roots.get(namespace)
    if root is None:
        return 0
    walk = follow(root, tokens, 0, len(tokens), tree.page_size)
    rest = tokens[walk.length :]
    below: list[Node]
    if walk.stopped_inside:
        below = [walk.node] if walk.beyond >= len(rest) else []
    else:
        key = page_key(rest)
        below = _beginning_with(walk.node, key)
    if not below and not (walk.node is not root and not len(rest)):
        return 0
    before = tree.evicted_total
    found: list[Node] = []
    while below:
        node = below.pop()
        found.append(node)
        below += node.children.values()
    for node in reversed(found):  # children before their parents
        if not node.locks:
            _drop(tree, node)
    end: Node | None = walk.node
    while end is not None and end.parent is not None and not end.locks and not end.children:
        parent = end.parent
        if end.parent.children.get(end.key) is end:  # not dropped above
            _drop(tree, end)
        end = parent
    return tree.evicted_total - before


def _beginning_with(node: Node, key: bytes) -> list[Node]:
    """The children whose keys do: neighbours in the order of keys."""
    children = node.children
    start = children.bisect_left(key) if children else 0
    found = []
    for i in range(start, len(children)):
        child = children.peekitem(i)[1]
        if not child.key.startswith(key):
            break
        found.append(child)
    return found


def _drop(tree: RadixTree, leaf: Node) -> None:
    tree.leaves.remove(leaf)
    tree.evictable -= len(leaf.pages)
    tree.cached -= len(leaf.pages)
    tree.evicted_total += len(leaf.pages)
    if leaf.parent is not None:
        tree.evictions.note(leaf.parent.serial, leaf.key)
    tree.allocator.give_back(leaf.pages)
    tree.detach(leaf)
