"""A model over two GPUs: the same tokens as over one. On one GPU, with TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1, both
ranks are on it: that is slow, since the ranks wait for each other by turns of the device, but it runs the same code."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from branchwise import Engine, EngineDead, SamplingParams

OVERLAPPING = os.environ.get("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES") == "1"
pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2 and not OVERLAPPING, reason="needs two CUDA devices")

# float32: two ranks add up in another order, which in bfloat16 changes the best token now and then.
SETTINGS: dict[str, Any] = {"dtype": "float32", "kv_cache_tokens": 4096, "max_num_seqs": 8, "check_when_idle": True}
TEXT = "A tree of tokens grows a branch for every question that is asked of one document."
GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)


@pytest.fixture(scope="module")
def engines(gpu_checkpoint: Callable[[str], Path]) -> Iterator[list[Engine]]:
    folder = gpu_checkpoint("llama-gqa")
    backend = {"attention_backend": "triton"}
    with (
        Engine(folder, **SETTINGS, **backend) as one,
        Engine(folder, tensor_parallel_size=2, **SETTINGS, **backend) as two,
    ):
        yield [one, two]


def tokens(engine: Engine, prompts: Any, params: Any) -> list[list[int]]:
    return [choice.token_ids for output in engine.generate(prompts, params) for choice in output.outputs]


def test_the_same_tokens_cold_and_warm(engines: list[Engine]) -> None:
    prompts = [TEXT * n + end for n in (1, 4) for end in ("", " a", " b")]
    for _ in range(2):
        one, two = (tokens(engine, prompts, GREEDY) for engine in engines)
        assert one == two


def test_seeded_and_constrained(engines: list[Engine]) -> None:
    params = [
        SamplingParams(temperature=0.9, top_p=0.9, seed=5, n=2, max_tokens=16, ignore_eos=True),
        SamplingParams(regex="[a-z]{12}", temperature=0, max_tokens=20),
        GREEDY,
    ]
    one, two = (tokens(engine, [TEXT] * 3, params) for engine in engines)
    assert one == two


def test_all_reduces_of_every_size(engines: list[Engine]) -> None:
    """A prompt larger than any captured step, beside decodes."""
    prompts = [[(7 * i + j) % 300 + 2 for j in range(n)] for i, n in enumerate((400, 450, 30, 5))]
    one, two = (tokens(engine, prompts, GREEDY) for engine in engines)
    assert one == two


def test_a_rank_that_is_killed(gpu_checkpoint: Callable[[str], Path]) -> None:
    """Last: the device of rank 0 may spin until this process ends."""
    engine = Engine(gpu_checkpoint("llama-gqa"), tensor_parallel_size=2, cuda_graphs=False, **SETTINGS)
    executor: Any = engine._core.executor
    os.kill(executor.ranks.pids[0], signal.SIGKILL)
    with pytest.raises(EngineDead, match="rank 1 was killed by signal 9"):
        engine.generate(TEXT, GREEDY)


def test_the_same_tokens_from_the_tiers_of_two_devices(
    gpu_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each device keeps its part of a page in host memory and, after a restart, on the disk."""
    monkeypatch.setattr("branchwise.runtime.tiers.gate.Gate.pays", lambda *_: True)  # so small a model is fast
    prompts = [[(7 * i + j * j) % 60 + 3 for j in range(90)] for i in range(12)]
    settings = SETTINGS | {"attention_backend": "triton", "max_model_len": 256}
    small = {"kv_cache_tokens": 512, "host_cache": "64MiB", "preemption": "swap", "disk_cache": str(tmp_path)}
    folder = gpu_checkpoint("llama-gqa")
    with Engine(folder, tensor_parallel_size=2, **settings) as engine:
        expected = [engine.generate(prompt, GREEDY).token_ids for prompt in prompts]
    for tier in ("host", "disk"):
        with Engine(folder, tensor_parallel_size=2, **settings | small) as engine:
            for _ in range(2):
                assert [engine.generate(prompt, GREEDY).token_ids for prompt in prompts] == expected
            stats = engine.stats()
            assert stats.tier_failures == 0
            assert (stats.host_tokens if tier == "host" else stats.disk_tokens) > 0
