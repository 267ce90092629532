"""One simulated replica: the real tree and planner, an executor that computes nothing, and a virtual clock."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ...radix.events import Event, PagesEntered, PagesLeft
from ...radix.node import Int32
from ..config import EngineConfig
from ..executor.null import NullExecutor
from ..fleet.block_events import PageHashes
from ..messages import Limits
from ..sampling_params import SamplingParams
from ..scheduler.request import Request
from ..scheduler.scheduled_step import ScheduledStep
from ..scheduler.scheduler import Scheduler
from ..scheduler.skip import skip_steps, uneventful_steps
from .step_times import StepTimes

VOCABULARY = 2**31 - 1


class ReplicaSettings(NamedTuple):
    """Every replica of a simulated fleet."""

    kv_cache_tokens: int = 1_000_000
    page_size: int = 256
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    step_times: StepTimes = StepTimes()


class Ended(NamedTuple):
    """A finished request."""

    id: int
    hit_tokens: int


class SimulatedReplica:
    """The caller calls `add` at an arrival and `run` at ``next_time``. Times are seconds.

    Decode steps without an event are skipped together (`scheduler.skip`), up to the next arrival.
    """

    def __init__(self, settings: ReplicaSettings, changed: Callable[[list[int], list[int]], None] | None) -> None:
        """``changed(stored, removed)`` receives block hashes, as a router does from KV events."""
        self._times, self._page_size = settings.step_times, settings.page_size
        pages = settings.kv_cache_tokens // settings.page_size
        self._now = 0.0
        self.scheduler = Scheduler(
            EngineConfig(page_size=settings.page_size, max_num_seqs=settings.max_num_seqs),
            Limits(VOCABULARY, VOCABULARY, pages * settings.page_size),
            num_pages=pages,
            max_rows=settings.max_num_seqs,
            max_batched_tokens=settings.max_num_batched_tokens,
            now=lambda: self._now,
        )
        if changed is not None:
            hashes = PageHashes(self.scheduler.tree)

            def take(event: Event) -> None:
                if isinstance(event, PagesEntered):
                    changed(hashes.enter(event), [])
                elif isinstance(event, PagesLeft):
                    changed([], hashes.of(event).tolist())

            self.scheduler.tree.subscribe(take)
        self._executor = NullExecutor(pages, settings.page_size, VOCABULARY)
        self._step: ScheduledStep | None = None
        self._skipping = 0  # steps skipped together, from ``_began`` on, of ``_each`` seconds
        self._began = self._each = 0.0
        self._no_token: set[int] = set()  # requests without a first token
        self._left: dict[int, int] = {}  # by request without a first token: prompt tokens to compute
        self.next_time = math.inf  # when `run` is due
        self.first_tokens: list[int] = []  # ids; taken by the caller after `run`
        self.ended: list[Ended] = []  # likewise
        self.computed_tokens = 0  # of prompts

    @property
    def queued(self) -> int:
        """Prompt tokens to compute, as a replica reports them."""
        return sum(self._left.values())

    @property
    def running(self) -> int:
        """Running requests."""
        return len(self.scheduler.ledger.rows)

    def add(self, now: float, id: int, prompt: Int32, output_tokens: int) -> None:
        """Submits a request that arrives at ``now``."""
        self._now = now
        if self._skipping:  # it joins after the step that is running
            done = min(self._skipping, max(1, math.ceil((now - self._began) / self._each)))
            self._skipping, self.next_time = done, self._began + done * self._each
        self._no_token.add(id)
        params = SamplingParams(max_tokens=output_tokens, ignore_eos=True, seed=0)
        request = Request(id, prompt, params)
        self.scheduler.submit(request)
        self._left[id] = len(prompt) - request.hit_estimate
        if self._step is None and not self._skipping:
            self._start()

    def run(self) -> None:
        """Completes the step or steps that end at ``next_time``, and starts the next."""
        self._now = self.next_time
        if self._skipping:
            skip_steps(self.scheduler, self._skipping)
            self._skipping = 0
        elif self._step is not None:
            step, self._step = self._step, None
            self.scheduler.complete(step, self._executor.launch(step.plan).result())
        self._take_output()
        self._start()

    def _start(self) -> None:
        skip = uneventful_steps(self.scheduler)
        if skip:
            rows = self.scheduler.ledger.rows
            kv = int(rows.computed[rows.active()].sum()) + len(rows) * (skip + 1) // 2  # on average
            self._skipping, self._began, self._each = skip, self._now, self._times.seconds(0, kv)
            self.next_time = self._now + skip * self._each
            return
        self._step = step = self.scheduler.plan(self.scheduler.poll())
        self._take_output()
        if step is None:
            if self.scheduler.has_requests:
                raise RuntimeError("a simulated replica cannot go on: its pool is too small for a request of the trace")
            self.next_time = math.inf
            return
        plan = step.plan
        self.computed_tokens += step.prompt_tokens
        kv = int(plan.kv_lens[: plan.num_decodes].sum())
        self.next_time = self._now + self._times.seconds(step.prompt_tokens, kv)

    def _take_output(self) -> None:
        out = self.scheduler.take_output()
        if out is None:
            return
        if self._no_token:
            for id in np.frombuffer(out.ids, "<i8").tolist():
                if id in self._no_token:
                    self._no_token.discard(id)
                    self._left.pop(id, None)
                    self.first_tokens.append(id)
        for each in out.finished:
            if each.reason == "error":
                raise RuntimeError(f"a simulated replica refused a request: {each.error}")
            self.ended.append(Ended(each.id, 0 if each.cache is None else each.cache.hit_tokens))
