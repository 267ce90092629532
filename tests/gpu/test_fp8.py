"""FP8 weights on the device against the same arithmetic in torch on the CPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from branchwise import Engine, SamplingParams
from branchwise.kernels import fp8_linear

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
