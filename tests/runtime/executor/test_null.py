"""The executor without a model, as a clock."""

from __future__ import annotations

import time

import numpy as np

from branchwise.runtime.executor.null import NullExecutor
from branchwise.runtime.step import StepPlan


def plan(kv_lens: list[int]) -> StepPlan:
    rows = np.arange(len(kv_lens), dtype=np.int32)
    ones, none = np.ones_like(rows), np.zeros(0, np.int32)
    return StepPlan(
        step=1,
        rows=rows,
        q_lens=ones,
        kv_lens=np.array(kv_lens, np.int32),
        token_ids=ones,
        num_decodes=len(rows),
        samples=rows,
        table_rows=none,
        table_cols=none,
        table_pages=none,
        copies=none.reshape(-1, 2),
    )


def test_steps_take_their_time_one_after_the_other() -> None:
    executor = NullExecutor(8, 16, 100, step_seconds=0.1)
    start = time.monotonic()
    pending = [executor.launch(plan([5, 6])) for _ in range(3)]
    assert time.monotonic() - start < 0.2, "launching does not wait for the steps before"
    ended = [(step.result(), time.monotonic() - start)[1] for step in pending]
    for i, seconds in enumerate(ended, start=1):
        assert seconds >= 0.1 * i


def test_tokens_are_of_the_position() -> None:
    executor = NullExecutor(8, 16, 100)
    first, again = (executor.launch(plan(lengths)).result().tokens for lengths in ([5, 6, 5], [6, 5, 5]))
    assert first[0] == first[2] == again[1]
    assert first[1] == again[0]
    assert all(0 <= token < 100 for token in first)
