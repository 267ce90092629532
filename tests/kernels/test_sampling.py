"""The sampling kernels against plain per-row references and against transformers' own logits processors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch

from branchwise.kernels import sampling

INF = float("inf")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def warpers() -> ModuleType:
    from transformers.generation import logits_process

    return logits_process


def keep(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    window: int | None = None,
) -> torch.Tensor:
    """The surviving tokens [S, V] under the same settings in every row."""
    rows, vocab_size = logits.shape
    probs, _ = sampling.unnormalized_probs(logits, torch.full((rows,), temperature))
    ks = np.full(rows, top_k if 0 < top_k < vocab_size else vocab_size)
    ps = np.full(rows, top_p)
    if window is None:
        window = sampling.window_for(ks, ps, vocab_size, sampling.TOP_WINDOW)
    threshold = sampling.keep_threshold(
        probs, torch.from_numpy(ks), torch.from_numpy(ps), torch.full((rows,), min_p), window
    )
    return probs >= threshold


@pytest.mark.parametrize("spread", [0.05, 1.0, 6.0])
@pytest.mark.parametrize("vocab_size", [7, 1000])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        (1, 1.0, 0.0),
        (5, 1.0, 0.0),
        (400, 1.0, 0.0),
        (5000, 1.0, 0.0),
        (0, 0.9, 0.0),
        (0, 0.999, 0.0),
        (0, 1e-6, 0.0),
        (0, 1.0, 0.1),
        (0, 1.0, 1.0),
        (50, 0.8, 0.0),
        (50, 0.8, 0.05),
        (0, 0.7, 0.2),
    ],
)
def test_survivors_are_those_of_transformers(
    warpers: ModuleType, spread: float, vocab_size: int, top_k: int, top_p: float, min_p: float
) -> None:
    logits = torch.randn(6, vocab_size, generator=torch.Generator().manual_seed(vocab_size)) * spread
    temperature = 0.7
    scores = warpers.TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        scores = warpers.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1.0:
        scores = warpers.TopPLogitsWarper(top_p)(None, scores)
    if min_p > 0.0:
        scores = warpers.MinPLogitsWarper(min_p)(None, scores)
    expected = torch.isfinite(scores)
    assert torch.equal(keep(logits, temperature, top_k, top_p, min_p), expected)


def test_threshold_does_not_depend_on_the_window() -> None:
    logits = torch.randn(8, 900, generator=torch.Generator().manual_seed(1))
    whole = keep(logits, top_p=0.95, window=900)
    assert whole.sum(dim=-1).min() > 128  # so that small windows have to be widened
    for window in (1, 2, 128, 500):
        assert torch.equal(keep(logits, top_p=0.95, window=window), whole)


def test_window_for_is_what_the_rows_need() -> None:
    def window(top_k: list[int], top_p: list[float], top_p_window: int = sampling.TOP_WINDOW) -> int:
        return sampling.window_for(np.array(top_k), np.array(top_p), 1000, top_p_window)

    assert window([5, 1000], [1.0, 1.0]) == 5
    assert window([5, 1000], [1.0, 0.9]) == sampling.TOP_WINDOW
    assert window([5, 1000], [1.0, 0.9], 1000) == 1000
    assert window([5, 40], [0.5, 0.9], 1000) == 40
    assert window([5, 1000], [1.0, 0.9], 1) == 5
    assert window([1000], [1.0]) == 1


def test_ties_at_the_edge_are_kept_together() -> None:
    logits = torch.tensor([[1.0, 3.0, 1.0, 3.0, 1.0, 0.0]])
    assert keep(logits, top_k=3).tolist() == [[True, True, True, True, True, False]]
    assert keep(logits, top_k=2).tolist() == [[False, True, False, True, False, False]]
    assert keep(logits, top_p=0.01).tolist() == [[False, True, False, True, False, False]]


def test_one_finite_logit_is_always_sampled() -> None:
    logits = torch.full((3, 300), -INF)
    logits[:, 137] = 2.5
    probs, _ = sampling.unnormalized_probs(logits, torch.full((3,), 0.3))
    for u in (0.0, 0.5, 1.0 - 2**-53):
        assert sampling.sample(probs, torch.full((3,), u, dtype=torch.float64)).tolist() == [137] * 3
    assert keep(logits, top_p=0.5).nonzero().tolist() == [[i, 137] for i in range(3)]


@pytest.mark.parametrize("row", [[-INF, -INF, -INF], [math.nan, math.nan, math.nan], [INF, 0.0, INF], [0.0]])
def test_rows_without_a_distribution_still_yield_a_token_of_the_vocabulary(row: list[float]) -> None:
    logits = torch.tensor([row])
    probs, finite = sampling.unnormalized_probs(logits, torch.ones(1))
    assert bool(finite) == bool(sampling.is_finite(logits, sampling.greedy(logits))) == (row[0] <= 0.0)
    assert bool(probs.any()) == (row == [0.0])
    assert torch.isfinite(probs).all()
    for u in (0.0, 0.999):
        assert 0 <= int(sampling.sample(probs, torch.tensor([u], dtype=torch.float64))) < len(row)


def test_a_tiny_temperature_is_greedy_and_finite() -> None:
    logits = torch.tensor([[1e30, -1e30, 9.9e29], [5.0, 5.001, 4.0]])
    probs, _ = sampling.unnormalized_probs(logits, torch.full((2,), 1e-6))
    assert probs.tolist() == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]


@pytest.mark.parametrize("vocab_size", [1, 7, 16, 128, 129, 1000, 4096])
def test_greedy_is_the_first_of_equals(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randint(-3, 4, (40, vocab_size), generator=generator).float()
    logits[:20] = torch.randn(20, vocab_size, generator=generator)
    logits[20] = -INF
    logits[21, vocab_size // 2] = INF
    for each in (logits, logits.bfloat16()):
        assert sampling.greedy(each).tolist() == [row.index(max(row)) for row in each.tolist()]
    logits[5, vocab_size // 3] = torch.nan
    assert sampling.greedy(logits)[5] == vocab_size // 3  # so that `is_finite` finds it


@pytest.mark.parametrize("vocab_size", [1, 2, 127, 128, 129, 1000])
def test_sampling_is_inverse_cdf_in_vocabulary_order(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    probs = torch.rand(64, vocab_size, generator=generator)
    probs[torch.rand(64, vocab_size, generator=generator) < 0.7] = 0.0
    probs[:, vocab_size // 2] = 0.5
    uniform = torch.rand(64, generator=generator, dtype=torch.float64)
    uniform[:2] = torch.tensor([0.0, 1.0 - 2**-53])
    drawn = sampling.sample(probs, uniform).numpy()
    cdf = np.cumsum(probs.double().numpy(), axis=1)
    for row in range(64):
        target = min(float(uniform[row]) * cdf[row, -1], np.nextafter(cdf[row, -1], 0))
        expected = int(np.searchsorted(cdf[row], target, side="right"))
        assert drawn[row] == expected or abs(cdf[row, min(expected, drawn[row])] - target) < 1e-12
        assert probs[row, drawn[row]] > 0


@pytest.mark.parametrize("filtered", [False, True])
def test_frequencies_follow_the_distribution(filtered: bool) -> None:
    """Chi-square over 40,000 positions of one seed; five standard deviations, and the seed is fixed."""
    count, vocab_size = 40_000, 300
    logits = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(3)) * 1.5
    probs, _ = sampling.unnormalized_probs(logits, torch.full((1,), 1.3))
    if filtered:
        probs = torch.where(keep(logits, 1.3, top_k=60, top_p=0.9), probs, 0.0)
    uniform = sampling.uniforms(np.full(count, 11, np.uint64), np.arange(count))
    drawn = sampling.sample(probs.expand(count, -1).contiguous(), torch.from_numpy(uniform))
    observed = np.bincount(drawn.numpy(), minlength=vocab_size)
    expected = (probs[0].double() / probs.double().sum()).numpy() * count
    assert observed[expected == 0].sum() == 0
    big = expected > 5
    chi2 = float(((observed[big] - expected[big]) ** 2 / expected[big]).sum())
    freedom = int(big.sum()) - 1
    assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom)


def test_uniforms_are_uniform_and_independent() -> None:
    def streams() -> Iterator[np.ndarray]:
        n = 20_000
        yield sampling.uniforms(np.full(n, 7, np.uint64), np.arange(n))  # positions of one seed
        yield sampling.uniforms(np.arange(n, dtype=np.uint64), np.full(n, 7))  # neighbouring seeds (n > 1)
        yield sampling.uniforms(np.arange(n, dtype=np.uint64), np.arange(n))  # both: no diagonal pattern
        yield sampling.uniforms(np.arange(n, dtype=np.uint64), n - np.arange(n))

    for u in streams():
        assert u.min() >= 0.0 and u.max() < 1.0
        assert len(np.unique(u)) == len(u)
        counts = np.bincount((u * 100).astype(int), minlength=100)
        chi2 = ((counts - len(u) / 100) ** 2 / (len(u) / 100)).sum()
        assert abs(chi2 - 99) < 5 * math.sqrt(2 * 99)
        assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 5 / math.sqrt(len(u))


def test_uniforms_take_the_whole_range_of_seeds() -> None:
    u = sampling.uniforms(np.array([0, 2**63 - 1, 2**64 - 1], np.uint64), np.array([0, 2**40, 0]))
    assert len(set(u.tolist())) == 3
    assert sampling.uniforms(np.array([0], np.uint64), np.array([0]))[0] > 0.0


def test_repetition_penalty_is_that_of_transformers(warpers: ModuleType) -> None:
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(5)) * 4
    history = torch.tensor([[1, 2, 3, 3], [7, 7, 7, 7], [0, 39, 20, 1]])
    seen = torch.zeros(3, 40, dtype=torch.bool).scatter_(1, history, True)
    for penalty in (0.5, 1.0, 1.7):
        expected = warpers.RepetitionPenaltyLogitsProcessor(penalty)(history, logits.clone())
        zeros = torch.zeros(3)
        counts = torch.zeros(3, 40, dtype=torch.int32)
        found = sampling.penalize(logits, counts, seen, torch.full((3,), penalty), zeros, zeros)
        assert torch.equal(found, expected)


def test_frequency_and_presence_penalties_by_hand() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    counts = torch.tensor([[0, 1, 3], [2, 0, 0]], dtype=torch.int32)
    seen = torch.ones(2, 3, dtype=torch.bool)
    found = sampling.penalize(logits, counts, seen, torch.ones(2), torch.tensor([0.5, 0.0]), torch.tensor([0.25, -1.0]))
    assert found.tolist() == [[1.0, 1.25, 1.25], [2.0, 2.0, 3.0]]
    assert logits.tolist() == [[1.0, 2.0, 3.0]] * 2  # the caller's are not touched


def test_bias_and_suppression_hit_only_their_cells() -> None:
    logits = torch.zeros(3, 4)
    sampling.add_bias_(logits, torch.tensor([0, 0, 2]), torch.tensor([1, 3, 1]), torch.tensor([100.0, -100.0, 2.5]))
    assert logits.tolist() == [[0, 100, 0, -100], [0, 0, 0, 0], [0, 2.5, 0, 0]]
    sampling.suppress_(logits, torch.tensor([1, 2]), torch.tensor([0, 3]))
    assert logits.tolist() == [[0, 100, 0, -100], [-INF, 0, 0, 0], [0, 2.5, 0, -INF]]


def test_logprobs_are_log_softmax_and_nan_where_the_logits_are() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(9)) * 3
    logits[1, 10] = -INF
    logits[2, 7] = math.nan
    tokens = torch.tensor([3, 10, 0, 49])
    chosen, ranks, ids, top = sampling.logprobs(logits, tokens, 5)
    expected = torch.log_softmax(logits.double(), dim=-1)
    for row in (0, 3):
        torch.testing.assert_close(chosen[row].double(), expected[row, tokens[row]], atol=1e-5, rtol=0)
        torch.testing.assert_close(top[row].double(), expected[row].topk(5).values, atol=1e-5, rtol=0)
        assert ids[row].tolist() == expected[row].topk(5).indices.tolist()
        assert ranks[row] == 1 + expected[row].argsort(descending=True).tolist().index(tokens[row])
    assert ranks[1] == 50
    assert chosen[1] == sampling.LOGPROB_FLOOR
    assert chosen.isnan().tolist() == [False, False, True, False]
    assert torch.isfinite(top[[0, 1, 3]]).all()
    assert sampling.logprobs(logits, tokens, 0)[2].shape == (4, 0)
    assert sampling.logprobs(logits[:, :3], tokens.clamp(max=2), 20)[2].shape == (4, 3)


@pytest.mark.parametrize("k", [0, 1, 3])
def test_ranks_count_the_tokens_that_are_at_least_as_likely(k: int) -> None:
    """As vLLM's do, whatever k is: equal ones share the last of their ranks."""
    logits = torch.tensor([[5.0, 1, 5, 3, -INF, -INF]]).expand(6, 6)
    assert sampling.logprobs(logits, torch.arange(6), k)[1].tolist() == [2, 4, 2, 3, 6, 6]
