"""Mixtures of experts: every implementation against a loop over tokens; on a GPU compiled, else in the interpreter."""

from __future__ import annotations

import pytest
import torch

from branchwise.kernels import ops
from branchwise.kernels.experts import Experts, ExpertWeight, LoopedExperts
from branchwise.kernels.linear import PlainLinear
from branchwise.kernels.ops import Activation, Routing
from branchwise.kernels.quantize import dequantize_mxfp4, dequantize_weight, quantize_weight

pytest.importorskip("triton", reason="Triton is not installed")

from branchwise.kernels import triton_experts, triton_ops
from branchwise.kernels.triton_experts import Tile, TritonExperts, interleave_mxfp4
from branchwise.kernels.triton_routing import Alignment

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
E, HIDDEN, INNER, TOP = 5, 160, 96, 3


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def weight(format: str, outputs: int, inputs: int, bias: bool) -> tuple[ExpertWeight, torch.Tensor]:
    """Of all experts, and what it is dequantized."""
    generator = torch.Generator().manual_seed(outputs)
    plain, biases = randn(E * outputs, inputs, seed=outputs) / inputs**0.5, randn(E * outputs) if bias else None
    if format == "plain":
        return ExpertWeight(plain, bias=biases), plain
    if format == "mxfp4":
        values = torch.randint(256, (E * outputs, inputs // 2), generator=generator).to(DEVICE, torch.uint8)
        scales = torch.randint(121, 126, (E * outputs, inputs // 32), generator=generator).to(DEVICE, torch.uint8)
        return ExpertWeight(values, scales, biases), dequantize_mxfp4(values, scales, torch.float32)
    values, scale = quantize_weight(plain, torch.float8_e4m3fn)
    if format == "block":
        scale = (0.5 + torch.rand(E * outputs // 128, inputs // 128, generator=generator).to(DEVICE)) / 2000
    return ExpertWeight(values, scale, biases), dequantize_weight(values, scale, torch.float32)


def routed(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and experts of tokens: expert 0 has all of them and expert 4 none."""
    generator = torch.Generator().manual_seed(tokens)
    others = [(1 + torch.randperm(3, generator=generator)[: TOP - 1]).tolist() for _ in range(tokens)]
    ids = torch.tensor([[0, *some] for some in others], dtype=torch.int32).reshape(tokens, TOP)
    return torch.rand(tokens, TOP, generator=generator).to(DEVICE), ids.to(DEVICE)


def check(
    experts: Experts,
    plain: list[torch.Tensor],
    biases: list[torch.Tensor | None],
    tokens: int,
    activation: Activation,
) -> None:
    gate_up, down = (each.unflatten(0, (E, -1)) for each in plain)
    x, (weights, ids) = randn(tokens, gate_up.shape[2]), routed(tokens)
    with torch.inference_mode():
        out = experts(x, weights, ids)
    assert out.shape == (tokens, down.shape[1]) and out.dtype == x.dtype
    bias = [0.0 if each is None else each.unflatten(0, (E, -1)) for each in biases]
    for t in range(tokens):
        expected = torch.zeros_like(out[t])
        for weight, expert in zip(weights[t], ids[t].tolist(), strict=True):
            of = [each if isinstance(each, float) else each[expert] for each in bias]
            inner = ops.gate_mul((gate_up[expert] @ x[t] + of[0])[None], activation)[0]
            expected += weight * (down[expert] @ inner + of[1])
        torch.testing.assert_close(out[t], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [0, 1, 40])
def test_looped_experts(tokens: int) -> None:
    (gate_up, plain_up), (down, plain_down) = (
        weight("plain", 2 * INNER, HIDDEN, False),
        weight("plain", HIDDEN, INNER, False),
    )
    linears = ([PlainLinear(one.values) for one in each.chunk(E)] for each in (gate_up, down))
    check(LoopedExperts(*linears, "silu"), [plain_up, plain_down], [None, None], tokens, "silu")


@pytest.mark.parametrize("tokens", [0, 1, 2, 40])
@pytest.mark.parametrize(
    ("format", "hidden", "inner", "bias", "activation"),
    [
        ("plain", HIDDEN, INNER, False, "silu"),
        ("plain", 72, 40, True, "gelu_tanh"),
        ("channel", HIDDEN, INNER, False, "silu"),
        ("block", 128, 128, False, "silu"),
        ("mxfp4", HIDDEN, INNER, True, "swigluoai"),
    ],
)
def test_fused_experts(
    format: str,
    hidden: int,
    inner: int,
    bias: bool,
    activation: Activation,
    tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # One block of tokens, and several.
    for rows, many in ((16, 2048), (64, 30)):
        monkeypatch.setattr(triton_experts, "pick_tile", lambda *_, rows=rows: Tile(64, rows, 64, 4, 2))
        monkeypatch.setattr(triton_experts, "MANY_TOKENS", many)
        (gate_up, plain_up), (down, plain_down) = (
            weight(format, 2 * inner, hidden, bias),
            weight(format, hidden, inner, bias),
        )
        experts = TritonExperts(gate_up, down, E, activation)
        check(experts, [plain_up, plain_down], [gate_up.bias, down.bias], tokens, activation)


def test_interleaved_mxfp4_has_neighbours_in_the_low_and_the_high_bits() -> None:
    codes = torch.randint(16, (3, 96), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = interleave_mxfp4(codes[:, 0::2] | (codes[:, 1::2] << 4)).unflatten(1, (-1, 16))
    blocks = codes.unflatten(1, (-1, 32))
    assert torch.equal(found & 0xF, blocks[..., :16]) and torch.equal(found >> 4, blocks[..., 16:])


@pytest.mark.parametrize(("experts", "top_k", "tokens", "rows"), [(5, 3, 40, 16), (128, 8, 1, 16), (33, 4, 700, 64)])
def test_alignment(experts: int, top_k: int, tokens: int, rows: int) -> None:
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(0))
    scores[:, 2] = -1  # never chosen
    ids = scores.topk(top_k).indices.int().to(DEVICE)
    found = Alignment(ids, experts, rows)
    order = ids.flatten().argsort(stable=True)
    assert torch.equal(found.order.long(), order) and torch.equal(found.place.long(), order.argsort())
    counts = torch.bincount(ids.flatten(), minlength=experts)
    assert torch.equal(found.ends.long(), counts.cumsum(0))
    blocks = [(e, at) for e, (n, end) in enumerate(zip(counts.tolist(), found.ends.tolist(), strict=True))
              for at in range(end - n, end, rows)]  # fmt: skip
    assert found.blocks[: len(blocks)].tolist() == [list(block) for block in blocks]
    assert bool((found.blocks[len(blocks) :, 0] == -1).all())


@pytest.mark.parametrize(
    "routing",
    [
        Routing(8),
        Routing(4, "softmax", normalize=True),
        Routing(6, "sigmoid", normalize=True, scale=2.5),
        Routing(2, "sparsemixer", jitter=0.1),
        Routing(4, "sigmoid", groups=4, top_groups=2),
    ],
    ids=lambda routing: f"{routing.scores}-{routing.top_k}",
)
@pytest.mark.parametrize(("tokens", "experts", "biased"), [(7, 128, False), (3, 20, True), (0, 8, False)])
def test_route(routing: Routing, tokens: int, experts: int, biased: bool) -> None:
    logits, bias = randn(tokens, experts) * 3, randn(experts) if biased else None
    weights, ids = triton_ops.route(logits, bias, routing)
    expected, chosen = ops.route(logits, bias, routing)
    assert ids.dtype == chosen.dtype == torch.int32
    assert torch.equal(ids, chosen)
    torch.testing.assert_close(weights, expected)
