"""Small steps run on one thread and large ones on all, by the bytes read and the operations of a step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from branchwise.runtime.executor import threads
from branchwise.runtime.executor.threads import ThreadChoice, container_processors


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def choice(weights: int, device: str = "cpu") -> ThreadChoice:
    memory = SimpleNamespace(device=device, read_bytes=4 * weights, dtype=torch.float32)
    memory.layout = SimpleNamespace(token_bytes=4096)
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


def test_a_container_has_no_more_threads_than_processors(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads beyond the quota would be stopped in the middle of a parallel region, and the others would wait."""
    monkeypatch.setattr(threads, "container_processors", lambda root: 1)
    choice(70_000_000).set_for(step(2000, 2000))  # type: ignore[arg-type]
    assert torch.get_num_threads() == 1
    torch.set_num_threads(2)
    choice(70_000_000, device="cuda:0").set_for(step(2000, 2000))  # type: ignore[arg-type]
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_quotas_of_containers(files: dict[str, str], expected: int | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert container_processors(tmp_path) == expected
