"""An executor without a model: every token is a hash of its row's position. For measuring everything else."""

from __future__ import annotations

import numpy as np

from ..step import StepPlan, StepResult


class _Done:
    def __init__(self, result: StepResult) -> None:
        self._result = result

    def result(self) -> StepResult:
        return self._result


class NullExecutor:
    """Implements `runtime.step.Executor`; a step costs a few microseconds."""

    def __init__(self, num_pages: int, page_size: int, vocab_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.vocab_size = vocab_size

    def launch(self, plan: StepPlan) -> _Done:
        positions = plan.kv_lens[plan.samples].astype(np.uint64)
        mixed = positions * np.uint64(0x9E3779B97F4A7C15)
        tokens = (mixed >> np.uint64(33)) % np.uint64(self.vocab_size)
        return _Done(StepResult(tokens.astype(np.int32)))

    def close(self) -> None:
        pass
