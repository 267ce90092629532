"""``deterministic`` on the device: the same bits alone and in a batch, cold and warm, whole and in chunks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from branchwise import Engine, SamplingParams

PARAMS = SamplingParams(temperature=0.9, seed=5, max_tokens=24, ignore_eos=True, logprobs=2, prompt_logprobs=2)


def facts(output: Any) -> Any:
    return output.token_ids, output.logprobs, output.prompt_logprobs


@pytest.mark.parametrize("family", ["llama-gqa", "qwen3", "gemma2"])
@pytest.mark.parametrize("graphs", [True, False])
def test_a_batch_gives_the_bits_of_each_alone(gpu_checkpoint: Callable[[str], Path], family: str, graphs: bool) -> None:
    settings: dict[str, Any] = {"model": gpu_checkpoint(family), "device": "cuda", "deterministic": True}
    settings |= {"kv_cache_tokens": 8192, "cuda_graphs": graphs, "max_num_seqs": 16}
    rng = np.random.default_rng(0)
    with Engine(disable_radix_cache=True, **settings) as engine:
        trunk = rng.integers(3, engine.vocab_size, 200).tolist()
        lengths = (5, 17, 64, 100, 129, 200, 260)
        asked = [trunk[: n // 2] + rng.integers(3, engine.vocab_size, n - n // 2).tolist() for n in lengths]
        expected = [facts(engine.generate(prompt, PARAMS)) for prompt in asked]
        assert [facts(one) for one in engine.generate(asked, PARAMS)] == expected
    with Engine(max_num_batched_tokens=96, **settings) as engine:
        engine.generate(trunk[:90], SamplingParams(max_tokens=3))
        assert [facts(one) for one in engine.generate(asked, PARAMS)] == expected
        plain = SamplingParams(temperature=0.9, seed=5, max_tokens=24, ignore_eos=True, logprobs=2)
        again = engine.generate(asked, plain)
        assert all(one.cached_tokens == len(prompt) - 1 for one, prompt in zip(again, asked, strict=True))
        assert [(one.token_ids, one.logprobs) for one in again] == [(ids, rows) for ids, rows, _ in expected]
