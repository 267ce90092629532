"""The host tier on a CPU, against the pool's own contents."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from branchwise.kernels.kv_pool import KVLayout, KVPool
from branchwise.runtime.tiers.copies import HostCopies
from branchwise.runtime.tiers.gate import Gate
from branchwise.runtime.tiers.host import HostTier


def array(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def test_pages_come_back_as_they_were() -> None:
    pool = KVPool.allocate(KVLayout(3, 4, 2, 8, torch.bfloat16), 6, torch.device("cpu"))
    tier = HostTier(pool, 5)
    assert tier.memory.shape == (5, pool.layout.page_bytes)
    data = pool.fragments()
    data.copy_(torch.randint(0, 256, data.shape, dtype=torch.uint8))
    before = data.clone()
    tier.store(HostCopies(array(1, 4, 2), array(3, 0, 4), -1))
    assert tier.stored() == 1
    data.zero_()
    tier.load(HostCopies(array(), array(), -1, [(7, array(4, 3), array(0, 5)), (8, array(0), array(1))]))
    assert [(end.id, end.good, end.damaged) for end in tier.ended()] == [(7, 2, False), (8, 1, False)]
    assert tier.ended() == []
    for page, source in ((0, 2), (5, 1), (1, 4)):
        assert torch.equal(data[:, page], before[:, source])
    assert not data[:, 2:5].any()
    k, v = pool.layer(2).k, pool.layer(2).v
    assert k[0].numel() and torch.equal(k[5].view(torch.uint8).flatten(), before[4, 1])
    assert torch.equal(v[5].view(torch.uint8).flatten(), before[5, 1])
    tier.close()


def test_the_gate_learns_and_recovers() -> None:
    gate = Gate(page_bytes=1 << 20, page_size=16)
    assert gate.pays(16, 1, 0, 0), "nothing was measured"
    for _ in range(50):
        gate.computed(1000, 1000, 0.01)  # 100,000 tokens/s
        gate.read(1, 1000, 0.1)  # 10,000 pages/s: 160,000 tokens/s
    assert abs(gate.computing - 1e5) < 1e3
    assert gate.pays(16_000, 1000, 0, 0)
    assert not gate.pays(16, 1, 0, 0), "waiting takes longer than computing 16 tokens"
    assert not gate.pays(16_000, 1000, 0, 5000), "it would wait behind others"
    for _ in range(50):
        gate.read(1, 1000, 1.0)
    refused = 0
    while not gate.pays(16_000, 1000, 0, 0):
        refused += 1
    assert 10 < refused < 200, "and is tried again after a while"


def test_one_shot_pages_are_kept_as_long_as_enough_come_back() -> None:
    gate = Gate(page_bytes=1 << 20, page_size=16)
    gate.computed(1000, 1000, 0.01)
    assert gate.keeps_one_shot() is None
    gate.stored = gate.loaded = 5000
    assert gate.keeps_one_shot() is True
    gate.stored, gate.loaded = 5000, 10
    assert gate.keeps_one_shot() is False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fp8_rounds_at_the_boundary_and_halves_the_bytes(dtype: torch.dtype) -> None:
    layout = KVLayout(3, 4, 2, 64, dtype)
    pool = KVPool.allocate(layout, 6, torch.device("cpu"))
    tier = HostTier(pool, 5, fp8=True)
    assert tier.page_bytes == 3 * 2 * 4 * 2 * (64 + 2) < layout.page_bytes * 0.52
    chance = torch.Generator().manual_seed(0)
    scale = torch.tensor([1e-6, 1.0, 300.0, 0.0]).view(1, 1, 1, 4, 1, 1)  # of the tokens of a page
    pool.data.copy_((torch.randn(pool.data.shape, generator=chance) * scale).to(dtype))
    before = pool.data.clone()
    tier.store(HostCopies(array(1, 4, 2), array(3, 0, 4), -1))
    pool.data.zero_()
    tier.load(HostCopies(array(), array(), -1, [(1, array(4, 0), array(2, 5))]))
    tier.ended()
    for page in (2, 5):
        source = {2: 2, 5: 4}[page]
        found, expected = pool.data[:, :, page].float(), before[:, :, source].float()
        largest = expected.abs().amax(-1, keepdim=True)
        assert ((found - expected).abs() <= largest / 28 + largest / 256 + 6e-8).all(), "and the dtype's own rounding"
        assert not found.equal(expected)
    once = pool.data.clone()
    tier.store(HostCopies(array(2), array(1), -1))
    tier.load(HostCopies(array(), array(), -1, [(2, array(1), array(0))]))
    again, first = pool.data[:, :, 0].float(), once[:, :, 2].float()
    assert torch.allclose(again, first, rtol=0.01, atol=0), "a page that moves again is not rounded again"
    tier.close()
