"""The tree: nodes, locks, tiers and the eviction indexes. Pages enter and leave the device here alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .events import ROOT, CopiesEntered, CopiesLeft, Copy, Events, LeaveReason, PagesEntered, PagesLeft
from .eviction import POLICIES
from .explain import EvictionRecord
from .matching import Walk
from .node import DEVICE, DISK, EMPTY, HOST, TOKEN_BYTES, Int32, Namespace, Node, Root, join, page_key
from .pages import PageAllocator
from .tiers import Tier


class PrefixTree:
    """Token prefixes and the slots that hold them in each memory tier, for each namespace. Independent of leases.

    Counters, read-only for others: those of each `Tier`; ``evicted_total`` (pages ever evicted from the device, pruned
    or flushed), ``num_nodes``. ``host`` and ``disk`` are None without such a tier.
    """

    def __init__(
        self,
        page_size: int,
        policy: str,
        evictions_remembered: int,
        *,
        num_pages: int,
        host_slots: int = 0,
        disk_slots: int = 0,
    ) -> None:
        if policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
        if page_size < 1:
            raise ValueError(f"a page has at least one token, got {page_size}")
        self.page_size = page_size
        sizes = {DEVICE: num_pages, HOST: host_slots, DISK: disk_slots}
        tiers = {
            number: Tier(number, PageAllocator(size), POLICIES[policy])
            for number, size in sizes.items()
            if size or number == DEVICE
        }
        self.tiers = list(tiers.values())
        self.device, self.host, self.disk = tiers[DEVICE], tiers.get(HOST), tiers.get(DISK)
        for tier in self.tiers[1:]:
            tier.changed = self._announce_copy
        self._policy = POLICIES[policy]
        self.keep_one_shot = True  # pages that were used once move to the host too when the device evicts them
        self.stores: list[tuple[Int32, Int32]] = []  # (pages, host slots): copies that the device has yet to make
        self.step = 0  # being planned
        self._clock = 0  # logical time
        self.stores_after = -1  # the last step that may write a page of those ever in `stores`
        self.published_in = np.full(num_pages, -1, np.int64)  # the step in which a page entered the tree
        self.evicted_total = 0
        self.num_nodes = 0
        self.roots: dict[Namespace, Root] = {}
        self.salts_in_use: dict[str, int] = {}  # owner -> number of its namespaces with cached pages
        self.evictions = EvictionRecord(evictions_remembered)
        self.events = Events()
        self._serial = 0

    def is_partial(self, node: Node) -> bool:
        """Whether the node is a partial page. False for a root."""
        return 0 < len(node.tokens) < self.page_size

    def size(self, node: Node) -> int:
        """The node's pages, wherever they are."""
        return -(-len(node.tokens) // self.page_size)

    def resident(self, node: Node) -> bool:
        """Whether any tier has a copy of the node."""
        return node.pages.size > 0 or node.host.size > 0 or node.disk.size > 0

    def tick(self) -> int:
        """A new logical time."""
        self._clock += 1
        return self._clock

    def root(self, namespace: Namespace) -> Root:
        """The namespace's root, made if need be."""
        root = self.roots.get(namespace)
        if root is None:
            root = self.roots[namespace] = Root(namespace)
        return root

    # ---- pages in ----

    def insert(
        self, parent: Node, key: bytes, tokens: Int32, pages: Int32, *, now: int, priority: int, locked: bool
    ) -> Node:
        """Adds pages on the device as a child of ``parent``, which must be locked. ``key``: of the first page of
        ``tokens``.

        ``locked``: the child starts with one lock, that of the lease which adds it.
        """
        child = self.add_node(parent, key, tokens, now=now, priority=priority)
        child.locks = int(locked)
        self.enter(child, pages)
        return child

    def add_node(self, parent: Node, key: bytes, tokens: Int32, *, now: int, priority: int = 0) -> Node:
        """Adds a child without a copy in any tier: the caller gives it one."""
        child = Node(tokens.copy(), EMPTY, key, parent, self._new_serial())
        child.created = child.last_access = now
        child.priority = priority
        parent.add_child(child)
        self.num_nodes += 1
        if isinstance(parent, Root) and len(parent.children) == 1:
            owner = parent.namespace[0]
            self.salts_in_use[owner] = self.salts_in_use.get(owner, 0) + 1
        return child

    def enter(self, node: Node, pages: Int32) -> None:
        """The node, whose parent is on the device or a root, gets a copy on the device."""
        self.device.put(node, pages.copy())
        self._announce(node.parent, node.tokens, pages, node)

    def extend(self, node: Node, tokens: Int32, pages: Int32) -> None:
        """Adds whole pages to the end of a locked node without children that is on the device only."""
        self._announce(node, tokens, pages)
        self.device.cached += len(pages)
        node.tokens = np.concatenate((node.tokens, tokens))
        self.device.place(node, np.concatenate((node.pages, pages)))
        node.serial = self._new_serial()

    def _announce(self, after: Node | None, tokens: Int32, pages: Int32, node: Node | None = None) -> None:
        """Pages entered the device after the present end of ``after``: all those of ``node``, or None."""
        if self.events.observers and after is not None:
            place, copied = (namespace_of(after), _last_page(after)), _other_copy(node, DEVICE)
            self.events.pending.append(PagesEntered(*place, tokens.copy(), pages.copy(), copied))

    def contents(self) -> Iterator[PagesEntered]:
        """The prefixes on the device as events, parents before children."""
        for namespace, root in self.roots.items():
            below = list(root.children.values())
            while below:
                node = below.pop()
                if len(node.pages):
                    yield PagesEntered(namespace, _last_page(node.parent), node.tokens, node.pages)
                    below += node.children.values()

    def copies(self) -> Iterator[CopiesEntered]:
        """The copies in lower tiers as events, parents before children."""
        for node in self.nodes():
            yield from (_copies_entered(tier, node) for tier in self.tiers[1:] if len(tier.of(node)))

    def nodes(self) -> Iterator[Node]:
        """Every node but the roots, parents before children."""
        nodes: list[Node] = [child for root in self.roots.values() for child in root.children.values()]
        for node in nodes:
            yield node
            nodes += node.children.values()

    def _announce_copy(self, tier: Tier, node: Node, entered: bool) -> None:
        """A lower tier has got a copy of a node, or is about to lose it."""
        if self.events.lower_tier_observers:
            if entered:
                event = _copies_entered(tier, node)._replace(copied=_other_copy(node, tier.number))
                self.events.pending.append(event)
            else:
                self.events.pending.append(CopiesLeft(tier.number, node.tokens, tier.of(node)))

    # ---- pages out ----

    def reserve(self, tier: Tier, n: int) -> Int32 | None:
        """n slots of a tier, evicting as needed; None, with nothing changed, if there are not enough."""
        short = n - tier.slots.free
        if short > tier.evictable:
            return None
        if short > 0:
            tier.free(self.evict(tier, short))
        return tier.slots.allocate(n)

    def evict(self, tier: Tier, n: int, reason: LeaveReason = "evicted") -> Int32:
        """Takes ``n`` slots, at most ``tier.evictable``, from the tail of its first leaf, then of the next.

        Evicting from the device is moving down: pages without a lower copy get one, if the host has room.
        """
        freed = []
        moves_down = tier is self.device and self.host is not None and reason == "evicted"
        while n:
            leaf = tier.leaves.first()
            keep = len(tier.of(leaf)) - n
            if keep > 0:
                self.split(leaf, keep)
            if moves_down and (leaf.hits or self.keep_one_shot):
                self.copy_down(leaf)
            if tier is self.device:
                self._left(leaf, reason)
            slots = tier.take_first()
            if not self.resident(leaf):
                self._remove(leaf, reason)
            freed.append(slots)
            n -= len(slots)
        return join(freed)

    def copy_down(self, node: Node) -> bool:
        """Gives a node on the device a copy on the host, if it has no lower copy; returns whether it has one now.

        The copy counts at once. The device makes it before it runs anything that is planned from now on (`stores`).
        """
        if self.host is None or not len(node.pages):
            return bool(len(node.host))
        if not len(node.host):
            if len(node.disk):
                return True
            slots = self.reserve(self.host, len(node.pages))
            if slots is None:
                return False
            self.host.put(node, slots)
            self.stores.append((node.pages, slots))
            self.stores_after = max(self.stores_after, int(self.published_in[node.pages].max()))
        return True

    def drop(self, node: Node, tier: Tier, reason: LeaveReason) -> Int32:
        """Takes an unlocked leaf of a tier off that tier. A node that no tier holds is removed."""
        if tier is self.device:
            self._left(node, reason)
        slots = tier.take(node)
        if not self.resident(node):
            self._remove(node, reason)
        return slots

    def remove(self, node: Node, reason: LeaveReason) -> Int32:
        """Removes an unlocked node that has no child on the device, from every tier. Returns its pages."""
        pages = node.pages
        if len(pages):
            self._left(node, reason)
        self._take_everywhere(node)
        self._remove(node, reason)
        return pages

    def remove_covered(self, parent: Node, key: bytes) -> Int32:
        """Removes the unlocked partial pages below ``parent`` whose tokens a page ``key`` begins with, and more."""
        freed = []
        if parent.children:
            for end in range(TOKEN_BYTES, len(key), TOKEN_BYTES):
                node = parent.children.get(key[:end])
                if node is not None and not node.locks:
                    freed.append(self.remove(node, "covered"))
        return join(freed)

    def forget(self, node: Node, tier: Tier) -> None:
        """Drops the copies that a lower tier has of a node and of what continues it: one of them is wrong.

        A copy that a transfer may be reading stays, and fails again when it is read.
        """
        order = [node]
        for each in order:
            order += each.children.values()
        for each in reversed(order):  # children before their parents
            if not len(tier.of(each)) or each.below[tier.number]:
                continue
            if not each.locks:
                tier.free(self.drop(each, tier, "evicted"))
            elif tier is self.disk and len(each.pages):
                tier.free(tier.take(each))

    def clear_lower(self, keep_disk: bool) -> None:
        """Removes every copy of unlocked nodes from the host and, if not ``keep_disk``, from the disk."""
        for tier in self.tiers[1:]:
            if tier is self.disk and keep_disk:
                continue
            tier.free(self.evict(tier, tier.evictable, "flushed"))

    def _left(self, node: Node, reason: LeaveReason) -> None:
        """Accounts for a node that leaves the device."""
        if reason != "covered":
            self.evicted_total += node.pages.size
        if self.events.observers and node.parent is not None:
            self.events.pending.append(
                PagesLeft(namespace_of(node), _last_page(node.parent), node.tokens, node.pages, reason)
            )

    def _remove(self, node: Node, reason: LeaveReason) -> None:
        """Removes an unlocked node without copies, and the nodes below it in lower tiers, which no lookup can reach."""
        parent = node.parent
        if parent is None:
            raise RuntimeError("a root has no pages to remove")
        if node.children:
            self._remove_below(node)
        parent.remove_child(node)
        self.num_nodes -= 1
        if reason != "covered":
            self.evictions.note(parent.serial, node.key)
        if isinstance(parent, Root) and not parent.children:
            owner = parent.namespace[0]
            self.salts_in_use[owner] -= 1
            if not self.salts_in_use[owner]:
                del self.salts_in_use[owner]
            if not parent.locks:
                del self.roots[parent.namespace]

    def _remove_below(self, node: Node) -> None:
        below = list(node.children.values())
        while below:
            orphan = below.pop()
            self._take_everywhere(orphan)
            self.num_nodes -= 1
            below += orphan.children.values()

    def _take_everywhere(self, node: Node) -> None:
        """Takes a node's copies; those of the lower tiers are freed, those on the device are the caller's to free."""
        for tier in self.tiers:
            if len(tier.of(node)):
                slots = tier.take(node)
                if tier is not self.device:
                    tier.free(slots)

    # ---- splits and locks ----

    def split_at(self, walk: Walk) -> Node:
        """The node that ends exactly where the walk ended, split off if need be."""
        return self.split(walk.node, walk.inside) if walk.stopped_inside else walk.node

    def split(self, lower: Node, pages: int) -> Node:
        """Splits a node after its first ``pages`` pages, some but not all; returns the upper part.

        The lower part is the old node: it ends where it ended, so its serial, leases and index entries stay valid. The
        upper part gets copies of times, hits and priority, and of the locks, which belong to paths that pass it.
        """
        parent, border = lower.parent, pages * self.page_size
        if parent is None:
            raise RuntimeError("a root has no pages to split")
        upper = Node(_head(lower.tokens, border), EMPTY, lower.key, parent, self._new_serial())
        upper.locks, upper.hits, upper.priority = lower.locks, lower.hits, lower.priority
        upper.created, upper.last_access, upper.transfer = lower.created, lower.last_access, lower.transfer
        lower.tokens = lower.tokens[border:].copy()
        lower.key = page_key(lower.tokens[: self.page_size])
        parent.children[upper.key] = upper
        upper.add_child(lower)
        for tier in self.tiers:
            slots = tier.of(lower)
            if len(slots):
                tier.place(upper, _head(slots, pages))
                tier.place(lower, slots[pages:].copy())
                upper.below[tier.number] = 1
        self.num_nodes += 1
        return upper

    def join_path(self, end: Node) -> None:
        """Joins nodes on the path to ``end`` that requests, transfers and splits have divided, so that a walk takes few
        steps: an unlocked node and its only child become one node if `_may_join` allows it. Of each joined run the last
        node stays, which keeps its serial and its place in the eviction indexes."""
        run = [end]
        for upper in end.upwards():
            if upper is end:
                continue
            if self._may_join(upper, run[-1]):
                run.append(upper)
                continue
            self._join(run)
            if upper.locks:  # and so is everything above it
                return
            run = [upper]

    def _may_join(self, upper: Node, lower: Node) -> bool:
        """Whether two nodes on one path differ in nothing that eviction, a match or its explanation depends on."""
        alike = len(upper.children) == 1 and not (upper.locks or lower.locks or isinstance(upper, Root))
        return (
            alike
            and len(lower.tokens) % self.page_size == 0
            and all((len(tier.of(upper)) > 0) == (len(tier.of(lower)) > 0) for tier in self.tiers)
            and self._policy(upper) == self._policy(lower)
            and (upper.hits > 0) == (lower.hits > 0)
            and not self.evictions.elsewhere(upper.serial, lower.key)
        )

    def _join(self, run: list[Node]) -> None:
        """Makes one node of several, from the lowest to the highest. Of equal rank to the policy, they may differ in
        hits and priority: the highest count."""
        if len(run) == 1:
            return
        lower, upper = run[0], run[-1]
        run = run[::-1]
        lower.tokens = join([node.tokens for node in run])
        for tier in self.tiers:
            if len(tier.of(lower)):
                tier.place(lower, join([tier.of(node) for node in run]))
        lower.key = upper.key
        lower.hits = max(node.hits for node in run)
        lower.priority = max(node.priority for node in run)
        if upper.parent is not None:
            upper.parent.add_child(lower)
        self.num_nodes -= len(run) - 1

    def lock(self, node: Node, top: Node | None = None) -> None:
        """Adds one lock to each node from ``node`` up to ``top`` (exclusive) or to the root (inclusive)."""
        for each in node.upwards(top):
            if not each.locks:
                for tier in self.tiers:
                    tier.protect(each)
            each.locks += 1

    def unlock(self, node: Node, top: Node | None = None) -> None:
        """Undoes one `lock`. An unlocked root without children is dropped."""
        for each in node.upwards(top):
            each.locks -= 1
            if not each.locks:
                for tier in self.tiers:
                    tier.expose(each)
                if isinstance(each, Root) and not each.children:
                    del self.roots[each.namespace]

    def _new_serial(self) -> int:
        self._serial += 1
        return self._serial


def namespace_of(node: Node) -> Namespace:
    """The namespace that a node is in. O(depth)."""
    *_, root = node.upwards()
    if not isinstance(root, Root):
        raise RuntimeError(f"node {node.serial} is not in the tree")
    return root.namespace


def _last_page(node: Node | None) -> int:
    return int(node.pages[-1]) if node is not None and len(node.pages) else ROOT


def _copies_entered(tier: Tier, node: Node) -> CopiesEntered:
    return CopiesEntered(namespace_of(node), tier.number, _copy_of_last_page(node.parent), node.tokens, tier.of(node))


def _copy_of_last_page(node: Node | None) -> tuple[int, int] | None:
    """(tier, slot) of the highest copy of a node's last page; None for a root."""
    if node is None or isinstance(node, Root):
        return None
    copy = _other_copy(node, None)
    if copy is None:
        raise RuntimeError(f"node {node.serial} has a copy in no tier, and a page that follows it has one")
    return copy[0], int(copy[1][-1])


def _other_copy(node: Node | None, tier: int | None) -> Copy | None:
    """The highest copy of a node that is not in ``tier``."""
    if node is None:
        return None
    copies = ((DEVICE, node.pages), (HOST, node.host), (DISK, node.disk))
    return next(((number, slots) for number, slots in copies if len(slots) and number != tier), None)


def _head(array: Int32, n: int) -> Int32:
    """The first n: a view, unless that would keep more than twice its size alive."""
    whole = array if array.base is None else array.base
    return array[:n].copy() if 2 * n < len(whole) else array[:n]
