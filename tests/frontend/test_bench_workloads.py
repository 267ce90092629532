"""The workloads draw the prompts BranchBench defines: hashes computed once from its reference implementation."""

from __future__ import annotations

import asyncio
import hashlib
import json

import pytest

from branchwise.frontend.bench.workloads import WORKLOADS, RandomTokens

# (scale, seed, vocab): {workload: (requests, hash of every call)}
GOLDEN = {
    (0.05, 0, 8000): {
        "warm-up": (64, "1313f69e23c8521e"),
        "no_sharing": (12, "22d28f6064acfb5a"),
        "fewshot": (25, "b0ad7a2517a79493"),
        "agents": (24, "110eea1f4b9d00bc"),
        "tree_of_thought": (40, "32ca319f9c15092d"),
        "chat": (30, "776511b2e5a270fd"),
        "best_of_n": (32, "11284ff33190d73c"),
        "long_document": (32, "4d4f7a719551306e"),
    },
    (0.02, 3, 100_000): {
        "warm-up": (64, "0641b2ed7d951d9f"),
        "no_sharing": (5, "45779c59992eb0f1"),
        "fewshot": (10, "7a8be2bd9eb34172"),
        "agents": (8, "7d15c8cf868b59f6"),
        "tree_of_thought": (40, "bff2d0d830d95575"),
        "chat": (10, "1d01787a445d2935"),
        "best_of_n": (32, "64a7a94fb7b104a2"),
        "long_document": (32, "85f1e489ccd28dd2"),
    },
}
CASES = [(key, name) for key, expected in GOLDEN.items() for name in expected if name != "warm-up"]


def digest(calls: list[tuple[list[int], int, int | None, float]]) -> str:
    rows = sorted(hashlib.sha256(json.dumps([list(call[0]), *call[1:]]).encode()).hexdigest() for call in calls)
    return hashlib.sha256("".join(rows).encode()).hexdigest()[:16]


class Recorder:
    """A server whose answer is a function of the prompt's sum; remembers every call."""

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab
        self.calls: list[tuple[list[int], int, int | None, float]] = []
        self.running = self.most_running = 0

    async def __call__(
        self, prompt: list[int], max_tokens: int, *, seed: int | None = None, temperature: float = 0.0
    ) -> list[int]:
        self.calls.append((prompt, max_tokens, seed, temperature))
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        await asyncio.sleep(0)
        self.running -= 1
        base = sum(prompt)
        return [(base * 31 + 7 * i) % self.vocab for i in range(max_tokens)]


@pytest.mark.parametrize(("key", "name"), CASES)
def test_draws_the_reference_prompts(key: tuple[float, int, int], name: str) -> None:
    scale, seed, vocab = key
    recorder = Recorder(vocab)
    asyncio.run(_run(name, recorder, RandomTokens(f"{name}/{seed}", vocab), scale))
    assert (len(recorder.calls), digest(recorder.calls)) == GOLDEN[key][name]
    assert WORKLOADS[name].requests(scale) == len(recorder.calls)
    assert WORKLOADS[name].longest == max(len(prompt) + max_tokens for prompt, max_tokens, _, _ in recorder.calls)


@pytest.mark.parametrize("key", GOLDEN)
def test_warms_up_with_the_reference_prompts(key: tuple[float, int, int]) -> None:
    _, seed, vocab = key
    calls = [(prompt, 16, None, 0.0) for prompt in RandomTokens(10_000 + seed, vocab).many(64, 300)]
    assert (len(calls), digest(calls)) == GOLDEN[key]["warm-up"]


def test_bounded_workloads_keep_at_most_128_in_flight() -> None:
    recorder = Recorder(8000)
    asyncio.run(_run("fewshot", recorder, RandomTokens("fewshot/0", 8000), 0.4))
    assert len(recorder.calls) == 204
    assert recorder.most_running == 128


async def _run(name: str, recorder: Recorder, draw: RandomTokens, scale: float) -> None:
    await WORKLOADS[name].run(recorder, draw, scale)
