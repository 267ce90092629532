"""KV events: what they say is what the tree holds, and other engines' subscribers can read them."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

from branchwise.radix.node import DEFAULT, DEVICE, DISK, HOST
from branchwise.radix.tree import RadixTree
from branchwise.runtime.config import EngineConfig
from branchwise.runtime.errors import LoadError
from branchwise.runtime.executor.null import NullExecutor
from branchwise.runtime.fleet import block_events
from branchwise.runtime.fleet.block_events import MEDIA, BlockEvents, snapshot
from branchwise.runtime.fleet.follower import Follower, Sink
from branchwise.runtime.fleet.hashes import block_hashes, root_hash
from branchwise.runtime.fleet.instances import instance_tag
from branchwise.runtime.fleet.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, IndexEvent
from branchwise.runtime.fleet.publisher import KVEventPublisher, _bind
from branchwise.runtime.fleet.view import FleetView, ReplicaReport
from branchwise.runtime.messages import Generate, Limits
from branchwise.runtime.sampling_params import SamplingParams
from branchwise.runtime.scheduler.scheduler import Scheduler

PAGE, PAGES = 4, 40


class TheirStored(msgspec.Struct, tag="BlockStored", omit_defaults=True):
    """vLLM's, restated: `vllm/distributed/kv_events.py`."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None = None


class TheirRemoved(msgspec.Struct, tag="BlockRemoved", omit_defaults=True):
    block_hashes: list[int]
    medium: str | None = None


class TheirCleared(msgspec.Struct, tag="AllBlocksCleared", omit_defaults=True):
    pass


class TheirBatch(msgspec.Struct, array_like=True, omit_defaults=True):
    ts: float
    events: list[TheirStored | TheirRemoved | TheirCleared]
    data_parallel_rank: int | None = None


class Mirror:
    """A subscriber's view: hash -> (parent, tokens). Applies what other engines' routers may assume."""

    def __init__(self) -> None:
        self.blocks: dict[int, tuple[int | None, tuple[int, ...]]] = {}

    def apply(self, events: list[Any]) -> None:
        for event in events:
            if type(event).__name__.endswith("Cleared"):
                self.blocks.clear()
            elif type(event).__name__.endswith("Removed"):
                for hash_ in event.block_hashes:
                    del self.blocks[hash_]
            else:
                assert event.parent_block_hash is None or event.parent_block_hash in self.blocks
                before, size = event.parent_block_hash, event.block_size
                assert len(event.token_ids) == size * len(event.block_hashes)
                for i, hash_ in enumerate(event.block_hashes):
                    assert hash_ not in self.blocks and 0 <= hash_ < 1 << 64
                    self.blocks[hash_] = before, tuple(event.token_ids[i * size : (i + 1) * size])
                    before = hash_


def of_snapshot(events: BlockEvents) -> dict[int, Any]:
    mirror = Mirror()
    mirror.apply(snapshot({"seq": 0, "block_size": PAGE, "contents": events.contents()}).batch.events)
    return mirror.blocks


def drive(seed: int) -> Iterator[Scheduler]:
    """A scheduler in which random requests of few prompts come, leave early, end and are evicted."""
    executor = NullExecutor(PAGES, PAGE, 1000)
    scheduler = Scheduler(
        EngineConfig(page_size=PAGE),
        Limits(1000, 128, PAGES * PAGE),
        num_pages=PAGES,
        max_rows=6,
        max_batched_tokens=32,
    )
    rng = random.Random(seed)
    prompts = [[2 + (i * k) % 40 for i in range(60)] for k in (3, 5, 7)]
    for number in range(1, 250):
        prompt = [*rng.choice(prompts)[: rng.randrange(2, 60)], rng.randrange(100)]
        namespace = rng.choice([("", ""), ("", "salt"), ("ann", "")])
        data = np.array(prompt, "<i4").tobytes()
        scheduler.add(
            Generate([number], SamplingParams(max_tokens=rng.randrange(1, 20)), tokens=data, namespace=namespace)
        )
        if rng.random() < 0.1:
            scheduler.abort(rng.randrange(1, number + 1))
        if rng.random() < 0.02:
            scheduler.tree.flush()
        for _ in range(rng.randrange(4)):
            step = scheduler.plan(scheduler.poll())
            if step is not None:
                scheduler.complete(step, executor.launch(step.plan).result())
        yield scheduler


@pytest.mark.parametrize("seed", range(4))
def test_a_subscriber_knows_every_block(seed: int) -> None:
    mirror, events, kinds = Mirror(), None, set()
    for scheduler in drive(seed):
        events = events or BlockEvents(scheduler.tree)
        batch = events.take()
        if batch is not None:
            mirror.apply(batch.events)
            kinds |= {type(event) for event in batch.events}
        assert of_snapshot(events) == mirror.blocks
        assert len(mirror.blocks) <= scheduler.tree.cached
    scheduler.tree.flush()
    while scheduler.has_requests:
        for request in list(scheduler.ledger.rows.running()) + list(scheduler.ledger.waiting.values()):
            scheduler.abort(request.id)
    scheduler.tree.flush()
    assert events is not None
    last = events.take()
    assert last is None or last.events == [AllBlocksCleared()]
    assert kinds >= {BlockStored, BlockRemoved}


def of_tree(tree: RadixTree) -> dict[str, set[int]]:
    """The hashes of the whole pages in each medium."""
    found: dict[str, set[int]] = {medium: set() for medium in MEDIA.values()}
    stack = [(root_hash(namespace), node) for namespace, root in tree.roots.items() for node in root.children.values()]
    while stack:
        before, node = stack.pop()
        hashes = block_hashes(node.tokens, PAGE, before)
        for tier in tree.structure.tiers:
            if len(tier.of(node)):
                found[MEDIA[tier.number]] |= set(hashes)
        stack += [(hashes[-1], child) for child in node.children.values()]
    return found


@pytest.mark.parametrize("seed", range(4))
def test_a_subscriber_knows_every_block_in_every_medium(seed: int) -> None:
    """Pages move between three tiers, some copies fail, and some are found to be wrong."""
    rng, tree = random.Random(seed), RadixTree(12, PAGE, host_slots=16, disk_slots=40)
    events, known = BlockEvents(tree), {medium: set() for medium in MEDIA.values()}
    prompts = [np.array([2 + (i * k) % 40 for i in range(36)], np.int32) for k in (3, 5, 7)]
    most = dict.fromkeys(known, 0)
    for _ in range(400):
        prompt, move = rng.choice(prompts)[: rng.randrange(2, 36)], rng.choice(["use", "use", "up", "up", "down"])
        if move == "use":
            lease = tree.match(prompt, limit=len(prompt) - 1)
            if tree.reserve(lease, -(-len(prompt) // PAGE) - len(lease.pages)) is not None:
                tree.publish(lease, prompt)
            tree.release(lease)
            tree.end_step(tree.begin_step() - 1)
        else:
            reach, transfer = tree.reach(prompt, DEFAULT, len(prompt)), None
            if move == "up":
                transfer = tree.moves.load(reach, 8) or tree.moves.fetch(reach, 8)
            elif (end := tree.moves.end_of(DEFAULT, prompt)) is not None:
                transfer = tree.moves.persist(end, 8)
            if transfer is not None:
                n = len(transfer.target_slots)
                good = n if rng.random() < 0.8 else rng.randrange(n)
                tree.end_transfer(transfer, good, damaged=transfer.source == DISK and rng.random() < 0.5)
        if rng.random() < 0.01:
            tree.flush(keep_disk=rng.random() < 0.5)
        batch = events.take()
        for event in batch.events if batch is not None else ():
            if isinstance(event, AllBlocksCleared):
                known = {medium: set() for medium in known}
            elif isinstance(event, BlockStored):
                parent = event.parent_block_hash
                assert parent is None or any(parent in hashes for hashes in known.values())
                assert not known[event.medium].intersection(event.block_hashes), "stored twice"
                known[event.medium].update(event.block_hashes)
            else:
                assert known[event.medium].issuperset(event.block_hashes), "removed and never stored"
                known[event.medium].difference_update(event.block_hashes)
        expected = of_tree(tree)
        assert known == expected
        assert known_blocks(events) == expected, "a late subscriber knows the same"
        most = {medium: max(n, len(expected[medium])) for medium, n in most.items()}
        tree.check()
    assert min(most.values()) >= 8, "a medium was hardly used"


def test_a_block_is_hashed_once_however_often_it_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Down when the device evicts it, to the disk and up again, its hash is known from the tier that it is in."""
    tree = RadixTree(12, PAGE, host_slots=16, disk_slots=40)
    events, prompt = BlockEvents(tree), np.arange(8 * PAGE, dtype=np.int32)
    fill(tree, prompt.tolist())
    stored = events.take()
    assert stored is not None

    def hashed_again(*_: Any) -> list[int]:
        raise AssertionError("a block was hashed again")

    monkeypatch.setattr(block_events, "block_hashes", hashed_again)
    fill_device, moves = tree.match(np.array([99], np.int32)), tree.moves
    assert tree.reserve(fill_device, 12) is not None, "the device evicts every page to the host"
    tree.release(fill_device)
    end = moves.end_of(DEFAULT, prompt)
    assert end is not None
    for transfer in (moves.persist(end, 8), moves.load(tree.reach(prompt), 8)):
        assert transfer is not None
        tree.end_transfer(transfer, 8)
    moved = events.take()
    assert moved is not None
    media = [(event.medium, event.block_hashes) for event in moved.events if isinstance(event, BlockStored)]
    assert media == [(MEDIA[tier], stored.events[0].block_hashes) for tier in (HOST, DISK, DEVICE)]
    assert known_blocks(events) == of_tree(tree)


def known_blocks(events: BlockEvents) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {medium: set() for medium in MEDIA.values()}
    for event in snapshot({"seq": 0, "block_size": PAGE, "contents": events.contents()}).batch.events:
        found[event.medium].update(event.block_hashes)
    return found


def test_a_hash_names_a_prefix_in_a_namespace() -> None:
    tokens = np.arange(12, dtype=np.int32)
    whole = block_hashes(tokens, 4)
    assert block_hashes(tokens[:11], 4) == whole[:2]
    assert block_hashes(tokens[4:], 4, whole[0]) == whole[1:], "a hash continues the one before"
    assert block_hashes(tokens[4:8], 4) != whole[1:2], "what precedes a block counts"
    salts = {root_hash(name) for name in (("", ""), ("a", ""), ("", "a"), ("ab", "c"), ("a", "bc"))}
    assert len(salts) == 5
    # Routers and replicas of different versions must agree.
    assert whole == [0xA1D0BD893C9531AC, 0x244C2E40BDC3593D, 0xA3F3948BF151C718]
    assert root_hash(("ann", "salt")) == 0x847E04B40E125A50


def fill(tree: RadixTree, tokens: list[int]) -> None:
    array = np.array(tokens, np.int32)
    step = tree.begin_step()
    lease = tree.match(array)
    tree.reserve(lease, -(-len(tokens) // tree.page_size) - len(lease.pages))
    tree.release(lease, array)
    tree.end_step(step)


class Subscriber:
    def __init__(self, publisher: KVEventPublisher) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self.sub = self.context.socket(zmq.SUB)
        self.sub.subscribe(b"")
        self.sub.connect(publisher.address)

    def next(self) -> tuple[int, TheirBatch]:
        assert self.sub.poll(60_000)
        topic, number, payload = self.sub.recv_multipart()
        assert topic == b""
        return int.from_bytes(number, "big"), msgspec.msgpack.decode(payload, type=TheirBatch)


@pytest.fixture
def published() -> Iterator[tuple[RadixTree, KVEventPublisher]]:
    tree = RadixTree(16, PAGE)
    fill(tree, [1, 2, 3, 4, 5, 6, 7, 8, 9])  # before there is a publisher
    publisher = KVEventPublisher(tree, "tcp://127.0.0.1:*", "tcp://127.0.0.1:*")
    yield tree, publisher
    publisher.close()


def test_batches_are_numbered_and_other_engines_subscribers_read_them(
    published: tuple[RadixTree, KVEventPublisher],
) -> None:
    tree, publisher = published
    subscriber = Subscriber(publisher)
    mirror, tokens = Mirror(), 100
    while not subscriber.sub.poll(50):  # until it has joined: it is blind to what was before
        fill(tree, list(range(tokens, tokens + 4)))
        publisher.publish()
        tokens += 4
    first, _ = subscriber.next()
    facts = publisher.snapshot()
    mirror.apply(snapshot(facts).batch.events)
    assert facts["seq"] >= first and any(tokens == (1, 2, 3, 4) for _, tokens in mirror.blocks.values())
    tree.flush()
    fill(tree, [7, 7, 7, 7])
    publisher.publish()
    publisher.publish()  # nothing has happened: no batch
    last = facts["seq"]
    while last <= facts["seq"]:
        last, batch = subscriber.next()
    assert last == facts["seq"] + 1
    mirror.apply(batch.events)
    assert [tokens for _, tokens in mirror.blocks.values()] == [(7, 7, 7, 7)]
    subscriber.context.destroy(0)


def test_missed_batches_are_sent_again(published: tuple[RadixTree, KVEventPublisher]) -> None:
    tree, publisher = published
    for start in range(100, 120, 4):
        fill(tree, list(range(start, start + 4)))
        publisher.publish()
    context: zmq.Context[Any] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.connect(publisher.replay_address or "")
    for start, expected in ((0, [0, 1, 2, 3, 4, 5]), (4, [4, 5]), (9, [])):
        dealer.send_multipart((b"", b"not a number"))  # ignored
        dealer.send_multipart((b"", start.to_bytes(8, "big")))
        numbers = []
        while True:
            assert dealer.poll(60_000)
            _, number, payload = dealer.recv_multipart()
            if number == b"\xff" * 8:
                break
            assert msgspec.msgpack.decode(payload, type=TheirBatch).data_parallel_rank == 0
            numbers.append(int.from_bytes(number, "big"))
        assert numbers == expected
    context.destroy(0)


@pytest.mark.parametrize("replay", [True, False])
async def test_batches_that_are_lost_before_a_pause_are_fetched(
    published: tuple[RadixTree, KVEventPublisher], monkeypatch: pytest.MonkeyPatch, replay: bool
) -> None:
    """A publisher drops what no subscription has reached. No batch follows that would show the gap: a report does."""
    monkeypatch.setattr("branchwise.runtime.fleet.follower.LATE_SECONDS", 0.0)
    tree, publisher = published
    nowhere, prompt = "tcp://127.0.0.1:1", np.arange(200, 200 + 2 * PAGE, dtype=np.int32)

    async def taken(_: str) -> bytes:
        return msgspec.json.encode(snapshot(publisher.snapshot()))

    view: FleetView[str] = FleetView(taken, instance_tag)

    def cached() -> int:
        return int(view.router.cached(len(prompt), block_hashes(prompt, PAGE))[0])

    def update() -> None:
        info = publisher.info()
        replayed = info["kv_events_replay"] if replay else None
        view.update({"a": ReplicaReport("", nowhere, replayed, info["kv_events_seq"], PAGE)})

    async with asyncio.timeout(60):
        update()
        while view.router.unsure[0]:
            await asyncio.sleep(0.01)
        fill(tree, prompt.tolist())
        publisher.publish()
        assert cached() == 0
        update()
        while cached() < len(prompt) or view.router.unsure[0]:
            await asyncio.sleep(0.01)
    view.close()


class Calls(Sink):
    """Notes what is called."""

    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    def apply(self, events: list[IndexEvent]) -> None:
        self._calls.append("apply")

    def reset(self) -> None:
        self._calls.append("reset")

    def sure(self, sure: bool) -> None:
        self._calls.append(f"sure {sure}")


async def noted(calls: list[str], *snapshots: int) -> Follower:
    """A follower after its first snapshot; ``snapshots``: the numbers of this one and of those to come."""
    numbers = iter(snapshots)

    async def snapshot() -> bytes:
        number = next(numbers)
        calls.append(f"snapshot {number}")
        return msgspec.json.encode({"seq": number, "block_size": PAGE, "batch": (0.0, (), 0)})

    follower = Follower("tcp://127.0.0.1:1", None, snapshot, Calls(calls))
    await follower._take_snapshot()
    calls.clear()
    return follower


async def test_a_subscription_whose_numbers_restart_takes_a_snapshot() -> None:
    """Not only at 0: a follower that connects again may have missed the first batches of a restarted engine."""
    calls: list[str] = []
    follower, batch = await noted(calls, 9, 4), msgspec.msgpack.encode((0.0, (), 0))
    for number in (8, 9, 10, 11):
        await follower._receive(number, batch)
    assert calls == ["apply", "apply"], "the snapshot includes the first two"
    calls.clear()
    for number in (2, 3, 4, 5):
        await follower._receive(number, batch)
    assert calls == ["sure False", "snapshot 4", "reset", "apply", "sure True", "apply"]


async def test_a_batch_that_cannot_be_read_is_replaced_by_a_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    """The follower goes on: a replica of another version may send events that this one does not know."""
    monkeypatch.setattr("branchwise.runtime.fleet.follower.RETRY_SECONDS", 0.0)
    calls: list[str] = []
    follower = await noted(calls, 3, 4)
    await follower._receive(4, msgspec.msgpack.encode((0.0, [["BlockUnheardOf", 1]], 0)))
    assert calls == ["sure False", "snapshot 4", "reset", "apply", "sure True"]
    calls.clear()
    await follower._receive(5, msgspec.msgpack.encode((0.0, (), 0)))
    assert calls == ["apply"]


def test_an_address_that_cannot_be_bound_names_its_flag() -> None:
    tree = RadixTree(4, PAGE)
    with pytest.raises(LoadError, match=r"--kv-events 127\.0\.0\.1: .*tcp://127\.0\.0\.1:5557"):
        KVEventPublisher(tree, "127.0.0.1")


def test_no_address_stays_bound_if_another_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[str] = []

    def bind(*asked: Any) -> str:
        bound.append(_bind(*asked))
        return bound[-1]

    monkeypatch.setattr(f"{KVEventPublisher.__module__}._bind", bind)
    with pytest.raises(LoadError, match="--kv-events-replay nowhere: ") as refused:
        KVEventPublisher(RadixTree(4, PAGE), "tcp://127.0.0.1:*", "nowhere")
    port = int(bound[0].rpartition(":")[2])
    with socket.socket() as client, pytest.raises(ConnectionRefusedError):
        client.connect(("127.0.0.1", port))
    assert refused.value.__traceback__ is not None, "it keeps the sockets from being collected"
