"""Every invariant of the room (README.md), checked by walking the whole tree: for tests and debug runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

import numpy as np

from .errors import InvariantError
from .hold import Hold
from .lease import Lease
from .moves import Transfer
from .node import DEVICE, FILE, HOST, Node, Root, join, page_key
from .scores import ScoreTable
from .structure import PrefixTree
from .tiers import Tier


def check_structure(tree: PrefixTree) -> list[Node]:
    """Raises `InvariantError` at the first inconsistency in nodes, counters or index. Returns all nodes but roots."""
    nodes: list[Node] = []
    for namespace, root in tree.roots.items():
        _require(root.namespace == namespace == root.serial and root.parent is None, f"root {namespace} is misfiled")
        _require(bool(root.children or root.locks), f"root {namespace} is empty and unused")
        nodes += _subtree(tree, root)
    _require(len({id(node) for node in nodes}) == len(nodes), "a node is in two places")
    _require(tree.num_nodes == len(nodes), f"num_nodes is {tree.num_nodes}, {len(nodes)} were found")
    for tier in tree.tiers:
        _check_tier(tier, nodes)
    salts = Counter(namespace[0] for namespace, root in tree.roots.items() if root.children)
    _require(tree.salts_in_use == salts, "the count of salts in use is wrong")
    _require(not tree.events.pending, "events were not delivered")
    return nodes


def _check_tier(tier: Tier, nodes: list[Node]) -> None:
    """Counters and index of one tier. A copy is of a whole node; on the device and on the disk, a node has one only if
    the node above it has one."""
    name = ("device", "host", "disk")[tier.number]
    here = [node for node in nodes if len(tier.of(node))]
    cached = sum(len(tier.of(node)) for node in here)
    evictable = sum(len(tier.of(node)) for node in here if not node.locks)
    _require(tier.cached == cached, f"{name}: cached is {tier.cached}, counted {cached}")
    _require(tier.evictable == evictable, f"{name}: evictable is {tier.evictable}, counted {evictable}")
    for node in here:
        above = node.parent
        whole = tier.number == HOST or above is None or above.parent is None or len(tier.of(above)) > 0
        _require(whole, f"node {node.serial} is on the {name} and the node above it is not")
    for node in nodes:
        below = sum(len(tier.of(child)) > 0 for child in node.children.values())
        _require(node.below[tier.number] == below, f"node {node.serial} miscounts its children on the {name}")
    leaves = sorted(tier.leaves.entry(node) for node in here if not node.locks and not node.below[tier.number])
    _require(list(tier.leaves) == leaves, f"{name}: the eviction index is not the unlocked leaves")


def _subtree(tree: PrefixTree, root: Root) -> list[Node]:
    """Every node below the root, each checked against its parent."""
    found: list[Node] = []
    stack: list[Node] = [root]
    while stack:
        parent = stack.pop()
        if parent.children:
            _require(list(parent.children.order) == sorted(parent.children), f"children of {parent.serial}: unsorted")
        for key, child in parent.children.items():
            where = f"node {child.serial}"
            full = len(child.tokens) % tree.page_size == 0
            partial = tree.is_partial(child)
            copies = {len(tier.of(child)) for tier in tree.tiers} - {0}
            _require(child.parent is parent, f"{where} has another parent")
            _require(len(child.tokens) > 0 and (full or partial), f"{where}: tokens do not fill its pages")
            _require(copies == {tree.size(child)}, f"{where}: {len(child.tokens)} tokens, copies of {copies} pages")
            _require(not (partial and child.children), f"{where} is a partial page with children")
            _require(
                key == child.key == page_key(child.tokens[: tree.page_size]), f"{where}: key is not its first page"
            )
            _require(child.locks >= 0, f"{where} has {child.locks} locks")
            in_order = child.locks > 0 or parent is root or child.last_access <= parent.last_access
            _require(in_order, f"{where} is unlocked and was used after its parent")
            found.append(child)
            stack.append(child)
        locked = sum(child.locks for child in parent.children.values())
        _require(parent.locks >= locked, f"node {parent.serial} has fewer locks than its children together")
    return found


def check_locks(
    tree: PrefixTree,
    nodes: list[Node],
    leases: Iterable[Lease],
    holds: Iterable[Hold],
    transfers: Collection[Transfer],
) -> None:
    """Checks that every lock belongs to a lease, a hold or a transfer, and that each path matches its record."""
    known = {id(node) for node in nodes} | {id(root) for root in tree.roots.values()}
    locks: Counter[int] = Counter()
    for lease in leases:
        _require(not lease.released, "a released lease is still registered")
        _require(id(lease.node) in known, "a lease ends at a node that is not in the tree")
        path = list(lease.node.upwards())
        locks.update(id(node) for node in path)
        _require(path[-1] is tree.roots.get(lease.namespace), "a lease reaches into another namespace")
        pages = np.concatenate([node.pages for node in reversed(path)])
        _require(lease.length == len(pages) * tree.page_size, "a lease's length is not its path's")
        _require(np.array_equal(pages, lease.pages[: len(pages)]), "a lease's pages are not its path's")
        if lease.source is not None:
            _require(id(lease.source) in known, "a lease copies from a node that is not in the tree")
            below = list(lease.source.upwards(lease.node))
            locks.update(id(node) for node in below)
            _require(below[-1].parent is lease.node, "a lease copies from elsewhere than below its path")
            copied = lease.copy[0] if lease.copy else -1
            _require(any(copied in node.pages for node in below), "a lease copies a page that is not its source's")
    for hold in holds:
        _require(hold.count > 0, "a hold without sharers")
        _require(id(hold.node) in known, "a hold ends at a node that is not in the tree")
        path = list(hold.node.upwards())
        locks.update(id(node) for node in path)
        _require(path[-1] is tree.roots.get(hold.namespace), "a hold reaches into another namespace")
        length = sum(len(node.tokens) for node in path)
        _require(length - tree.page_size < hold.tokens <= length, "a hold is longer or shorter than its path")
    for transfer in transfers:
        _require(id(transfer.node) in known, "a transfer ends at a node that is not in the tree")
        path = list(transfer.node.upwards())
        locks.update(id(node) for node in path)
        if transfer.source == FILE:
            continue
        tier = next(tier for tier in tree.tiers if tier.number == transfer.source)
        slots = join([tier.of(node) for node in reversed(path)])
        n = len(transfer.source_slots)
        _require(
            transfer.target == FILE or n == len(transfer.target_slots), "a transfer has as many sources as targets"
        )
        _require(np.array_equal(slots[len(slots) - n :], transfer.source_slots), "a transfer copies from elsewhere")
    for node in nodes:
        _require(node.transfer is None or node.transfer in transfers, f"node {node.serial} awaits an ended transfer")
    for node in [*nodes, *tree.roots.values()]:
        _require(node.locks == locks[id(node)], f"node {node.serial}: {node.locks} locks, {locks[id(node)]} explained")


def check_slots(tier: Tier, nodes: list[Node], leases: Iterable[Lease], transfers: Iterable[Transfer]) -> None:
    """Every slot of a tier is in exactly one place: free, quarantined, in the tree, or owned by a lease or transfer."""
    allocator = tier.slots
    free, quarantined = allocator.listing()
    _require(len(free) == allocator.free, "the allocator miscounts its free slots")
    _require(len(quarantined) == allocator.quarantined, "the allocator miscounts its quarantined slots")
    owned = [transfer.target_slots for transfer in transfers if transfer.target == tier.number]
    if tier.number == DEVICE:
        owned += [lease.pages[len(lease.pages) - lease.owned :] for lease in leases]
    everything = np.concatenate([free, quarantined, *(tier.of(node) for node in nodes), *owned])
    times = np.bincount(everything, minlength=allocator.total)
    _require(len(times) == allocator.total, "a slot beyond the tier")
    _require(bool((times > 0).all()), f"slots lost: {np.flatnonzero(times == 0).tolist()}")
    _require(bool((times < 2).all()), f"slots in two places: {np.flatnonzero(times > 1).tolist()}")


def check_scores(nodes: list[Node], scores: ScoreTable) -> None:
    """Checks that scores are of cached tokens, and none of a prompt's first token, which nothing precedes."""
    if not scores.allocated:
        return
    for node in [node for node in nodes if len(node.pages)]:
        known = np.concatenate([scores.known(page) for page in node.pages.tolist()])
        _require(not known[len(node.tokens) :].any(), f"node {node.serial} has scores of tokens that it does not hold")
        _require(not (isinstance(node.parent, Root) and known[0]), f"node {node.serial} scores a prompt's first token")


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise InvariantError(otherwise)
