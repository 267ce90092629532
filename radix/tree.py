"""The prefix cache: matching, reserving, publishing and releasing pages, over the tree of `structure.PrefixTree`.

The idea is SGLang's RadixAttention (arXiv 2312.07104); README.md says what differs here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np

from .check import check_locks, check_scores, check_slots, check_structure
from .dump import dump_namespaces
from .errors import InvariantError, LeaseError
from .events import Event, Observer
from .explain import REASONS, Explanation, Reason
from .hold import Hold
from .hottest import hottest
from .inspection import Inspection, explain, inspect
from .lease import Lease
from .matching import closest_page, follow
from .moves import Moves, Reach, Transfer
from .node import DEFAULT, DEVICE, DISK, EMPTY, Int32, Namespace, Node, Root, join
from .prune import prune
from .publishing import Publisher
from .scores import Scores, ScoreTable, remembered
from .structure import PrefixTree

EVICTIONS_REMEMBERED = 65_536


class RadixTree:
    """A radix tree of token prefixes for each namespace, over one pool of pages.

    Token ids and page numbers are one-dimensional int32 arrays. Not thread-safe.

    Readable at any time, each O(1): ``allocator``, ``available``, ``evictable`` (pages of unlocked nodes), ``cached``
    (pages in the tree), ``evicted_total`` (pages, ever), ``num_nodes``, ``reasons`` (matches by the reason they
    ended).
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int = 16,
        policy: str = "lru",
        enabled: bool = True,
        evictions_remembered: int = EVICTIONS_REMEMBERED,
        *,
        host_slots: int = 0,
        disk_slots: int = 0,
    ) -> None:
        self.structure = PrefixTree(
            page_size,
            policy,
            evictions_remembered,
            num_pages=num_pages,
            host_slots=host_slots if enabled else 0,
            disk_slots=disk_slots if enabled else 0,
        )
        self.allocator = self.structure.device.slots
        self.moves = Moves(self.structure)
        self.page_size = page_size
        self.enabled = enabled
        self.reasons: dict[Reason, int] = dict.fromkeys(REASONS, 0)
        self.leases: dict[Lease, None] = {}  # the live ones, in the order in which they were made
        self.holds: dict[Hold, None] = {}  # likewise
        self._scores = ScoreTable(num_pages, page_size)
        self._publisher = Publisher(self.structure, self._scores, policy)

    @property
    def roots(self) -> dict[Namespace, Root]:
        """The root of each namespace with pages or leases."""
        return self.structure.roots

    @property
    def cached(self) -> int:
        """Pages in the tree."""
        return self.structure.device.cached

    @property
    def evictable(self) -> int:
        """Pages of unlocked nodes."""
        return self.structure.device.evictable

    @property
    def evicted_total(self) -> int:
        """Pages ever evicted, pruned or flushed."""
        return self.structure.evicted_total

    @property
    def num_nodes(self) -> int:
        """Nodes in all namespaces, without roots."""
        return self.structure.num_nodes

    @property
    def available(self) -> int:
        """Pages that a reservation could get now. Quarantined pages are not counted."""
        return self.structure.device.available

    # ---- requests: match, reserve, publish, release ----

    def peek(self, tokens: Int32, namespace: Namespace = DEFAULT, limit: int | None = None) -> int:
        """The ``hit`` that `match` would report; changes nothing."""
        return self.peek_in_flight(tokens, namespace, limit)[0]

    def peek_in_flight(
        self, tokens: Int32, namespace: Namespace = DEFAULT, limit: int | None = None
    ) -> tuple[int, int]:
        """The ``hit`` that `match` would report now, and once the step being planned has run, when its pages can be
        copied."""
        root = self.structure.roots.get(namespace)
        if root is None or not self.enabled:
            return 0, 0
        tokens = np.asarray(tokens, np.int32)
        limit = _clamp(limit, len(tokens))
        walk = follow(root, tokens, 0, limit, self.page_size)
        partial = closest_page(walk, tokens, limit, self.page_size, self._may_copy)
        return walk.length + partial.tokens, walk.length + partial.common

    def match(
        self, tokens: Int32, namespace: Namespace = DEFAULT, limit: int | None = None, priority: int = 0
    ) -> Lease:
        """Leases the longest cached prefix: its pages are locked before anything else can evict them.

        Reuses at most ``limit`` tokens. Pass ``len(tokens) - 1`` to sample: the last token must be computed for its
        logits.
        """
        tokens = np.asarray(tokens, np.int32)
        limit = _clamp(limit, len(tokens)) if self.enabled else 0
        structure = self.structure
        root = structure.root(namespace)
        walk = follow(root, tokens, 0, limit, self.page_size)
        partial = closest_page(walk, tokens, limit, self.page_size, self._may_copy)
        if self.enabled:
            report = explain(structure, namespace, tokens, limit, walk, partial)
        else:
            report = Explanation(0, "disabled")
        self.reasons[report.reason] += 1
        end = structure.split_at(walk)
        lease = Lease(
            namespace=namespace,
            priority=priority,
            page_size=self.page_size,
            length=walk.length,
            hit=walk.length + partial.tokens,
            pages=join(walk.pages),
            copy=(partial.page, partial.tokens) if partial.node is not None else None,
            report=report,
            node=end,
            source=partial.node,
        )
        self.leases[lease] = None
        structure.lock(end)
        if partial.node is not None:
            structure.lock(partial.node, end)
        now = structure.tick()
        for node in end.upwards():
            _use(node, now, priority)
        if partial.node is not None and structure.is_partial(partial.node):  # all of it is used; else a part
            _use(partial.node, now, priority)
        return lease

    def reserve(self, lease: Lease, n: int) -> Int32 | None:
        """n more pages for the lease, evicting as needed; None, with nothing changed, if there are not enough."""
        return self._reserve([lease], n)

    def reserve_each(self, leases: Sequence[Lease]) -> Int32 | None:
        """One more page for each lease, int32 ``[len(leases)]``, at the cost of one reservation: see `reserve`."""
        return self._reserve(leases, 1)

    def _reserve(self, leases: Sequence[Lease], n: int) -> Int32 | None:
        for lease in leases:
            self._require_live(lease)
        found = self.structure.reserve(self.structure.device, n * len(leases))
        if found is None:
            return None
        self._scores.forget(found)
        for i, lease in enumerate(leases):
            pages = found[i * n : (i + 1) * n]
            if lease.copy is not None and lease.source is not None and n and not lease.owned:
                self._scores.copy(lease.copy[0], int(pages[0]), lease.copy[1])
            lease.pages = np.concatenate((lease.pages, pages))
            if lease.scores_ahead is not None and n:
                start, scores = lease.scores_ahead
                lease.scores_ahead = None
                self.record_scores(lease, start, scores)
        self.structure.events.deliver()
        return found

    def publish(self, lease: Lease, tokens: Int32) -> tuple[int, Int32] | None:
        """Adds every whole page of ``tokens`` beyond ``lease.length`` to the tree, and extends the lease's path to it.

        ``tokens`` are the request's from position 0, as far as their keys and values are written *or scheduled in the
        step being planned*: publishing a page promises that this step will run and write it.

        If the tree already has such a page (another request published it meanwhile), the lease's own page is
        quarantined and the canonical page replaces it: returns (index into ``lease.pages`` of the first that changed,
        the canonical pages from there on), which the request must use from now on. None if nothing changed.

        Raises `LeaseError` if the lease has ended or has too few pages.
        """
        self._require_live(lease)
        replaced = self._publisher.publish(lease, tokens if self.enabled else tokens[: lease.length])
        self.structure.events.deliver()
        return replaced

    def release(self, lease: Lease, tokens: Int32 | None = None) -> None:
        """Ends the lease. With ``tokens`` (as for `publish`) everything computed stays in the tree, to the last token:
        the last, partial page is kept too, unless another page begins with the same tokens. Without, nothing is
        published. Pages that the lease still owns are quarantined.
        """
        self._require_live(lease)
        kept = 0
        if tokens is not None and self.enabled:
            tokens = np.asarray(tokens, np.int32)
            if len(tokens) > len(lease.pages) * self.page_size:
                raise LeaseError(f"{len(tokens)} tokens to publish, but the lease has {len(lease.pages)} pages")
            self._publisher.publish(lease, tokens)
            kept = self._publisher.keep_partial_page(lease, tokens[lease.length :])
        self._publisher.release_source(lease)
        self.allocator.quarantine(lease.pages[lease.length // self.page_size + kept :])
        lease.pages = lease.pages[:0]
        lease.released = True
        del self.leases[lease]
        self._touch(lease.node)  # it was in use until now
        self.structure.unlock(lease.node)
        self.structure.join_path(lease.node)
        self.structure.events.deliver()

    def exclusive(self, lease: Lease) -> int:
        """Pages that would become available if the lease ended: those that no other lease or hold protects."""
        pages = lease.owned
        for node in lease.node.upwards():
            if node.locks > 1:
                break
            pages += len(node.pages)
        return pages

    # ---- scores of prompt tokens: see `scores` ----

    def scores(self, tokens: Int32, namespace: Namespace = DEFAULT, start: int = 1) -> Scores:
        """The remembered scores of ``tokens[start:]``, up to the first that is not remembered."""
        root = self.structure.roots.get(namespace) if self.enabled else None
        return remembered(self._scores, root, np.asarray(tokens, np.int32), start)

    def record_scores(self, lease: Lease, start: int, scores: Scores) -> None:
        """Keeps the scores of the lease's tokens from position ``start`` on, as long as their pages are cached.

        The logits of a page's last token score the first token of a page that may not be reserved yet: that score is
        kept with the lease until then.
        """
        self._require_live(lease)
        if not self.enabled:
            return
        room = max(0, len(lease.pages) * self.page_size - start)
        if room:
            self._scores.write(lease.pages, start, scores[:room])
        if len(scores) > room:
            lease.scores_ahead = start + room, scores[room:]

    # ---- branches and pins, between requests: hold, share, unhold ----

    def hold(self, tokens: Int32, namespace: Namespace = DEFAULT) -> Hold | None:
        """Protects the longest cached prefix from eviction, to the token and no page more. None: nothing is cached."""
        root = self.roots.get(namespace)
        if root is None or not self.enabled:
            return None
        tokens = np.asarray(tokens, np.int32)
        walk = follow(root, tokens, 0, len(tokens), self.page_size)
        partial = closest_page(walk, tokens, len(tokens), self.page_size, _any_page)
        end = self.structure.split_at(walk)
        if partial.node is not None:  # a child of the path's end by now; only its first page is needed
            end = partial.node if len(partial.node.pages) == 1 else self.structure.split(partial.node, 1)
        if end is root:
            return None
        self.structure.lock(end)
        self._touch(end)
        hold = Hold(namespace, walk.length + partial.tokens, end)
        self.holds[hold] = None
        return hold

    def share(self, hold: Hold, n: int = 1) -> None:
        """Adds ``n`` sharers to a hold."""
        self._require_hold(hold)
        hold.count += n

    def unhold(self, hold: Hold) -> None:
        """Removes one sharer. After the last the pages can be evicted; their times do not change.

        A partial page is removed at once if another page begins with the same tokens.
        """
        self._require_hold(hold)
        hold.count -= 1
        if hold.count:
            return
        del self.holds[hold]
        node, parent = hold.node, hold.node.parent
        self.structure.unlock(node)
        if node.locks or parent is None or not self.structure.is_partial(node):
            return
        covering = parent.covering(node.key, but=node)
        if covering is not None:
            self._scores.merge(node.pages, covering.pages[:1])
            self.allocator.give_back(self.structure.remove(node, "covered"))
            self.structure.events.deliver()

    # ---- steps ----

    def begin_step(self) -> int:
        """Begins to plan a step (see `PageAllocator.begin_step`). Pages published before are no longer in flight."""
        self.structure.step = self.allocator.begin_step()
        return self.structure.step

    def end_step(self, step: int) -> None:
        """Every step up to and including this one has ended."""
        self.allocator.end_step(step)

    def cancel_step(self, step: int) -> None:
        """The step begun last was planned and will not run. Nothing may have been published for it."""
        self.allocator.cancel_step(step)
        # The number is used again. Pages published until then are not in flight in that step.
        self.structure.step = step - 1

    # ---- lower tiers ----

    def reach(self, tokens: Int32, namespace: Namespace = DEFAULT, limit: int | None = None) -> Reach:
        """How many of ``tokens`` each tier stores, in order: see `moves.Reach`. Changes nothing."""
        if not self.enabled:
            return Reach(0, 0, 0, [])
        tokens = np.asarray(tokens, np.int32)
        return self.moves.reach(tokens, namespace, _clamp(limit, len(tokens)))

    def restore(self, rows: Sequence[tuple[int, int, Namespace, Int32, int]]) -> None:
        """Fills an empty tree with the pages on the disk: see `Moves.restore`."""
        if rows and self.enabled:
            self.moves.restore(rows)

    def end_transfer(self, transfer: Transfer, good: int, damaged: bool = False) -> None:
        """A copy has ended: see `Moves.end`. Its pages can be matched, and copied from."""
        if transfer.target == DEVICE:
            self._scores.forget(transfer.target_slots)
            self.structure.published_in[transfer.target_slots] = -1
        if transfer.target != DISK:
            self._touch(transfer.node)
        self.moves.end(transfer, good, damaged)

    def take_stores(self) -> tuple[Int32, Int32, int]:
        """The copies to the host that the device has yet to make, before it runs or loads anything else: pages, host
        slots, no slot twice, and the last step that may write one of the pages."""
        stores, self.structure.stores = self.structure.stores, []
        pages, slots = (join([store[i] for store in stores]) for i in (0, 1))
        if len(slots):
            _, last = np.unique(slots[::-1], return_index=True)  # a slot that was evicted and taken again
            pages, slots = (each[len(slots) - 1 - last] for each in (pages, slots))
        return pages, slots, self.structure.stores_after

    # ---- operators and subscribers ----

    def flush(self, *, keep_disk: bool = False) -> int:
        """Removes everything that is neither leased nor held, from every tier, or from all but the disk; returns the
        number of pages on the device."""
        freed = self.structure.evict(self.structure.device, self.evictable, "flushed")
        self.allocator.give_back(freed)
        self.structure.clear_lower(keep_disk)
        self.structure.events.deliver()
        return len(freed)

    def inspect(self, tokens: Int32, namespace: Namespace = DEFAULT, limit: int | None = None) -> Inspection:
        """The result of `match` once this step has run, and how much of it is locked; changes nothing."""
        if not self.enabled:
            return Inspection(Explanation(0, "disabled"), EMPTY, EMPTY, 0)
        tokens = np.asarray(tokens, np.int32)
        return inspect(self.structure, tokens, namespace, _clamp(limit, len(tokens)))

    def prune(self, tokens: Int32, namespace: Namespace = DEFAULT) -> int:
        """Removes what begins with ``tokens`` and is neither leased nor held: see `prune.prune`. Returns the pages."""
        freed = prune(self.structure, np.asarray(tokens, np.int32), namespace)
        self.allocator.give_back(freed)
        self.structure.events.deliver()
        return len(freed)

    def subscribe(self, observer: Observer, *, lower_tiers: bool = False) -> None:
        """Sends the present contents to ``observer`` as pages that enter, then every later event: see `events`.
        ``lower_tiers``: with the events of copies there, which may name pages on the device."""
        structure, events = self.structure, self.structure.events
        contents: Iterator[Event] = chain(structure.contents(), structure.copies() if lower_tiers else ())
        for event in contents:
            observer(event)
        events.observers.append(observer)
        if lower_tiers:
            events.lower_tier_observers.append(observer)

    def hottest(self, count: int, namespace: Namespace | None = None) -> list[tuple[Namespace, Int32]]:
        """The most used prefixes: see `hottest.hottest`."""
        return hottest(self.structure, count, namespace)

    def dump(self, max_nodes: int = 1000, preview: int | None = None, owner: str | None = None) -> dict[str, Any]:
        """``{"namespaces": [...], "omitted": namespaces left out, "totals"}``: see `dump.dump_namespaces`. The totals
        are those of the whole tree."""
        namespaces, omitted = dump_namespaces(self.structure, max_nodes, preview, owner)
        totals = {
            "page_size": self.page_size,
            "pages": self.allocator.total,
            "free": self.allocator.free,
            "quarantined": self.allocator.quarantined,
            "cached": self.cached,
            "evictable": self.evictable,
            "evicted": self.evicted_total,
            "nodes": self.num_nodes,
            "leases": len(self.leases),
            "reasons": dict(self.reasons),
        }
        return {"namespaces": namespaces, "omitted": omitted, "totals": totals}

    def check(self, leases: Collection[Lease] | None = None) -> None:
        """Raises `InvariantError` at the first inconsistency: see `check`. O(everything).

        ``leases``: the live leases by the caller's account, which must equal the tree's.
        """
        if leases is not None and set(leases) != set(self.leases):
            raise InvariantError(f"{len(self.leases)} leases are live, the caller has {len(leases)}")
        nodes = check_structure(self.structure)
        check_locks(self.structure, nodes, self.leases, self.holds, self.moves.active)
        for tier in self.structure.tiers:
            check_slots(tier, nodes, self.leases, self.moves.active)
        check_scores(nodes, self._scores)

    # ---- helpers ----

    def _require_live(self, lease: Lease) -> None:
        if lease not in self.leases:
            raise LeaseError("the lease was released" if lease.released else "the lease belongs to another tree")

    def _require_hold(self, hold: Hold) -> None:
        if hold not in self.holds:
            raise LeaseError("the hold has ended or belongs to another tree")

    def _may_copy(self, page: int) -> bool:
        """Whether a page may be copied: not while in flight, as the step being planned writes it after its copies."""
        return bool(self.structure.published_in[page] != self.structure.step)

    def _touch(self, end: Node) -> None:
        """Marks a locked path as used now."""
        now = self.structure.tick()
        for node in end.upwards():
            node.last_access = now


def _use(node: Node, now: int, priority: int) -> None:
    """Counts a use of a locked node. (The eviction index sorts unlocked leaves by these values.)"""
    node.last_access = now
    node.hits += 1
    node.priority = max(node.priority, priority)


def _any_page(_page: int) -> bool:
    return True


def _clamp(limit: int | None, length: int) -> int:
    return length if limit is None else max(0, min(limit, length))
