"""What the language costs beside an executor that computes nothing: the same requests with it and without.

python tests/benchmarks/bench_language.py [gens]
"""

from __future__ import annotations

import asyncio
import sys
import time

import branchwise as bw
from branchwise.frontend.lang.engine import EngineBackend
from branchwise.runtime.config import EngineConfig
from branchwise.runtime.engine.core import EngineCore
from branchwise.runtime.executor.null import NullExecutor
from branchwise.runtime.models.folder import SHIPPED
from branchwise.runtime.tokenizer.tokenizer import Tokenizer

WIDTH = 50  # branches at the same time
PARAMS = bw.SamplingParams(max_tokens=2, ignore_eos=True)


@bw.function
async def program(s, rounds):
    s += "Once upon a time there was a mill.\n"
    forks = s.fork(WIDTH)
    for _ in range(rounds):
        forks += " And" + bw.gen("a", max_tokens=2, ignore_eos=True)
    await forks["a"]


async def bare(engine, tokenizer, rounds):
    """The requests the program makes, with the bookkeeping left to this loop."""

    async def one():
        ids = tokenizer.encode("Once upon a time there was a mill.\n").tolist()
        for _ in range(rounds):
            ids += tokenizer.encode(" And", False).tolist()
            ids += (await engine.agenerate(ids, PARAMS)).token_ids

    await asyncio.gather(*(one() for _ in range(WIDTH)))


def main(gens: int) -> None:
    tokenizer = Tokenizer.load(SHIPPED)
    config = EngineConfig(model=str(SHIPPED), max_num_seqs=WIDTH, max_num_batched_tokens=8192)
    core = EngineCore(config, NullExecutor(65536, 16, tokenizer.vocab_size), (), 4352)
    rounds = gens // WIDTH
    with bw.Engine.from_core(core, tokenizer) as engine:
        backend = EngineBackend(engine)
        asyncio.run(program.arun(2, backend=backend))
        best = {}
        for _ in range(5):  # in turn: the machine drifts
            for name, work in (
                ("language", lambda: program.arun(rounds, backend=backend)),
                ("bare", lambda: bare(engine, tokenizer, rounds)),
            ):
                engine.flush_cache()
                began = time.perf_counter()
                asyncio.run(work())
                best[name] = min(best.get(name, 1e9), (time.perf_counter() - began) / (rounds * WIDTH))
    language, plain = best["language"] * 1e6, best["bare"] * 1e6
    print(f"{rounds * WIDTH} gens, {WIDTH} at a time, best of 5: {language:.0f} us a gen with the language, ", end="")
    print(f"{plain:.0f} us for the bare request: {language - plain:.0f} us are the language's")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
