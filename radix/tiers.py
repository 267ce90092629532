"""One memory tier of the tree: its slots, the nodes' copies in it, and the order of eviction."""

from __future__ import annotations

from collections.abc import Callable

from .eviction import EvictionIndex, Policy
from .node import DEVICE, DISK, EMPTY, HOST, Int32, Node, join
from .pages import PageAllocator

_COPIES = {DEVICE: "pages", HOST: "host", DISK: "disk"}  # the attribute of `Node` with the copy in each tier


class Tier:
    """A memory that holds copies of nodes. A slot has room for one page; on the device slots are page numbers.

    Counters, read-only for others: ``cached`` (slots that nodes use), ``evictable`` (of them, those of unlocked
    nodes). ``leaves`` are the nodes whose copy can be evicted next: unlocked, and without a child that has a copy here.
    """

    def __init__(self, number: int, slots: PageAllocator, policy: Policy) -> None:
        self.number = number
        self.slots = slots
        self.cached = 0
        self.evictable = 0
        self.leaves = EvictionIndex(policy)
        self.freed: list[Int32] = []  # slots freed since `take_freed`; on the disk only, whose index has rows to delete
        # Called when a node has got its copy, and before it loses it (True, False). Set for the lower tiers.
        self.changed: Callable[[Tier, Node, bool], None] | None = None
        self._copy = _COPIES[number]

    @property
    def available(self) -> int:
        """Slots that a reservation could get now."""
        return self.slots.free + self.evictable

    def of(self, node: Node) -> Int32:
        """The node's slots here, [pages]; empty: it has no copy here."""
        slots: Int32 = getattr(node, self._copy)
        return slots

    def place(self, node: Node, slots: Int32) -> None:
        """Sets a node's slots, and nothing else: the counters and the index are the caller's."""
        setattr(node, self._copy, slots)

    def put(self, node: Node, slots: Int32) -> None:
        """The node, which has none, gets a copy."""
        parent, t = node.parent, self.number
        if parent is not None:
            if self._indexed(parent):
                self.leaves.remove(parent)
            parent.below[t] += 1
        self.place(node, slots)
        self.cached += len(slots)
        if not node.locks:
            self.expose(node)
        if self.changed is not None:
            self.changed(self, node, True)

    def take(self, node: Node) -> Int32:
        """The node loses its copy. Returns the slots, which the caller frees or reuses."""
        slots = self.of(node)
        if not node.locks:
            self.protect(node)
        self._lose(node, slots)
        return slots

    def take_first(self) -> Int32:
        """The first leaf loses its copy: `take`, without searching the index for it."""
        node = self.leaves.pop_first()
        slots = self.of(node)
        self.evictable -= len(slots)
        self._lose(node, slots)
        return slots

    def _lose(self, node: Node, slots: Int32) -> None:
        if self.changed is not None:
            self.changed(self, node, False)
        parent, t = node.parent, self.number
        self.cached -= len(slots)
        self.place(node, EMPTY)
        if parent is not None:
            parent.below[t] -= 1
            if not parent.locks and not parent.below[t] and len(self.of(parent)):
                self.leaves.add(parent)

    def free(self, slots: Int32) -> None:
        """Frees slots that no node and no transfer uses."""
        self.slots.give_back(slots)
        if self.number == DISK and len(slots):
            self.freed.append(slots)

    def take_freed(self) -> Int32:
        """The slots freed since the last call."""
        freed, self.freed = self.freed, []
        return join(freed)

    def protect(self, node: Node) -> None:
        """The node's copy, if it has one, can no longer be evicted: it is being locked or removed."""
        slots = self.of(node)
        if len(slots):
            self.evictable -= len(slots)
            if not node.below[self.number]:
                self.leaves.remove(node)

    def expose(self, node: Node) -> None:
        """The node's copy, if it has one, can be evicted: the node was unlocked or the copy is new."""
        slots = self.of(node)
        if len(slots):
            self.evictable += len(slots)
            if not node.below[self.number]:
                self.leaves.add(node)

    def _indexed(self, node: Node) -> bool:
        """Whether the node is a leaf of this tier."""
        return not node.locks and len(self.of(node)) > 0 and not node.below[self.number]
