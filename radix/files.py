"""Prefixes on their way between the disk tier and a file of an operator: what must not change meanwhile, and what is
added to the tree at the end. The files themselves are the caller's."""

from __future__ import annotations

from .matching import follow
from .moves import Moves, Transfer, last_record
from .node import DISK, EMPTY, FILE, Int32, Namespace, Node, join, page_key


def begin_save(moves: Moves, tokens: Int32, namespace: Namespace) -> Transfer | None:
    """Locks the whole pages of ``tokens``; ``source_slots`` are their records. None: the disk does not have them all.
    `Moves.cancel` unlocks them."""
    structure, size = moves.structure, moves.structure.page_size
    root, whole = structure.roots.get(namespace), len(tokens) // size * size
    if root is None or not whole:
        return None
    walk = follow(root, tokens, 0, whole, size, below=True)
    if walk.length < whole:
        return None
    node = structure.split_at(walk)
    path = list(node.upwards(root))[::-1]
    if not all(len(each.disk) for each in path):
        return None
    return moves.start(Transfer(DISK, FILE, node, join([each.disk for each in path]), EMPTY))


def begin_load(moves: Moves, tokens: Int32, namespace: Namespace) -> tuple[Transfer, int] | None:
    """Reserves records (``target_slots``) for the pages of ``tokens`` that the disk lacks, after the record ``before``,
    and locks those before them. Returns the transfer and the page at which they begin. None: there is no room.
    ``tokens`` are whole pages."""
    structure, size = moves.structure, moves.structure.page_size
    if structure.disk is None:
        return None
    root = structure.root(namespace)
    walk = follow(root, tokens, 0, len(tokens), size, below=True)
    end: Node = root
    known = 0
    for node in reversed(list(structure.split_at(walk).upwards(root))):
        if not len(node.disk):
            break
        end, known = node, known + structure.size(node)
    transfer = moves.start(Transfer(FILE, DISK, end, EMPTY, EMPTY, last_record(end)))
    slots = structure.reserve(structure.disk, len(tokens) // size - known)
    if slots is None:
        moves.cancel(transfer)
        return None
    transfer.target_slots = slots
    return transfer, known


def end_load(moves: Moves, transfer: Transfer, tokens: Int32, good: int) -> int:
    """The first ``good`` records of `begin_load` have been written: the disk has those pages of ``tokens`` now. Returns
    how many it has of them: if it got one of them by another way meanwhile, only those before, whose records the rows
    of the others name; none if it lost the page before them."""
    structure, size, node = moves.structure, moves.structure.page_size, transfer.node
    disk = structure.disk
    if disk is None:
        raise RuntimeError("pages were loaded from a file into a disk tier that does not exist")
    good = good if last_record(node) == transfer.before else 0
    slots = transfer.target_slots[:good]
    begin = len(tokens) // size - len(transfer.target_slots)
    limit = (begin + good) * size
    walk = follow(node, tokens, begin * size, limit, size, below=True)
    added, met = 0, False
    for each in reversed(list(structure.split_at(walk).upwards(node))):
        met = len(each.disk) > 0
        if met:
            break
        count = structure.size(each)
        disk.put(each, slots[added : added + count].copy())
        node, added = each, added + count
    if added < good and not met:
        rest = tokens[(begin + added) * size : limit]
        child = structure.add_node(node, page_key(rest[:size]), rest, now=structure.tick())
        disk.put(child, slots[added:].copy())
        node, added = child, good
    structure.lock(node)  # times change only while a node is locked
    now = structure.tick()
    for each in node.upwards():
        each.last_access = now
    structure.unlock(node)
    unused, transfer.target_slots = transfer.target_slots[added:], EMPTY
    disk.free(unused)
    moves.cancel(transfer)
    structure.events.deliver()
    return added
