"""Writes to the disk name the record of the page before: what happens when that record changes meanwhile."""

from __future__ import annotations

import numpy as np
import pytest

from branchwise.radix import DEFAULT, RadixTree, Transfer, files
from branchwise.radix.node import DISK, HOST, Int32, Node
from branchwise.runtime.tiers.index import PageRow, prefix_hash, sound

Rows = dict[int, PageRow]
TOKENS = np.arange(6, dtype=np.int32)  # three pages of two tokens


def cached(tokens: Int32 = TOKENS) -> RadixTree:
    tree = RadixTree(10, 2, host_slots=10, disk_slots=10)
    lease = tree.match(tokens)
    assert tree.reserve(lease, len(tokens) // 2) is not None
    tree.begin_step()
    tree.publish(lease, tokens)
    tree.release(lease, tokens)
    return tree


def end_at(tree: RadixTree, length: int) -> Node:
    """The node that ends after so many tokens, split off if need be."""
    hold = tree.hold(TOKENS[:length])
    assert hold is not None
    node = hold.node
    tree.unhold(hold)
    return node


def persist(tree: RadixTree, node: Node) -> Transfer:
    transfer = tree.moves.persist(node, 10)
    assert transfer is not None
    return transfer


def write(tree: RadixTree, rows: Rows, transfer: Transfer) -> None:
    """Adds the rows of a transfer to the index, as the disk tier does before the transfer ends."""
    pages = tree.moves.describe(transfer)
    assert pages is not None
    for record, (namespace, before, tokens) in zip(transfer.target_slots.tolist(), pages, strict=True):
        prefix = prefix_hash(rows[before].prefix if before >= 0 else b"", namespace, tokens)
        rows[record] = PageRow(record, before, namespace, tokens, prefix, b"", 0)


def restarted(tree: RadixTree, rows: Rows) -> int:
    """Tokens that a new process finds on the disk, which must be those that the old one believed to be there."""
    assert tree.structure.disk is not None
    for record in tree.structure.disk.take_freed().tolist():
        rows.pop(record, None)
    good, _, _ = sound(rows.values(), 10)
    again = RadixTree(10, 2, host_slots=10, disk_slots=10)
    again.restore([(row.record, row.before, row.namespace, row.tokens, row.written) for row in good])
    again.check()
    found = again.reach(TOKENS, DEFAULT, len(TOKENS)).disk
    tree.check()
    claimed = tree.structure.disk.cached * 2
    assert found == claimed
    return found


@pytest.mark.parametrize("shorter_first", [True, False])
def test_a_prefix_that_is_written_twice_at_once_survives_a_restart(shorter_first: bool) -> None:
    """The loser's records are freed: pages whose rows name them must not count as written."""
    tree, rows = cached(), Rows()
    transfers = [persist(tree, end_at(tree, 2)), persist(tree, end_at(tree, 6))]
    for transfer in transfers if shorter_first else transfers[::-1]:
        write(tree, rows, transfer)
        tree.end_transfer(transfer, len(transfer.target_slots))
    assert restarted(tree, rows) == (2 if shorter_first else 6)
    again = tree.moves.persist(end_at(tree, 6), 10)
    if again is not None:
        write(tree, rows, again)
        tree.end_transfer(again, len(again.target_slots))
    assert restarted(tree, rows) == 6


def test_a_kill_between_two_writes_of_one_prefix_loses_nothing() -> None:
    """Both have rows. The first page of the one that has not ended counts, and what follows the other follows it."""
    tree, rows = cached(), Rows()
    short, whole = persist(tree, end_at(tree, 2)), persist(tree, end_at(tree, 6))
    for transfer in (short, whole):
        write(tree, rows, transfer)
    tree.end_transfer(whole, 3)
    assert restarted(tree, rows) == 6
    tree.end_transfer(short, 1)
    assert restarted(tree, rows) == 6


def half_written() -> tuple[RadixTree, Rows, Transfer]:
    """The first page is on the disk, and the two after it are being written."""
    tree, rows = cached(), Rows()
    first = persist(tree, end_at(tree, 2))
    write(tree, rows, first)
    tree.end_transfer(first, 1)
    return tree, rows, persist(tree, end_at(tree, 6))


def test_a_write_does_not_start_once_the_page_before_it_has_left_the_disk() -> None:
    """Its first row would name a record that holds another prefix, or none."""
    tree, rows, transfer = half_written()
    assert tree.structure.disk is not None and tree.moves.describe(transfer) is not None
    tree.structure.forget(end_at(tree, 2), tree.structure.disk)
    assert tree.moves.describe(transfer) is None
    tree.end_transfer(transfer, 0)
    assert restarted(tree, rows) == 0


@pytest.mark.parametrize("written_again", [True, False])
def test_a_write_does_not_count_if_the_page_before_it_has_moved(written_again: bool) -> None:
    tree, rows, transfer = half_written()
    assert tree.structure.disk is not None
    write(tree, rows, transfer)
    tree.structure.forget(end_at(tree, 2), tree.structure.disk)
    for record in tree.structure.disk.take_freed().tolist():
        rows.pop(record)
    if written_again:
        assert tree.structure.reserve(tree.structure.disk, 1) is not None  # so that it gets another record
        first = persist(tree, end_at(tree, 2))
        write(tree, rows, first)
        tree.end_transfer(first, 1)
    tree.end_transfer(transfer, 2)
    assert tree.structure.disk.cached == int(written_again)
    good, _, _ = sound(rows.values(), 10)
    assert {row.record for row in good} == set(end_at(tree, 2).disk.tolist())


def test_a_file_that_is_loaded_does_not_count_if_the_page_before_it_has_left_the_disk() -> None:
    tree, rows = cached(), Rows()
    first = persist(tree, end_at(tree, 2))
    write(tree, rows, first)
    tree.end_transfer(first, 1)
    begun = files.begin_load(tree.moves, TOKENS, DEFAULT)
    assert begun is not None and begun[1] == 1 and tree.structure.disk is not None
    assert begun[0].before == first.target_slots[0]
    tree.structure.forget(end_at(tree, 2), tree.structure.disk)
    assert files.end_load(tree.moves, begun[0], TOKENS, 2) == 0
    tree.check()
    assert tree.structure.disk.slots.free == tree.structure.disk.slots.total


def test_copies_to_the_host_need_nothing_above_them() -> None:
    """The host and the device hold different pages, as one larger cache."""
    tree, rows, transfer = half_written()
    write(tree, rows, transfer)
    tree.end_transfer(transfer, 2)
    tree.flush(keep_disk=True)
    reach = tree.reach(TOKENS, DEFAULT, 6)
    fetch = tree.moves.fetch(reach, 10)
    assert fetch is not None and (fetch.source, fetch.target, fetch.before) == (DISK, HOST, -1)
    tree.end_transfer(fetch, 3)
    assert tree.reach(TOKENS, DEFAULT, 6).host == 6
    tree.check()
