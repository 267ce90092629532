"""How full the KV pool is while requests wait for memory, under a load of mixed lengths. No model, no GPU.

    python tests/benchmarks/bench_utilization.py [--pages 4096] [--requests 600] [--json]

Prompts of 64 to 4,096 tokens and answers of 16 to 1,024, both log-uniform; a quarter of the prompts share a prefix of
1,024. Requests ask for at most 2,048 output tokens, and end where a stop token says: what they need is not known to the
scheduler. Every step at which requests wait although rows are free counts: memory is what they wait for.

*Tokens*: those of running requests over the pool's, a shared prefix once. *Pages*: those that running requests use; the
rest is free, or holds cached prefixes. *Reserved*: the same load if each request's limit were set aside at its start.
"""

from __future__ import annotations

import argparse
import json
import statistics

import numpy as np

from branchwise.runtime.config import EngineConfig
from branchwise.runtime.executor.null import NullExecutor
from branchwise.runtime.messages import Generate, Limits
from branchwise.runtime.sampling_params import SamplingParams
from branchwise.runtime.scheduler.scheduler import Scheduler

VOCAB, PAGE, ROWS, SHARED, LIMIT = 100_000, 16, 1024, 1024, 2048


def stop_token(position: int) -> int:
    """What `NullExecutor` samples at ``position``."""
    return ((position * 0x9E3779B97F4A7C15) % 2**64 >> 33) % VOCAB


def measure(pages: int, requests: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    scheduler = Scheduler(
        EngineConfig(), Limits(VOCAB, 16_384, pages * PAGE), num_pages=pages, max_rows=ROWS, max_batched_tokens=8192
    )
    executor = NullExecutor(pages, PAGE, VOCAB)
    prefix = rng.integers(0, VOCAB, SHARED, dtype=np.int32)
    for id_ in range(requests):
        own = rng.integers(0, VOCAB, int(np.exp(rng.uniform(np.log(64), np.log(4096)))), dtype=np.int32)
        tokens = np.concatenate([prefix, own]) if id_ % 4 == 0 else own
        answer = int(np.exp(rng.uniform(np.log(16), np.log(1024))))
        params = SamplingParams(
            max_tokens=LIMIT, ignore_eos=True, stop_token_ids=[stop_token(len(tokens) + answer - 1)]
        )
        scheduler.add(Generate([id_], params, tokens=tokens.astype("<i4").tobytes()))
    tokens_used, pages_used, reserved = list[float](), list[float](), list[float]()
    ledger = scheduler.ledger
    while (step := scheduler.plan()) is not None:
        if ledger.waiting and len(ledger.rows) < ROWS:
            running = [request for request in ledger.rows.requests if request is not None]
            lengths = [request.num_tokens for request in running]
            shared = max(sum(request.id % 4 == 0 for request in running) - 1, 0) * SHARED
            tokens_used.append((sum(lengths) - shared) / (pages * PAGE))
            pages_used.append(1 - (ledger.tree.allocator.free + ledger.tree.evictable) / pages)
            reserved.append(sum(lengths) / sum(request.prompt_len + LIMIT for request in running))
        scheduler.complete(step, executor.launch(step.plan).result())
        scheduler.take_output()
    return {
        "steps": len(tokens_used),
        "tokens_mean": round(statistics.mean(tokens_used), 4),
        "tokens_p10": round(statistics.quantiles(tokens_used, n=10)[0], 4),
        "pages_mean": round(statistics.mean(pages_used), 4),
        "reserved_mean": round(statistics.mean(reserved), 4),
        "retractions": ledger.retractions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=4096)
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = measure(args.pages, args.requests)
    if args.json:
        print(json.dumps({"utilization": found}))
        return
    for name, value in found.items():
        print(f"{name:14} {value:,}")


if __name__ == "__main__":
    main()
