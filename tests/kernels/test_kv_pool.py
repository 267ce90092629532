"""The KV pool: its figures, what it stores and what it copies."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from branchwise.kernels.kv_pool import KVLayout, KVPool

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layout_counts_what_is_allocated(dtype: torch.dtype) -> None:
    layout = KVLayout(num_layers=3, page_size=4, kv_heads=2, head_dim=8, dtype=dtype)
    pool = KVPool.allocate(layout, 5, CPU)
    assert (pool.layout, pool.num_pages, pool.device) == (layout, 5, CPU)
    layers = [pool.layer(i) for i in range(3)]
    assert pool.data.nbytes == 5 * layout.page_bytes == 5 * 4 * layout.token_bytes
    for layer in layers:
        assert layer.k.shape == layer.v.shape == (5, 4, 2, 8) and layer.k.dtype == layer.v.dtype == dtype
        assert not layer.k.any() and not layer.v.any()


def test_a_write_touches_its_slots_alone() -> None:
    pool = KVPool(torch.zeros(2, 2, 3, 4, 2, 8))
    k, v = torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    slots = torch.tensor([11, 2, 5])
    pool.layer(1).write(slots, k, v)
    expected = torch.zeros(2, 12, 2, 8)
    expected[:, slots] = torch.stack([k, v])
    assert torch.equal(pool.data[1].flatten(1, 2), expected)
    assert torch.equal(pool.layer(1).k.flatten(0, 1), expected[0]) and not pool.data[0].any()


@pytest.mark.parametrize("choice", ["auto", "fp8", "int4", "nvfp4", "k16v8"])
def test_a_layout_is_described_alike_in_every_process(choice: str) -> None:
    """A disk cache compares these texts after a restart."""
    program = (
        "import torch; from branchwise.kernels.kv_pool import KVLayout; "
        f"print(KVLayout.of({choice!r}, 2, 16, 4, 64, torch.bfloat16))"
    )
    found = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout for _ in range(2)]
    assert found[0] == found[1] != ""
    assert "0x" not in found[0]
