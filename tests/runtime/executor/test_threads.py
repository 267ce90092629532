"""Small steps on one thread, large ones on all: by what a step reads and multiplies."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from branchwise.runtime.executor.threads import ThreadChoice


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def choice(weights: int, device: str = "cpu") -> ThreadChoice:
    memory = SimpleNamespace(device=device, weight_bytes=4 * weights, dtype=torch.float32, token_bytes=4096)
    return ThreadChoice(memory)  # type: ignore[arg-type]


def step(tokens: int, *kv_lens: int) -> SimpleNamespace:
    return SimpleNamespace(kv_lens=np.array(kv_lens, np.int32), num_tokens=tokens)


def test_a_small_decode_takes_one_thread_and_a_prompt_all(two_threads):
    threads = choice(5_000_000)
    threads.set_for(step(3, 4000, 4000, 4000))
    assert torch.get_num_threads() == 1
    threads.set_for(step(2048, 2048))
    assert torch.get_num_threads() == 2
    threads.set_for(step(1, 100))
    assert torch.get_num_threads() == 1
    threads.set_for(step(64, *[2000] * 64))
    assert torch.get_num_threads() == 2


def test_a_large_model_takes_all_threads_for_one_token(two_threads):
    choice(600_000_000).set_for(step(1, 10))
    assert torch.get_num_threads() == 2


def test_a_gpu_is_left_alone(two_threads):
    threads = choice(1, device="cuda")
    threads.set_for(step(1, 1))
    assert torch.get_num_threads() == 2
