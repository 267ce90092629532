"""Tree of thought in BranchBench's shape, through the language: bytes on the wire and prompt tokens computed.

    python tests/benchmarks/bench_tree_of_thought.py

A server without a model (the null executor) and the shipped tokenizer; the same program with the prompts kept there as
branches, and sent whole each time. `tests/frontend/lang/test_tree_of_thought.py` asserts what this prints.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import branchwise as bw
from branchwise.runtime.models.folder import SHIPPED

LAUNCH = """
import json, sys
import msgspec
from branchwise.runtime.config import ServerConfig
from branchwise.runtime.server.server import run_server

config = msgspec.json.decode(sys.argv[1], type=ServerConfig)
sys.exit(run_server(config, lambda info: print(json.dumps(info), flush=True)))
"""
WORDS = ["mill", "bridge", "baker", "number", "the", "and", "river", "of", "town", "green", "lives", "next", "to"]


def text(seed: str, words: int) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(words)) + "\n"


# Each begins with a token of its own: siblings share what stands before the fork, and nothing by chance.
HINTS = [f"{WORDS[i]} {text(f'hint {i}', 7)}" for i in range(4)]
JUDGE = text("judge", 32)
PROBLEMS, DEPTH, KEPT = 16, 3, 2


@bw.function
async def tree_of_thought(s, problem, instruction=1024, given=256, thought=96, verdict=16):
    """At each level four proposals a kept state, a score of each of them, and two go on."""
    s += text("instruction", instruction)
    s += text(f"problem {problem}", given)
    frontier = [s]
    for _ in range(DEPTH):
        forks = [fork for state in frontier for fork in state.fork(len(HINTS))]
        for i, fork in enumerate(forks):
            fork += HINTS[i % len(HINTS)] + bw.gen("thought", max_tokens=thought, ignore_eos=True) + "\n"
        judges = [fork.copy() for fork in forks]
        for judge in judges:
            judge += JUDGE + bw.gen("score", max_tokens=verdict, ignore_eos=True)
        await asyncio.gather(*(judge["score"] for judge in judges))
        frontier = forks[:KEPT]


class Recorded:
    """A backend that keeps each prompt it was asked for, and what was drawn."""

    def __init__(self, backend: Any) -> None:
        self.asked: list[tuple[list[int], list[int]]] = []
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    async def generate(self, handle: Any, ask: Any, on_delta: Any = None) -> Any:
        prompt = handle.array().tolist()
        done = await self._backend.generate(handle, ask, on_delta)
        self.asked.append((prompt, handle.array().tolist()[len(prompt) :]))
        return done


def fewest(asked: list[tuple[list[int], list[int]]]) -> int:
    """Prompt tokens that have to be computed if each distinct one is computed once, by a walk through a trie.

    What the model wrote it has computed itself, but for an answer's last token, which nothing has read; and of a prompt
    that is answered the last token is computed, known or not: the logits come from there.
    """
    root: dict[int, Any] = {}
    count = 0
    for prompt, output in asked:
        node, known = root, 0
        for i, token in enumerate([*prompt, *output[:-1]]):
            known += token in node and i < len(prompt)
            node = node.setdefault(token, {})
        count += max(len(prompt) - known, 1 if output else 0)
    return count


@contextmanager
def server(page_size: int) -> Iterator[str]:
    """The address of a server that computes nothing; a token is a hash of its position."""
    engine = {"model": str(SHIPPED), "max_num_seqs": 256, "page_size": page_size, "kv_cache_tokens": 1 << 18}
    config = {"engine": engine, "port": 0, "null_executor": True}
    command = [sys.executable, "-c", LAUNCH, json.dumps(config)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{json.loads(process.stdout.readline())['port']}"
    finally:
        process.terminate()
        process.communicate(timeout=60)


def run(backend: Any, problems: int = PROBLEMS, **options: Any) -> tuple[Any, int]:
    """What all problems used, and the fewest prompt tokens that had to be computed for them."""
    backend = Recorded(backend)
    bw.flush_cache(backend)
    program = tree_of_thought.bind(
        **{name: options.pop(name) for name in set(tree_of_thought.arg_names) & options.keys()}
    )
    for state in program.run_batch(list(range(problems)), backend=backend, temperature=1.0, seed=1, **options):
        if (error := state.error()) is not None:
            raise error
    return backend.usage, fewest(backend.asked)


def main() -> None:
    with server(page_size=16) as url:
        for branches in (False, True, False, True):
            began = time.perf_counter()
            used, least = run(bw.connect(url, branches=branches))
            print(
                f"{'branches' if branches else 'stateless':>9}: {used.requests} requests, {used.bytes_sent:,} bytes "
                f"sent; prompt tokens: {used.prompt_tokens:,} read, {used.computed_tokens:,} computed, {least:,} at "
                f"the fewest; {time.perf_counter() - began:.1f} s"
            )


if __name__ == "__main__":
    main()
