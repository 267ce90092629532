"""The budget that the bodies of all unfinished requests share."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from branchwise.runtime.errors import Overloaded
from branchwise.runtime.server.http.plumbing.body import SMALL_BODY, BodyLimit

LARGE = SMALL_BODY + 1000  # counts as 1000


async def settle() -> None:
    """Until every task has come as far as it can."""
    for _ in range(50):
        await asyncio.sleep(0)


class Upload:
    """A request whose body comes piece by piece, as the test sends it; the application answers when told to."""

    def __init__(self, limit: BodyLimit) -> None:
        self.pieces: asyncio.Queue[tuple[int, bool]] = asyncio.Queue()
        scope = {"type": "http", "path": "/", "method": "POST", "headers": [], "answer": asyncio.Event()}
        self.answer: asyncio.Event = scope["answer"]  # type: ignore[assignment]
        self.task = asyncio.create_task(limit(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        size, more = await self.pieces.get()
        return {"type": "http.request", "body": b"x" * size, "more_body": more}

    async def _send(self, message: Any) -> None:
        raise AssertionError(message)

    async def piece(self, size: int, more: bool = True) -> None:
        self.pieces.put_nowait((size, more))
        await settle()


async def read_then_wait(scope: Any, receive: Any, send: Any) -> None:
    while (await receive())["more_body"]:
        pass
    await scope["answer"].wait()


@pytest.fixture
async def limit() -> BodyLimit:
    return BodyLimit(read_then_wait, max_bytes=SMALL_BODY + 2000, max_total_bytes=SMALL_BODY + 2500)


async def test_withheld_bodies_have_a_budget_and_small_ones_are_free(limit: BodyLimit) -> None:
    limit._max_total = 2500
    withheld = [Upload(limit), Upload(limit)]
    for upload in withheld:
        await upload.piece(LARGE)
    third = Upload(limit)
    await third.piece(SMALL_BODY)
    assert not third.task.done(), "the first bytes of every body are free"
    await third.piece(501)
    with pytest.raises(
        Overloaded, match=r"have 2000 bytes, and this one would exceed .* 2500 \(--max-total-body-bytes"
    ):
        await third.task
    small = Upload(limit)
    await small.piece(SMALL_BODY, more=False)
    small.answer.set()
    await small.task


async def test_bodies_are_counted_until_their_requests_end_however_they_end(limit: BodyLimit) -> None:
    limit._max_total = 2500
    answered, cut, refused = Upload(limit), Upload(limit), Upload(limit)
    await answered.piece(LARGE, more=False)
    await cut.piece(LARGE)
    assert limit._total == 2000
    await refused.piece(LARGE)
    assert isinstance(refused.task.exception(), Overloaded) and limit._total == 2000
    cut.task.cancel()
    await settle()
    assert limit._total == 1000, "read, but not answered yet"
    answered.answer.set()
    await answered.task
    assert limit._total == 0


def test_the_budget_always_takes_one_body() -> None:
    assert BodyLimit(read_then_wait, max_bytes=10**9, max_total_bytes=1)._max_total == 10**9
