"""Sampling in Triton against torch: on a GPU compiled, elsewhere in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch

from branchwise.kernels import sampling

triton_sampling = pytest.importorskip("branchwise.kernels.triton_sampling", reason="Triton is not installed")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def thresholds(probs: torch.Tensor, top_k: int, top_p: list[float], min_p: float = 0.0) -> list[torch.Tensor]:
    """By sorting everything, and by search."""
    rows, vocab_size = probs.shape
    filters = torch.full((rows,), top_k), torch.tensor(top_p, dtype=torch.float64), torch.full((rows,), min_p)
    some = [probs.to(DEVICE), *(each.to(DEVICE) for each in filters)]
    narrow = top_k if top_k < vocab_size else 1
    return [
        sampling.keep_threshold(*some, vocab_size),
        sampling.keep_threshold(*some, narrow, triton_sampling),
    ]


@pytest.mark.parametrize("vocab_size", [1, 7, 4096, 9000])
@pytest.mark.parametrize("spread", [0.05, 1.0, 6.0])
@pytest.mark.parametrize("top_k", [0, 50])
def test_it_is_what_sorting_finds(vocab_size: int, spread: float, top_k: int) -> None:
    top_p = [0.9, 0.999, 1e-6, 0.5, 1.0, 0.95]
    logits = torch.randn(6, vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * spread
    probs, _ = sampling.unnormalized_probs(logits, torch.full((6,), 0.7))
    expected, got = thresholds(probs, top_k if 0 < top_k < vocab_size else vocab_size, top_p, 0.001)
    assert torch.equal(got, expected)


def test_ties_and_masses_that_are_hit_exactly() -> None:
    """Powers of two add up exactly: 0.5 of four equal values is two of them, and ties are kept together."""
    row = [1.0, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 0.0]
    shares = [1 / 3, 1 / 3 + 1e-9, 2 / 3, 2 / 3 + 1e-9, 0.9999, 1e-9]
    probs = torch.tensor([row] * len(shares))
    expected, got = thresholds(probs, 8, shares)
    assert torch.equal(got, expected)
    assert got[:, 0].tolist() == [1.0, 0.5, 0.5, 0.25, 0.25, 1.0]


@pytest.mark.parametrize("row", [[0.0] * 5, [1.0, 0.0, 0.0, 0.0, 0.0], [1.0] * 5, [1.0, 1e-30, 1e-38, 0.0, 0.3]])
def test_rows_at_the_edge(row: list[float]) -> None:
    expected, got = thresholds(torch.tensor([row] * 3), 5, [0.9, 0.2, 1.0])
    assert torch.equal(got, expected)


def test_no_rows() -> None:
    none = torch.empty((0, 9), device=DEVICE)
    floor = torch.empty((0, 1), device=DEVICE)
    assert triton_sampling.top_p_threshold(none, floor, torch.empty(0, dtype=torch.float64)).shape == (0, 1)


def test_the_mass_of_a_large_vocabulary_does_not_overflow() -> None:
    """2 ** 18 tokens of equal probability: the sum is 2 ** 62 units."""
    probs = torch.ones(1, 2**18)
    floor, top_p = torch.zeros(1, 1), torch.tensor([0.9], dtype=torch.float64)
    got = triton_sampling.top_p_threshold(probs.to(DEVICE), floor.to(DEVICE), top_p.to(DEVICE))
    assert got.item() == 1.0 and math.log2(2**18 * 2**44) < 63


def sampled(logits: torch.Tensor, temperature: list[float], uniform: list[float]) -> list[tuple[list[int], list[bool]]]:
    """Tokens and whether each row is finite, by torch and by the kernels."""
    settings = torch.tensor(temperature), torch.tensor(uniform, dtype=torch.float64)
    some = [logits.to(DEVICE), *(each.to(DEVICE) for each in settings)]
    found = [sampling.sample_logits(*some), triton_sampling.sample_logits(*some)]
    return [(tokens.tolist(), finite.tolist()) for tokens, finite in found]


@pytest.mark.parametrize("vocab_size", [1, 7, 4096, 9000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_samples_what_torch_samples(vocab_size: int, dtype: torch.dtype) -> None:
    rows = 12
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (torch.randn(rows, vocab_size, generator=generator) * 3).to(dtype)
    logits[:, 0] = -torch.inf if vocab_size > 1 else 1.0
    temperature = [1.0, 0.7, 2.0, 1e-6] * (rows // 4)
    uniform = torch.rand(rows, generator=generator, dtype=torch.float64).tolist()
    uniform[0], uniform[1] = 0.0, 1 - 2.0**-53
    expected, got = sampled(logits, temperature, uniform)
    assert got == expected


def test_rows_that_are_not_finite() -> None:
    logits = torch.zeros(6, 5000)
    logits[0, 4999], logits[1, 17], logits[2] = torch.nan, torch.inf, -torch.inf
    logits[3, :4999] = -torch.inf  # one token is possible
    logits[4, 4097:] = -torch.inf  # and here the last block has none
    expected, got = sampled(logits, [1.0] * 6, [0.5, 0.5, 0.5, 0.5, 1 - 2.0**-53, 0.5])
    assert got == expected
    assert got == ([4999, 4999, 4999, 4999, 4096, 2500], [False, False, True, True, True, True])


def test_a_row_does_not_depend_on_the_others() -> None:
    logits = torch.randn(5, 5000, generator=torch.Generator().manual_seed(1))
    temperature, uniform = [0.5, 1.0, 1.5, 2.0, 0.9], [0.1, 0.3, 0.5, 0.7, 0.9]
    together = sampled(logits, temperature, uniform)[1][0]
    alone = [sampled(logits[i : i + 1], temperature[i : i + 1], uniform[i : i + 1])[1][0][0] for i in range(5)]
    assert together == alone


def test_no_rows_to_sample() -> None:
    tokens, finite = triton_sampling.sample_logits(torch.empty(0, 9), torch.empty(0), torch.empty(0))
    assert tokens.shape == finite.shape == (0,)
