"""The attention of ``--deterministic``: right, and the same bits in any step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from branchwise.kernels.attention.base import AttentionBackend, AttentionBatch, LayerSpec
from branchwise.kernels.attention.fixed_backend import FixedAttention
from branchwise.kernels.attention.torch_backend import TorchAttention
from branchwise.kernels.kv_pool import KVPool
from branchwise.kernels.linear import FixedRows, PlainLinear

HEADS, KV_HEADS, DIM, PAGE = 4, 2, 16, 8
LENGTH = 150
SPECS = {
    "full": LayerSpec(0.25),
    "window": LayerSpec(0.25, window=40),
    "softcap": LayerSpec(0.25, softcap=5.0),
    "sinks": LayerSpec(0.25, window=40, sinks=torch.tensor([-4.0, 0.5, 2.0, 9.0])),
}
Make = Callable[[KVPool, list[LayerSpec], int], AttentionBackend]


def fixed_triton(pool: KVPool, layers: list[LayerSpec], num_heads: int) -> AttentionBackend:
    from branchwise.kernels.attention.triton_backend import TritonAttention

    return TritonAttention(pool, layers, num_heads, fixed=True)


class Setup:
    """Two prompts of one pool that share no page; every row of queries belongs to one position of one of them."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        pages = -(-LENGTH // PAGE)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        data = torch.randn(1, 2, 2 * pages + 1, PAGE, KV_HEADS, DIM, generator=generator)
        self.pool = KVPool(data.to(self.device, dtype))
        self.table = np.concatenate([np.arange(2 * pages).reshape(2, pages), np.full((1, pages), 2 * pages)])
        self.table = self.table.astype(np.int32)
        self.q = torch.randn(2, LENGTH, HEADS, DIM, generator=generator).to(self.device, dtype)

    def run(self, make: Make, spec: LayerSpec, *chunks: tuple[int, int, int]) -> list[torch.Tensor]:
        """Attention of (row, start, stop) in one step; decodes first."""
        rows, starts, stops = (np.array(column, np.int32) for column in zip(*chunks, strict=True))
        q_lens = stops - starts
        table = torch.from_numpy(self.table).to(self.device)
        decodes = int((np.cumsum(q_lens != 1) == 0).sum())
        batch = AttentionBatch(rows, q_lens, stops, decodes, PAGE, table, self.table)
        backend = make(self.pool, [spec], HEADS)
        backend.plan(batch)
        q = torch.cat([self.q[row, start:stop] for row, start, stop in chunks])
        slots = torch.from_numpy(batch.query_slots()).to(self.device)
        layer = self.pool.layer(0)
        k, v = layer.k.flatten(0, 1)[slots], layer.v.flatten(0, 1)[slots]
        return list(backend.run(0, q, k, v).split(q_lens.tolist()))


MAKERS: list[object] = [pytest.param(FixedAttention, id="torch"), pytest.param(fixed_triton, id="triton")]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_token_gets_the_same_bits_in_any_step(make: Make, spec: LayerSpec) -> None:
    if make is fixed_triton:
        pytest.importorskip("triton", reason="Triton is not installed")
    setup = Setup(torch.float32)
    [whole] = setup.run(make, spec, (0, 0, LENGTH))
    [expected] = setup.run(TorchAttention, spec, (0, 0, LENGTH))
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-5)
    for cut in (1, 16, 37, 64, 129):
        [first], [rest] = setup.run(make, spec, (0, 0, cut)), setup.run(make, spec, (0, cut, LENGTH))
        assert torch.equal(torch.cat((first, rest)), whole)
    decode, other, chunk = setup.run(make, spec, (0, 99, 100), (1, 3, 4), (1, 20, 90))[:3]
    assert torch.equal(decode, whole[99:100])
    _, beside = setup.run(make, spec, (1, 5, 60), (0, 33, 71))
    assert torch.equal(beside, whole[33:71])
    [alone] = setup.run(make, spec, (1, 0, LENGTH))
    assert torch.equal(other, alone[3:4]) and torch.equal(chunk, alone[20:90])


def test_what_lies_beyond_a_prompts_end_is_never_read() -> None:
    setup = Setup(torch.float32)
    [before] = setup.run(FixedAttention, SPECS["full"], (0, 10, 45))
    for stored in (setup.pool.layer(0).k, setup.pool.layer(0).v):
        stored.flatten(0, 1)[45:] = float("nan")
    [after] = setup.run(FixedAttention, SPECS["full"], (0, 10, 45))
    assert torch.equal(before, after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_a_product_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(77, 72).to(dtype), torch.randn(50, 72).to(dtype)
    layer = FixedRows(PlainLinear(weight, torch.randn(50).to(dtype)), 16)
    with torch.inference_mode():
        whole = layer(x)
        assert whole.shape == (77, 50)
        torch.testing.assert_close(whole, layer._inner(x), rtol=2e-2, atol=1e-1)
        for some in (slice(0, 1), slice(76, 77), slice(5, 40), slice(16, 48)):
            assert torch.equal(layer(x[some]), whole[some])
