"""Owners take turns."""

from __future__ import annotations

import asyncio

import pytest

from branchwise.runtime.fair_queue import FairQueue
from branchwise.runtime.server.fair_lock import FairLock


def test_owners_take_turns_and_keep_their_order() -> None:
    queue: FairQueue[int] = FairQueue()
    for i in range(4):
        queue.put("a", i)
    queue.put("b", 10)
    queue.put("c", 20)
    assert len(queue) == 6
    assert "b" in queue
    assert "d" not in queue
    assert [queue.take() for _ in range(6)] == [0, 10, 20, 1, 2, 3]
    assert not queue
    with pytest.raises(IndexError):
        queue.take()
    for owner, item in (("a", 1), ("b", 1), ("a", 2), ("a", 1)):
        queue.put(owner, item)
    queue.discard(1)
    assert "b" not in queue
    assert [queue.take() for _ in range(len(queue))] == [2]


def test_the_lock_is_passed_between_owners_and_never_lost() -> None:
    lock, order, inside = FairLock(), [], 0

    async def use(owner: str, i: int) -> None:
        nonlocal inside
        async with lock.of(owner):
            inside += 1
            assert inside == 1
            await asyncio.sleep(0)
            order.append(f"{owner}{i}")
            inside -= 1

    async def main() -> None:
        tasks = [asyncio.create_task(use("a", i)) for i in range(4)] + [asyncio.create_task(use("b", 0))]
        await asyncio.sleep(0)
        tasks[1].cancel()  # while it waits
        await asyncio.wait(tasks)
        assert order == ["a0", "b0", "a2", "a3"]
        # Cancelled when it has just been given the lock: the next one gets it.
        async with lock.of("a"):
            late = [asyncio.create_task(use("c", i)) for i in range(2)]
            await asyncio.sleep(0)
        late[0].cancel()
        await asyncio.wait_for(asyncio.wait(late), 60)
        assert order[4:] == ["c1"]
        await asyncio.wait_for(use("d", 0), 60)

    asyncio.run(main())
