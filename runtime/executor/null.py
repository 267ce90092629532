"""An executor without a model: every token is a hash of its position. For measuring everything else."""

from __future__ import annotations

import time

import numpy as np

from ..step import Int32, StepPlan, StepResult, TokenBitmask


class _Step:
    def __init__(self, result: StepResult, ends: float, constrained: Int32) -> None:
        self._result = result
        self._ends = ends  # monotonic seconds
        self._constrained = constrained

    def sample(self, masks: TokenBitmask) -> None:
        """The hash chooses among the allowed tokens."""
        tokens = self._result.tokens
        for i, mask in zip(self._constrained.tolist(), masks, strict=True):
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
            tokens[i] = allowed[tokens[i] % len(allowed)]

    def result(self) -> StepResult:
        left = self._ends - time.monotonic()
        if left > 0:
            time.sleep(left)
        return self._result


class NullExecutor:
    """Implements `runtime.step.Executor`; a step costs a few microseconds.

    ``step_seconds`` is how long a step takes, as on a device: steps run one after the other, and waiting for a result
    does not use the processor.
    """

    def __init__(self, num_pages: int, page_size: int, vocab_size: int, step_seconds: float = 0.0) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.vocab_size = vocab_size
        self._step_seconds = step_seconds
        self._idle_at = 0.0  # monotonic seconds: when everything launched so far has run

    def launch(self, plan: StepPlan) -> _Step:
        positions = plan.sample_positions.astype(np.uint64)
        mixed = positions * np.uint64(0x9E3779B97F4A7C15)
        tokens = (mixed >> np.uint64(33)) % np.uint64(self.vocab_size)
        self._idle_at = max(self._idle_at, time.monotonic()) + self._step_seconds
        return _Step(StepResult(tokens.astype(np.int32)), self._idle_at, plan.constrained)

    def prepare_next(self) -> bool:
        return False

    def beat(self) -> None:
        pass

    def close(self) -> None:
        pass
