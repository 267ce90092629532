"""FP8 weights on the device against the same arithmetic in torch on the CPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from branchwise import Engine, SamplingParams
from branchwise.kernels import fp8_linear, ops
from branchwise.kernels.quantize import Quantizer
from branchwise.runtime.models.config import load_config
from branchwise.runtime.models.loader import dummy_weights
from branchwise.runtime.models.quantization import ONLINE_FP8

pytest.importorskip("triton", reason="Triton is not installed")

from branchwise.kernels import triton_fp8, triton_ops

PROMPT = np.random.default_rng(0).integers(2, 300, 150).tolist()
LENGTHS = list(range(2, len(PROMPT), 7))


def top(folder: Path, **config: Any) -> list[dict[int, float]]:
    """Logprobs of the likeliest tokens after prompts of each length."""
    with Engine(str(folder), kv_cache_tokens=4096, max_num_seqs=8, **config) as engine:
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=5, ignore_eos=True)
        outputs = engine.generate([PROMPT[:n] for n in LENGTHS], params)
        engine.check()
    return [dict(output.outputs[0].logprobs[0].top) for output in outputs]


def distance(some: list[dict[int, float]], others: list[dict[int, float]]) -> float:
    """Mean difference of the logprobs that both have."""
    pairs = [(a[token], b[token]) for a, b in zip(some, others, strict=True) for token in a.keys() & b.keys()]
    return statistics.mean(abs(x - y) for x, y in pairs)


@pytest.mark.parametrize("family", ["llama-gqa", "qwen3", "gemma2", "cohere"])
def test_logprobs(family: str, gpu_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = gpu_checkpoint(family)
    exact, plain = (
        top(folder, device=device, dtype=dtype) for device, dtype in (("cpu", "float32"), ("cuda", "bfloat16"))
    )
    captured, eager = (
        top(folder, device="cuda", dtype="bfloat16", quantization="fp8", cuda_graphs=g) for g in (True, False)
    )
    monkeypatch.setattr(fp8_linear, "multiplies_fp8", lambda device: True)
    expected = top(folder, device="cpu", dtype="float32", quantization="fp8")
    rounding, quantization = distance(exact, plain), distance(exact, expected)
    print(f"{family}: bfloat16 {rounding:.4f}, FP8 {quantization:.4f}, device {distance(expected, captured):.4f}")
    assert distance(captured, eager) <= 0.5 * quantization
    assert distance(captured, expected) <= 2 * rounding + 0.7 * quantization


@pytest.mark.parametrize(("outputs", "inputs"), [(6144, 4096), (4096, 14336), (2560, 2560)])
@pytest.mark.parametrize("bias", [False, True])
def test_scales_of_blocks(outputs: int, inputs: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager and captured, by torch where the device has it and by the kernel: as specified."""
    monkeypatch.setattr(triton_fp8, "_in_torch", {})
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn((outputs, inputs), generator=generator, device="cuda").to(torch.float8_e4m3fn)
    scale = torch.rand((outputs // 128, inputs // 128), generator=generator, device="cuda") + 0.5
    added = torch.randn(outputs, generator=generator, device="cuda").bfloat16() if bias else None
    for few in (triton_fp8.FEW_IN_BLOCKS, 1 << 30):
        monkeypatch.setattr(triton_fp8, "FEW_IN_BLOCKS", few)
        for tokens in (1, 16, 18, 39, 256, 2050):
            x = torch.randn((tokens, inputs), generator=generator, device="cuda")
            rows = triton_ops.quantize(x.bfloat16(), Quantizer(torch.float8_e4m3fn, group=128))
            expected = ops.fp8_linear(rows, weight, scale, added, torch.float32)
            got = triton_ops.fp8_linear(rows, weight, scale, added, torch.bfloat16)
            assert float((got.float() - expected).norm()) < 4e-3 * float(expected.norm())
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                replayed = triton_ops.fp8_linear(rows, weight, scale, added, torch.bfloat16)
            graph.replay()
            assert torch.equal(replayed, got)
    if torch.cuda.get_device_capability() == (9, 0):
        assert list(triton_fp8._in_torch.values()) == [True]


def test_quantizing_leaves_nothing_beside_the_weights(gpu_checkpoint: Callable[[str], Path]) -> None:
    """Temporaries of other sizes leave no memory that torch cannot return: of a 70B, 3.1 GiB on each of two GPUs."""
    config = replace(
        load_config(gpu_checkpoint("llama-gqa")), hidden_size=4096, intermediate_size=11000, quantization=ONLINE_FP8
    )
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    weights = dummy_weights(config, torch.bfloat16, torch.device("cuda"), 0)
    torch.cuda.empty_cache()
    taken = torch.cuda.memory_reserved() - before
    assert taken <= 1.05 * sum(weight.nbytes for weight in weights.values()) + (40 << 20)
