"""Products with experts: every implementation against a loop over tokens."""

from __future__ import annotations

import pytest
import torch

from branchwise.kernels.experts import Dispatch, ExpertLinear, GroupedLinear, LoopedLinear, MaskedLinear, groups
from branchwise.kernels.linear import PlainLinear

E, K, N, TOP = 5, 32, 48, 3


def make(name: str, weight: torch.Tensor) -> ExpertLinear:
    if name == "grouped":
        return GroupedLinear(weight)
    linears = [PlainLinear(one.contiguous()) for one in weight]
    return LoopedLinear(linears) if name == "looped" else MaskedLinear(linears)


@pytest.mark.parametrize("tokens", [0, 1, 2, 40])
@pytest.mark.parametrize("name", ["grouped", "looped", "masked"])
def test_each_token_is_multiplied_with_its_own_experts(name: str, tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    weight, x = torch.randn(E, N, K, generator=generator), torch.randn(tokens, K, generator=generator)
    # Expert 0 has all tokens and expert 4 none.
    ids = torch.tensor([[0, *(1 + torch.randperm(3, generator=generator)[: TOP - 1]).tolist()] for _ in range(tokens)])
    ids = ids.reshape(tokens, TOP).long()
    weights = torch.rand(tokens, TOP, generator=generator)
    dispatch = Dispatch.of(ids, E)
    assert dispatch.ends.tolist() == [int((ids <= expert).sum()) for expert in range(E)]
    with torch.inference_mode():
        out = dispatch.gather(make(name, weight)(dispatch.scatter(x), dispatch), weights)
    assert out.shape == (tokens, N)
    for t in range(tokens):
        expected = sum(weights[t, k] * (weight[ids[t, k]] @ x[t]) for k in range(TOP))
        torch.testing.assert_close(out[t], expected, rtol=1e-4, atol=1e-4)


def test_a_grouped_product_needs_bfloat16_on_a_gpu_and_aligned_rows() -> None:
    gpu = torch.device("cuda")
    assert groups(torch.bfloat16, gpu, 2048, 768)
    assert not groups(torch.bfloat16, gpu, 2048, 100)
    assert not groups(torch.float16, gpu, 2048, 768)
    assert not groups(torch.bfloat16, torch.device("cpu"), 2048, 768)
