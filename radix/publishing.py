"""Adding what a lease has computed to the tree: whole pages when they are scheduled, and the last page at the end."""

from __future__ import annotations

import numpy as np

from .errors import LeaseError
from .lease import Lease
from .matching import follow
from .node import Int32, Node, join, page_key
from .scores import ScoreTable
from .structure import PrefixTree

GROWS_UP_TO = 4096  # tokens: extending a node copies it, so a longer node gets a child instead


class Publisher:
    """Publishes the pages of leases: see `RadixTree.publish` and `RadixTree.release`."""

    def __init__(self, structure: PrefixTree, scores: ScoreTable, policy: str) -> None:
        self._structure = structure
        self._scores = scores
        self._pages = structure.device.slots
        # Under these policies an extension of a node counts as a use of the whole node. Under the others new pages
        # must not inherit an old node's history, so a node is extended only by the lease that added it.
        self._by_recency = policy in ("lru", "priority")

    def publish(self, lease: Lease, tokens: Int32) -> tuple[int, Int32] | None:
        page_size = self._structure.page_size
        first, last = lease.length // page_size, len(tokens) // page_size
        if last > len(lease.pages):
            raise LeaseError(f"{last} whole pages to publish, but the lease has {len(lease.pages)}")
        self.release_source(lease)
        if last <= first:
            return None
        tokens = np.asarray(tokens, np.int32)
        walk = follow(lease.node, tokens, lease.length, last * page_size, page_size)
        end = self._structure.split_at(walk)
        self._structure.lock(end, lease.node)
        known = walk.length // page_size
        replaced = None
        if known > first:
            canonical = join(walk.pages)
            self._scores.merge(lease.pages[first:known], canonical)
            self._pages.quarantine(lease.pages[first:known])
            lease.pages = np.concatenate((lease.pages[:first], canonical, lease.pages[known:]))
            replaced = first, canonical
        end, known = self._restore(lease, end, tokens[: last * page_size], known)
        if last > known:
            end = self._grow(lease, end, tokens[known * page_size : last * page_size], lease.pages[known:last])
        lease.node = end
        lease.length = last * page_size
        return replaced

    def _restore(self, lease: Lease, end: Node, tokens: Int32, known: int) -> tuple[Node, int]:
        """Nodes that only lower tiers have, and whose pages the lease has computed, are on the device from now on.
        Returns the end of the lease's path and its pages."""
        structure, size = self._structure, self._structure.page_size
        walk = follow(end, tokens, known * size, len(tokens), size, below=True)
        bottom = structure.split_at(walk)
        for node in reversed(list(bottom.upwards(end))):
            self.remove_covered(end, node.key, int(lease.pages[known]))
            structure.lock(node, end)
            count = structure.size(node)
            pages = lease.pages[known : known + count]
            self._structure.published_in[pages] = self._structure.step
            structure.enter(node, pages)
            node.priority = max(node.priority, lease.priority)
            end, known = node, known + count
        return end, known

    def _grow(self, lease: Lease, end: Node, tokens: Int32, pages: Int32) -> Node:
        """Adds pages after ``end``, which the lease has locked: to the node itself if it may grow, else as a child."""
        key = page_key(tokens[: self._structure.page_size])
        self.remove_covered(end, key, int(pages[0]))
        self._structure.published_in[pages] = self._structure.step
        if self._may_extend(lease, end, len(tokens)):
            self._structure.extend(end, tokens, pages)
            return end
        lease.grown = self._structure.insert(
            end, key, tokens, pages, now=self._structure.tick(), priority=lease.priority, locked=True
        )
        return lease.grown

    def _may_extend(self, lease: Lease, end: Node, growth: int) -> bool:
        if end.locks > 1 or end.children or not len(end.pages) or len(end.tokens) > max(GROWS_UP_TO, growth):
            return False
        if len(end.host) or len(end.disk):
            return False
        if self._by_recency:
            return end is lease.grown or end.priority == lease.priority
        return end is lease.grown and not end.hits

    def keep_partial_page(self, lease: Lease, tokens: Int32) -> int:
        """Adds a finished request's last, partial page to the tree, to be copied from. Returns 1 if it was added."""
        key = page_key(tokens)
        if not key:
            return 0
        at = lease.length // self._structure.page_size
        page = lease.pages[at : at + 1]
        self._scores.forget(page, len(tokens))
        covering = lease.node.covering(key)
        if covering is not None:
            self._scores.merge(page, covering.pages[:1])
            return 0
        self.remove_covered(lease.node, key, int(page[0]))
        self._structure.published_in[page] = self._structure.step
        below = lease.node.children.get(key)
        if below is not None:  # only lower tiers had it
            self._structure.enter(below, page)
        else:
            now = self._structure.tick()
            self._structure.insert(lease.node, key, tokens, page, now=now, priority=lease.priority, locked=False)
        return 1

    def remove_covered(self, parent: Node, key: bytes, page: int) -> None:
        """Removes the partial pages whose tokens ``page`` begins with. The step being planned may copy from them."""
        covered = self._structure.remove_covered(parent, key)
        self._scores.merge(covered, np.full_like(covered, page))
        self._pages.quarantine(covered)

    def release_source(self, lease: Lease) -> None:
        """The source is below the path's end. If it was split meanwhile, both halves are on the way up."""
        if lease.source is not None:
            self._structure.unlock(lease.source, lease.node)
            lease.source = None
