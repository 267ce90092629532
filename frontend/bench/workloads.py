"""The seven programs of BranchBench: how prompts branch in few-shot evaluation, agents, tree search, chat and so on.

A workload generates its prompts with a `random.Random` seeded with ``"{name}/{seed}"``: the same seed, scale and
vocabulary give the same prompts to every server. Prompts are token ids; multi-turn programs continue from the ids that
the server generated.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

VOCAB_LOW, VOCAB_HIGH = 1_000, 100_000
CONCURRENCY = 128  # requests in flight, in the workloads that limit it

Tokens = list[int]


class GenerateTokens(Protocol):
    """Continues a prompt; returns the generated token ids, or an empty list if the request failed."""

    def __call__(
        self, prompt: Tokens, max_tokens: int, *, seed: int | None = None, temperature: float = 0.0
    ) -> Awaitable[Tokens]: ...


class RandomTokens:
    """Random token ids below ``high``. The order of the calls is part of a workload's definition."""

    def __init__(self, seed: int | str, high: int = VOCAB_HIGH) -> None:
        self._random = random.Random(seed)
        self._low, self._high = min(VOCAB_LOW, high // 8), high

    def tokens(self, n: int) -> Tokens:
        return [self._random.randrange(self._low, self._high) for _ in range(n)]

    def many(self, count: int, n: int) -> list[Tokens]:
        return [self.tokens(n) for _ in range(count)]


def scaled(count: int, scale: float, least: int = 1) -> int:
    return max(least, int(count * scale))


async def _bounded(jobs: Sequence[Callable[[], Awaitable[object]]], limit: int = CONCURRENCY) -> None:
    gate = asyncio.Semaphore(limit)

    async def run(job: Callable[[], Awaitable[object]]) -> None:
        async with gate:
            await job()

    await asyncio.gather(*(run(job) for job in jobs))


async def no_sharing(generate: GenerateTokens, rng: RandomTokens, scale: float) -> None:
    """256 unrelated 1,024-token prompts, 256-token answers, 128 at once: what a cache costs when it cannot help."""
    prompts = rng.many(scaled(256, scale, least=2), 1024)
    await _bounded([lambda prompt=prompt: generate(prompt, 256) for prompt in prompts])  # type: ignore[misc]


async def fewshot(generate: GenerateTokens, rng: RandomTokens, scale: float) -> None:
    """512 questions of 64 tokens on one 2,048-token prefix, 32-token answers, 128 at once."""
    prefix = rng.tokens(2048)
    questions = rng.many(scaled(512, scale, least=2), 64)
    await _bounded([lambda question=question: generate(prefix + question, 32) for question in questions])  # type: ignore[misc]


async def agents(generate: GenerateTokens, rng: RandomTokens, scale: float) -> None:
    """64 agents on one 3,072-token tool schema: 8 steps of 96 generated and 160 tool-result tokens."""
    schema = rng.tokens(3072)
    jobs = [(rng.tokens(128), rng.many(8, 160)) for _ in range(scaled(64, scale))]

    async def agent(task: Tokens, tool_results: list[Tokens]) -> None:
        history = schema + task
        for result in tool_results:
            history = history + await generate(history, 96) + result

    await asyncio.gather(*(agent(task, tool_results) for task, tool_results in jobs))


async def tree_of_thought(generate: GenerateTokens, rng: RandomTokens, scale: float) -> None:
    """16 problems, depth 3: 4 proposals of 96 tokens a kept state, a 16-token score each, 2 kept."""
    instruction = rng.tokens(1024)
    judge = rng.tokens(32)
    hints = rng.many(4, 8)

    async def problem(state: Tokens) -> None:
        frontier = [instruction + state]
        for _ in range(3):
            stems = [kept + hint for kept in frontier for hint in hints]
            thoughts = await asyncio.gather(*(generate(stem, 96) for stem in stems))
            grown = [stem + thought for stem, thought in zip(stems, thoughts, strict=True)]
            await asyncio.gather(*(generate(state + judge, 16) for state in grown))
            frontier = grown[:2]

    await asyncio.gather(*(problem(state) for state in rng.many(scaled(16, scale), 256)))


async def chat(generate: GenerateTokens, rng: RandomTokens, scale: float) -> None:
    """128 sessions of 5 turns on one 512-token system prompt: 96-token turns, 128-token replies."""
    system = rng.tokens(512)

    async def session(turns: list[Tokens]) -> None:
        history = system
        for turn in turns:
            history = history + turn
            history = history + await generate(history, 128)

    await asyncio.gather(*(session(rng.many(5, 96)) for _ in range(scaled(128, scale))))


async def best_of_n(generate: GenerateTokens, rng: RandomTokens, scale: float) -> None:
    """8 prompts of 8,192 tokens, 32 samples of 256 tokens each, all at once."""
    prompts = rng.many(scaled(8, scale), 8192)
    await asyncio.gather(*(generate(prompt, 256, seed=i, temperature=1.0) for prompt in prompts for i in range(32)))


async def long_document(generate: GenerateTokens, rng: RandomTokens, scale: float) -> None:
    """4 documents of 32,768 tokens, 32 questions of 64 tokens on each, 128-token answers, all at once."""
    documents = rng.many(scaled(4, scale), 32768)
    await asyncio.gather(*(generate(document + rng.tokens(64), 128) for document in documents for _ in range(32)))


@dataclass(frozen=True)
class Workload:
    """One branching program. ``requests``: how many it makes at a scale."""

    name: str
    run: Callable[[GenerateTokens, RandomTokens, float], Awaitable[None]]
    requests: Callable[[float], int]
    longest: int  # tokens of the longest request, prompt and answer together


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("no_sharing", no_sharing, lambda scale: scaled(256, scale, least=2), 1024 + 256),
        Workload("fewshot", fewshot, lambda scale: scaled(512, scale, least=2), 2048 + 64 + 32),
        Workload("agents", agents, lambda scale: scaled(64, scale) * 8, 3072 + 128 + 7 * (96 + 160) + 96),
        Workload(
            "tree_of_thought",
            tree_of_thought,
            lambda scale: scaled(16, scale) * (8 + 16 + 16),
            1024 + 256 + 3 * (8 + 96) + 32 + 16,
        ),
        Workload("chat", chat, lambda scale: scaled(128, scale) * 5, 512 + 5 * (96 + 128)),
        Workload("best_of_n", best_of_n, lambda scale: scaled(8, scale) * 32, 8192 + 256),
        Workload("long_document", long_document, lambda scale: scaled(4, scale) * 32, 32768 + 64 + 128),
    )
}
