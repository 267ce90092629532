"""The executor without a model, as a clock."""

from __future__ import annotations

import numpy as np
import pytest

from branchwise.runtime.executor import null
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


class Clock:
    """The module ``time``, of which only sleeping takes any."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_steps_take_their_time_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(null, "time", clock)
    executor = NullExecutor(8, 16, 100, step_seconds=0.1)
    pending = [executor.launch(plan([5, 6])) for _ in range(3)]
    assert clock.now == 100.0, "launching does not wait for the steps before"
    ended = [(step.result(), clock.now)[1] for step in pending]
    assert ended == pytest.approx([100.1, 100.2, 100.3])


def test_tokens_are_of_the_position() -> None:
    executor = NullExecutor(8, 16, 100)
    first, again = (executor.launch(plan(lengths)).result().tokens for lengths in ([5, 6, 5], [6, 5, 5]))
    assert first[0] == first[2] == again[1]
    assert first[1] == again[0]
    assert all(0 <= token < 100 for token in first)
