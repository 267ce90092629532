"""Random programs against a tree over three tiers, with every copy failing in every way.

Each tier is an array whose slots hold a fingerprint of the whole prefix up to each token. Copies move fingerprints
late, in part, or not at all; the disk loses bits; the process is killed and starts again with what the disk's index
names. After every operation each copy that the tree claims is compared with the prefix that it should hold, so that a
slot reused too early, or a copy that never arrived, cannot go unseen.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from branchwise.radix import DEVICE, DISK, HOST, CopiesEntered, CopiesLeft, Event, Lease, RadixTree, Transfer
from branchwise.radix.explain import REASONS
from branchwise.radix.node import Namespace, Node
from branchwise.runtime.tiers.index import PageRow, prefix_hash, sound

X, Y, Z = 1, 256, 2
WRONG = -7
NAMESPACES: list[Namespace] = [("ann", ""), ("bob", "")]


def fingerprints(namespace: Namespace, tokens: tuple[int, ...]) -> list[int]:
    return [hash((namespace[0], tokens[: i + 1])) for i in range(len(tokens))]


class Copies:
    """The slots of the lower tiers that are in use, from events alone."""

    def __init__(self) -> None:
        self.slots: dict[int, set[int]] = {HOST: set(), DISK: set()}

    def __call__(self, event: Event) -> None:
        if isinstance(event, CopiesEntered):
            self.copies_entered(event)
        elif isinstance(event, CopiesLeft):
            self.copies_left(event)

    def copies_entered(self, event: CopiesEntered) -> None:
        assert not self.slots[event.tier].intersection(event.slots.tolist()), "a slot entered twice"
        self.slots[event.tier].update(event.slots.tolist())

    def copies_left(self, event: CopiesLeft) -> None:
        assert self.slots[event.tier].issuperset(event.slots.tolist()), "a slot left that had not entered"
        self.slots[event.tier].difference_update(event.slots.tolist())


class Machine(RuleBasedStateMachine):
    policy = "lru"
    mirror_type: type[Any]
    seen_by_tier: dict[int, int]
    restored = 0  # pages

    @initialize(
        size=st.sampled_from([1, 2, 4]),
        pages=st.integers(5, 16),
        host=st.integers(1, 16),
        disk=st.sampled_from([4, 30, 30, 0]),
        one_shot=st.booleans(),
    )
    def start(self, size: int, pages: int, host: int, disk: int, one_shot: bool) -> None:
        self.size = size
        self.tiers = {"num_pages": pages, "host_slots": host, "disk_slots": disk}
        self.one_shot = one_shot
        self.data = {
            DEVICE: np.zeros((pages, size), np.int64),
            HOST: np.zeros((host, size), np.int64),
            DISK: np.zeros((disk, size), np.int64),
        }
        self.damaged: set[int] = set()  # records of the disk
        self.index: dict[int, PageRow] = {}  # of the disk: rows are added after their data, deleted before it changes
        self.seen: list[tuple[int, ...]] = [(X,) * size + (Y,) * size]
        self.start_process()

    def start_process(self) -> None:
        """An empty tree, with nothing running."""
        self.tree = RadixTree(page_size=self.size, policy=self.policy, **self.tiers)
        self.tree.structure.keep_one_shot = self.one_shot
        self.mirror = self.mirror_type(self.size)
        self.tree.subscribe(self.mirror)
        self.copies = Copies()
        self.tree.subscribe(self.copies, lower_tiers=True)
        self.running: list[tuple[Lease, Namespace, tuple[int, ...]]] = []
        self.transfers: list[Transfer] = []
        self.written: dict[Transfer, int] = {}  # to the disk, with the pages that arrived; `Moves.end` is yet to come
        self.step = self.tree.begin_step()

    # ---- the memories ----

    def make_stores(self) -> None:
        """What the device does before anything that was planned after these copies."""
        pages, slots, after = self.tree.take_stores()
        assert len(set(slots.tolist())) == len(slots) and after <= self.step
        self.data[HOST][slots] = self.data[DEVICE][pages]

    def forget_freed(self) -> None:
        if self.tree.structure.disk is not None:
            freed = self.tree.structure.disk.take_freed().tolist()
            self.damaged -= set(freed)
            for record in freed:
                self.index.pop(record, None)

    # ---- what a program does ----

    def prompt(self, data: st.DataObject) -> tuple[int, ...]:
        base = data.draw(st.sampled_from(self.seen))
        kept = data.draw(st.sampled_from([len(base), len(base), len(base) // 2, 1]))
        tail = data.draw(st.lists(st.sampled_from([X, Y, Z]), max_size=self.size + 2))
        return (base[:kept] + tuple(tail))[: 5 * self.size]

    @rule(data=st.data(), ends=st.booleans(), namespace=st.sampled_from(NAMESPACES))
    def request(self, data: st.DataObject, ends: bool, namespace: Namespace) -> None:
        """A request reads what it reuses, computes the rest, and ends or runs on."""
        if len(self.running) >= 3:
            self.end(0)
        tokens = self.prompt(data)
        array, expected = np.array(tokens, np.int32), fingerprints(namespace, tokens)
        reach = self.tree.reach(array, namespace, len(tokens) - 1)
        lease = self.tree.match(array, namespace, len(tokens) - 1)
        assert lease.hit == reach.device
        below = {"tier", "evicted"} if reach.host + reach.disk else {*REASONS} - {"tier"}
        assert lease.report.reason in below
        pages = -(-len(tokens) // self.size)
        if self.tree.reserve(lease, pages - len(lease.pages)) is None:
            self.tree.release(lease)
            return
        self.make_stores()
        device = self.data[DEVICE]
        if lease.copy is not None:
            device[lease.pages[lease.length // self.size]] = device[lease.copy[0]]
        read = device[lease.pages].reshape(-1)[: lease.hit].tolist()
        assert read == expected[: lease.hit], "a wrong page was reused"
        for position in range(lease.hit, len(tokens)):
            device[lease.pages[position // self.size], position % self.size] = expected[position]
        self.tree.publish(lease, array)
        self.running.append((lease, namespace, tokens))
        self.seen = [*self.seen, tokens][-10:]
        self.next_step()
        if ends:
            self.end(len(self.running) - 1)

    def next_step(self) -> None:
        self.tree.end_step(self.step)
        self.step = self.tree.begin_step()

    def end(self, index: int) -> None:
        lease, _, tokens = self.running.pop(index)
        self.tree.release(lease, np.array(tokens, np.int32))
        self.next_step()

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end_one(self, data: st.DataObject) -> None:
        self.end(data.draw(st.integers(0, len(self.running) - 1)))

    @rule(data=st.data(), up=st.booleans(), most=st.integers(1, 8), namespace=st.sampled_from(NAMESPACES))
    def bring_up(self, data: st.DataObject, up: bool, most: int, namespace: Namespace) -> None:
        tokens = np.array(self.prompt(data), np.int32)
        reach = self.tree.reach(tokens, namespace, len(tokens) - 1)
        assert reach.device + reach.host + reach.disk <= max(0, len(tokens) - 1)
        begun = self.tree.moves.load(reach, most) if up else self.tree.moves.fetch(reach, most)
        if begun is not None:
            assert 0 < len(begun.target_slots) <= most
            self.make_stores()
            self.transfers.append(begun)

    @rule(data=st.data(), most=st.integers(1, 8))
    def write_down(self, data: st.DataObject, most: int) -> None:
        nodes = self.nodes()
        if self.tree.structure.disk is None or not nodes:
            return
        begun = self.tree.moves.persist(data.draw(st.sampled_from(nodes)), most)
        self.make_stores()
        if begun is not None:
            self.transfers.append(begun)

    @precondition(lambda self: self.transfers)
    @rule(
        data=st.data(), fate=st.sampled_from(["arrives", "arrives", "stops"]), ends=st.sampled_from([True, True, False])
    )
    def finish(self, data: st.DataObject, fate: str, ends: bool) -> None:
        """A copy is made: whole, in part, or to the first slot that is damaged. The tree hears of a write to the disk
        now or later."""
        transfer = data.draw(st.sampled_from(self.transfers))
        n = len(transfer.target_slots)
        good = n if fate == "arrives" else data.draw(st.integers(0, n - 1))
        damaged = False
        self.forget_freed()
        if transfer.source == DISK:
            bad = [i for i, record in enumerate(transfer.source_slots.tolist()) if record in self.damaged]
            if bad and bad[0] < good:
                good, damaged = bad[0], True
        self.make_stores()
        if transfer in self.written:
            good = self.written.pop(transfer)
        elif transfer.target == DISK:
            good = self.write(transfer, good)
            if not ends:
                self.written[transfer] = good
                return
        else:
            self.copy(transfer, good)
        self.transfers.remove(transfer)
        self.tree.end_transfer(transfer, good, damaged)

    def copy(self, transfer: Transfer, good: int) -> None:
        source, target = transfer.source_slots[:good], transfer.target_slots[:good]
        self.data[transfer.target][transfer.target_slots[good:]] = WRONG
        self.data[transfer.target][target] = self.data[transfer.source][source]

    def write(self, transfer: Transfer, good: int) -> int:
        """Writes pages to the disk and, once all have arrived, their rows to its index. Returns how many count: all or
        none."""
        pages = self.tree.moves.describe(transfer)
        if pages is None:
            return 0
        self.copy(transfer, good)
        self.damaged -= set(transfer.target_slots[:good].tolist())
        if good < len(pages):
            return 0
        for record, (namespace, before, tokens) in zip(transfer.target_slots.tolist(), pages, strict=True):
            start = self.index[before].prefix if before >= 0 else b""
            prefix = prefix_hash(start, namespace, tokens)
            self.index[record] = PageRow(record, before, namespace, tokens, prefix, b"", len(self.index))
        return good

    @precondition(lambda self: self.tree.structure.disk is not None)
    @rule(data=st.data())
    def lose_bits(self, data: st.DataObject) -> None:
        slot = data.draw(st.integers(0, len(self.data[DISK]) - 1))
        self.data[DISK][slot] = WRONG
        self.damaged.add(slot)

    @precondition(lambda self: self.index)
    @rule(really=st.integers(0, 2), data=st.data())
    def kill(self, really: int, data: st.DataObject) -> None:
        """The process is killed, some of its writes half done, and another one starts with what the index names."""
        if really:
            return
        self.forget_freed()
        for transfer in self.transfers:
            if transfer.target == DISK and transfer not in self.written:
                n = data.draw(st.integers(0, len(transfer.target_slots)))
                self.data[DISK][transfer.target_slots[:n]] = WRONG
        rows, moved, bad = sound(self.index.values(), len(self.data[DISK]))
        claimed = {self.index[record].prefix for node in self.nodes() for record in node.disk.tolist()}
        assert claimed <= {row.prefix for row in rows}, "a page on the disk is lost at a restart"
        self.index |= {row.record: row for row in moved}
        for record in bad:
            del self.index[record]
        self.start_process()
        for tier in (DEVICE, HOST):
            self.data[tier][:] = WRONG
        self.tree.restore([(row.record, row.before, row.namespace, row.tokens, row.written) for row in rows])
        type(self).restored += len(rows)

    @rule(really=st.integers(0, 19), data=st.data())
    def empty(self, really: int, data: st.DataObject) -> None:
        if really == 0:
            self.tree.flush()
        elif really == 1:
            self.tree.prune(np.array(self.prompt(data), np.int32), NAMESPACES[0])

    # ---- what must hold always ----

    def nodes(self) -> list[Node]:
        found = [child for root in self.tree.roots.values() for child in root.children.values()]
        for node in found:
            found += node.children.values()
        return found

    @invariant()
    def every_copy_is_right(self) -> None:
        self.tree.check([lease for lease, _, _ in self.running])
        self.mirror.compare(self.tree)
        nodes = self.nodes()
        for tier in self.tree.structure.tiers[1:]:
            assert self.copies.slots[tier.number] == {slot for node in nodes for slot in tier.of(node).tolist()}
        self.forget_freed()
        pages, slots, _ = (each.copy() if isinstance(each, np.ndarray) else each for each in self.peek_stores())
        host = self.data[HOST].copy()
        host[slots] = self.data[DEVICE][pages]
        stack = [((n, ()), node) for n, root in self.tree.roots.items() for node in root.children.values()]
        while stack:
            (namespace, before), node = stack.pop()
            tokens = before + tuple(node.tokens.tolist())
            expected = fingerprints(namespace, tokens)[len(before) :]
            for tier, copy in (
                (DEVICE, self.data[DEVICE][node.pages]),
                (HOST, host[node.host]),
                (DISK, self.data[DISK][node.disk]),
            ):
                slots_of = {DEVICE: node.pages, HOST: node.host, DISK: node.disk}[tier].tolist()
                if tier == DISK and self.damaged & set(slots_of):
                    continue
                if slots_of:
                    type(self).seen_by_tier[tier] += 1
                    assert copy.reshape(-1)[: len(expected)].tolist() == expected, f"a wrong copy in tier {tier}"
            stack += [((namespace, tokens), child) for child in node.children.values()]

    def peek_stores(self) -> tuple[np.ndarray, np.ndarray, int]:
        """The pending copies to the host, left pending."""
        pending = list(self.tree.structure.stores)
        stores = self.tree.take_stores()
        self.tree.structure.stores = pending
        return stores

    def teardown(self) -> None:
        if not hasattr(self, "tree"):
            return
        for transfer in self.transfers:
            self.tree.end_transfer(transfer, 0)
        for lease, _, _ in self.running:
            self.tree.release(lease)
        self.next_step()
        self.tree.flush()
        self.tree.check([])
        assert not self.tree.roots
        assert all(tier.slots.free == tier.slots.total for tier in self.tree.structure.tiers)


@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo", "priority"])
def test_random_programs_over_three_tiers(policy: str, mirror: type[Any]) -> None:
    seen = dict.fromkeys((DEVICE, HOST, DISK), 0)
    machine = type("Machine", (Machine,), {"policy": policy, "mirror_type": mirror, "seen_by_tier": seen})
    chosen = settings(
        max_examples=30, stateful_step_count=50, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    for turn in range(5):  # a run in ten hardly writes to the disk, since Hypothesis leaves out rules at random
        if chosen.derandomize:
            seed(f"{policy} {turn}")(machine)  # each its own examples, the same in every run
        run_state_machine_as_test(machine, settings=chosen)
        if min(seen.values()) >= 100 and machine.restored >= 10:  # type: ignore[attr-defined]
            break
    assert min(seen.values()) >= 100, "a tier was hardly used"
    assert machine.restored >= 10, "hardly anything survived a kill"  # type: ignore[attr-defined]
