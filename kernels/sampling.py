"""Sampling tokens from logits: each function works on all rows at once, and no row's result depends on another row.

The order is that of Hugging Face and SGLang: penalties, logit bias, suppression, grammar mask, temperature, top-k,
top-p, min-p, sample. So filters choose among the allowed tokens, and no bias can allow a forbidden one. After the
temperature a row is held as *unnormalized probabilities*, ``exp((logit - max) / temperature)``: the largest is exactly
1, so min-p is a plain threshold, and nothing overflows however small the temperature is.

Filters are thresholds, not cuts in a sorted order: top-k, top-p and min-p each keep probabilities of at least t. So
only values are sorted, ties at the edge are kept together (as Hugging Face's top-k does), and sampling always runs in
vocabulary order: a row whose filters keep everything gives the token of an unfiltered row.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

LOGPROB_FLOOR = -9999.0  # stands for log 0: JSON has no infinity
TOP_WINDOW = 128  # largest probabilities that top-p looks at first when no top-k bounds it
_BLOCK = 128  # columns that `sample` looks at together
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """One number in [0, 1) a row from (seed, position): a counter-based generator, which has no state.

    Two rounds of splitmix64 (Steele, Lea, Flood 2014), 53 bits. Runs on the host, where both inputs are; the result
    is sent to the device with the other parameters of the step.
    """
    mixed = _splitmix64(seeds.astype(np.uint64)) + positions.astype(np.uint64) * _GOLDEN
    return (_splitmix64(mixed) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _splitmix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def penalize(
    logits: Tensor, counts: Tensor, seen: Tensor, repetition: Tensor, frequency: Tensor, presence: Tensor
) -> Tensor:
    """Penalised copy of ``logits`` [S, V].

    ``counts`` [S, V] int32 is how often each token occurs in the *output*, ``seen`` [S, V] bool whether it occurs in
    prompt or output; the penalties are [S]. Repetition (CTRL, Keskar et al. 2019) divides positive and multiplies
    negative logits of seen tokens; frequency and presence (OpenAI) subtract.
    """
    factor = repetition[:, None]
    logits = torch.where(seen, torch.where(logits > 0, logits / factor, logits * factor), logits)
    logits -= frequency[:, None] * counts
    logits -= presence[:, None] * (counts > 0)
    return logits


def add_bias_(logits: Tensor, rows: Tensor, tokens: Tensor, bias: Tensor) -> None:
    """Adds ``bias[j]`` to ``logits[rows[j], tokens[j]]`` in place. int64 [N], int64 [N], float32 [N]; no pair twice."""
    logits.view(-1).scatter_add_(0, rows * logits.shape[1] + tokens, bias)


def suppress_(logits: Tensor, rows: Tensor, tokens: Tensor) -> None:
    """Sets ``logits[rows[j], tokens[j]]`` to -inf in place. int64 [N] each."""
    logits.view(-1).index_fill_(0, rows * logits.shape[1] + tokens, float("-inf"))


def apply_bitmask(logits: Tensor, rows: Tensor, bitmask: Tensor) -> Tensor:
    """A copy of ``logits`` [S, V] in which row ``rows[j]`` is -inf wherever ``bitmask[j]`` has a 0.

    ``rows`` [K] int64, ascending; ``bitmask`` [K, ceil(V / 32)] int32: bit ``t % 32`` of word ``t // 32`` is token t.
    """
    bits = torch.arange(32, dtype=torch.int32, device=bitmask.device)
    forbidden = (bitmask[:, :, None] >> bits).bitwise_and_(1).flatten(1)[:, : logits.shape[1]] == 0
    if len(rows) == len(logits):
        return logits.masked_fill(forbidden, float("-inf"))
    logits = logits.clone()
    logits[rows] = logits[rows].masked_fill_(forbidden, float("-inf"))
    return logits


def greedy(logits: Tensor) -> Tensor:
    """The best token of each row, the first of equals: [S, V] to int64 [S]."""
    if logits.device.type != "cpu":
        return logits.argmax(dim=-1)
    # NumPy's argmax is vectorized and torch's is not: 2 and 17 µs for 8,192 logits on a Xeon core with AVX512.
    return torch.from_numpy(logits.float().numpy().argmax(axis=-1))


def is_finite(logits: Tensor, best: Tensor) -> Tensor:
    """Whether each row of ``logits`` [S, V] holds neither NaN nor positive infinity: bool [S].

    ``best`` [S] is the result of `greedy`, which finds these first: checking costs no pass over the row.
    """
    return logits.gather(1, best[:, None]).squeeze(1) < torch.inf


def unnormalized_probs(logits: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [S, V] in [0, 1] of logits [S, V] and temperatures [S] > 0, and as `is_finite`: bool [S].

    A row that is not finite, or has no logit above negative infinity, is 0.
    """
    best = logits.amax(dim=-1, keepdim=True)  # NaN if any logit is
    probs = logits.sub(torch.where(best.abs() < torch.inf, best, torch.nan))
    return probs.div_(temperature[:, None]).exp_().nan_to_num_(nan=0.0), (best < torch.inf).squeeze(1)


class SamplingKernels(Protocol):
    """What a device computes by kernels of its own: `triton_sampling`."""

    def top_p_threshold(self, probs: Tensor, floor: Tensor, top_p: Tensor) -> Tensor:
        """The smallest probability ``[S, 1]`` that top-p keeps among those of at least ``floor``. ``probs`` float32
        ``[S, V]``, ``floor`` float32 ``[S, 1]``, ``top_p`` float64 ``[S]``, 1 is off."""
        ...

    def sample_logits(self, logits: Tensor, temperature: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """As `sample_logits`."""
        ...


def window_for(top_k: npt.NDArray[np.int64], top_p: npt.NDArray[np.float64], vocab_size: int, top_p_window: int) -> int:
    """How many of the largest probabilities `keep_threshold` looks at, decided on the host.

    ``top_k`` is ``vocab_size`` where off. ``top_p_window`` is for rows with top-p alone. On a CPU it is `TOP_WINDOW`,
    which `keep_threshold` widens where it does not hold the row's mass. On a GPU that check would stall the host: there
    it is 1 with `SamplingKernels`, and otherwise ``vocab_size``.
    """
    narrow = np.where(top_k < vocab_size, top_k, 1)
    if np.any((top_p < 1.0) & (top_k >= vocab_size)):
        narrow = np.maximum(narrow, top_p_window)
    return int(min(narrow.max(initial=1), vocab_size))


def keep_threshold(
    probs: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, window: int, kernels: SamplingKernels | None = None
) -> Tensor:
    """The smallest probability [S, 1] that top-k, then top-p of the rest, then min-p keep.

    ``probs`` [S, V] float32; ``top_k`` [S] int64 in [1, V], V is off; ``top_p`` [S] float64 in (0, 1], 1 is off;
    ``min_p`` [S] float32 in [0, 1], 0 is off. ``window`` from `window_for`. The threshold does not depend on it.
    ``kernels``: find top-p's threshold without sorting; the window then only serves top-k.
    """
    vocab_size = probs.shape[1]
    best = probs.topk(window, dim=-1).values
    kth = best.gather(1, top_k.clamp(max=window)[:, None] - 1).masked_fill_((top_k >= vocab_size)[:, None], 0.0)
    if kernels is not None:
        return torch.maximum(kernels.top_p_threshold(probs, kth, top_p), min_p[:, None])
    mass = torch.where(probs >= kth, probs, 0.0).sum(dim=-1, keepdim=True, dtype=torch.float64)
    through = torch.where(best >= kth, best, 0.0).cumsum(dim=-1, dtype=torch.float64)
    before = through - best
    needed = top_p[:, None] * mass
    last_kept = (before < needed).sum(dim=-1, keepdim=True).clamp_(min=1) - 1
    nucleus = torch.where(top_p[:, None] < 1.0, torch.maximum(best.gather(1, last_kept), kth), kth)
    if window < vocab_size and probs.device.type == "cpu":
        short = (through[:, -1] < needed[:, 0]) & (top_p < 1.0) & (top_k > window)
        if bool(short.any()):
            wider = min(window * 8, vocab_size)
            nucleus[short] = keep_threshold(probs[short], top_k[short], top_p[short], min_p[short], wider)
    return torch.maximum(nucleus, min_p[:, None])


def sample_logits(logits: Tensor, temperature: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Samples without filters: tokens int64 [S], and as `is_finite`: bool [S].

    ``logits`` [S, V] of any floating dtype, contiguous; ``temperature`` [S] float32 > 0; ``uniform`` as for `sample`.
    """
    probs, finite = unnormalized_probs(logits.float(), temperature)
    return sample(probs, uniform), finite


def sample(probs: Tensor, uniform: Tensor) -> Tensor:
    """One token a row by inverse CDF in vocabulary order: int64 [S].

    ``probs`` [S, V] float32 >= 0, unnormalized; ``uniform`` [S] float64 in [0, 1). Two levels (blocks of columns,
    then inside the block) keep the float64 sums small. A token of probability 0 is never sampled, unless the whole row
    is 0: then the result is the last token.
    """
    rows, vocab_size = probs.shape
    if vocab_size % _BLOCK:
        probs = torch.nn.functional.pad(probs, (0, -vocab_size % _BLOCK))
    blocks = probs.view(rows, -1, _BLOCK)
    through = blocks.sum(dim=-1, dtype=torch.float64).cumsum_(dim=-1)
    target = _below(uniform[:, None] * through[:, -1:], through[:, -1:])
    block = torch.searchsorted(through, target, right=True).clamp_(max=blocks.shape[1] - 1)
    left = target - torch.where(block > 0, through.gather(1, (block - 1).clamp_(min=0)), 0.0)
    inside = blocks.gather(1, block[:, :, None].expand(-1, 1, _BLOCK)).squeeze(1).cumsum(dim=-1, dtype=torch.float64)
    column = torch.searchsorted(inside, _below(left, inside[:, -1:]), right=True)
    return (block * _BLOCK + column).squeeze(1).clamp_(max=vocab_size - 1)


def _below(target: Tensor, total: Tensor) -> Tensor:
    """``target`` strictly below ``total``: the search then ends on a token of positive probability despite rounding."""
    return torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))


def logprobs(logits: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities under the raw logits [S, V]: of ``tokens`` [S] and of the ``k`` best, descending.

    Returns the logprobs of ``tokens``, float32 [S]; their ranks, int64 [S]: how many tokens are at least as likely (as
    in vLLM: 1 for the best, and tokens of equal probability share the last of their ranks); the ids of the best, int64
    [S, k], and their logprobs, float32 [S, k]. Log 0 is `LOGPROB_FLOOR`. A row that holds NaN or positive infinity, or
    no finite logit, is NaN.
    """
    normal = torch.log_softmax(logits, dim=-1, dtype=torch.float32).clamp_(min=LOGPROB_FLOOR, max=0.0)
    chosen = normal.gather(1, tokens[:, None])
    ranks = (normal >= chosen).sum(dim=1)
    if k == 1:
        best = greedy(normal)[:, None]
        return chosen.squeeze(1), ranks, best, normal.gather(1, best)
    top = normal.topk(min(k, logits.shape[1]), dim=-1)
    return chosen.squeeze(1), ranks, top.indices, top.values
