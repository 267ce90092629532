"""BranchBench on a GPU that is not there: the real scheduler, a cost model of a step, and virtual time.

    python tests/benchmarks/simulate_gpu.py [--workloads fewshot,chat] [--budget 8192] [--request-ms 0.4]

For comparing scheduling policies, at a second a workload. The model is that of Llama-3.1-8B's shape on one H200, from
the measurements in NOTES.md: matrix products by the padded number of query tokens, attention by distinct keys, and a
constant part. Requests reach the scheduler one after the other, ``--request-ms`` apart, and half of ``--latency-ms``
after the answer before them. Against the device on 2026-11-29 (main at 15:03) makespans were within 6 %.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from branchwise.frontend.bench.workloads import WORKLOADS, RandomTokens
from branchwise.runtime.config import EngineConfig
from branchwise.runtime.executor.graphs import JOINT_TOKENS
from branchwise.runtime.messages import Generate, Limits
from branchwise.runtime.sampling_params import SamplingParams
from branchwise.runtime.scheduler.scheduled_step import ScheduledStep
from branchwise.runtime.scheduler.scheduler import Scheduler
from branchwise.runtime.step import StepPlan, StepResult

PAGE, PAGES, ROWS = 16, 55_013, 256
TOKENS = (1, 64, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192)
PRODUCTS = (4.1, 4.3, 4.7, 5.4, 6.1, 8.1, 10.0, 15.2, 19.5, 39.8, 83.4, 168.3)  # ms of all matrix products of a step
CONSTANT, OUTPUT = 0.75, 0.0012  # ms: norms, the output layer, gaps; for each sampled token
TOKEN_BYTES, BANDWIDTH = 131_072, 4.1e12  # keys and values of a token; bytes a second
TREE, FLASHINFER, FA3 = 365e12, 280e12, 500e12  # operations a second: shared keys, short chunks, long chunks
PAIR = 4 * 4096 * 32  # operations of one query token and one key, over all heads and layers
LAUNCH, EAGER_LAUNCH = 0.003, 0.045  # seconds of the host
STEPS_AHEAD = 2


def step_seconds(plan: StepPlan, scheduler: Scheduler) -> tuple[float, float]:
    """Seconds of the device and of the host."""
    n, tokens = plan.num_decodes, plan.num_tokens
    eager = tokens > JOINT_TOKENS[-1]
    padded = JOINT_TOKENS[bisect_left(JOINT_TOKENS, tokens)] if len(plan.rows) > n and not eager else tokens
    ms = float(np.interp(padded, TOKENS, PRODUCTS)) + CONSTANT + OUTPUT * len(plan.samples)
    ledger = scheduler.ledger
    rows = [row for row in plan.rows[:n].tolist() if ledger.rows.requests[row] is not None]
    if rows:
        readers = np.bincount(np.concatenate([ledger.lease(ledger.rows.request(row)).pages for row in rows]))
        shared = float(readers[readers > 1].sum()) * PAGE
        ms += 0.35 + 1e3 * (np.count_nonzero(readers) * PAGE * TOKEN_BYTES / BANDWIDTH + shared * PAIR / TREE)
    if len(plan.rows) > n:
        q, kv = plan.q_lens[n:].astype(float), plan.kv_lens[n:].astype(float)
        rate = FA3 if eager and q.mean() >= 512 else FLASHINFER
        ms += max(1e3 * float((q * (kv - q / 2)).sum()) * PAIR / rate, 0.5)
    return ms / 1e3, EAGER_LAUNCH if eager else LAUNCH


@dataclass
class Simulation:
    """One workload, from a cold cache. Times in seconds."""

    budget: int
    request: float
    latency: float
    on_step: Callable[[StepPlan], object] = lambda plan: None  # called with each step
    now: float = 0.0
    steps: list[tuple[int, int, float]] = field(default_factory=list)  # decodes, query tokens, device time
    _intake: float = 0.0  # when the server can take or answer the next request
    _arrivals: list[tuple[float, int, list[int], int]] = field(default_factory=list)
    _answers: list[tuple[float, int]] = field(default_factory=list)
    _outputs: dict[int, list[int]] = field(default_factory=dict)
    _waiting: dict[int, asyncio.Future[list[int]]] = field(default_factory=dict)

    async def generate(
        self, prompt: list[int], max_tokens: int, *, seed: int | None = None, temperature: float = 0.0
    ) -> list[int]:
        """See `GenerateTokens`."""
        number = len(self._outputs) + 1
        self._outputs[number] = []
        self._intake = max(self._intake, self.now + self.latency / 2) + self.request
        heapq.heappush(self._arrivals, (self._intake, number, prompt, max_tokens))
        self._waiting[number] = asyncio.get_running_loop().create_future()
        return await self._waiting[number]

    async def run(self, workload: str) -> float:
        """The makespan."""
        scheduler = Scheduler(
            EngineConfig(model="none", page_size=PAGE),
            Limits(128_000, 131_072, PAGES * PAGE),
            num_pages=PAGES,
            max_rows=ROWS,
            max_batched_tokens=self.budget,
        )
        program = asyncio.ensure_future(WORKLOADS[workload].run(self.generate, RandomTokens(f"{workload}/0"), 1.0))
        in_flight: list[tuple[ScheduledStep, float]] = []
        device_free = 0.0
        while not program.done():
            for _ in range(4):  # the program goes on
                await asyncio.sleep(0)
            while self._arrivals and self._arrivals[0][0] <= self.now:
                _, number, prompt, most = heapq.heappop(self._arrivals)
                params = SamplingParams(max_tokens=most, ignore_eos=True)
                scheduler.add(Generate([number], params, tokens=np.array(prompt, "<i4").tobytes()))
            while self._answers and self._answers[0][0] <= self.now:
                _, number = heapq.heappop(self._answers)
                self._waiting.pop(number).set_result(self._outputs[number])
            step = scheduler.plan(scheduler.poll())
            if step is not None:
                device, host = step_seconds(step.plan, scheduler)
                device_free = max(device_free, self.now + LAUNCH) + device
                self.now += host
                self.on_step(step.plan)
                self.steps.append((step.plan.num_decodes, step.plan.num_tokens, device))
                in_flight.append((step, device_free))
            if len(in_flight) == STEPS_AHEAD or (in_flight and step is None):
                self._complete(scheduler, *in_flight.pop(0))
            elif step is None:
                self.now = max(self.now, min((q[0][0] for q in (self._arrivals, self._answers) if q), default=0.0))
        return self.now

    def _complete(self, scheduler: Scheduler, step: ScheduledStep, end: float) -> None:
        self.now = max(self.now, end)
        samples = np.random.default_rng(step.plan.step).integers(1_000, 100_000, len(step.plan.samples))
        scheduler.complete(step, StepResult(samples.astype(np.int32)))
        output = scheduler.take_output()
        if output is None:
            return
        for number, token in zip(np.frombuffer(output.ids, "<i8"), np.frombuffer(output.tokens, "<i4"), strict=True):
            self._outputs[int(number)].append(int(token))
        for finished in output.finished:
            heapq.heappush(self._answers, (self.now + self.latency / 2, finished.id))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--budget", type=int, default=8192, help="query tokens of a step")
    parser.add_argument("--request-ms", type=float, default=0.4)
    parser.add_argument("--latency-ms", type=float, default=12.0)
    args = parser.parse_args()
    print(f"{'workload':<16} {'seconds':>8} {'steps':>6} {'mixed':>6} {'decodes':>8} {'busy':>6}")
    for name in args.workloads.split(","):
        simulation = Simulation(args.budget, args.request_ms / 1e3, args.latency_ms / 1e3)
        seconds = asyncio.run(simulation.run(name))
        decodes, tokens, device = np.array(simulation.steps).T
        mixed = int(((decodes > 0) & (tokens > decodes)).sum())
        busy = device.sum() / seconds
        print(f"{name:<16} {seconds:8.3f} {len(device):6} {mixed:6} {decodes.mean():8.1f} {busy:6.1%}", flush=True)


if __name__ == "__main__":
    main()
