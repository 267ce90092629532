"""The Triton operations against `ops`: on a GPU compiled, elsewhere in Triton's interpreter (see tests/conftest.py)."""

from __future__ import annotations

import pytest
import torch

from branchwise.kernels import ops
from branchwise.kernels.addends import Addends
from branchwise.kernels.kv_pool import KVLayer
from branchwise.kernels.ops import Activation

pytest.importorskip("triton", reason="Triton is not installed")

from branchwise.kernels import triton_ops

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's, on the way to 0
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# One rounding of a result of the order of one; twice that where the specification rounds in between.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == expected.dtype and got.shape == expected.shape
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(3, 64), (1, 4096), (2, 5000), (0, 64), (7,), (2, 3, 2, 17), (5, 3, 128), (37, 4, 80)]
)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = randn(*shape, dtype=dtype), randn(shape[-1])
    close(triton_ops.rms_norm(x, weight, 1e-5), ops.rms_norm(x, weight, 1e-5))


def test_rms_norm_of_strided_heads_with_a_weight_each() -> None:
    x, weight = randn(11, 8, 48)[:, 2:7], randn(5, 48)
    close(triton_ops.rms_norm(x, weight, 1e-6), ops.rms_norm(x, weight, 1e-6))
    rows = randn(9, 100)[:, :60]
    close(triton_ops.rms_norm(rows, randn(60), 1e-6), ops.rms_norm(rows, randn(60), 1e-6))


def test_rms_norm_of_zeros_and_of_huge_values() -> None:
    x = torch.stack([torch.zeros(40), torch.full((40,), 1e18), torch.full((40,), -1e-18)]).to(DEVICE)
    weight = torch.ones(40, device=DEVICE)
    got = triton_ops.rms_norm(x, weight, 1e-5)
    assert torch.isfinite(got).all()
    close(got, ops.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (4, 4096), (3, 1000), (0, 64)])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_add_rms_norm_of_addends(shape: tuple[int, int], dtype: torch.dtype, ranks: int) -> None:
    """What the ranks of a model have each computed, in places of their own."""
    tensors = tuple(randn(*shape, dtype=dtype, seed=seed) for seed in range(ranks))
    addresses = torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64, device=DEVICE)
    x, residual, weight = Addends(tensors, addresses), randn(*shape, dtype=dtype, seed=9), randn(shape[1])
    expected_residual = residual.clone()
    expected = ops.add_rms_norm(x, expected_residual, weight, 1e-5)
    close(triton_ops.add_rms_norm(x, residual, weight, 1e-5), expected)
    close(residual, expected_residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (4, 4096), (3, 1000), (0, 64)])
def test_add_rms_norm(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, residual, weight = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=1), randn(shape[1])
    expected_residual = residual.clone()
    expected = ops.add_rms_norm(x, expected_residual, weight, 1e-5)
    close(triton_ops.add_rms_norm(x, residual, weight, 1e-5), expected)
    if dtype != torch.bfloat16 or DEVICE.type == "cuda":  # the interpreter truncates to bfloat16 instead of rounding
        assert torch.equal(residual, expected_residual)
    close(residual, expected_residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [8, 333, 1024, 2500])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
def test_gated_activations(activation: Activation, size: int, dtype: torch.dtype) -> None:
    gate_up = randn(3, 2 * size, dtype=dtype)
    gate_up[0, :2] = torch.tensor([60.0, -60.0])  # where exponentials saturate
    close(triton_ops.gate_mul(gate_up, activation), ops.gate_mul(gate_up.float(), activation).to(dtype))
    assert triton_ops.gate_mul(gate_up[:0], activation).shape == (0, size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", ["not", "before", "after"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "turning", "page"),
    [
        (8, 2, 128, 128, 16),
        (3, 3, 64, 64, 1),
        (8, 1, 80, 32, 4),
        (5, 1, 256, 256, 16),
        (14, 2, 48, 24, 3),
        (1, 1, 6, 2, 1),
    ],
)
def test_rope_write(
    heads: int, kv_heads: int, size: int, turning: int, page: int, normed: str, dtype: torch.dtype
) -> None:
    tokens, pages = 5, 12
    qkv = randn(tokens, heads + 2 * kv_heads, size, dtype=dtype)
    angles = randn(tokens, turning // 2)
    table = torch.cat([angles.cos(), angles.sin()], dim=1)  # rows longer than either half
    cos, sin = table[:, : turning // 2], table[:, turning // 2 :]
    norm = None if normed == "not" else randn(heads + kv_heads, size)
    slots = torch.randperm(pages * page, generator=torch.Generator().manual_seed(0))[:tokens].to(DEVICE)
    pool, expected_pool = (torch.full((2, pages, page, kv_heads, size), 7.0, dtype=dtype, device=DEVICE) for _ in "ab")
    options = slots, norm, 1e-6, normed == "after"
    expected = ops.rope_write(qkv.clone(), heads, cos, sin, KVLayer.of(expected_pool), *options)
    given = qkv.clone()
    got = triton_ops.rope_write(given, heads, cos, sin, KVLayer.of(pool), *options)
    for mine, theirs in zip(got, expected, strict=True):
        close(mine, theirs)
        assert mine.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()
    assert torch.equal(got[2], qkv[:, heads + kv_heads :])
    # The pool holds what was returned, to the bit, and nothing else was touched.
    expected_pool.flatten(1, 2)[:, slots] = torch.stack([got[1], got[2]])
    assert torch.equal(pool, expected_pool)


def test_rope_write_of_padding_that_shares_a_slot() -> None:
    qkv, angles = randn(6, 4, 32), randn(6, 16)
    slots = torch.tensor([9, 0, 4, 0, 0, 0], device=DEVICE)
    pool = torch.zeros(2, 5, 2, 1, 32, device=DEVICE)
    _, k, v = triton_ops.rope_write(qkv, 2, angles.cos(), angles.sin(), KVLayer.of(pool), slots)
    flat = pool.flatten(1, 2)
    assert torch.equal(flat[:, [9, 4]], torch.stack([k[[0, 2]], v[[0, 2]]]))
    assert not flat[:, [1, 2, 3, 5, 6, 7, 8]].any()


def test_rope_write_of_nothing() -> None:
    pool = torch.zeros(2, 1, 1, 1, 16, device=DEVICE)
    slots = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    q, k, v = triton_ops.rope_write(randn(0, 4, 16), 2, randn(0, 8), randn(0, 8), KVLayer.of(pool), slots)
    assert (q.shape, k.shape, v.shape) == ((0, 2, 16), (0, 1, 16), (0, 1, 16))
    assert not pool.any()


def test_apply_sinks_in_place() -> None:
    whole = torch.randn(5, 8, 24, device=DEVICE)
    lse, sinks = torch.randn(5, 6, device=DEVICE) * 9, torch.randn(6, device=DEVICE) * 9
    lse[0, 0] = float("-inf")  # of a token that sees no key
    expected = whole.clone()
    ops.apply_sinks(expected[:, 1:7], lse, sinks)
    assert not expected[:, 1:7].isnan().any()
    triton_ops.apply_sinks(whole[:, 1:7], lse, sinks)
    torch.testing.assert_close(whole, expected)


@pytest.mark.parametrize("size", [8, 1200, 6])
@pytest.mark.parametrize("count", [0, 3, 130])
def test_copy_pages(size: int, count: int) -> None:
    """Pages that are copied to one another, in one launch; more than a launch takes, and pages that are no words."""
    generator = torch.Generator().manual_seed(count)
    pages = torch.randint(0, 256, (4, 200, size), generator=generator, dtype=torch.uint8).to(DEVICE)
    expected, ring = pages.clone(), torch.randperm(200, generator=generator)[:count]
    copies = torch.stack([ring, ring.roll(1)], 1).to(DEVICE)
    triton_ops.copy_pages(pages, copies)
    ops.copy_pages(expected, copies)
    assert torch.equal(pages, expected)


@pytest.mark.parametrize("max_pages", [3, 1500])
def test_page_indices(max_pages: int) -> None:
    generator = torch.Generator().manual_seed(max_pages)
    table = torch.randint(0, 10**6, (6, 1600), generator=generator, dtype=torch.int32).to(DEVICE)
    rows = torch.tensor([4, 0, 4, 5], dtype=torch.int32, device=DEVICE)
    indptr = torch.tensor([0, max_pages, max_pages, max_pages + 2, max_pages + 3], dtype=torch.int32, device=DEVICE)
    out, expected = (torch.full((max_pages + 5,), -1, dtype=torch.int32, device=DEVICE) for _ in "ab")
    triton_ops.page_indices(table, rows, indptr, max_pages, out)
    ops.page_indices(table, rows, indptr, max_pages, expected)
    assert torch.equal(out, expected)
    assert out[-2:].tolist() == [-1, -1]
    triton_ops.page_indices(table, rows[:0], indptr[:1], max_pages, out)
    assert torch.equal(out, expected)
