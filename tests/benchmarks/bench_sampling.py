"""Sampling over a whole vocabulary on a GPU: top-p by sorting and by `triton_sampling`, and tokens from bfloat16 logits
by torch and by `triton_sampling`.

    python tests/benchmarks/bench_sampling.py [--vocab 128256] [--rounds 20]

Rows are softmax-like: logits of a normal distribution, spread as a model's are. Both results are compared first.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch

from branchwise.kernels import sampling, triton_sampling

ROWS = (1, 8, 64, 256)


def milliseconds(work: Callable[[], torch.Tensor], rounds: int) -> float:
    for _ in range(3):
        work()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    print("rows  top-p: sort ms  search ms  tokens: torch ms  kernels ms")
    for rows in ROWS:
        logits = torch.randn(rows, args.vocab, device="cuda") * 4
        probs, _ = sampling.unnormalized_probs(logits, torch.ones(rows, device="cuda"))
        top_k = torch.full((rows,), args.vocab, device="cuda")
        top_p = torch.full((rows,), 0.9, dtype=torch.float64, device="cuda")
        min_p = torch.zeros(rows, device="cuda")

        def by_sorting(
            probs: torch.Tensor = probs, filters: tuple[torch.Tensor, ...] = (top_k, top_p, min_p)
        ) -> torch.Tensor:
            return sampling.keep_threshold(probs, *filters, args.vocab)

        def by_search(
            probs: torch.Tensor = probs, filters: tuple[torch.Tensor, ...] = (top_k, top_p, min_p)
        ) -> torch.Tensor:
            return sampling.keep_threshold(probs, *filters, 1, triton_sampling)

        if not torch.equal(by_sorting(), by_search()):
            raise SystemExit(f"{rows} rows: the thresholds differ")
        uniform = torch.rand(rows, device="cuda", dtype=torch.float64)
        given = logits.bfloat16(), torch.ones(rows, device="cuda"), uniform
        works = (
            *(by_sorting, by_search),
            lambda given=given: sampling.sample_logits(*given)[0],
            lambda given=given: triton_sampling.sample_logits(*given)[0],
        )
        print(f"{rows:4d}", *(f"{milliseconds(work, args.rounds):10.3f}" for work in works), flush=True)


if __name__ == "__main__":
    main()
