"""Steps padded to captured shapes, without a GPU: Triton's interpreter, and graphs that repeat their calls.

A replay runs over the inputs staged at capture, so it only works if later steps are staged at the same addresses.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from branchwise.kernels.attention import tree_backend
from branchwise.kernels.attention.base import StepShape
from branchwise.runtime.executor import backends, graphs
from branchwise.runtime.executor import executor as subject
from branchwise.runtime.executor.graphs import StepGraphs
from branchwise.runtime.sampling_params import SamplingParams
from branchwise.runtime.step import PENDING

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has real graphs")

PROMPTS = [np.random.default_rng(i).integers(2, 300, 30).tolist() for i in range(4)]


class RepeatingGraphs(StepGraphs):
    """Captures nothing: a replay makes the same calls again, over the inputs that were staged at its capture."""

    replays = 0

    def capture(self) -> None:
        while shape := self.next_missing():
            self.capture_missing(shape)

    def _capture(self, shape: StepShape, warm_up: bool = False) -> None:
        self._run(shape)
        repeated: Any = SimpleNamespace(replay=partial(self._run, shape))
        self._captured[shape] = repeated

    def replay(self, shape: StepShape) -> None:
        type(self).replays += 1
        super().replay(shape)


class LazyGraphs(RepeatingGraphs):
    """Captures the shapes of the steps that come, and some while idle."""

    def capture(self) -> None:
        self.capture_missing(self.next_missing())


def run(drive: Any, make: SimpleNamespace) -> list[list[int]]:
    """A prompt alone, chunks beside decodes, several samples of one request, decodes whose tokens are PENDING."""
    random = SamplingParams(temperature=1.0, top_p=0.9, seed=3)
    found = []

    def step(*args: Any, **kwargs: Any) -> None:
        found.append(drive.step(*args, **kwargs).tokens.tolist())

    starts = [make.start(row, prompt, random if row == 2 else make.greedy) for row, prompt in enumerate(PROMPTS)]
    tables = [column for row in range(4) for column in make.columns(row, range(6 * row, 6 * row + 6))]
    step([(0, PROMPTS[0][:7], 0, True)], table=tables, starts=starts)
    step([(0, [PENDING], 7, True), (1, PROMPTS[1][:5], 0, True), (2, PROMPTS[2][:9], 0, False)], num_decodes=1)
    step([(1, [PENDING], 5, True), (2, PROMPTS[2][9:12], 9, True)], num_decodes=1, samples=[0, 2, 3])
    step([(2, [PENDING], 12, True), (0, [PENDING], 8, True), (3, PROMPTS[3][:1], 0, True)], num_decodes=3)
    step([(row, [PENDING], length, True) for row, length in ((3, 1), (1, 6), (0, 9))], num_decodes=3)
    return found


@pytest.mark.parametrize("backend", ["triton", "tree"])
@pytest.mark.parametrize("kind", [RepeatingGraphs, LazyGraphs])
def test_padded_steps_are_those_of_the_torch_backend(
    kind: type[RepeatingGraphs],
    backend: str,
    driver: Callable[..., Any],
    make: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tree backend's steps with chunks have joint shapes."""
    expected = run(driver(), make)
    kind.replays = 0
    monkeypatch.setattr(backends, "_problem_with_triton", lambda device: None)
    monkeypatch.setattr(subject, "StepGraphs", kind)
    monkeypatch.setattr(tree_backend, "MIN_DECODES", 2)
    for name, sizes in {
        "DECODES": (1, 2, 4),
        "MIXED_DECODES": (4,),
        "CHUNK_TOKENS": (8, 16),
        "JOINT_TOKENS": (8, 16),
    }.items():
        monkeypatch.setattr(graphs, name, sizes)
    got = run(driver(attention_backend=backend, max_num_seqs=4), make)
    assert got == expected
    assert kind.replays == 4  # all but the step with more samples than requests
