"""8-bit weights and activations: the specification, the Triton kernels against it, and the products."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from branchwise.kernels import linear as linear_module
from branchwise.kernels import ops
from branchwise.kernels.base import Ops
from branchwise.kernels.fp8_linear import Fp8Linear
from branchwise.kernels.linear import Int8Linear
from branchwise.kernels.processor import multiplies_int8
from branchwise.kernels.quantize import (
    ZERO_POINT,
    QuantizedRows,
    Quantizer,
    dequantize_weight,
    quantize,
    quantize_weight,
)

pytest.importorskip("triton", reason="Triton is not installed")

from branchwise.kernels import triton_fp8, triton_ops
from branchwise.kernels.triton_fp8 import Tile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
E4M3 = torch.float8_e4m3fn
DYNAMIC, BLOCKS = Quantizer(E4M3), Quantizer(E4M3, group=128)
INTEGERS = Quantizer(torch.int8), Quantizer(torch.uint8)
STATIC = Quantizer(E4M3, scale=torch.tensor([0.004], device=DEVICE))


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def same(got: QuantizedRows, expected: QuantizedRows) -> None:
    assert got.values.dtype == expected.values.dtype
    torch.testing.assert_close(got.scales, expected.scales, rtol=1e-6, atol=0.0)
    values, codes = got.values.float(), expected.values.float()
    if DEVICE.type == "cpu":  # Triton's interpreter does not carry into the exponent: 15.9 becomes 8 instead of 16
        values = torch.where(codes.abs().frexp().mantissa == 0.5, codes, values)
    assert (values != codes).sum() <= values.numel() // 100  # the interpreter rounds ties to another side


def dequantized(rows: QuantizedRows) -> torch.Tensor:
    values = rows.values.float() - (ZERO_POINT if rows.values.dtype == torch.uint8 else 0)
    groups = values.unflatten(-1, (rows.scales.shape[1], -1))
    return (groups * rows.scales[..., None]).flatten(-2)


@pytest.mark.parametrize("quantizer", [DYNAMIC, BLOCKS, *INTEGERS], ids=["row", "group", "int8", "uint8"])
def test_values_are_within_half_a_step_of_the_input(quantizer: Quantizer) -> None:
    x = randn(5, 256) * torch.tensor([1e-3, 1.0, 300.0, 1e5, 0.0], device=DEVICE)[:, None]
    rows = quantize(x, quantizer)
    assert rows.values.dtype == quantizer.dtype and rows.scales.shape == (5, 2 if quantizer.group else 1)
    error = (dequantized(rows) - x).abs()
    step = rows.scales.repeat_interleave(256 // rows.scales.shape[1], 1)
    assert (error <= (step * 0.501 if quantizer in INTEGERS else x.abs() / 16 + step * 2**-10)).all()
    assert not dequantized(rows)[4].any()


def test_values_beyond_a_static_scale_saturate() -> None:
    rows = quantize(torch.tensor([[1.0, -50.0]], device=DEVICE), STATIC)
    assert rows.values.float().tolist() == [[256.0, -448.0]] and rows.scales.tolist() == [[pytest.approx(0.004)]]


@pytest.mark.parametrize(
    "quantizer", [DYNAMIC, BLOCKS, STATIC, *INTEGERS], ids=["row", "group", "static", "int8", "uint8"]
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_stay_so(value: float, quantizer: Quantizer) -> None:
    """A request whose logits are NaN ends with an error: quantization must not hide them."""
    if quantizer is STATIC and value == torch.inf:
        pytest.skip("saturates, as any value beyond a static scale does")
    x = randn(2, 256)
    x[1, 3] = value
    on_device = DEVICE.type == "cuda" and quantizer.dtype == E4M3  # Triton's interpreter rounds NaN to a number
    for module in (ops, triton_ops) if on_device else (ops,):
        finite = dequantized(module.quantize(x, quantizer)).isfinite()
        assert finite[0].all() and not finite[1, 3]


def test_a_weight_has_a_scale_for_each_output() -> None:
    weight = randn(6, 32) * torch.tensor([1.0, 2.0, 4.0, 8.0, 0.1, 100.0], device=DEVICE)[:, None]
    values, scale = quantize_weight(weight, E4M3)
    assert scale.shape == (6, 1)
    torch.testing.assert_close(dequantize_weight(values, scale, torch.float32), weight, rtol=1 / 16, atol=1e-2)


def test_block_scales_cover_the_edges_of_a_weight() -> None:
    weight, scale = torch.ones(200, 256, device=DEVICE).to(E4M3), torch.tensor([[1.0, 2.0], [3.0, 4.0]], device=DEVICE)
    full = dequantize_weight(weight, scale, torch.bfloat16)
    assert full[0, 0] == 1 and full[127, 128] == 2 and full[128, 127] == 3 and full[199, 255] == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantizer", [DYNAMIC, BLOCKS, STATIC], ids=["row", "group", "static"])
@pytest.mark.parametrize("size", [128, 640, 2304])
def test_kernels_quantize_as_specified(size: int, quantizer: Quantizer, dtype: torch.dtype) -> None:
    x, residual, weight = randn(3, size, dtype=dtype), randn(3, size, dtype=dtype, seed=1), randn(size)
    x[1] = 0
    same(triton_ops.quantize(x, quantizer), ops.quantize(x, quantizer))
    strided = randn(3, 2 * size, dtype=dtype)[:, :size]
    same(triton_ops.quantize(strided, quantizer), ops.quantize(strided, quantizer))
    summed = residual.clone()
    normed = triton_ops.add_rms_norm(x, summed, weight, 1e-5)
    same(triton_ops.add_rms_norm_quantized(x, residual, weight, 1e-5, quantizer), ops.quantize(normed, quantizer))
    assert torch.equal(residual, summed)
    gate_up = randn(3, 2 * size, dtype=dtype)
    for activation in ("silu", "gelu"):
        product = triton_ops.gate_mul(gate_up, activation)
        same(triton_ops.gate_mul_quantized(gate_up, activation, quantizer), ops.quantize(product, quantizer))
    assert triton_ops.quantize(x[:0], quantizer).scales.shape[0] == 0


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", ["channel", "block"])
@pytest.mark.parametrize(
    "tile", [Tile(64, 16, 128, 1, 4, 3), Tile(64, 32, 128, 2, 4, 3), Tile(128, 16, 256, 3, 4, 2)], ids=str
)
@pytest.mark.parametrize(("tokens", "outputs", "inputs"), [(1, 64, 128), (17, 208, 384), (40, 130, 640)])
def test_the_kernel_multiplies_as_specified(
    tokens: int, outputs: int, inputs: int, tile: Tile, form: str, bias: bool
) -> None:
    if form == "block" and tile.inputs != 128:
        pytest.skip("an iteration has one scale")
    x, weight, b = randn(tokens, inputs), randn(outputs, inputs), randn(outputs) if bias else None
    values, scale = quantize_weight(weight, E4M3)
    if form == "block":
        scale = randn(-(-outputs // 128), inputs // 128).abs()
    rows = quantize(x, BLOCKS if form == "block" else DYNAMIC)
    if tokens > 30:
        rows = QuantizedRows(rows.values, rows.scales.contiguous())  # as copies of rows have them
    expected = ops.fp8_linear(rows, values, scale, b, torch.float32)
    got = triton_fp8.fp8_linear_in_tiles(rows, values, scale, b, torch.float32, tile)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def scaled_mm(a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, **kwargs: Any) -> Any:
    """`torch._scaled_mm` with scales of 1 × 128 and of 128 × 128, as it is on a Hopper GPU."""
    (tokens, inputs), groups = a.shape, -(-a.shape[1] // 128)
    assert tokens % 4 == 0 and a.is_contiguous() and b.stride() == (1, inputs)
    assert scale_a.shape == (tokens, groups) and scale_a.stride() == (1, tokens)
    assert scale_b.shape == (groups, -(-b.shape[1] // 128)) and scale_b.stride() == (1, groups)
    widened = scale_a.repeat_interleave(128, 1)[:, :inputs]
    product = (a.float() * widened) @ dequantize_weight(b.t(), scale_b.t(), torch.float32).t()
    return product.to(kwargs["out_dtype"])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("tokens", [8, 16, 18, 39])
def test_scales_of_blocks_are_multiplied_by_torch_where_it_can(
    tokens: int, contiguous: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (values, _), scale = quantize_weight(randn(208, 384), E4M3), randn(2, 3).abs()
    b = randn(208, dtype=torch.bfloat16) if bias else None
    rows = triton_ops.quantize(randn(tokens, 384), BLOCKS)
    if contiguous:
        rows = QuantizedRows(rows.values, rows.scales.contiguous())
    calls: list[int] = []

    def counted(a: torch.Tensor, *rest: torch.Tensor, **kwargs: Any) -> Any:
        calls.append(len(a))
        return scaled_mm(a, *rest, **kwargs)

    monkeypatch.setattr(triton_fp8, "_in_torch", {})
    monkeypatch.setattr(torch, "_scaled_mm", counted)
    expected = ops.fp8_linear(rows, values, scale, b, torch.float32)
    for _ in range(2):
        got = triton_fp8.fp8_linear(rows, values, scale, b, torch.bfloat16)
        assert got.shape == (tokens, 208) and got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), expected, rtol=0.01, atol=0.01 * float(expected.abs().max()))
    assert calls == ([] if tokens < 16 else [triton_fp8.TRIAL, *2 * [-(-tokens // 4) * 4]])


@pytest.mark.parametrize("refuses", [True, False], ids=["refused", "wrong"])
def test_scales_of_blocks_are_multiplied_by_the_kernel_where_torch_cannot(
    refuses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (values, _), scale = quantize_weight(randn(208, 384), E4M3), randn(2, 3).abs()
    rows, calls = triton_ops.quantize(randn(20, 384), BLOCKS), []

    def other(*given: torch.Tensor, **kwargs: Any) -> Any:
        calls.append(len(given[0]))
        if refuses:
            raise RuntimeError("not supported")
        return 1.02 * scaled_mm(*given, **kwargs)

    monkeypatch.setattr(triton_fp8, "_in_torch", {})
    monkeypatch.setattr(torch, "_scaled_mm", other)
    expected = ops.fp8_linear(rows, values, scale, None, torch.float32)
    for _ in range(2):
        got = triton_fp8.fp8_linear(rows, values, scale, None, torch.bfloat16)
        torch.testing.assert_close(got.float(), expected, rtol=0.01, atol=0.01 * float(expected.abs().max()))
    assert calls == [triton_fp8.TRIAL]


@pytest.mark.parametrize("module", [ops, triton_ops], ids=["torch", "triton"])
@pytest.mark.parametrize("tokens", [0, 1, 300])
def test_fp8_linear_quantizes_what_comes_in_the_models_dtype(tokens: int, module: Ops) -> None:
    weight = randn(48, 64)
    x, bias = randn(tokens, 64, dtype=torch.bfloat16), randn(48, dtype=torch.bfloat16)
    values, scale = quantize_weight(weight, E4M3)
    linear = Fp8Linear(values, scale, bias, DYNAMIC, torch.bfloat16, module)
    rows = module.quantize(x, DYNAMIC)
    expected = ops.fp8_linear(rows, values, scale, bias, torch.float32)
    assert linear(x).dtype == torch.bfloat16 and torch.equal(linear(x), linear(rows))
    torch.testing.assert_close(linear(x).float(), expected, rtol=0.01, atol=0.05)
    if module is ops:
        exact = x.float() @ weight.T + bias.float()
        assert float((expected - exact).norm()) <= 0.05 * float(exact.norm())


@pytest.mark.skipif(not multiplies_int8(), reason="the processor has no VNNI")
@pytest.mark.parametrize("tokens", [0, 1, 40])
@pytest.mark.parametrize("row_copy_bytes", [0, linear_module.COPY_BYTES], ids=["packed", "with a row copy"])
def test_int8_linear(tokens: int, row_copy_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "COPY_BYTES", row_copy_bytes)
    weight, x, bias = torch.randn(48, 64), torch.randn(tokens, 64), torch.randn(48)
    linear = Int8Linear(weight, bias)
    got = linear(x)
    torch.testing.assert_close(got, x @ weight.T + bias, rtol=0.02, atol=0.35)
    assert all(torch.equal(linear(x[i : i + 1]), got[i : i + 1]) for i in range(tokens))  # whatever the step holds


@pytest.mark.skipif(not multiplies_int8(), reason="the processor has no VNNI")
@pytest.mark.parametrize("row_copy_bytes", [0, linear_module.COPY_BYTES], ids=["packed", "with a row copy"])
def test_an_int8_layer_takes_the_bytes_of_the_plan(row_copy_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "COPY_BYTES", row_copy_bytes)
    layer = Int8Linear(torch.randn(256, 128))
    layer.lay_out()
    row_copy = 0 if layer._row_copy is None else layer._row_copy.nbytes
    stored = torch.ops.mkldnn._nbytes(layer._packed) + row_copy + layer._scale.nbytes + layer._sums.nbytes
    assert stored == linear_module.linear_bytes(torch.device("cpu"), (256, 128), torch.float32, int8=True)
