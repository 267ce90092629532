"""What branches cost beside stateless requests: forks, and a generation's overhead. No model, no sockets.

    python tests/benchmarks/bench_branches.py [--tokens 32768]

Times are wall-clock medians in one thread, of the core itself (no sockets, no tokenizer); nothing is asserted.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import numpy as np

from branchwise.runtime.config import EngineConfig
from branchwise.runtime.engine.core import EngineCore
from branchwise.runtime.executor.null import NullExecutor
from branchwise.runtime.messages import BranchOp, BranchRun, Generate, Piece, Settled
from branchwise.runtime.sampling_params import SamplingParams

VOCAB = 128_000
OWNER = ("", "")


class Bench:
    def __init__(self, tokens: int) -> None:
        config = EngineConfig(max_num_batched_tokens=8192, max_branches=100_000)
        self.core = EngineCore(config, NullExecutor(1 << 16, 16, VOCAB), (), 1 << 17)
        self.ids = itertools.count(1)
        self.prompt = np.random.default_rng(0).integers(0, VOCAB, tokens).astype("<i4")
        self.params = SamplingParams(max_tokens=4, seed=1)

    def op(self, what: str, branch: str = "", **fields: object) -> dict:
        self.core.branches.take(BranchOp(next(self.ids), what, OWNER, branch, **fields))  # type: ignore[arg-type]
        return self.core.branches.replies.pop().value

    def run(self) -> None:
        while self.core.has_work:
            self.core.step()

    def branch_turn(self, branch: str, piece: bytes) -> None:
        id = next(self.ids)
        self.core.branches.take(BranchRun([id], branch, OWNER, self.params, Piece(tokens=piece)))
        self.run()
        self.core.branches.settled(Settled(id, 4))

    def plain_turn(self, tokens: bytes) -> None:
        self.core.add(Generate([next(self.ids)], self.params, tokens=tokens))
        self.run()


def median(times: int, call: Callable[[], object]) -> float:
    """Microseconds."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        taken.append(1e6 * (time.perf_counter() - started))
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32_768)
    n = parser.parse_args().tokens
    bench = Bench(n)
    trunk = bench.op("create", piece=Piece(tokens=bench.prompt.tobytes()))["id"]
    bench.branch_turn(trunk, b"")
    for count in (1, 4, 16, 64):
        print(f"fork {n} tokens into {count:2}: {median(200, lambda c=count: bench.op('fork', trunk, n=c)):7.1f} us")
    bench.core.branches.registry.sweep()
    rng = np.random.default_rng(1)

    def piece() -> bytes:
        return rng.integers(0, VOCAB, 20).astype("<i4").tobytes()

    children = iter(bench.op("fork", trunk, n=1000)["ids"])
    extended = median(200, lambda: bench.op("extend", next(children), piece=Piece(tokens=piece())))
    print(f"extend by 20 tokens: {extended:.1f} us")
    plain = median(200, lambda: bench.plain_turn(bench.prompt.tobytes() + piece()))
    branch = median(200, lambda: bench.branch_turn(next(children), piece()))
    print(f"a turn of 20 + 4 tokens, stateless: {plain:.0f} us; on a branch: {branch:.0f} us (settled and held again)")


if __name__ == "__main__":
    main()
