"""Everything of an engine runs on its own device. Devices are simulated, since most machines have no second GPU.

tests/gpu/test_engine.py has the same with real ones (`test_a_second_device`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from branchwise.kernels.attention.base import StepShape
from branchwise.runtime.config import EngineConfig
from branchwise.runtime.executor import executor as subject
from branchwise.runtime.executor.device import on_device
from branchwise.runtime.executor.executor import ModelExecutor
from branchwise.runtime.executor.graphs import StepGraphs
from branchwise.runtime.models import implementation
from branchwise.runtime.sampling_params import SamplingParams
from branchwise.runtime.step import RowStart, StepPlan


class Devices:
    """Simulates torch's current device: ``engine`` inside `on_device`, ``user`` outside."""

    def __init__(self) -> None:
        self.current = "user"
        self.seen: list[tuple[str, str]] = []

    @contextlib.contextmanager
    def enter(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, "engine"
        try:
            yield
        finally:
            self.current = before

    def spy(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.seen.append((name, self.current))
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)


def test_the_executor_works_on_its_device_and_restores_the_callers(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    devices = Devices()
    monkeypatch.setattr(subject, "on_device", devices.enter)
    for name in ("load", "plan_memory", "make_attention", "InputStaging", "Sampler"):
        devices.spy(monkeypatch, subject, name)
    for name in ("load_weights", "Decoder"):
        devices.spy(monkeypatch, implementation, name)
    config = EngineConfig(model=str(checkpoint("llama-gqa")), device="cpu", page_size=8, kv_cache_tokens=64)
    executor = ModelExecutor.load(config)
    for owner, name in (
        (executor._attention, "plan"),
        (executor._attention, "run"),
        (executor._inputs, "stage"),
        (executor._table, "write"),
        (executor._sampler, "sample"),
        (executor._sampler, "start"),
    ):
        devices.spy(monkeypatch, owner, name)
    none = np.empty(0, np.int32)
    one, first = np.ones(1, np.int32), np.zeros(1, np.int32)
    plan = StepPlan(1, first, one, one, one + 4, 1, first, first, first, one, none.reshape(0, 2))
    plan.constrained = first
    plan.starts = [RowStart(0, SamplingParams(temperature=1.0), 7, one + 4, 1)]
    step = executor.launch(plan)
    words = -(-executor.vocab_size // 32)
    step.sample(np.full((1, words), 0xFFFFFFFF, np.uint32))
    step.result()
    executor.close()
    assert {name for name, _ in devices.seen} >= {"load_weights", "plan", "run", "stage", "write", "sample", "start"}
    assert {where for _, where in devices.seen} == {"engine"}
    assert devices.current == "user"


class FakeGraph:
    """Records where it is captured."""

    captures: ClassVar[list[dict[str, Any]]] = []
    stream: ClassVar[Any] = None
    fails: ClassVar[Exception | None] = None

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        self.captures.append({"stream": FakeGraph.stream, "mode": capture_error_mode})

    def capture_end(self) -> None:
        if self.fails is not None:
            raise self.fails

    def replay(self) -> None:
        self.captures.append({"replayed": True})


def ignore(shape: StepShape) -> None: ...


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> type[FakeGraph]:
    @contextlib.contextmanager
    def on_stream(stream: Any) -> Iterator[None]:
        FakeGraph.stream = stream
        yield
        FakeGraph.stream = None

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(device=device))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(FakeGraph, "captures", [])
    return FakeGraph


def test_graphs_are_captured_on_a_stream_of_their_own_device(fake_cuda: type[FakeGraph]) -> None:
    """torch's default capture stream is created once a process, on the device of the first capture."""
    for index in (1, 0):
        device = torch.device("cuda", index)
        graphs = StepGraphs(ignore, ignore, ignore, 2, 64, device)
        graphs.capture()
        while shape := graphs.next_missing():
            graphs.capture_missing(shape)
        assert [capture["stream"].device for capture in fake_cuda.captures] == [device] * len(graphs.shapes())
        assert {capture["mode"] for capture in fake_cuda.captures} == {"thread_local"}
        fake_cuda.captures.clear()


def test_a_shape_is_captured_by_its_first_step_and_replayed_by_the_next(fake_cuda: type[FakeGraph]) -> None:
    runs: list[StepShape] = []
    graphs = StepGraphs(runs.append, ignore, ignore, 2, 64, torch.device("cuda", 0))
    graphs.capture()
    assert len(fake_cuda.captures) == 3  # one and two decodes, and the largest shape
    runs.clear()
    shape = StepShape(2, 32, 2)
    graphs.replay(shape)
    assert runs == [shape, shape]  # computed, then recorded
    graphs.replay(shape)
    assert len(runs) == 2 and fake_cuda.captures[-1] == {"replayed": True}


def test_a_shape_that_cannot_be_captured_runs_eagerly(
    fake_cuda: type[FakeGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[StepShape] = []
    graphs = StepGraphs(runs.append, ignore, ignore, 2, 64, torch.device("cuda", 0))
    graphs.capture()
    monkeypatch.setattr(FakeGraph, "fails", torch.OutOfMemoryError("injected"))
    while (missing := graphs.next_missing()) is not None:
        graphs.capture_missing(missing)
    runs.clear()
    shape = StepShape(2, 32, 2)
    for _ in range(2):
        graphs.replay(shape)
    assert runs == [shape, shape]


def test_a_model_that_cannot_be_captured_runs_eagerly_and_says_so_once(
    fake_cuda: type[FakeGraph], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    graphs = StepGraphs(ignore, ignore, ignore, 40, 300, torch.device("cuda", 0))
    monkeypatch.setattr(FakeGraph, "fails", RuntimeError("operation not permitted when stream is capturing"))
    graphs.capture()
    none = np.empty(0, np.int32)
    one, first = np.ones(1, np.int32), np.zeros(1, np.int32)
    decode = StepPlan(1, first, one, one, one + 4, 1, first, first, first, one, none.reshape(0, 2))
    assert graphs.shape_for(decode) is None and graphs.next_missing() is None
    assert len(fake_cuda.captures) == 1 and caplog.text.count("run eagerly") == 1


def test_joint_shapes_are_all_captured_at_start(fake_cuda: type[FakeGraph]) -> None:
    """And hold any step of so many tokens, whatever share of them is decodes."""
    graphs = StepGraphs(ignore, ignore, ignore, 40, 300, torch.device("cuda", 0), joint=True)
    graphs.capture()
    assert graphs.next_missing() is None
    assert len(fake_cuda.captures) == len(graphs.shapes())
    none = np.empty(0, np.int32)
    for decodes, chunks in ((30, [40]), (1, [69]), (0, [70]), (20, [20] * 5), (0, [2] * 60)):
        q_lens = np.array([1] * decodes + chunks, np.int32)
        tokens, samples = np.zeros(decodes + sum(chunks), np.int32), np.arange(len(q_lens), dtype=np.int32)
        plan = StepPlan(0, samples, q_lens, q_lens, tokens, decodes, samples, none, none, none, none.reshape(0, 2))
        assert graphs.shape_for(plan) == StepShape(0, 128, 0, joint=40)


def test_a_gpu_is_entered_by_its_number_and_a_cpu_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext(device))
    with on_device(torch.device("cuda:1")) as entered:
        assert entered == torch.device("cuda:1")
    with on_device(torch.device("cpu")) as entered:
        assert entered is None
