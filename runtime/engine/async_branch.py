"""Branches for asyncio: `AsyncEngine.branch`."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any, Literal, Unpack, overload

from ..messages import BranchOp, BranchRun
from ..sampling_params import SamplingParams
from ..scheduler.branches.scores import Score, ScoreCollector
from .base import EngineBase
from .branch import BranchBase, ignore_gone, scored, token_ids
from .prompts import BranchPiece, Prompt, RunOptions
from .request_output import RequestOutput, StreamChunk


class AsyncBranch(BranchBase):
    """`Branch` for asyncio: the same methods, awaitable; ``await branch.tokens()`` and ``text()`` are methods here."""

    @classmethod
    async def create(cls, engine: EngineBase, prompt: BranchPiece, cache_salt: str, ttl: float | None) -> AsyncBranch:
        op = cls._creation(engine, prompt, cache_salt, ttl)
        return cls(engine, (await engine._thread.aoperate(op))["id"])

    async def fork(self, n: int = 1) -> list[AsyncBranch]:
        ids = (await self._operate(self._operation("fork", n=n)))["ids"]
        return [AsyncBranch(self._engine, id) for id in ids]

    async def extend(self, piece: Prompt, *, parse_special: bool = False) -> int:
        return int((await self._operate(self._extension(piece, parse_special)))["num_tokens"])

    @overload
    def generate(
        self, params: SamplingParams | None = None, *, stream: Literal[False] = False, **options: Unpack[RunOptions]
    ) -> Awaitable[RequestOutput]: ...

    @overload
    def generate(
        self, params: SamplingParams | None = None, *, stream: Literal[True], **options: Unpack[RunOptions]
    ) -> AsyncIterator[StreamChunk]: ...

    def generate(
        self, params: SamplingParams | None = None, *, stream: bool = False, **options: Unpack[RunOptions]
    ) -> Awaitable[RequestOutput] | AsyncIterator[StreamChunk]:
        """`Branch.generate`: an awaitable of a `RequestOutput`; with ``stream`` an asynchronous iterator."""
        return self.stream(params, **options) if stream else self._complete(self._generation(params, **options))

    async def _complete(self, run: BranchRun) -> RequestOutput:
        return (await self._thread.acomplete([run]))[0]

    def stream(self, params: SamplingParams | None = None, **options: Unpack[RunOptions]) -> AsyncIterator[StreamChunk]:
        """`Branch.stream`."""
        return self._thread.astream(self, self._generation(params, **options))

    async def score(
        self, continuations: Sequence[Prompt], *, parse_special: bool = False, unconditional: bool = False
    ) -> list[Score]:
        """`Branch.score`."""
        run = self._scoring(continuations, parse_special, unconditional)
        collector = ScoreCollector(len(run.ids), unconditional=unconditional)
        async with contextlib.aclosing(self._thread.afollow([run])) as deltas:
            async for delta in deltas:
                collector.feed(delta.id - run.ids[0], scored(delta))
        return collector.scores

    async def tokens(self) -> list[int]:
        return token_ids(await self.info(tokens=True))

    async def text(self) -> str:
        return self._text_of(await self.info(tokens=True))

    async def info(self, *, tokens: bool = False) -> dict[str, Any]:
        """`Branch.info`."""
        return dict(await self._operate(self._operation("get", tokens=tokens)))

    async def close(self) -> None:
        with ignore_gone():
            await self._operate(self._operation("delete"))

    async def _operate(self, op: BranchOp) -> Any:
        return await self._thread.aoperate(op)

    async def __aenter__(self) -> AsyncBranch:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()
