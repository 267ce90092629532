"""Dynamo's router follows our events: it decodes them, honours removals and finds no gap.

Skipped without Dynamo. To run it: ``pip install --no-deps ai-dynamo-runtime`` (1.6.1 was used; it needs no GPU).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from branchwise.radix.tree import RadixTree
from branchwise.runtime.fleet.publisher import KVEventPublisher

dynamo = pytest.importorskip("dynamo._core")
PAGE = 4


def remember(tree: RadixTree, tokens: list[int]) -> None:
    array = np.array(tokens, np.int32)
    step = tree.begin_step()
    lease = tree.match(array)
    tree.reserve(lease, -(-len(tokens) // tree.page_size) - len(lease.pages))
    tree.release(lease, array)
    tree.end_step(step)


@pytest.fixture
def published() -> Iterator[tuple[RadixTree, KVEventPublisher]]:
    tree = RadixTree(16, PAGE)
    publisher = KVEventPublisher(tree, "tcp://127.0.0.1:*", "tcp://127.0.0.1:*")
    yield tree, publisher
    publisher.close()


async def test_its_selection_service_knows_what_is_cached(published: Any) -> None:
    tree, publisher = published
    service = dynamo.SelectionService()
    worker = {
        "worker_id": 1,
        "model_name": "m",
        "endpoint": "http://127.0.0.1:1",
        "kv_events_endpoint": publisher.address,
        "replay_endpoint": publisher.replay_address,
        "block_size": PAGE,
        "total_kv_blocks": 16,
    }
    remember(tree, list(range(20, 32)))  # before it subscribes: it gets this by a replay
    publisher.publish()
    record = await service.upsert_worker(worker)
    assert record["lifecycle"] == "schedulable", record

    async def overlap(tokens: list[int], expected: int) -> None:
        for _ in range(100):
            found = await service.overlap_scores({"model_name": "m", "token_ids": tokens})
            if sum(each["device_blocks"] for each in found["workers"]) == expected:
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"{tokens}: {found}, expected {expected} blocks")

    prompt = list(range(100, 112))
    await asyncio.sleep(0.3)  # its subscription
    remember(tree, prompt)
    publisher.publish()
    await overlap([*prompt, 1, 2, 3, 4], 3)
    await overlap(list(range(20, 32)), 3)
    remember(tree, [*prompt[:4], 9, 9, 9, 9])  # another prompt keeps the first block
    tree.prune(np.array(prompt[:8], np.int32))
    publisher.publish()
    await overlap(prompt, 1)
    tree.flush()
    publisher.publish()
    await overlap(prompt, 0)
    remember(tree, prompt)
    publisher.publish()
    await overlap(prompt, 3)
    service.shutdown()
