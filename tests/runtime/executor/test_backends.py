"""The choice of the attention backend. The GPU is simulated, and no kernel runs."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from branchwise.kernels import ops
from branchwise.kernels.attention import flashinfer_backend, flashinfer_module, tree_backend, triton_backend
from branchwise.kernels.attention.base import LayerSpec, Unavailable
from branchwise.kernels.attention.torch_backend import TorchAttention
from branchwise.kernels.kv_pool import KVPool
from branchwise.runtime.config import EngineConfig
from branchwise.runtime.errors import LoadError
from branchwise.runtime.executor import backends
from branchwise.runtime.executor.backends import make_attention, pick_ops
from branchwise.runtime.executor.device import pick_dtype
from branchwise.runtime.models.config import load_config


def make(choice: str, head_dim: int = 128, device: str = "cuda") -> Any:
    pool: Any = KVPool(torch.zeros(1, 2, 9, 16, 2, head_dim, dtype=torch.bfloat16))
    pool.device = torch.device(device)
    table: Any = SimpleNamespace(host=np.zeros((9, 4), np.int32), device=torch.zeros(9, 4, dtype=torch.int32))
    config = EngineConfig(attention_backend=choice)  # type: ignore[arg-type]
    return make_attention(config, pool, [LayerSpec(0.1)], 4, table, 64)


@pytest.fixture
def no_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashInfer is installed and supports the model, but cannot compile. Triton's backend is a stand-in."""

    def broken(*args: object) -> None:
        raise Unavailable("FlashInfer's kernels could not be compiled: Could not find nvcc")

    monkeypatch.setattr(flashinfer_module, "check_available", lambda device, dtype, head_dim: None)
    monkeypatch.setattr(flashinfer_backend, "FlashInferAttention", broken)
    monkeypatch.setattr(triton_backend, "TritonAttention", lambda *args, **options: "triton")
    monkeypatch.setattr(tree_backend, "TreeAttention", lambda *args, **options: ("tree", args[4]))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))


@pytest.mark.usefixtures("no_nvcc")
def test_auto_takes_the_next_best(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert make("auto") == ("tree", "triton")
    assert make("tree") == ("tree", "triton")
    assert make("triton") == "triton"
    assert "attention does not run on flashinfer: FlashInfer's kernels could not be compiled" in caplog.text
    assert isinstance(make("auto", head_dim=512), TorchAttention)  # Triton's kernels end at 256
    assert "attention does not run on triton: there is no Triton kernel for head_dim 512 (16 to 256)" in caplog.text


@pytest.mark.usefixtures("no_nvcc")
def test_a_gpu_before_ampere_has_torch_and_no_bfloat16(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert isinstance(make("auto"), TorchAttention)
    assert pick_ops(torch.device("cuda:0")) is ops
    for family, dtype in (("llama-gqa", torch.float16), ("gemma2", torch.float32)):
        model = dataclasses.replace(load_config(checkpoint(family)), dtype="bfloat16")
        assert pick_dtype(EngineConfig(), model, torch.device("cuda:0")) == dtype
        assert pick_dtype(EngineConfig(dtype="bfloat16"), model, torch.device("cuda:0")) == torch.bfloat16


@pytest.mark.usefixtures("no_nvcc")
@pytest.mark.parametrize(
    ("choice", "head_dim", "device", "says"),
    [
        ("flashinfer", 128, "cuda", "--attention-backend flashinfer: FlashInfer's kernels could not be compiled"),
        ("triton", 512, "cuda", "--attention-backend triton: there is no Triton kernel for head_dim 512"),
        ("tree", 512, "cuda", "--attention-backend tree: neither FlashInfer nor Triton"),
        ("triton", 128, "cpu", "--attention-backend triton: Triton runs on CUDA devices, not on cpu"),
    ],
)
def test_a_named_one_that_cannot_run_is_refused(choice: str, head_dim: int, device: str, says: str) -> None:
    with pytest.raises(LoadError) as caught:
        make(choice, head_dim, device)
    assert str(caught.value).startswith(says)


def test_flashinfer_is_imported_ahead_where_it_may_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[str] = []
    done = threading.Event()

    def fail(name: str) -> None:
        imported.append(name)
        done.set()
        raise ImportError("no such module")  # told by whoever needs it, not here

    monkeypatch.setattr(backends.importlib, "import_module", fail)
    backends.preload(EngineConfig(), torch.device("cpu"))
    backends.preload(EngineConfig(attention_backend="triton"), torch.device("cuda", 0))
    assert not imported
    backends.preload(EngineConfig(), torch.device("cuda", 0))
    assert done.wait(100) and imported == ["flashinfer.jit"]


@pytest.mark.parametrize(
    ("choice", "device", "said"),
    [
        ("auto", "cpu", "torch, which"),
        ("torch", "cuda", "torch, which"),
        ("flashinfer", "cuda", "flashinfer, which reads a shared prefix once for each request"),
        (
            "auto",
            "cuda",
            "tree: by the built-in costs, which a start measures anew, 8 requests read a shared prefix once",
        ),
        ("tree", "cpu", "not the tree: "),
    ],
)
def test_attention_in_words(
    choice: Any, device: str, said: str, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cuda":
        monkeypatch.setattr(backends, "_problem_with_triton", lambda device: None)
        properties = SimpleNamespace(multi_processor_count=132)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    model = dataclasses.replace(load_config(checkpoint("llama-gqa")), num_heads=32, num_kv_heads=8)
    config = EngineConfig(attention_backend=choice)
    assert backends.describe_attention(config, model, torch.device(device)).startswith(said)


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_do_not_measure_costs_of_their_own(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With costs of its own a rank could run a step in another shape than the others, which then wait for ever."""
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(backends, "_problem_with_triton", lambda device: None)
    monkeypatch.setattr(backends, "_flashinfer", lambda *args: SimpleNamespace())
    monkeypatch.setattr(tree_backend, "TreeAttention", lambda *args, **options: seen.append(options))
    pool = SimpleNamespace(device=torch.device("cuda"), layout=SimpleNamespace(quantized=False))
    table = SimpleNamespace(host=np.zeros((9, 4)), device=None)
    config = EngineConfig(attention_backend="tree", tensor_parallel_size=ranks)
    make_attention(config, pool, [LayerSpec(1.0)], 4, table, 64)  # type: ignore[arg-type]
    assert seen == [{"measure": ranks == 1}]


@pytest.mark.parametrize("ranks", [1, 2])
def test_kernels_of_several_ranks_do_not_overlap(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from branchwise.kernels import triton_launch

    monkeypatch.setattr(triton_launch, "OVERLAP", ranks != 1)
    monkeypatch.setattr(backends, "_problem_with_triton", lambda device: None)
    backends.set_overlap(EngineConfig(tensor_parallel_size=ranks), torch.device("cuda"))
    assert triton_launch.OVERLAP is (ranks == 1)
