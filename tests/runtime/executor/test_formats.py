"""Formats of weights and activations: what auto takes on each device, what is refused, and what the plan says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from branchwise import Engine, SamplingParams
from branchwise.kernels import linear as kernel_linear
from branchwise.kernels.processor import multiplies_bfloat16, multiplies_int8
from branchwise.runtime.config import EngineConfig
from branchwise.runtime.errors import LoadError
from branchwise.runtime.executor import device as subject
from branchwise.runtime.executor.device import apply_quantization, pick_dtype
from branchwise.runtime.executor.memory import plan_memory
from branchwise.runtime.models import linear
from branchwise.runtime.models.config import ModelConfig, load_config
from branchwise.runtime.models.quantization import ONLINE_FP8

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def model(checkpoint: Callable[[str], Path]) -> ModelConfig:
    return dataclasses.replace(load_config(checkpoint("llama-gqa")), dtype="bfloat16")


def weights_row(model: ModelConfig, device: torch.device = CPU, **config: Any) -> tuple[str, str]:
    dtype = pick_dtype(EngineConfig(**config), model, device)
    plan = plan_memory(EngineConfig(**config, kv_cache_tokens=64), model, dtype, device, 64, 64)
    return next((size, how) for what, size, how in plan.rows() if what == "weights")


@pytest.mark.parametrize(
    ("capabilities", "native"),
    [
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"bf16": True}, True),
        ({"avx512_vnni": True, "avx512_bf16": False}, False),
        ({}, False),
    ],
)
def test_auto_on_a_cpu_is_bfloat16_where_the_processor_multiplies_it(
    capabilities: dict[str, bool], native: bool, model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert multiplies_bfloat16() == native
    assert multiplies_int8() == ("avx512_vnni" in capabilities)
    assert pick_dtype(EngineConfig(), model, CPU) == (torch.bfloat16 if native else torch.float32)
    said = "bfloat16" if native else "float32 (the processor does not multiply bfloat16)"
    assert weights_row(model)[1] == said
    assert weights_row(model, dtype="float32")[1] == "float32"
    for dtype in ("float32", "float16"):  # what the checkpoint has is not rounded unasked
        assert pick_dtype(EngineConfig(), dataclasses.replace(model, dtype=dtype), CPU) == torch.float32


def test_int8_is_refused_where_it_does_not_run(model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(quantization="int8")
    with pytest.raises(LoadError, match="--quantization int8 is for CPUs with VNNI, and cuda:0 is a GPU: use fp8"):
        apply_quantization(config, model, CUDA)
    monkeypatch.setattr(subject, "multiplies_int8", lambda: False)
    with pytest.raises(LoadError, match="this processor has no VNNI: use auto"):
        apply_quantization(config, model, CPU)
    monkeypatch.setattr(subject, "multiplies_int8", lambda: True)
    assert apply_quantization(config, model, CPU) == model


def test_fp8_quantizes_plain_checkpoints_alone(model: ModelConfig) -> None:
    fp8 = apply_quantization(EngineConfig(quantization="fp8"), model, CPU)
    assert fp8.quantization == ONLINE_FP8
    own = dataclasses.replace(model, quantization=dataclasses.replace(ONLINE_FP8, scale="weight_scale"))
    assert apply_quantization(EngineConfig(quantization="fp8"), own, CPU) == own
    assert "float32, dequantized from FP8, which cpu does not multiply" in weights_row(fp8, dtype="float32")[1]


def test_the_plan_counts_the_bytes_of_each_format(model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    model = dataclasses.replace(model, hidden_size=1024, intermediate_size=4096, quantization=ONLINE_FP8)
    plain = dataclasses.replace(model, quantization=None)
    monkeypatch.setattr(kernel_linear, "COPY_BYTES", 0)  # copies: `test_a_linear_layer_takes_the_bytes_of_the_plan`
    for native in (True, False):
        monkeypatch.setattr(linear, "multiplies_fp8", lambda device, native=native: native)
        bf16, fp8, int8 = (
            linear.weight_bytes(m, torch.bfloat16, CUDA, int8=int8)
            for m, int8 in ((plain, False), (model, False), (plain, True))
        )
        embedding = model.vocab_size * 1024 * 2
        assert fp8 - embedding == pytest.approx((bf16 - embedding) * (0.5 if native else 1), rel=0.02)
        assert int8 - 1.5 * embedding == pytest.approx((bf16 - embedding) / 2, rel=0.02)  # the tied head is a copy


@pytest.mark.skipif(not multiplies_int8(), reason="the processor has no VNNI")
@pytest.mark.parametrize("family", ["llama-gqa", "gemma2", "cohere", "starcoder2"])
def test_int8_is_close_to_float32(family: str, checkpoint: Callable[[str], Path]) -> None:
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=1, ignore_eos=True)
    prompts = [list(range(5, 5 + n)) for n in (1, 9, 40)]
    likeliest = []
    for quantization in ("auto", "int8"):
        with Engine(str(checkpoint(family)), device="cpu", quantization=quantization, kv_cache_tokens=256) as engine:
            outputs = engine.generate(prompts, params)
            likeliest.append([output.outputs[0].logprobs[0].logprob for output in outputs])
    assert likeliest[0] != likeliest[1]
    torch.testing.assert_close(torch.tensor(likeliest[0]), torch.tensor(likeliest[1]), atol=0.5, rtol=0.2)
