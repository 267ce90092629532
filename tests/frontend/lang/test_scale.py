"""Thousands of branches, and every distinct token computed once."""

from __future__ import annotations

import asyncio
import threading
import time
import tracemalloc
from typing import Any

import pytest

import branchwise as bw
from branchwise.frontend.lang.engine import EngineBackend


def test_two_thousand_branches(null_engine: Any) -> None:
    """No thread for each, no copy of the shared prompt for each, and each one's own result."""
    prompt = " ".join(f"Fact {i} is known." for i in range(150)) + "\n"
    threads: list[int] = []

    @bw.function
    async def program(s):
        s += prompt
        forks = s.fork(2000)
        forks += lambda i: f"Question {i}:" + bw.gen("a", max_tokens=4, ignore_eos=True)
        threads.append(threading.active_count())
        answers = await forks["a"]
        threads.append(threading.active_count())
        assert [(await fork.text()).removeprefix(prompt) for fork in forks] == [
            f"Question {i}:{answer}" for i, answer in enumerate(answers)
        ]
        return answers

    before = threading.active_count()
    backend = EngineBackend(null_engine)
    asyncio.run(_warm(backend))
    tracemalloc.start()
    answers = asyncio.run(program.arun(backend=backend, seed=1)).ret_value
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(answers) == 2000
    assert max(threads) <= before + 1
    assert peak < 90_000_000  # bytes: 20,000 a branch, and the engine's own 16 for each token of a waiting prompt
    # Every answer is what a lone request for the same prompt gets.
    for i in (0, 999, 1999):
        ids = null_engine.tokenizer.encode(prompt + f"Question {i}:")
        alone = null_engine.generate(ids, bw.SamplingParams(max_tokens=4, ignore_eos=True))
        assert alone.text == answers[i]
    assert backend.usage.cached_tokens > 0.95 * backend.usage.prompt_tokens


async def _warm(backend: EngineBackend) -> None:
    await backend.codec()


def test_a_gen_costs_less_than_a_millisecond(echo: Any) -> None:
    """Beside a backend that answers at once. `tests/benchmarks/bench_language.py` has the figure against an engine."""

    @bw.function
    def program(s):
        s += "x"
        for _ in range(500):
            s += "y" + bw.gen("a")

    backend = echo(lambda prompt: "z")
    program.run(backend=backend)
    began = time.perf_counter()
    program.run(backend=backend)
    assert (time.perf_counter() - began) / 500 < 0.001


class Trie:
    """Counts the distinct prefixes of what it is given: the tokens that have to be computed at least once."""

    def __init__(self) -> None:
        self.root: dict[int, Any] = {}
        self.count = 0

    def add(self, ids: list[int]) -> None:
        node = self.root
        for token in ids:
            if token not in node:
                node[token] = {}
                self.count += 1
            node = node[token]


BRANCHES, DEPTH, PROBLEMS = 3, 3, 16


@bw.function
async def tree_of_thought(s, problem):
    """BranchBench's shape: one system prompt, problems, and at each level proposals of which the best goes on."""
    s += "Numbers are combined with + and - and * until one is left. One step a line, nothing else.\n" * 4
    s += f"Problem {problem}: {problem + 2} {problem + 5} {problem + 9}. Target: {3 * problem + 7}.\n"
    for level in range(DEPTH):
        s += f"Step {level + 1}:\n"
        forks = s.fork(BRANCHES)
        forks += bw.gen("step", max_tokens=12, ignore_eos=True)
        steps = await forks["step"]
        best = max(range(BRANCHES), key=lambda i: (len(steps[i]), steps[i]))
        s.join([forks[best]], "concate_and_append")
        s += "\n"


@pytest.mark.parametrize("in_turn", [True, False], ids=["one by one", "all at once"])
def test_tree_of_thought_computes_each_distinct_token_once(shipped: Any, in_turn: bool) -> None:
    shipped.flush_cache()
    backend = _Recorder(shipped)
    tree_of_thought.run_batch(
        list(range(PROBLEMS)), backend=backend, seed=1, temperature=1.0, num_threads=1 if in_turn else "auto"
    )
    assert len(backend.asked) == PROBLEMS * DEPTH * (
        BRANCHES + 1
    )  # each level: the shared part once, then the proposals
    trie = Trie()
    for prompt, _ in backend.asked:
        trie.add(prompt)
    distinct = trie.count
    computed = backend.usage.computed_tokens
    read_while_writing = _read_while_writing(backend.asked)
    # Every request computes its prompt's last token, also when it is in the cache: the logits come from there.
    floor = distinct - read_while_writing
    last_tokens = _repeated_last_tokens(backend.asked)
    if in_turn:
        assert computed == floor + last_tokens
    else:
        # Sixteen programs at once begin with the same text; what of a page several of them fill in one step is theirs.
        assert floor + last_tokens <= computed <= floor + last_tokens + PROBLEMS * 16


def _read_while_writing(asked: list[tuple[list[int], list[int]]]) -> int:
    """Prompt tokens that were there because the model had written them: all of an answer but its last."""
    prompts, outputs = Trie(), 0
    seen: set[tuple[int, ...]] = set()
    for prompt, output in asked:
        prompts.add(prompt)
        for end in range(1, len(output)):
            seen.add((*prompt, *output[:end]))
    for prefix in seen:
        node: Any = prompts.root
        for token in prefix:
            node = node.get(token)
            if node is None:
                break
        outputs += node is not None
    return outputs


def _repeated_last_tokens(asked: list[tuple[list[int], list[int]]]) -> int:
    """Requests whose whole prompt had been computed before they came."""
    known: set[tuple[int, ...]] = set()
    repeated = 0
    for prompt, output in asked:
        repeated += tuple(prompt) in known
        whole = (*prompt, *output[:-1])
        known.update(whole[:end] for end in range(1, len(whole) + 1))
    return repeated


class _Recorder(EngineBackend):
    """Keeps each prompt that was asked, and what was drawn."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self.asked: list[tuple[list[int], list[int]]] = []

    async def generate(self, handle: Any, ask: Any, on_delta: Any = None) -> Any:
        prompt = handle.tokens()
        done = await super().generate(handle, ask, on_delta)
        self.asked.append((prompt, handle.tokens()[len(prompt) :]))
        return done
