"""The engine in process for asyncio: `Engine`'s names, awaitable."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Self

from ..scheduler.branches.scores import Score
from .async_branch import AsyncBranch
from .base import EngineBase
from .prompts import BranchPiece, Prompt


class AsyncEngine(EngineBase):
    """`Engine` whose ``generate``, ``chat``, ``stream`` and branches are asynchronous."""

    generate = EngineBase.agenerate
    chat = EngineBase.achat
    stream = EngineBase.astream

    async def score(self, prefix: Prompt, continuations: Sequence[Prompt], *, cache_salt: str = "") -> list[Score]:
        """`Engine.score` for asyncio."""
        async with await self.branch(prefix, cache_salt=cache_salt) as branch:
            return await branch.score(continuations)

    async def branch(self, prompt: BranchPiece = (), *, cache_salt: str = "", ttl: float | None = None) -> AsyncBranch:
        """`Engine.branch` for asyncio."""
        return await AsyncBranch.create(self, prompt, cache_salt, ttl)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)
