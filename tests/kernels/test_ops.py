"""The elementwise operations against float64 definitions."""

from __future__ import annotations

import math

import pytest
import torch

from branchwise.kernels import ops
from branchwise.kernels.kv_pool import KVLayer
from branchwise.kernels.linear import PlainLinear, linear_bytes, packs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 3, 16).to(dtype), torch.randn(3, 16)
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    got = ops.rms_norm(x, weight, 1e-5)
    assert got.dtype == dtype
    torch.testing.assert_close(got, exact.to(dtype))


def test_add_rms_norm_adds_in_place() -> None:
    torch.manual_seed(0)
    x, residual, weight = torch.randn(4, 8), torch.randn(4, 8), torch.randn(8)
    total = x + residual
    got = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, total)
    assert torch.equal(got, ops.rms_norm(total, weight, 1e-5))


@pytest.mark.parametrize("turning", [16, 8])
def test_rope_rotates_pairs_and_keeps_the_rest(turning: int) -> None:
    torch.manual_seed(0)
    x, angles = torch.randn(3, 2, 16), torch.rand(3, turning // 2) * 6
    got = ops.rope(x, angles.cos(), angles.sin())
    for token in range(3):
        for channel in range(turning // 2):
            c, s = math.cos(angles[token, channel]), math.sin(angles[token, channel])
            a, b = x[token, :, channel], x[token, :, channel + turning // 2]
            torch.testing.assert_close(got[token, :, channel], a * c - b * s)
            torch.testing.assert_close(got[token, :, channel + turning // 2], b * c + a * s)
    assert torch.equal(got[..., turning:], x[..., turning:])


def test_gated_activations() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 10)
    gate, up = x[:, :5].double(), x[:, 5:].double()
    torch.testing.assert_close(ops.gate_mul(x, "silu"), (gate * torch.sigmoid(gate) * up).float())
    exact = gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2))) * up
    torch.testing.assert_close(ops.gate_mul(x, "gelu"), exact.float())
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    torch.testing.assert_close(ops.gate_mul(x, "gelu_tanh"), (gate * 0.5 * (1 + torch.tanh(inner)) * up).float())


@pytest.mark.parametrize("normed", ["not", "before", "after"])
def test_rope_write_is_its_parts_and_touches_its_slots_alone(normed: str) -> None:
    torch.manual_seed(0)
    tokens, heads, kv_heads, dim = 3, 4, 2, 8
    qkv, pool = torch.randn(tokens, heads + 2 * kv_heads, dim), torch.randn(2, 3, 4, kv_heads, dim)
    cos, sin = torch.randn(tokens, 2, dim // 2).unbind(1)
    norm = None if normed == "not" else torch.randn(heads + kv_heads, dim)
    q, k, v = (x.clone() for x in qkv.split([heads, kv_heads, kv_heads], dim=1))
    if norm is not None and normed == "before":
        q, k = ops.rms_norm(q, norm[:heads], 1e-5), ops.rms_norm(k, norm[heads:], 1e-5)
    q, k = ops.rope(q, cos, sin), ops.rope(k, cos, sin)
    if norm is not None and normed == "after":
        q, k = ops.rms_norm(q, norm[:heads], 1e-5), ops.rms_norm(k, norm[heads:], 1e-5)
    expected = pool.flatten(1, 2).clone()
    slots = torch.tensor([11, 2, 5])
    expected[0, slots], expected[1, slots] = k, v
    got = ops.rope_write(qkv, heads, cos, sin, KVLayer.of(pool), slots, norm, 1e-5, normed == "after")
    for mine, theirs in zip(got, (q, k, v), strict=True):
        torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(pool.flatten(1, 2), expected)


@pytest.mark.parametrize("bytes_in_flight", [1, 2**26], ids=["row by row", "at once"])
def test_copies_read_every_source_first(bytes_in_flight: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "COPY_BYTES", bytes_in_flight)
    pages = torch.arange(2 * 2 * 4 * 6, dtype=torch.uint8).view(4, 4, 6)
    before = pages.clone()
    # A ring: copying pair by pair would be wrong in any order.
    ops.copy_pages(pages, torch.tensor([[0, 1], [1, 2], [2, 0]]))
    assert torch.equal(pages[:, [1, 2, 0]], before[:, [0, 1, 2]])
    assert torch.equal(pages[:, 3], before[:, 3])


def test_page_indices_lays_rows_end_to_end() -> None:
    table = torch.arange(20, dtype=torch.int32).view(4, 5)
    rows, indptr = torch.tensor([2, 0, 3], dtype=torch.int32), torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    out = torch.full((10,), -1, dtype=torch.int32)
    ops.page_indices(table, rows, indptr, 5, out)
    assert out.tolist() == [10, 11, 12, 15, 16, 17, 18, 19, -1, -1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 7, 600])
def test_linear_equals_torch_also_where_it_is_packed(
    dtype: torch.dtype, rows: int, copied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # the copy then serves 7 rows too
    torch.manual_seed(0)
    weight, bias, x = torch.randn(30, 24).to(dtype), torch.randn(30).to(dtype), torch.randn(rows, 48).to(dtype)[:, :24]
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]
    with torch.inference_mode():
        for b in (None, bias):
            exact = x.double() @ weight.double().T + (0 if b is None else b.double())
            torch.testing.assert_close(
                PlainLinear(weight, b, copied=copied)(x), exact.to(dtype), atol=tolerance, rtol=tolerance
            )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_linear_layer_converts_a_narrower_weight(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(48, 64).to(dtype), torch.randn(5, 64)
    layer = PlainLinear(weight, dtype=torch.float32)
    torch.testing.assert_close(layer(x), x @ weight.float().T)
    assert layer(x).dtype == torch.float32


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_layer_takes_the_bytes_of_the_plan(dtype: torch.dtype, copied: bool) -> None:
    layer = PlainLinear(torch.randn(256, 128).to(dtype), copied=copied)
    layer.lay_out()
    weight = layer._weight
    stored = torch.ops.mkldnn._nbytes(weight) if weight.is_mkldnn else weight.nbytes
    stored += 0 if layer._copy is None else layer._copy.nbytes
    assert stored == linear_bytes(weight.device, (256, 128), dtype, int8=False, copied=copied)


def test_float32_is_packed_on_a_cpu() -> None:
    """If torch dropped the operation, decoding would silently become two to three times slower."""
    assert packs(torch.device("cpu"), torch.float32) == torch.backends.mkldnn.is_available()
