"""Copies between memory tiers that take time: up for requests that wait for them, and from the host down to the disk.

The tree decides and accounts; who moves the bytes reports with `Moves.end`. (Copies from the device down to the host
need none of this: the device makes them in order, see `PrefixTree.copy_down`.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .matching import closest_page, follow
from .node import DEVICE, DISK, HOST, Int32, Namespace, Node, Root, common_tokens, join, page_key
from .structure import PrefixTree, namespace_of
from .tiers import Tier

FULL = 8  # the host is nearly full when less than this part of it is free


@dataclass(slots=True, eq=False)
class Transfer:
    """Copies whole pages of consecutive nodes from one tier to another. Begun and ended by `Moves`.

    Its target slots are reserved, all of them, before it begins, and its path is locked: it waits for nothing but the
    copy itself.
    """

    source: int  # HOST, DISK or FILE
    target: int
    node: Node  # internal: the last node. If nodes are split meanwhile, all parts are on the way up
    source_slots: Int32  # [n] in order of position
    target_slots: Int32  # [n]
    before: int = -1  # to the disk: the record of the page before the first, -1: none. The first row names it


class Reach(NamedTuple):
    """How many tokens of a prompt each tier stores."""

    device: int  # tokens that a match would reuse now
    host: int  # tokens after those that the host has
    disk: int  # and that only the disk has
    nodes: list[tuple[Node, int]]  # internal: the nodes below the device, from the top, and the pages of each to copy

    @property
    def transfer(self) -> Transfer | None:
        """The transfer that is bringing the first of these nodes up, if any."""
        first = self.nodes[0][0].transfer if self.nodes else None
        return first if isinstance(first, Transfer) else None


@dataclass(slots=True)
class Moves:
    """The transfers of one tree."""

    structure: PrefixTree
    active: dict[Transfer, None] = field(default_factory=dict)

    def reach(self, tokens: Int32, namespace: Namespace, limit: int) -> Reach:
        """How many of ``tokens[:limit]`` each tier stores. Changes nothing."""
        structure, size = self.structure, self.structure.page_size
        root = structure.roots.get(namespace)
        if root is None:
            return Reach(0, 0, 0, [])
        top = follow(root, tokens, 0, limit, size)
        copied = closest_page(top, tokens, limit, size, lambda _page: True).tokens
        device = top.length + copied
        if top.stopped_inside or not (top.node.below[HOST] or top.node.below[DISK]):
            return Reach(device, 0, 0, [])
        walk = follow(top.node, tokens, top.length, limit, size, below=True)
        below = [(node, structure.size(node)) for node in walk.node.upwards(top.node)][::-1]
        if below:
            below[-1] = walk.node, walk.inside + (walk.stopped_inside and walk.beyond > 0)
            copied = 0
        extra = walk.beyond
        if not walk.stopped_inside:
            wanted = page_key(tokens[walk.length : min(walk.length + size, limit)])
            nearest = walk.node.nearest_below(wanted)
            extra = common_tokens(nearest.key, wanted) if nearest is not None else 0
            if nearest is not None and extra > copied:
                below.append((nearest, 1))
        counts = {HOST: 0, DISK: 0}
        left = max(0, walk.length + extra - device) if below else 0
        for node, pages in below:
            tokens_of = min(left, pages * size)
            counts[HOST if len(node.host) else DISK] += tokens_of
            left -= tokens_of
        return Reach(device, counts[HOST], counts[DISK], below)

    def load(self, reach: Reach, most: int) -> Transfer | None:
        """Begins to copy to the device what the host has after the device's part, at most ``most`` pages of it. None if
        there is no room, or nothing that no other transfer is copying."""
        nodes = []
        for node, pages in reach.nodes:
            if not len(node.host) or node.transfer is not None:
                break
            nodes.append((node, pages))
        return self._begin(nodes, HOST, DEVICE, most)

    def fetch(self, reach: Reach, most: int) -> Transfer | None:
        """The same from the disk to the host: the first nodes that only the disk has."""
        nodes: list[tuple[Node, int]] = []
        for node, pages in reach.nodes:
            if len(node.host):
                if nodes:
                    break
                continue
            if node.transfer is not None:
                break
            nodes.append((node, pages))
        return self._begin(nodes, DISK, HOST, most)

    def persist(self, node: Node, most: int) -> Transfer | None:
        """Begins to copy a node and those above it, from the top, to the disk, which has a node only if it has all
        above it. What is only on the device goes to the host first."""
        structure = self.structure
        nodes: list[tuple[Node, int]] = []
        if not self._attached(node):
            return None
        structure.lock(node)  # making room on the host must not evict these
        for each in reversed(list(node.upwards())):
            size = structure.size(each)
            if not size or len(each.disk):
                continue
            if each.transfer is not None or not structure.copy_down(each):
                break
            nodes.append((each, size))
        begun = self._begin(nodes, HOST, DISK, most)
        structure.unlock(node)
        return begun

    def end(self, transfer: Transfer, good: int, damaged: bool = False) -> None:
        """The transfer has ended; its first ``good`` pages arrived.

        ``damaged``: the next page is corrupt in its source, which drops it and the pages after it. Nodes that reached
        the target by another way meanwhile keep what they have; on the disk what follows them does not count then,
        because its rows name other records.
        """
        del self.active[transfer]
        structure = self.structure
        target, source = self._tier(transfer.target), self._tier(transfer.source)
        nodes, left = [], len(transfer.target_slots)
        for node in transfer.node.upwards():
            if not left:
                break
            begin = left - structure.size(node)
            if begin < good < left:  # it arrived in part: its upper part is the next in this loop
                structure.split(node, good - begin)
            nodes.append(node)
            left -= structure.size(node)
        at, before, unused = 0, transfer.before, []
        failed: Node | None = None
        for node in reversed(nodes):
            slots = transfer.target_slots[at : at + structure.size(node)]
            at += len(slots)
            if node.transfer is transfer:
                node.transfer = None
            if at > good:
                failed = failed or node
                unused.append(slots)
            elif len(target.of(node)) or not self._may_enter(target, node, before):
                unused.append(slots)
            elif target is structure.device:
                structure.enter(node, slots)
            else:
                target.put(node, slots)
            before = int(slots[-1])
        target.free(join(unused))
        structure.unlock(transfer.node)
        if target is structure.device and source.slots.free < source.slots.total // FULL:
            for node in nodes:  # a full host keeps what the device lacks
                if len(node.pages) and len(node.host) and not node.locks:
                    source.free(source.take(node))
        if damaged and failed is not None:
            structure.forget(failed, source)
        else:
            structure.join_path(transfer.node)
        structure.events.deliver()

    def start(self, transfer: Transfer) -> Transfer:
        """Locks the transfer's path until it ends or is cancelled."""
        self.structure.lock(transfer.node)
        self.active[transfer] = None
        return transfer

    def cancel(self, transfer: Transfer) -> None:
        """The transfer has ended without pages for a tier: its target slots, if any, are free."""
        del self.active[transfer]
        if len(transfer.target_slots):
            self._tier(transfer.target).free(transfer.target_slots)
        self.structure.unlock(transfer.node)

    def restore(self, rows: Sequence[tuple[int, int, Namespace, Int32, int]]) -> None:
        """Fills an empty tree with the pages that an earlier process left on the disk. Each: (slot, slot of the page
        before or -1, namespace, tokens, time), after the page before it. Runs without branches become one node."""
        structure, disk = self.structure, self._tier(DISK)
        followers: dict[int, int] = {}
        for _, before, *_ in rows:
            followers[before] = followers.get(before, 0) + 1
        latest = {slot: time for slot, _, _, _, time in rows}
        for slot, before, *_ in reversed(rows):  # a prefix was last used when anything that continues it was
            if before >= 0:
                latest[before] = max(latest[before], latest[slot])
        disk.slots.claim(np.array([row[0] for row in rows], np.int32))
        runs: dict[int, tuple[int, Namespace, list[Int32], list[int]]] = {}  # by last slot: slot before, ...
        heads = []
        for slot, before, namespace, tokens, _ in rows:
            run = runs.pop(before, None) if followers[before] == 1 else None
            if run is None or latest[before] != latest[slot] or len(tokens) < structure.page_size:
                if run is not None:
                    runs[before] = run
                run = (before, namespace, [], [])
                heads.append(run)
            run[2].append(tokens)
            run[3].append(slot)
            runs[slot] = run
        ends: dict[int, Node] = {}
        order = {time: structure.tick() for time in sorted(set(latest.values()))}
        for before, namespace, parts, slots in heads:
            above = ends[before] if before >= 0 else structure.root(namespace)
            tokens = join(parts)
            key = page_key(tokens[: structure.page_size])
            node = structure.add_node(above, key, tokens, now=order[latest[slots[-1]]])
            disk.put(node, np.array(slots, np.int32))
            ends[slots[-1]] = node
        structure.events.deliver()

    def describe(self, transfer: Transfer) -> list[tuple[Namespace, int, Int32]] | None:
        """(namespace, record of the page before or -1, tokens) for each page that is about to be written to the disk.
        None: the disk has lost the page before the first since the transfer began, or has it in another record."""
        size, left = self.structure.page_size, len(transfer.target_slots)
        nodes: list[Node] = []
        for node in transfer.node.upwards():
            if not left:
                break
            nodes.append(node)
            left -= self.structure.size(node)
        if last_record(nodes[-1].parent) != transfer.before:
            return None
        tokens = join([node.tokens for node in reversed(nodes)])
        namespace = namespace_of(transfer.node)
        befores = [transfer.before, *transfer.target_slots[:-1].tolist()]
        return [(namespace, before, tokens[i * size : (i + 1) * size]) for i, before in enumerate(befores)]

    def end_of(self, namespace: Namespace, prefix: Int32) -> Node | None:
        """The node at or inside which the whole pages of a prefix end, in any tier."""
        root = self.structure.roots.get(namespace)
        if root is None:
            return None
        node = follow(root, prefix, 0, len(prefix), self.structure.page_size, below=True).node
        return None if node is root else node

    def leaves(self) -> list[Node]:
        """Every node without children."""
        return [node for node in self.structure.nodes() if not node.children]

    def _attached(self, node: Node) -> bool:
        """Whether the node is still in the tree."""
        for each in node.upwards():
            parent = each.parent
            if parent is None:
                return isinstance(each, Root) and self.structure.roots.get(each.namespace) is each
            if parent.children.get(each.key) is not each:
                return False
        return False

    def _may_enter(self, target: Tier, node: Node, before: int) -> bool:
        """Whether a node may get a copy in a tier: on the device and the disk the node above it must have one, on the
        disk the one that the node's first row names (``before``)."""
        if target.number == DISK:
            return last_record(node.parent) == before
        above = node.parent
        return target.number == HOST or isinstance(above, Root) or (above is not None and len(above.pages) > 0)

    def _begin(self, wanted: Sequence[tuple[Node, int]], source: int, target: int, most: int) -> Transfer | None:
        structure = self.structure
        nodes: list[Node] = []
        for node, pages in wanted:
            pages = min(pages, most)
            if not pages:
                break
            most -= pages
            nodes.append(node if pages == structure.size(node) else structure.split(node, pages))
        if not nodes:
            return None
        structure.lock(nodes[-1])
        taken = self._tier(source)
        source_slots = join([taken.of(node) for node in nodes])
        target_slots = structure.reserve(self._tier(target), len(source_slots))
        structure.events.deliver()
        if target_slots is None:
            structure.unlock(nodes[-1])
            return None
        before = last_record(nodes[0].parent) if target == DISK else -1
        transfer = Transfer(source, target, nodes[-1], source_slots, target_slots, before)
        for node in nodes:
            if target != DISK:
                node.transfer = transfer
        self.active[transfer] = None
        return transfer

    def _tier(self, number: int) -> Tier:
        return next(tier for tier in self.structure.tiers if tier.number == number)


def last_record(node: Node | None) -> int:
    """The record of a node's last page on the disk; -1: it has none there, or is a root."""
    return int(node.disk[-1]) if node is not None and len(node.disk) else -1
