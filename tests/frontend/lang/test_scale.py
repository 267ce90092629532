"""Thousands of branches in one process, and what the language costs."""

from __future__ import annotations

import asyncio
import time
import tracemalloc
from typing import Any

import branchwise as bw
from branchwise.frontend.lang.engine import EngineBackend


def test_two_thousand_branches(null_engine: Any, threads_started: Any) -> None:
    """No thread for each, no copy of the shared prompt for each, and each one's own result."""
    prompt = " ".join(f"Fact {i} is known." for i in range(150)) + "\n"
    threads: list[int] = []

    @bw.function
    async def program(s):
        s += prompt
        forks = s.fork(2000)
        forks += lambda i: f"Question {i}:" + bw.gen("a", max_tokens=4, ignore_eos=True)
        threads.append(len(threads_started()))
        answers = await forks["a"]
        threads.append(len(threads_started()))
        assert [(await fork.text()).removeprefix(prompt) for fork in forks] == [
            f"Question {i}:{answer}" for i, answer in enumerate(answers)
        ]
        return answers

    backend = EngineBackend(null_engine)
    asyncio.run(_warm(backend))
    tracemalloc.start()
    answers = asyncio.run(program.arun(backend=backend, seed=1)).ret_value
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(answers) == 2000
    assert max(threads) < 10  # not one for each branch
    assert peak < 110_000_000  # bytes; 88 million: 20,000 a branch, and 16 for each token of a waiting prompt
    # Every answer is what a lone request for the same prompt gets.
    for i in (0, 999, 1999):
        ids = null_engine.tokenizer.encode(prompt + f"Question {i}:")
        alone = null_engine.generate(ids, bw.SamplingParams(max_tokens=4, ignore_eos=True))
        assert alone.text == answers[i]
    assert backend.usage.cached_tokens > 0.95 * backend.usage.prompt_tokens


async def _warm(backend: EngineBackend) -> None:
    await backend.codec()


def test_a_gen_of_a_long_program_costs_little(echo: Any) -> None:
    """Beside a backend that answers at once: some 0.1 ms of CPU each. `tests/benchmarks/bench_language.py` has the
    figure; the limit is 100 times as much: CPU time has that of other tests' threads."""

    @bw.function
    def program(s):
        s += "x"
        for _ in range(500):
            s += "y" + bw.gen("a")

    backend = echo(lambda prompt: "z")
    program.run(backend=backend)
    began = time.process_time()
    program.run(backend=backend)
    assert (time.process_time() - began) / 500 < 0.01
