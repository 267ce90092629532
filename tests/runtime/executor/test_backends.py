"""Which attention serves: what was asked for, or the fastest that runs, and why it is not a faster one."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from branchwise.kernels.attention import triton_backend
from branchwise.kernels.attention.base import LayerSpec, Unavailable
from branchwise.kernels.attention.torch_backend import TorchAttention
from branchwise.runtime.config import EngineConfig
from branchwise.runtime.errors import LoadError
from branchwise.runtime.executor import backends
from branchwise.runtime.executor.executor import pick_dtype
from branchwise.runtime.executor.inputs import PageTable
from branchwise.runtime.models.config import load_config

NO_COMPILER = "FlashInfer's kernels could not be compiled: nvcc: not found"


@pytest.fixture
def a_gpu_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as the choice can tell: FlashInfer is installed and fits the device, and fails when it compiles."""

    def fails(*_args: object) -> None:
        raise Unavailable(NO_COMPILER)

    monkeypatch.setattr(backends, "check_available", lambda *_: None)
    monkeypatch.setattr(backends, "FlashInferAttention", fails)
    monkeypatch.setattr(backends, "find_spec", lambda _: None)  # nor Triton


@pytest.fixture
def triton_at_least(a_gpu_without_a_compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, but that Triton is installed: its backend is a name here."""
    monkeypatch.setattr(backends, "find_spec", lambda _: "there")
    monkeypatch.setattr(triton_backend, "TritonAttention", lambda *_: "triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))


def make(choice: str, device: str, head_dim: int = 64) -> object:
    pool = torch.empty(1, 2, 9, 16, 2, head_dim, device=device, dtype=torch.bfloat16)
    table = PageTable(4, 2, 8, torch.device("cpu"))
    config = EngineConfig(attention_backend=choice)  # type: ignore[arg-type]
    return backends.make_attention(config, pool, [LayerSpec(0.125)], 4, table, 64)


@pytest.mark.usefixtures("a_gpu_without_a_compiler")
def test_auto_takes_the_next_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert isinstance(make("auto", "meta"), TorchAttention)
    assert caplog.messages == [
        f"attention does not run on flashinfer: {NO_COMPILER}",
        "attention does not run on triton: Triton is not installed: pip install 'branchwise[gpu]'",
    ]


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


@pytest.mark.usefixtures("triton_at_least")
def test_triton_serves_the_heads_and_the_devices_it_is_made_for(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make("auto", "meta") == make("triton", "meta", 256) == "triton"
    assert isinstance(make("auto", "meta", head_dim=512), TorchAttention)
    assert "attention does not run on triton: there is no Triton kernel for head_dim 512 (16 to 256)" in caplog.text
    with pytest.raises(LoadError, match="--attention-backend triton: there is no Triton kernel for head_dim 512"):
        make("triton", "meta", head_dim=512)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert isinstance(make("auto", "meta"), TorchAttention)


@pytest.mark.usefixtures("triton_at_least")
def test_triton_is_not_for_a_cpu() -> None:
    with pytest.raises(LoadError, match="--attention-backend triton: Triton runs on CUDA devices, not on a CPU"):
        make("triton", "cpu")


@pytest.mark.usefixtures("triton_at_least")
def test_a_gpu_before_ampere_has_no_bfloat16(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    for family, dtype in (("llama-gqa", torch.float16), ("gemma2", torch.float32)):
        model = dataclasses.replace(load_config(checkpoint(family)), dtype="bfloat16")
        assert pick_dtype(EngineConfig(), model, torch.device("cuda:0")) == dtype
        assert pick_dtype(EngineConfig(dtype="bfloat16"), model, torch.device("cuda:0")) == torch.bfloat16
