"""BranchBench on a GPU that is not there: the real scheduler, a model of what steps and messages cost, virtual time.

    python tests/benchmarks/simulate_gpu.py [--workloads fewshot,chat] [--format bf16] [--runs 3] [--fill 1024]

For comparing scheduling policies, at a second a workload. The costs are those of Llama-3.1-8B's shape on one H200,
fitted to profiles of 2026-11-30 with prompts that are not cached. Three timelines run beside each other: the thread of
the scheduler (messages, planning, launches, results), the device (which starts a step when it is launched and the step
before has ended), and the clients with the HTTP process (each takes one message after the other). ``MEASURED`` has
makespans of the device for comparison. Times are milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import random
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from branchwise.frontend.bench.workloads import WORKLOADS, RandomTokens
from branchwise.runtime.config import EngineConfig
from branchwise.runtime.executor.graphs import DECODES, JOINT_TOKENS
from branchwise.runtime.messages import Generate, Limits, StepOutput
from branchwise.runtime.sampling_params import SamplingParams
from branchwise.runtime.scheduler import planner
from branchwise.runtime.scheduler.scheduled_step import ScheduledStep
from branchwise.runtime.scheduler.scheduler import Scheduler
from branchwise.runtime.step import StepPlan, StepResult

PAGE, ROWS, BUDGET, STEPS_AHEAD = 16, 256, 8192, 2
PAIR = 4 * 4096 * 32  # operations of one query token and one key, over all heads and layers
LONG_CHUNK = 512  # query tokens from which chunks run on fa3

# The scheduler's thread: a message, a plan (and each row, each admission), launches, a result (and each row, each end).
MESSAGE, PLAN, PLAN_ROW, ADMIT = 0.06, 0.3, 0.0015, 0.28
LAUNCH_DECODES, LAUNCH_CAPTURED, LAUNCH_EAGER = 1.1, 3.0, 22.0
RESULT, RESULT_ROW, END = 0.2, 0.0012, 0.06
# Clients and the HTTP process: a request (and each of its tokens), a response, and what lies between two processes.
CLIENT_REQUEST, CLIENT_TOKEN, CLIENT_RESPONSE = 0.12, 0.0001, 0.10
HTTP_REQUEST, HTTP_TOKEN, HTTP_RESPONSE = 0.10, 0.00021, 0.10
CLIENT_TO_HTTP, HTTP_TO_SCHEDULER, SCHEDULER_TO_HTTP = 0.15, 1.0, 1.2


@dataclass(frozen=True)
class Costs:
    """Of the device. ``products``: all matrix products of a step with ``tokens`` query tokens, padding included."""

    tokens: tuple[int, ...]
    products: tuple[float, ...]
    pages: int
    token_bytes: int
    bandwidth: float = 4.1e12  # bytes a second, of keys that one request reads
    shared: float = 440e12  # operations a second, of keys that several requests read
    chunk_pair: float = 1.55e-6  # a query token of a chunk and a key
    long_pair: float = 0.87e-6  # the same in a long chunk
    decodes: float = 0.98  # norms, the output layer and sampling of a step of decodes
    mixed: float = 1.2  # and of a step with chunks
    mixed_token: float = 0.0011


# fmt: off
_BF16_TOKENS = (32, 64, 96, 128, 160, 192, 256, 320, 384, 512, 576, 640, 704, 768, 832, 896, 960, 1024, 1152, 1280,
                1408, 1536, 1664, 1792, 1920, 2048, 3072, 8192)
_BF16_PRODUCTS = (3.95, 3.95, 4.65, 4.8, 5.0, 5.55, 6.4, 7.2, 8.05, 10.1, 12.2, 12.6, 14.5, 14.6, 18.2, 18.4, 18.6,
                  18.5, 22.4, 24.0, 27.0, 27.9, 33.8, 36.0, 39.9, 40.1, 59.5, 159.0)
_FP8_TOKENS = (32, 64, 96, 128, 160, 256, 320, 512, 896, 1152, 1536, 1664, 2048, 8192)
_FP8_PRODUCTS = (2.2, 2.3, 2.55, 2.72, 3.4, 3.5, 4.86, 5.8, 8.8, 12.1, 14.3, 15.8, 19.6, 78.0)
# fmt: on
FORMATS = {
    "bf16": Costs(_BF16_TOKENS, _BF16_PRODUCTS, pages=57_052, token_bytes=131_072),
    "fp8": Costs(
        *(_FP8_TOKENS, _FP8_PRODUCTS),
        pages=118_880,
        token_bytes=66_560,
        bandwidth=3.9e12,
        chunk_pair=1.7e-6,
        decodes=1.4,
    ),
}
_NAMES = ("no_sharing", "fewshot", "agents", "tree_of_thought", "chat", "best_of_n", "long_document")
MEASURED = {  # seconds on the device, 2026-11-30
    "bf16": dict(zip(_NAMES, (11.45, 1.75, 8.13, 2.68, 6.84, 5.09, 7.59), strict=True)),
    "fp8": dict(zip(_NAMES, (6.98, 1.20, 5.57, 2.04, 4.67, 3.64, 6.02), strict=True)),
}


def device_ms(plan: StepPlan, scheduler: Scheduler, costs: Costs) -> float:
    """How long the device computes the step."""
    n, tokens = plan.num_decodes, plan.num_tokens
    sizes = DECODES if len(plan.rows) == n else JOINT_TOKENS
    padded = sizes[bisect_left(sizes, tokens)] if tokens <= sizes[-1] else tokens
    products = float(np.interp(padded, costs.tokens, costs.products))
    decodes = _attend_decodes(plan, scheduler, costs)
    if len(plan.rows) == n:
        return products + costs.decodes + decodes
    q, kv = plan.q_lens[n:].astype(float), plan.kv_lens[n:].astype(float)
    pair = costs.long_pair if tokens > JOINT_TOKENS[-1] and q.mean() >= LONG_CHUNK else costs.chunk_pair
    chunks = 0.1 + 0.03 * len(q) + pair * float((q * (kv - q / 2)).sum())
    return products + costs.mixed + costs.mixed_token * padded + 0.8 * decodes + chunks


def _attend_decodes(plan: StepPlan, scheduler: Scheduler, costs: Costs) -> float:
    ledger = scheduler.ledger
    rows = [row for row in plan.rows[: plan.num_decodes].tolist() if ledger.rows.requests[row] is not None]
    if not rows:
        return 0.0
    readers = np.bincount(np.concatenate([ledger.lease(ledger.rows.request(row)).pages for row in rows]))
    read, shared = np.count_nonzero(readers) * PAGE, float(readers[readers > 1].sum()) * PAGE
    return 0.35 + 1e3 * (read * costs.token_bytes / costs.bandwidth + shared * PAIR / costs.shared)


class Process:
    """Takes one job after the other."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._jobs: deque[tuple[float, Callable[[float], None]]] = deque()

    def take(self, ms: float, then: Callable[[float], None], now: float) -> None:
        """Queues a job of ``ms``; ``then`` gets the time of its end."""
        self._jobs.append((ms, then))
        if len(self._jobs) == 1:
            self._begin(now)

    def _begin(self, now: float) -> None:
        ms, _ = self._jobs[0]
        self._simulation.at(now + ms * self._simulation.random.lognormvariate(-0.02, 0.2), self._end)

    def _end(self, now: float) -> None:
        self._jobs[0][1](now)
        self._jobs.popleft()
        if self._jobs:
            self._begin(now)


class Simulation:
    """One workload, from a cold cache. ``seed``: of the noise in what messages and launches cost."""

    def __init__(self, costs: Costs, seed: int = 0, on_step: Callable[[StepPlan], object] = lambda plan: None) -> None:
        self.random = random.Random(seed)
        self.ttft: list[float] = []
        self.busy = 0.0
        self.steps = self.mixed = 0
        self._costs, self._on_step = costs, on_step
        self._now = self._client_now = 0.0
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = 0
        self._http, self._client = Process(self), Process(self)
        self._arrived: deque[tuple[int, list[int], int]] = deque()  # at the scheduler
        self._outputs: dict[int, list[int]] = {}
        self._sent: dict[int, float] = {}
        self._waiting: dict[int, asyncio.Future[list[int]]] = {}
        self._resumed: list[int] = []

    def at(self, when: float, what: Callable[[float], None]) -> None:
        """Calls ``what`` with the time when it is ``when``."""
        self._order += 1
        heapq.heappush(self._events, (when, self._order, what))

    async def generate(
        self, prompt: list[int], max_tokens: int, *, seed: int | None = None, temperature: float = 0.0
    ) -> list[int]:
        """See `GenerateTokens`."""
        number, size = len(self._outputs) + 1, len(prompt)
        self._outputs[number] = []
        self._waiting[number] = asyncio.get_running_loop().create_future()

        def arrive(now: float) -> None:
            self._arrived.append((number, prompt, max_tokens))

        def send(now: float) -> None:
            self._sent[number] = now
            taken = partial(self._http.take, HTTP_REQUEST + HTTP_TOKEN * size, self._later(HTTP_TO_SCHEDULER, arrive))
            self.at(now + CLIENT_TO_HTTP, taken)

        self._client.take(CLIENT_REQUEST + CLIENT_TOKEN * size, send, self._client_now)
        return await self._waiting[number]

    def _later(self, ms: float, what: Callable[[float], None]) -> Callable[[float], None]:
        return lambda now: self.at(now + ms, what)

    async def run(self, workload: str) -> float:
        """The makespan in seconds."""
        scheduler = Scheduler(
            EngineConfig(model="none", page_size=PAGE),
            Limits(128_000, 131_072, self._costs.pages * PAGE),
            num_pages=self._costs.pages,
            max_rows=ROWS,
            max_batched_tokens=BUDGET,
        )
        scheduler.send_early = self._send
        program = asyncio.ensure_future(WORKLOADS[workload].run(self.generate, RandomTokens(f"{workload}/0"), 1.0))
        await self._settle()
        in_flight: deque[tuple[ScheduledStep, float]] = deque()
        device_free = 0.0
        while not program.done():
            await self._clients()
            while self._arrived:
                number, prompt, most = self._arrived.popleft()
                params = SamplingParams(max_tokens=most, ignore_eos=True)
                scheduler.add(Generate([number], params, tokens=np.array(prompt, "<i4").tobytes()))
                self._now += MESSAGE
            step = scheduler.plan(scheduler.poll())
            self._now += PLAN
            if step is not None:
                device_free = self._launch(step, scheduler, device_free)
                in_flight.append((step, device_free))
            if len(in_flight) == STEPS_AHEAD or (in_flight and step is None):
                self._complete(scheduler, *in_flight.popleft())
            elif step is None and self._events:
                self._now = max(self._now, self._events[0][0])
        return self._client_now / 1e3

    def _launch(self, step: ScheduledStep, scheduler: Scheduler, device_free: float) -> float:
        """Returns when the device will have computed the step."""
        plan, noise = step.plan, self.random.lognormvariate(0.0, 0.2)
        captured, chunks = plan.num_tokens <= JOINT_TOKENS[-1], len(plan.rows) - plan.num_decodes
        self._now += (PLAN_ROW * len(plan.rows) + ADMIT * len(plan.starts)) * noise
        host = (LAUNCH_EAGER if not captured else LAUNCH_CAPTURED if chunks else LAUNCH_DECODES) * noise
        device = device_ms(plan, scheduler, self._costs) * self.random.uniform(0.995, 1.005)
        begin = max(device_free, self._now + (0.85 * host if captured else 2.0))
        self._now += host
        self._on_step(plan)
        self.busy += device
        self.steps += 1
        self.mixed += bool(plan.num_decodes and chunks)
        return max(begin + device, self._now + 0.5)

    def _complete(self, scheduler: Scheduler, step: ScheduledStep, end: float) -> None:
        self._now = max(self._now, end) + RESULT + RESULT_ROW * len(step.plan.rows)
        samples = np.random.default_rng(step.plan.step).integers(1_000, 100_000, len(step.plan.samples))
        scheduler.complete(step, StepResult(samples.astype(np.int32)))
        self._send(scheduler.take_output())

    def _send(self, output: StepOutput | None) -> None:
        if output is None:
            return
        for number, token in zip(np.frombuffer(output.ids, "<i8"), np.frombuffer(output.tokens, "<i4"), strict=True):
            tokens = self._outputs[int(number)]
            if not tokens:
                self.ttft.append(self._now - self._sent[int(number)])
            tokens.append(int(token))
        self._now += END * len(output.finished)
        for finished in output.finished:
            resume = partial(self._client.take, CLIENT_RESPONSE, partial(self._resume, finished.id))
            responded = self._later(CLIENT_TO_HTTP, resume)
            self.at(self._now + SCHEDULER_TO_HTTP, partial(self._http.take, HTTP_RESPONSE, responded))

    def _resume(self, number: int, now: float) -> None:
        self._resumed.append(number)

    async def _clients(self) -> None:
        """What happens outside of the scheduler until now."""
        while self._events and self._events[0][0] <= self._now:
            self._client_now, _, what = heapq.heappop(self._events)
            what(self._client_now)
            for number in self._resumed:
                self._waiting.pop(number).set_result(self._outputs[number])
                await self._settle()
            self._resumed.clear()

    async def _settle(self) -> None:
        for _ in range(6):  # the program goes on
            await asyncio.sleep(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--format", choices=tuple(FORMATS), default="bf16", help="of weights, keys and values")
    parser.add_argument("--runs", type=int, default=1, help="with other noise each; the mean is printed")
    parser.add_argument("--fill", type=int, help="as `_FILL` in runtime/scheduler/planner.py")
    args = parser.parse_args()
    if args.fill is not None:
        vars(planner)["_FILL"] = args.fill
    print(f"{'workload':<16} {'seconds':>8} {'measured':>9} {'steps':>6} {'mixed':>6} {'busy':>6}  TTFT p50, p99 ms")
    for name in args.workloads.split(","):
        runs = [Simulation(FORMATS[args.format], seed) for seed in range(args.runs)]
        seconds = float(np.mean([asyncio.run(run.run(name)) for run in runs]))
        measured = MEASURED[args.format].get(name)
        off = "" if measured is None else f"{seconds / measured - 1:+.1%}"
        p50, p99 = np.percentile([ms for run in runs for ms in run.ttft], (50, 99))
        last: Any = runs[-1]
        print(
            f"{name:<16} {seconds:8.3f} {off:>9} {last.steps:6} {last.mixed:6} {last.busy / 1e3 / seconds:6.1%}"
            f"  {p50:.0f}, {p99:.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
