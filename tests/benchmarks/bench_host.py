"""What a step costs the host between two launches, part by part: `python -m branchwise.tests.benchmarks.bench_host`.

Decodes in groups of 32 that share 2,048 tokens, steps read one late as on a GPU. *steady*: nothing joins or leaves;
*churn*: one request ends and another joins in each step. Model, logits and kernels are left out: `sample` is what the
sampler does on the host, attention's flat backend does nothing. Milliseconds of this thread's CPU time: mean and p99.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections import defaultdict, deque

import msgspec
import numpy as np
import torch

from branchwise.kernels.attention.base import AttentionBatch
from branchwise.runtime.config import EngineConfig
from branchwise.runtime.executor.graphs import StepGraphs, largest_shape
from branchwise.runtime.executor.inputs import InputStaging, PageTable
from branchwise.runtime.executor.null import NullExecutor
from branchwise.runtime.executor.sampler import Sampler
from branchwise.runtime.messages import Generate, Limits
from branchwise.runtime.sampling_params import SamplingParams
from branchwise.runtime.scheduler.scheduler import Scheduler

from .bench_tree_attention import idle_tree

VOCAB, PAGE, PREFIX, PER_GROUP, BUDGET, COLUMNS = 1000, 16, 2048, 32, 8192, 1024
WARM_UP = 20  # steps that are not counted


class DeviceSampling:
    """Stands in for the kernels that sample on a device."""

    def sample_logits(self, logits: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(len(logits), dtype=torch.int64), torch.ones(len(logits), dtype=torch.bool)


def measure(running: int, steps: int, *, churn: bool) -> dict[str, list[float]]:
    pages, rng, ids = running * 400, np.random.default_rng(0), itertools.count()
    executor, cpu = NullExecutor(pages, PAGE, VOCAB), torch.device("cpu")
    limits = Limits(VOCAB, COLUMNS * PAGE, pages * PAGE)
    scheduler = Scheduler(EngineConfig(), limits, num_pages=pages, max_rows=running, max_batched_tokens=BUDGET)
    prefixes = rng.integers(0, VOCAB, (max(1, running // PER_GROUP), PREFIX), dtype=np.int32)
    table = PageTable(running, COLUMNS, pages, cpu)
    tree = idle_tree(table.device, largest_shape(running))
    graphs = StepGraphs(*(lambda _: None,) * 3, running, BUDGET, cpu, tree.forms, tree.joint)  # type: ignore[arg-type]
    staging = InputStaging(cpu, pages * PAGE, BUDGET + largest_shape(running), running)
    sampler = Sampler(running, VOCAB, cpu, kernels=DeviceSampling())  # type: ignore[arg-type]
    logits, last_token = torch.zeros(running, VOCAB), torch.zeros(running + 1, dtype=torch.int64)
    encoder, in_flight, times = msgspec.msgpack.Encoder(), deque(), defaultdict(list)

    def add(max_tokens: int) -> None:
        number = next(ids)
        tokens = np.concatenate([prefixes[number % len(prefixes)], rng.integers(0, VOCAB, 64, dtype=np.int32)])
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=number)
        scheduler.add(Generate([number], params, tokens=tokens.astype("<i4").tobytes()))

    for i in range(running):
        add(i + 30 if churn else COLUMNS * PAGE - PREFIX - 64)
    counted = -WARM_UP
    while counted < steps:
        marks = [time.thread_time()]

        def mark() -> None:
            marks.append(time.thread_time())  # noqa: B023

        step = scheduler.plan(scheduler.poll())
        mark()
        if step is None:
            raise RuntimeError("no request can run")
        plan = step.plan
        table.write(plan.table_rows, plan.table_cols, plan.table_pages)
        for start in plan.starts:
            sampler.start(start)
        mark()
        lengths = plan.rows, plan.q_lens, plan.kv_lens, plan.num_decodes, PAGE, table.device, table.host
        batch = AttentionBatch(*lengths, written=(plan.table_rows, plan.table_cols))
        form = tree.plan(batch, graphs.shape_for(plan))
        mark()
        inputs = staging.stage(plan, batch, form, [])
        mark()
        with torch.inference_mode():
            count = len(plan.samples)
            sampled = sampler.sample(logits[:count], inputs.sample_rows, inputs.sample_positions)
            last_token.index_copy_(0, inputs.last_token_rows, sampled.tokens)
        mark()
        in_flight.append((step, executor.launch(plan)))
        if len(in_flight) < 2:
            continue
        oldest, pending = in_flight.popleft()
        result = pending.result()
        begin = time.thread_time()
        scheduler.complete(oldest, result)
        middle = time.thread_time()
        output = scheduler.take_output()
        encoder.encode(output)
        end = time.thread_time()
        counted += not scheduler.ledger.waiting  # else the prompts of the beginning
        for _ in output.finished if churn and output is not None else ():
            add(running + 30)
        if counted > 0:
            parts = [*np.diff(marks), middle - begin, end - middle]
            for name, seconds in zip(PARTS, [*parts, sum(parts)], strict=True):
                times[name].append(1e3 * seconds)
    return times


PARTS = ("scheduler: plan", "table, new rows", "attention", "inputs", "sample", "scheduler: complete", "output", "sum")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = [measure(args.running, args.steps, churn=churn) for churn in (False, True)]
    print(f"{args.running} running, ms of CPU time   {'steady':>10} {'p99':>7} {'churn':>10} {'p99':>7}")
    for name in PARTS:
        row = "".join(f"{np.mean(each[name]):11.3f} {np.quantile(each[name], 0.99):7.3f}" for each in found)
        print(f"  {name:28}{row}")


if __name__ == "__main__":
    main()
