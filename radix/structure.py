"""The tree: nodes, locks, counters and the eviction index. All pages are added and removed here."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .events import ROOT, Events, LeaveReason, PagesEntered, PagesLeft
from .eviction import POLICIES, EvictionIndex
from .explain import EvictionRecord
from .matching import Walk
from .node import TOKEN_BYTES, Int32, Namespace, Node, Root, join, page_key


class PrefixTree:
    """Token prefixes and the numbers of the pages that hold them, for each namespace.

    Independent of leases and of page allocation: `insert` takes page numbers, and methods that remove pages return
    them. Counters, read-only for others: ``cached`` (pages in the tree), ``evictable`` (pages of unlocked nodes),
    ``evicted_total`` (pages ever evicted, pruned or flushed), ``num_nodes``.
    """

    def __init__(self, page_size: int, policy: str, evictions_remembered: int) -> None:
        if policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
        self.page_size = page_size
        self.cached = 0
        self.evictable = 0
        self.evicted_total = 0
        self.num_nodes = 0
        self.roots: dict[Namespace, Root] = {}
        self.leaves = EvictionIndex(POLICIES[policy])
        self.salts_in_use: dict[str, int] = {}  # owner -> number of its namespaces with cached pages
        self.evictions = EvictionRecord(evictions_remembered)
        self.events = Events()
        self._serial = 0

    def is_partial(self, node: Node) -> bool:
        """Whether the node is a partial page. False for a root."""
        return 0 < len(node.tokens) < self.page_size

    # ---- pages in ----

    def insert(
        self, parent: Node, key: bytes, tokens: Int32, pages: Int32, *, now: int, priority: int, locked: bool
    ) -> Node:
        """Adds pages as a child of ``parent``, which must be locked. ``key``: of the first page of ``tokens``.

        ``locked``: the child starts with one lock, that of the lease which adds it.
        """
        child = Node(tokens.copy(), pages.copy(), key, parent, self._new_serial())
        child.created = child.last_access = now
        child.priority = priority
        parent.add_child(child)
        self.num_nodes += 1
        if isinstance(parent, Root) and len(parent.children) == 1:
            owner = parent.namespace[0]
            self.salts_in_use[owner] = self.salts_in_use.get(owner, 0) + 1
        if locked:
            child.locks = 1
        else:
            self.evictable += len(pages)
            self.leaves.add(child)
        self._entered(parent, tokens, pages)
        return child

    def extend(self, node: Node, tokens: Int32, pages: Int32) -> None:
        """Adds whole pages to the end of a locked node without children."""
        self._entered(node, tokens, pages)
        node.tokens = np.concatenate((node.tokens, tokens))
        node.pages = np.concatenate((node.pages, pages))
        node.serial = self._new_serial()

    def _entered(self, after: Node, tokens: Int32, pages: Int32) -> None:
        """Accounts for pages that enter after the present end of ``after``."""
        self.cached += len(pages)
        if self.events.observers:
            self.events.pending.append(PagesEntered(_namespace(after), _last_page(after), tokens.copy(), pages.copy()))

    def contents(self) -> Iterator[PagesEntered]:
        """The present contents as events, parents before children."""
        for namespace, root in self.roots.items():
            below = list(root.children.values())
            while below:
                node = below.pop()
                yield PagesEntered(namespace, _last_page(node.parent), node.tokens, node.pages)
                below += node.children.values()

    # ---- pages out ----

    def evict(self, n: int, reason: LeaveReason = "evicted") -> Int32:
        """Removes and returns ``n`` pages, at most ``evictable``: from the tail of the first leaf, then of the next."""
        freed = []
        while n:
            leaf = self.leaves.pop()
            freed.append(self._leave(leaf, max(0, len(leaf.pages) - n), reason))
            n -= len(freed[-1])
        return join(freed)

    def remove(self, leaf: Node, reason: LeaveReason) -> Int32:
        """Removes an unlocked leaf and returns its pages."""
        self.leaves.remove(leaf)
        return self._leave(leaf, 0, reason)

    def remove_covered(self, parent: Node, key: bytes) -> Int32:
        """Removes the unlocked partial pages below ``parent`` whose tokens a page ``key`` begins with, and more."""
        freed = []
        if parent.children:
            for end in range(TOKEN_BYTES, len(key), TOKEN_BYTES):
                node = parent.children.get(key[:end])
                if node is not None and not node.locks:
                    freed.append(self.remove(node, "covered"))
        return join(freed)

    def _leave(self, leaf: Node, keep: int, reason: LeaveReason) -> Int32:
        """Removes all but the first ``keep`` pages of an unlocked leaf that was taken off the index.

        No other method removes pages. A leaf without pages is removed too, which may make its parent a leaf.
        """
        after, tokens, pages, key = leaf.parent, leaf.tokens, leaf.pages, leaf.key
        if after is None:
            raise RuntimeError("a root has no pages to remove")
        if keep:
            after, border = leaf, keep * self.page_size
            tokens, pages = tokens[border:], pages[keep:]
            key = page_key(tokens[: self.page_size])
            leaf.tokens, leaf.pages = _head(leaf.tokens, border), _head(leaf.pages, keep)
            leaf.serial = self._new_serial()
            self.leaves.add(leaf)
        else:
            after.remove_child(leaf)
            self.num_nodes -= 1
            if not after.children:
                self._lost_last_child(after)
        n = len(pages)
        self.cached -= n
        self.evictable -= n
        if reason != "covered":
            self.evicted_total += n
            self.evictions.note(after.serial, key)
        if self.events.observers:
            self.events.pending.append(PagesLeft(_namespace(after), _last_page(after), tokens, pages, reason))
        return pages

    def _lost_last_child(self, parent: Node) -> None:
        if isinstance(parent, Root):
            owner = parent.namespace[0]
            self.salts_in_use[owner] -= 1
            if not self.salts_in_use[owner]:
                del self.salts_in_use[owner]
        if not parent.locks:
            self._became_leaf(parent)

    # ---- splits and locks ----

    def split_at(self, walk: Walk) -> Node:
        """The node that ends exactly where the walk ended, split off if need be.

        The lower half is the old node: it ends where it ended, so its serial, leases and index entry stay valid. The
        upper half gets copies of times, hits and priority, and of the locks, which belong to paths that pass it.
        """
        lower, inside = walk.node, walk.inside
        if not walk.stopped_inside:
            return lower
        parent, border = lower.parent, inside * self.page_size
        if parent is None:
            raise RuntimeError("a root has no pages to split")
        upper = Node(lower.tokens[:border].copy(), lower.pages[:inside].copy(), lower.key, parent, self._new_serial())
        upper.locks, upper.hits, upper.priority = lower.locks, lower.hits, lower.priority
        upper.created, upper.last_access, upper.residency = lower.created, lower.last_access, lower.residency
        lower.tokens, lower.pages = lower.tokens[border:].copy(), lower.pages[inside:].copy()
        lower.key = page_key(lower.tokens[: self.page_size])
        parent.children[upper.key] = upper
        upper.add_child(lower)
        self.num_nodes += 1
        return upper

    def lock(self, node: Node, top: Node | None = None) -> None:
        """Adds one lock to each node from ``node`` up to ``top`` (exclusive) or to the root (inclusive)."""
        for each in node.upwards(top):
            if not each.locks and len(each.pages):  # a root has no pages and is never evicted
                self.evictable -= len(each.pages)
                if not each.children:
                    self.leaves.remove(each)
            each.locks += 1

    def unlock(self, node: Node, top: Node | None = None) -> None:
        """Undoes one `lock`."""
        for each in node.upwards(top):
            each.locks -= 1
            if not each.locks:
                self.evictable += len(each.pages)
                if not each.children:
                    self._became_leaf(each)

    def _became_leaf(self, node: Node) -> None:
        """An unlocked node without children can be evicted; an unlocked root without children is dropped."""
        if isinstance(node, Root):
            del self.roots[node.namespace]
        else:
            self.leaves.add(node)

    def _new_serial(self) -> int:
        self._serial += 1
        return self._serial


def _namespace(node: Node) -> Namespace:
    *_, root = node.upwards()
    if not isinstance(root, Root):
        raise RuntimeError(f"node {node.serial} is not in the tree")
    return root.namespace


def _last_page(node: Node | None) -> int:
    return int(node.pages[-1]) if node is not None and len(node.pages) else ROOT


def _head(array: Int32, n: int) -> Int32:
    """The first n: a view, unless that would keep more than twice its size alive."""
    whole = array if array.base is None else array.base
    return array[:n].copy() if 2 * n < len(whole) else array[:n]
