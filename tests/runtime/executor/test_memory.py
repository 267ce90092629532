"""The memory plan: what bounds the pool, and that the planned bytes are those allocated."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from branchwise.kernels import linear as kernel_linear
from branchwise.runtime.config import EngineConfig
from branchwise.runtime.errors import LoadError
from branchwise.runtime.executor import memory
from branchwise.runtime.executor.measure import taken_beside
from branchwise.runtime.executor.memory import GIB, MemoryPlan, human_bytes, plan_memory
from branchwise.runtime.models import linear
from branchwise.runtime.models.config import ModelConfig, load_config
from branchwise.runtime.models.loader import load_weights

CPU = torch.device("cpu")


@pytest.fixture
def model(checkpoint: Callable[[str], Path]) -> ModelConfig:
    return load_config(checkpoint("llama-gqa"))  # 768 bytes of KV a token in float32


def plan(model: ModelConfig, max_model_len: int = 512, tokens: int = 64, **config: Any) -> MemoryPlan:
    return plan_memory(EngineConfig(**config), model, torch.float32, CPU, max_model_len, tokens)


def test_as_many_tokens_as_asked_rounded_up_to_pages(model: ModelConfig) -> None:
    found = plan(model, kv_cache_tokens=100, page_size=16)
    assert (found.num_pages, found.kv_tokens, found.layout.token_bytes) == (7, 112, 768)
    assert found.kv_bytes == 112 * 768
    assert found.max_pages_per_row == 7  # a row cannot hold more pages than there are


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_few_requests_do_not_bound_what_is_remembered(
    device: str, model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool was once capped at max_num_seqs × max_model_len: 32,768 tokens here, on a device of 141 GB."""
    monkeypatch.setattr(memory, "device_memory", lambda device: (138 * GIB, 141 * GIB))
    few, many = (
        plan_memory(
            EngineConfig(max_num_seqs=seqs, page_size=16), model, torch.float32, torch.device(device), 4096, 8192
        )
        for seqs in (8, 256)
    )
    most = 0.92 * 141 * GIB - 3 * GIB if device == "cuda" else 4 * GIB
    assert 0.95 * most < many.kv_bytes <= few.kv_bytes <= most
    assert few.max_pages_per_row == 256 and few.page_table_bytes == 8 * 256 * 4


def test_half_of_what_is_free(model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "device_memory", lambda device: (64 * 1024**2, GIB))
    found = plan(model, gpu_memory_utilization=0.5)
    rest = found.weight_bytes + found.activation_bytes
    assert found.kv_bytes + rest <= 16 * 1024**2 < found.kv_bytes + rest + 16 * 768
    assert found.limit.startswith("25% of free memory")


def test_four_gibibytes_at_most(model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "device_memory", lambda device: (1000 * GIB, 1000 * GIB))
    found = plan(model, max_num_seqs=4096, max_model_len=100_000)
    assert found.kv_bytes <= 4 * GIB < found.kv_bytes + 16 * 768


def test_a_gpu_keeps_room_for_the_page_table_and_its_copies(
    model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small pages and long contexts make them large: 1.6 GiB with 1,024 rows of 131,072 pages."""
    monkeypatch.setattr(memory, "device_memory", lambda device: (30 * GIB, 40 * GIB))
    config = EngineConfig(page_size=1, max_num_seqs=1024)
    found = plan_memory(config, model, torch.bfloat16, torch.device("cuda"), 131_072, 8192)
    taken = 10 * GIB + found.weight_bytes + found.activation_bytes + found.kv_bytes + 3 * found.page_table_bytes
    assert found.page_table_bytes == 1024 * 131_072 * 4
    taken += memory.WORKSPACES + memory.FLASHINFER_WORKSPACES
    assert taken <= 0.92 * 40 * GIB < taken + found.layout.token_bytes
    assert found.graph_bytes > memory.GRAPHS_AND_MARGIN


def test_captured_steps_fit_beside_the_share_that_is_used(model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 98 % of 24 GiB, 0.5 GiB would be left for them."""
    monkeypatch.setattr(memory, "device_memory", lambda device: (23 * GIB, 24 * GIB))
    found = plan_memory(
        EngineConfig(gpu_memory_utilization=0.98), model, torch.bfloat16, torch.device("cuda"), 512, 8192
    )
    assert 23 * GIB - found.layout.page_bytes < found.largest_bytes + found.graph_bytes <= 23 * GIB


@pytest.mark.parametrize(
    ("cached", "expected"),
    [
        (0, 5),  # libraries and buffers between ranks
        (2, 3),  # memory that torch cannot return, which the largest step will use
        (4, 2),  # more of it than the step will use
    ],
)
def test_what_loading_took_beside_the_weights_is_reserved(
    cached: int, expected: int, model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * GIB, 40 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 14 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: (14 + cached) * GIB)
    others = taken_beside(torch.device("cuda"), 39 * GIB, 14 * GIB, 3 * GIB)
    assert others == expected * GIB
    monkeypatch.setattr(memory, "device_memory", lambda device: (20 * GIB, 40 * GIB))
    sizes = model, torch.bfloat16, torch.device("cuda"), 512, 8192
    found = plan_memory(EngineConfig(), *sizes, measured=(39 * GIB, 14 * GIB, 3 * GIB, others))
    taken = GIB + found.largest_bytes  # of another process, and ours
    assert found.reserve_bytes > others and taken <= 0.92 * 40 * GIB < taken + found.layout.page_bytes


def test_nothing_left(model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "device_memory", lambda device: (1024**2, GIB))
    with pytest.raises(LoadError, match="no memory for a KV cache: weights take"):
        plan(model)
    with pytest.raises(LoadError, match="more memory than cpu has free"):
        plan(model, kv_cache_tokens=10_000)


def test_lines_tell_the_formula(model: ModelConfig) -> None:
    text = "\n".join(plan(model, kv_cache_tokens=1600).lines())
    for part in ("2 (K, V) × 3 layers × 2 KV heads × 16 × 4 B (float32)", "768 B", "100 × 16 tokens", "1,600"):
        assert part in text


def test_a_gpu_that_another_process_fills(model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names every part of the plan, and how much of the device is free."""
    monkeypatch.setattr(memory, "device_memory", lambda device: (3 * GIB // 2, 80 * GIB))
    with pytest.raises(LoadError) as caught:
        plan_memory(EngineConfig(), model, torch.bfloat16, torch.device("cuda:0"), 512, 8192)
    said = str(caught.value)
    assert "workspaces and libraries 512.1 MiB, of 0 B (1.5 GiB of 80.0 GiB are free on cuda:0)" in said


@pytest.mark.parametrize(("family", "tied"), [("llama-mqa", False), ("gemma2", True)])
def test_planned_weights_are_the_weights_loaded(
    family: str, tied: bool, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_config(checkpoint(family))
    weights = load_weights(checkpoint(family), model, torch.float32, CPU)
    loaded = sum(weight.nbytes for weight in weights.values())
    monkeypatch.setattr(linear, "packs", lambda device, dtype: True)
    once = plan(model).read_bytes
    monkeypatch.setattr(kernel_linear, "COPY_BYTES", 0)
    assert plan(model).weight_bytes == plan(model).read_bytes == once
    monkeypatch.setattr(linear, "packs", lambda device, dtype: False)
    assert plan(model).weight_bytes == loaded
    monkeypatch.setattr(linear, "packs", lambda device, dtype: True)  # a tied output layer is then a second copy
    assert plan(model).weight_bytes == loaded + (weights["embedding"].nbytes if tied else 0)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"memory.max": "1000\n", "memory.current": "300\n"}, (700, 1000)),
        ({"memory.max": "1000", "memory.current": "3000"}, (0, 1000)),
        # A checkpoint that was read lies in the page cache, which the kernel gives up for whoever asks.
        ({"memory.max": "1000", "memory.current": "900", "memory.stat": "file 700\ninactive_file 600\n"}, (700, 1000)),
        ({"memory.max": "max", "memory.current": "300"}, None),
        ({"memory/memory.limit_in_bytes": "900", "memory/memory.usage_in_bytes": "100"}, (800, 900)),
        (
            {
                "memory/memory.limit_in_bytes": "900",
                "memory/memory.usage_in_bytes": "500",
                "memory/memory.stat": "inactive_file 7\ntotal_inactive_file 300\n",
            },
            (700, 900),
        ),
        ({}, None),
    ],
)
def test_container_limits(files: dict[str, str], expected: tuple[int, int] | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory.container_memory(tmp_path) == expected


def test_human_bytes() -> None:
    assert [human_bytes(n) for n in (0, 1023, 1536, 3 * 1024**2, 5 * GIB, 2**50)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "3.0 MiB",
        "5.0 GiB",
        "1024.0 TiB",
    ]


def test_a_cpu_takes_the_memory_of_pages_as_they_are_first_used_and_no_more() -> None:
    """A CPU server grew from 3.5 to 6.4 GB while it served: that was its pool, which the plan now counts in all.

    In a process of its own: memory that earlier tests have freed may be used again without becoming resident.
    """
    done = subprocess.run([sys.executable, "-c", _FILL], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    before, empty, full, *later, kv_bytes, largest_bytes = map(int, done.stdout.split())
    assert full - empty > kv_bytes // 2
    assert max(later) - full < kv_bytes // 2
    assert max(later) - before < largest_bytes + 64 * 1024**2  # code and caches of libraries


_FILL = """
from pathlib import Path
import torch
from branchwise import Engine, SamplingParams
from branchwise.runtime import models
from branchwise.runtime.engine import engine  # with what it imports, before the first look

def resident_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

def fill():
    "Computes as many different tokens as the pool holds."
    engine.generate([[next(prompts)] + [7] * 1023 for _ in range(8)], one)
    return resident_bytes()

shipped = Path(models.__file__).parent / "shipped"
one, prompts = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True), iter(range(5, 4000))
before = resident_bytes()
with Engine(shipped, device="cpu", kv_cache_tokens=8192, max_num_batched_tokens=256) as engine:
    empty, filled = resident_bytes(), [fill() for _ in range(3)]
    plan = engine._core.executor.memory_plan
    print(before, empty, *filled, plan.kv_bytes, plan.largest_bytes)
"""
