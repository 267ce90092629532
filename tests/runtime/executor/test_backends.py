"""Which attention serves: what was asked for, or the fastest that runs, and why it is not a faster one."""

from __future__ import annotations

import logging

import pytest
import torch

from branchwise.kernels.attention.base import LayerSpec
from branchwise.kernels.attention.flashinfer_module import Unavailable
from branchwise.kernels.attention.torch_backend import TorchAttention
from branchwise.runtime.config import EngineConfig
from branchwise.runtime.errors import LoadError
from branchwise.runtime.executor import backends
from branchwise.runtime.executor.inputs import PageTable

NO_COMPILER = "FlashInfer's kernels could not be compiled: nvcc: not found"


@pytest.fixture
def a_gpu_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as the choice can tell: FlashInfer is installed and fits the device, and fails when it compiles."""

    def fails(*_args: object) -> None:
        raise Unavailable(NO_COMPILER)

    monkeypatch.setattr(backends, "check_available", lambda *_: None)
    monkeypatch.setattr(backends, "FlashInferAttention", fails)
    monkeypatch.setattr(backends, "find_spec", lambda _: None)  # nor Triton


def make(choice: str, device: str) -> object:
    pool = torch.empty(1, 2, 9, 16, 2, 64, device=device, dtype=torch.bfloat16)
    table = PageTable(4, 2, 8, torch.device("cpu"))
    config = EngineConfig(attention_backend=choice)  # type: ignore[arg-type]
    return backends.make_attention(config, pool, [LayerSpec(0.125)], 4, table, 64)


@pytest.mark.usefixtures("a_gpu_without_a_compiler")
def test_auto_takes_the_next_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert isinstance(make("auto", "meta"), TorchAttention)
    assert caplog.messages == [f"attention runs on torch: {NO_COMPILER}"]


@pytest.mark.usefixtures("a_gpu_without_a_compiler")
def test_one_asked_for_by_name_is_an_error() -> None:
    with pytest.raises(LoadError, match=f"--attention-backend flashinfer: {NO_COMPILER}"):
        make("flashinfer", "meta")
    with pytest.raises(LoadError, match="--attention-backend triton: Triton is not installed"):
        make("triton", "meta")


def test_a_cpu_takes_torch_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    assert isinstance(make("auto", "cpu"), TorchAttention)
    assert not caplog.messages
    with pytest.raises(LoadError, match="flashinfer: FlashInfer"):
        make("flashinfer", "cpu")
