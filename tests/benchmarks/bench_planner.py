"""What planning a step costs on the host: 256 running requests, 1,000 waiting.

    python tests/benchmarks/bench_planner.py [--running 256] [--waiting 1000] [--steps 300]

Three situations: every row taken (the queue is not looked at), one row free each step (the queue is ordered and one
request admitted), and one row free with a pool too full to admit anybody (the queue is ordered and tried in vain).
The executor is the null one; `complete` (taking in 256 tokens) is timed apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np

from branchwise.runtime.config import EngineConfig
from branchwise.runtime.executor.null import NullExecutor
from branchwise.runtime.messages import Generate, Limits
from branchwise.runtime.sampling_params import SamplingParams
from branchwise.runtime.scheduler.scheduler import Scheduler

VOCAB = 100_000


def build(running: int, waiting: int, *, spare_rows: int, pages: int) -> tuple[Scheduler, NullExecutor]:
    rng = np.random.default_rng(0)
    executor = NullExecutor(pages, 16, VOCAB)
    config = EngineConfig()
    scheduler = Scheduler(
        config,
        Limits(VOCAB, 131_072, pages * 16),
        num_pages=pages,
        max_rows=running + spare_rows,
        max_batched_tokens=1 << 20,
    )
    shared = rng.integers(0, VOCAB, 2048, dtype=np.int32)

    def add(id_: int, max_tokens: int) -> None:
        tokens = np.concatenate([shared[: 16 * int(rng.integers(1, 128))], rng.integers(0, VOCAB, 64, dtype=np.int32)])
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        scheduler.add(Generate([id_], params, tokens=tokens.astype("<i4").tobytes()))

    for id_ in range(running):
        add(id_, 100_000)
    while scheduler.ledger.waiting:
        step = scheduler.plan()
        if step is None:
            raise RuntimeError("the pool is too small for the requests that should run")
        scheduler.complete(step, executor.launch(step.plan).result())
        scheduler.take_output()
    scheduler.planner._budget = 2048
    for id_ in range(running, running + waiting):
        add(id_, 1 if spare_rows else 128)
    return scheduler, executor


def measure(scheduler: Scheduler, executor: NullExecutor, steps: int) -> dict[str, float]:
    plan, complete = [], []
    for _ in range(steps):
        start = time.perf_counter()
        step = scheduler.plan()
        middle = time.perf_counter()
        if step is None:
            break
        result = executor.launch(step.plan).result()
        launched = time.perf_counter()
        scheduler.complete(step, result)
        scheduler.take_output()
        end = time.perf_counter()
        plan.append((middle - start) * 1e3)
        complete.append((end - launched) * 1e3)
    pick = statistics.quantiles(plan, n=100)
    return {
        "plan_ms_p50": round(statistics.median(plan), 3),
        "plan_ms_p99": round(pick[98], 3),
        "complete_ms_p50": round(statistics.median(complete), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--waiting", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    enough = args.running * 400
    results = {
        "rows full": measure(*build(args.running, args.waiting, spare_rows=0, pages=enough), args.steps),
        "one admitted a step": measure(*build(args.running, args.waiting, spare_rows=1, pages=enough), args.steps),
    }
    scheduler, executor = build(args.running, args.waiting, spare_rows=1, pages=enough)
    scheduler.planner.estimator.fraction = 1.0  # nobody fits beside what the running requests may still want
    scheduler.planner.estimator.finished = lambda outputs, max_tokens: None  # type: ignore[method-assign]
    results["nobody fits"] = measure(scheduler, executor, args.steps)
    if args.json:
        print(json.dumps({"planner": results}))
        return
    print(f"{args.running} running, {args.waiting} waiting")
    for name, row in results.items():
        print(f"{name:22s}" + "".join(f"  {key} {value:7.3f}" for key, value in row.items()))


if __name__ == "__main__":
    main()
