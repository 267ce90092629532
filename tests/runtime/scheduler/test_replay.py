"""A plan is a function of the scheduler's inputs: messages, results, and the clock reading at each."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Callable

import numpy as np

from branchwise.runtime.config import EngineConfig
from branchwise.runtime.messages import BranchOp, BranchRun, Generate, Limits, Piece
from branchwise.runtime.sampling_params import SamplingParams
from branchwise.runtime.scheduler.branches.service import BranchService
from branchwise.runtime.scheduler.scheduler import Scheduler

PAGES, PAGE, ROWS = 48, 4, 6


def written_down(plan) -> list:
    """Every field of a plan, comparable."""
    values = (getattr(plan, field.name) for field in dataclasses.fields(plan))
    return [value.tolist() if isinstance(value, np.ndarray) else repr(value) for value in values]


def play(executor, source: Callable[[], float], seed: int) -> list:
    """Runs a random program of requests, pins and branches that expire; returns its plans."""
    config = EngineConfig(page_size=PAGE, max_num_seqs=ROWS, branch_ttl=60.0)
    limits = Limits(executor.vocab_size, 512, PAGES * PAGE)
    scheduler = Scheduler(
        config, limits, num_pages=PAGES, max_rows=ROWS, max_batched_tokens=64, eos_ids=(1,), now=source
    )
    branches = BranchService(scheduler, config)
    rng, plans, made = random.Random(seed), [], []
    prompts = [[2 + (i * k) % 40 for i in range(1, 40)] for k in (3, 5, 7, 11)]
    for number in range(1, 300):
        prompt = rng.choice(prompts)[: rng.randrange(4, 39)] + [rng.randrange(2, 40) for _ in range(3)]
        data = np.array(prompt, "<i4").tobytes()
        match rng.randrange(6):
            case 0 | 1:
                params = SamplingParams(max_tokens=rng.randrange(1, 20))
                scheduler.add(Generate([number], params, tokens=data, breakpoints=[(len(prompt), rng.uniform(1, 30))]))
            case 2:
                branches.take(BranchOp(number, "create", ("", ""), piece=Piece(tokens=data)))
                made += [reply.value["id"] for reply in branches.replies if reply.ok and "id" in reply.value]
            case 3 if made:
                run = BranchRun(
                    [number], made.pop(rng.randrange(len(made))), ("", ""), SamplingParams(max_tokens=5, seed=number)
                )
                branches.take(run)
        branches.replies.clear()
        branches.registry.sweep()
        scheduler.cache.pins.sweep()
        step = scheduler.plan(scheduler.poll())
        if step is not None:
            plans.append(written_down(step.plan))
            scheduler.complete(step, executor.launch(step.plan).result())
        scheduler.take_output()
    assert len(plans) > 100
    return plans


def test_a_replay_with_the_same_readings_makes_the_same_plans(make_driver):
    def executor():
        return make_driver(num_pages=PAGES, page_size=PAGE, max_num_seqs=ROWS).executor

    for seed in range(3):
        readings: list[float] = []
        steps = random.Random(seed)

        def record(readings=readings, steps=steps) -> float:
            readings.append((readings[-1] if readings else 0.0) + steps.choice([0.0, 0.1, 3.0]))
            return readings[-1]

        first = play(executor(), record, seed)
        left = iter(readings)
        assert play(executor(), lambda left=left: next(left), seed) == first
        assert next(left, None) is None, "the clock is read as often"
        frozen = play(executor(), lambda: 0.0, seed)
        assert frozen != first, "the program does depend on time, so the readings were what made the plans equal"


def test_planning_does_not_read_the_clock(make_driver):
    readings = Counter()

    def source() -> float:
        readings["all"] += 1
        return 0.0

    limits = Limits(50, 512, PAGES * PAGE)
    config = EngineConfig(page_size=PAGE)
    scheduler = Scheduler(config, limits, num_pages=PAGES, max_rows=ROWS, max_batched_tokens=64, now=source)
    scheduler.add(Generate([1], SamplingParams(max_tokens=0), tokens=np.arange(2, 30, dtype="<i4").tobytes()))
    events, before = scheduler.poll(), readings["all"]
    assert scheduler.plan(events) is not None
    assert readings["all"] == before
