"""The radix tree: which token prefixes have their keys and values in which pages, and who is using them.

The idea is SGLang's RadixAttention (arXiv 2312.07104); what differs here is argued in README.md.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from .check import check_tree
from .dump import dump_tree
from .errors import LeaseError
from .eviction import POLICIES, EvictionIndex
from .explain import REASONS, EvictionRecord, Reason, explain
from .hold import Hold
from .inspection import Inspection, inspect
from .lease import Lease
from .matching import Walk, closest_page, follow
from .node import DEFAULT, TOKEN_BYTES, Int32, Namespace, Node, Root, page_key
from .pages import PageAllocator
from .prune import prune

EVICTIONS_REMEMBERED = 65_536
GROWS_UP_TO = 4096  # tokens: growing a node copies it, so beyond this a long node gets a child instead of a few tokens


class RadixTree:
    """A radix tree of token prefixes for each namespace, over one pool of pages.

    Token ids and pages are one-dimensional int32 arrays. One thread at a time.

    Read at will, all O(1): ``allocator``, ``available``, ``evictable`` (pages of unlocked nodes), ``cached`` (pages in
    the tree), ``evicted_total`` (pages, ever), ``num_nodes``, ``reasons`` (matches by the reason they stopped).
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int = 16,
        policy: str = "lru",
        enabled: bool = True,
        evictions_remembered: int = EVICTIONS_REMEMBERED,
    ) -> None:
        if policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
        self.allocator = PageAllocator(num_pages, page_size)
        self.page_size = page_size
        self.enabled = enabled
        self.evictable = 0
        self.cached = 0
        self.evicted_total = 0
        self.num_nodes = 0
        self.reasons: dict[Reason, int] = dict.fromkeys(REASONS, 0)
        self.roots: dict[Namespace, Root] = {}
        self.leases: dict[Lease, None] = {}  # the live ones, in the order they were made
        self.holds: dict[Hold, None] = {}  # likewise
        self.leaves = EvictionIndex(POLICIES[policy])
        self.salts_in_use: dict[str, int] = {}  # owner -> namespaces of theirs that hold something
        # Under these an extension of a node counts as a use of the whole node. Under the others new pages must not
        # inherit an old node's past, so there a node grows only by the lease that added it.
        self._by_recency = policy in ("lru", "priority")
        self.evictions = EvictionRecord(evictions_remembered)
        self._published_in = np.full(num_pages, -1, np.int64)  # the step in which a page entered the tree
        self._step = 0
        self._clock = 0
        self._serial = 0

    @property
    def available(self) -> int:
        """Pages a reservation could get now. Quarantined ones are not counted."""
        return self.allocator.free + self.evictable

    # ---- what a request does: match, reserve, publish, release ----

    def peek(
        self, tokens: Int32, namespace: Namespace = DEFAULT, limit: int | None = None, *, fresh: bool = False
    ) -> int:
        """What `match` would report as ``hit``, without touching anything.

        ``fresh``: what it would report once the step being planned has run, when its pages can be copied from.
        """
        root = self.roots.get(namespace)
        if root is None or not self.enabled:
            return 0
        tokens = np.asarray(tokens, np.int32)
        limit = _clamp(limit, len(tokens))
        walk = follow(root, tokens, 0, limit, self.page_size)
        may_copy = _any_page if fresh else self._may_copy
        return walk.length + closest_page(walk, tokens, limit, self.page_size, may_copy).tokens

    def match(
        self, tokens: Int32, namespace: Namespace = DEFAULT, limit: int | None = None, priority: int = 0
    ) -> Lease:
        """Leases the longest cached prefix: its pages are locked before anything else can evict them.

        At most ``limit`` tokens are reused: pass ``len(tokens) - 1``, for the last must be computed to get its logits.
        """
        tokens = np.asarray(tokens, np.int32)
        limit = _clamp(limit, len(tokens)) if self.enabled else 0
        root = self.roots.get(namespace)
        if root is None:
            root = self.roots[namespace] = Root(namespace)
        walk = follow(root, tokens, 0, limit, self.page_size)
        partial = closest_page(walk, tokens, limit, self.page_size, self._may_copy)
        report = explain(self, namespace, tokens, limit, walk, partial)
        self.reasons[report.reason] += 1

        end = self._split_at(walk)
        lease = Lease(
            namespace=namespace,
            priority=priority,
            page_size=self.page_size,
            length=walk.length,
            hit=walk.length + partial.tokens,
            pages=_join(walk.pages),
            copy=(partial.page, partial.tokens) if partial.node else None,
            report=report,
            node=end,
            source=partial.node,
        )
        self.leases[lease] = None
        self._lock(end)
        if partial.node is not None:
            self._lock(partial.node, end)
        now = self._tick()
        for node in end.upwards():
            self._use(node, now, priority)
        if partial.node is not None and self._is_stub(partial.node):  # all of it is used, as of no other source
            self._use(partial.node, now, priority)
        return lease

    def reserve(self, lease: Lease, n: int) -> Int32 | None:
        """n more pages for the lease, evicting as needed; None, with nothing changed, if they cannot be had."""
        self._require_live(lease)
        short = n - self.allocator.free
        if short > self.evictable:
            return None
        if short > 0:
            self._evict(short)
        pages = self.allocator.allocate(n)
        lease.pages = np.concatenate((lease.pages, pages))
        return pages

    def publish(self, lease: Lease, tokens: Int32) -> tuple[int, Int32] | None:
        """Puts every whole page of ``tokens`` beyond ``lease.length`` into the tree, and moves the lock to the new end.

        ``tokens`` are the request's from position 0, as far as their keys and values are written *or scheduled in the
        step being planned*: that a page is published is a promise that this step will run and write it.

        Where the tree already holds such a page (somebody published it meanwhile) the lease's own goes to quarantine
        and the canonical one takes its place: returns (index into ``lease.pages`` of the first that changed, the
        canonical pages from there on), which the request must use from now on. None if nothing changed.
        """
        self._require_live(lease)
        tokens = np.asarray(tokens, np.int32)
        page_size = self.page_size
        first, last = lease.length // page_size, len(tokens) // page_size
        if last > len(lease.pages):
            raise LeaseError(f"{last} whole pages to publish, but the lease holds {len(lease.pages)}")
        self._release_source(lease)
        if last <= first or not self.enabled:
            return None

        walk = follow(lease.node, tokens, lease.length, last * page_size, page_size)
        end = self._split_at(walk)
        self._lock(end, lease.node)
        known = walk.length // page_size
        replaced = None
        if known > first:
            canonical = _join(walk.pages)
            self.allocator.quarantine(lease.pages[first:known])
            lease.pages = np.concatenate((lease.pages[:first], canonical, lease.pages[known:]))
            replaced = first, canonical
        if last > known:
            end = self._grow(lease, end, tokens[walk.length : last * page_size], lease.pages[known:last])
        lease.node = end
        lease.length = last * page_size
        return replaced

    def release(self, lease: Lease, tokens: Int32 | None = None) -> None:
        """Ends the lease. With ``tokens`` (as for `publish`) what it computed stays in the tree, to the last token.

        The last, partial page is kept as a stub unless something in the tree covers it. Without ``tokens`` nothing is
        published. Whatever the lease still owns is quarantined.
        """
        self._require_live(lease)
        stubs = 0
        if tokens is not None and self.enabled:
            tokens = np.asarray(tokens, np.int32)
            if len(tokens) > len(lease.pages) * self.page_size:
                raise LeaseError(f"{len(tokens)} tokens to publish, but the lease holds {len(lease.pages)} pages")
            self.publish(lease, tokens)
            stubs = self._keep_stub(lease, tokens[lease.length :])
        self._release_source(lease)
        self.allocator.quarantine(lease.pages[lease.length // self.page_size + stubs :])
        lease.pages = lease.pages[:0]
        lease.released = True
        del self.leases[lease]
        now = self._tick()
        for node in lease.node.upwards():  # held until now is used until now
            node.last_access = now
        self._unlock(lease.node)

    # ---- what a branch does between its requests: hold, share, unhold ----

    def hold(self, tokens: Int32, namespace: Namespace = DEFAULT) -> Hold | None:
        """Keeps the longest cached prefix from eviction, to the token, and no page more. None: nothing is cached."""
        root = self.roots.get(namespace)
        if root is None or not self.enabled:
            return None
        tokens = np.asarray(tokens, np.int32)
        walk = follow(root, tokens, 0, len(tokens), self.page_size)
        partial = closest_page(walk, tokens, len(tokens), self.page_size, _any_page)
        end = self._split_at(walk)
        if partial.node is not None:  # now a child of the path's end: of its pages the first is the one
            end = self._split_at(Walk(partial.node, 1, 0, 0, []))
        if end is root:
            return None
        self._lock(end)
        now = self._tick()
        for node in end.upwards():
            node.last_access = now
        hold = Hold(namespace, walk.length + partial.tokens, end)
        self.holds[hold] = None
        return hold

    def share(self, hold: Hold, n: int = 1) -> None:
        """``n`` sharers more."""
        if hold not in self.holds:
            raise LeaseError("the hold has ended or is of another tree")
        hold.count += n

    def unhold(self, hold: Hold) -> None:
        """One sharer less. After the last its pages are evictable, as old as they were; a covered stub goes."""
        if hold not in self.holds:
            raise LeaseError("the hold has ended or is of another tree")
        hold.count -= 1
        if hold.count:
            return
        del self.holds[hold]
        node = hold.node
        self._unlock(node)
        if not node.locks and self._is_stub(node) and node.parent is not None:
            after = node.parent.children.bisect_right(node.key)
            if after < len(node.parent.children) and node.parent.children.peekitem(after)[0].startswith(node.key):
                self._drop_stub(node, self.allocator.give_back)

    # ---- what a step does ----

    def begin_step(self) -> int:
        """A new step is being planned: see `PageAllocator.begin_step`. Pages published before are no longer *fresh*."""
        self._step = self.allocator.begin_step()
        return self._step

    def end_step(self, step: int) -> None:
        """Every step up to and including this one has ended."""
        self.allocator.end_step(step)

    def cancel_step(self, step: int) -> None:
        """The step begun last was planned and will not run. Nothing may have been published for it."""
        self.allocator.cancel_step(step)
        self._step = step - 1  # the number is given again: what is published until then must not look fresh to it

    # ---- what an operator does ----

    def flush(self) -> int:
        """Evicts everything that is not leased; returns the number of pages."""
        pages = self.evictable
        self._evict(pages)
        return pages

    def inspect(self, tokens: Int32, namespace: Namespace = DEFAULT, limit: int | None = None) -> Inspection:
        """What `match` would find once this step has run, and how safe it is, without touching anything."""
        tokens = np.asarray(tokens, np.int32)
        return inspect(self, tokens, namespace, _clamp(limit, len(tokens)) if self.enabled else 0)

    def prune(self, tokens: Int32, namespace: Namespace = DEFAULT) -> int:
        """Evicts what begins with ``tokens`` and is not leased or held: see `prune.prune`. Returns the pages."""
        return prune(self, np.asarray(tokens, np.int32), namespace)

    def dump(self, max_nodes: int = 1000, preview: int | None = None) -> dict[str, Any]:
        """The tree as JSON-able data: see `dump.dump_tree`."""
        return dump_tree(self, max_nodes, preview)

    def check(self, leases: Collection[Lease] | None = None) -> None:
        """Walks everything and raises `InvariantError` unless the books balance: see `check.check_tree`."""
        check_tree(self, leases)

    # ---- growing ----

    def _split_at(self, walk: Walk) -> Node:
        """The node that ends exactly where the walk ended, split off if need be.

        The lower half is the old node: it ends where it ended, so serial, leases and index entry stay right. The upper
        half takes the copies: the times, hits and priority it had, and the locks, for they are of paths to below it.
        """
        lower, inside = walk.node, walk.inside
        if not walk.stopped_inside:
            return lower
        parent, border = lower.parent, inside * self.page_size
        if parent is None:
            raise RuntimeError("a root has no pages to split")
        upper = Node(lower.tokens[:border].copy(), lower.pages[:inside].copy(), lower.key, parent, self._new_serial())
        upper.locks, upper.hits, upper.priority = lower.locks, lower.hits, lower.priority
        upper.created, upper.last_access = lower.created, lower.last_access
        lower.tokens, lower.pages = lower.tokens[border:].copy(), lower.pages[inside:].copy()
        lower.key = page_key(lower.tokens[: self.page_size])
        parent.children[upper.key] = upper
        upper.adopt(lower)
        self.num_nodes += 1
        return upper

    def _grow(self, lease: Lease, end: Node, tokens: Int32, pages: Int32) -> Node:
        """Adds pages after ``end``, which the lease has locked: to the node itself if it may grow, else as a child."""
        key = page_key(tokens[: self.page_size])
        self._drop_covered_stubs(end, key)
        self._published_in[pages] = self._step
        self.cached += len(pages)
        if self._may_extend(lease, end, len(tokens)):
            end.tokens = np.concatenate((end.tokens, tokens))
            end.pages = np.concatenate((end.pages, pages))
            end.serial = self._new_serial()
            return end
        lease.grown = self._attach(end, tokens, pages, key, lease.priority)
        lease.grown.locks = 1
        return lease.grown

    def _may_extend(self, lease: Lease, end: Node, growth: int) -> bool:
        if end.locks > 1 or end.children or not len(end.pages) or len(end.tokens) > max(GROWS_UP_TO, growth):
            return False
        if self._by_recency:
            return end is lease.grown or end.priority == lease.priority
        return end is lease.grown and not end.hits

    def _keep_stub(self, lease: Lease, tokens: Int32) -> int:
        """Gives the tree a finished request's last page, partly filled, to copy from. Returns 1 if it took it."""
        key = page_key(tokens)
        if not key or any(node.key.startswith(key) for node in lease.node.neighbours(key)):
            return 0  # a page or another stub holds the same tokens already
        self._drop_covered_stubs(lease.node, key)
        at = lease.length // self.page_size
        page = lease.pages[at : at + 1]
        self._published_in[page] = self._step
        self.cached += 1
        self.evictable += 1
        self.leaves.add(self._attach(lease.node, tokens, page, key, lease.priority))
        return 1

    def _drop_covered_stubs(self, parent: Node, key: bytes) -> None:
        """A stub whose tokens begin the page (or longer stub) about to enter is of no more use."""
        if not parent.children:
            return
        for end in range(TOKEN_BYTES, len(key), TOKEN_BYTES):
            stub = parent.children.get(key[:end])
            if stub is not None and not stub.locks:
                self._drop_stub(stub, self.allocator.quarantine)  # this step may copy from it

    def _drop_stub(self, stub: Node, free: Callable[[Int32], None]) -> None:
        self.leaves.remove(stub)
        self.cached -= 1
        self.evictable -= 1
        free(stub.pages)
        self.detach(stub)

    def _attach(self, parent: Node, tokens: Int32, pages: Int32, key: bytes, priority: int) -> Node:
        child = Node(tokens.copy(), pages.copy(), key, parent, self._new_serial())
        child.created = child.last_access = self._tick()
        child.priority = priority
        parent.adopt(child)
        self.num_nodes += 1
        if isinstance(parent, Root) and len(parent.children) == 1:
            owner = parent.namespace[0]
            self.salts_in_use[owner] = self.salts_in_use.get(owner, 0) + 1
        return child

    # ---- locks and eviction ----

    def _lock(self, node: Node, top: Node | None = None) -> None:
        """Locks the path from ``node`` up to ``top`` (excluded) or to the root (included): one lease more on each."""
        for each in node.upwards(top):
            if not each.locks and len(each.pages):  # a root has no pages, and nothing evicts it
                self.evictable -= len(each.pages)
                if not each.children:
                    self.leaves.remove(each)
            each.locks += 1

    def _unlock(self, node: Node, top: Node | None = None) -> None:
        for each in node.upwards(top):
            each.locks -= 1
            if not each.locks:
                self.evictable += len(each.pages)
                if not each.children:
                    self._became_leaf(each)

    def _became_leaf(self, node: Node) -> None:
        """An unlocked node without children: next in line for eviction, or an empty namespace, which goes at once."""
        if isinstance(node, Root):
            del self.roots[node.namespace]
        else:
            self.leaves.add(node)

    def _release_source(self, lease: Lease) -> None:
        """The source hangs below the path's end; were it split meanwhile, the walk up passes both halves."""
        if lease.source is not None:
            self._unlock(lease.source, lease.node)
            lease.source = None

    def _evict(self, n: int) -> None:
        """Frees n pages, which must be evictable: from the tail of the first leaf, then of the next."""
        self.evictable -= n
        self.cached -= n
        self.evicted_total += n
        freed = []
        while n:
            leaf = self.leaves.pop()
            keep = max(0, len(leaf.pages) - n)
            freed.append(leaf.pages[keep:])
            n -= len(freed[-1])
            if keep:
                self._trim(leaf, keep)
            elif leaf.parent is not None:
                self.evictions.note(leaf.parent.serial, leaf.key)
                self.detach(leaf)
        self.allocator.give_back(_join(freed))

    def _trim(self, leaf: Node, keep: int) -> None:
        border = keep * self.page_size
        leaf.serial = self._new_serial()
        self.evictions.note(leaf.serial, page_key(leaf.tokens[border : border + self.page_size]))
        leaf.tokens, leaf.pages = _head(leaf.tokens, border), _head(leaf.pages, keep)
        self.leaves.add(leaf)

    def detach(self, leaf: Node) -> None:
        """Takes a node without children out of the tree. Its parent may be the next leaf."""
        parent = leaf.parent
        if parent is None:
            raise RuntimeError("a root cannot be detached")
        parent.disown(leaf)
        self.num_nodes -= 1
        if isinstance(parent, Root) and not parent.children:
            owner = parent.namespace[0]
            self.salts_in_use[owner] -= 1
            if not self.salts_in_use[owner]:
                del self.salts_in_use[owner]
        if not parent.children and not parent.locks:
            self._became_leaf(parent)

    # ---- small things ----

    def _require_live(self, lease: Lease) -> None:
        if lease not in self.leases:
            raise LeaseError("the lease was released" if lease.released else "the lease is of another tree")

    def _use(self, node: Node, now: int, priority: int) -> None:
        """Only on locked nodes: the eviction index files a leaf under these."""
        node.last_access = now
        node.hits += 1
        node.priority = max(node.priority, priority)

    def _may_copy(self, page: int) -> bool:
        """Not from a *fresh* page: the step being planned writes it, and a step copies before it writes."""
        return bool(self._published_in[page] != self._step)

    def _is_stub(self, node: Node) -> bool:
        return len(node.tokens) < self.page_size

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _new_serial(self) -> int:
        self._serial += 1
        return self._serial


def _any_page(_page: int) -> bool:
    return True


def _clamp(limit: int | None, length: int) -> int:
    return length if limit is None else max(0, min(limit, length))


def _join(arrays: list[Int32]) -> Int32:
    return np.concatenate(arrays) if arrays else np.empty(0, np.int32)


def _head(array: Int32, n: int) -> Int32:
    """The first n: a view, until it would keep more than twice its size alive."""
    whole = array if array.base is None else array.base
    return array[:n].copy() if 2 * n < len(whole) else array[:n]
