"""Sampler state by page-table row, and one call a step that samples a token for each sampled query token.

Scalars are on the host, indexed by row. One small packed copy a step sends them to the device with the step's uniform
numbers. So the host knows without asking the device which work a step needs, and `start` overwrites everything that
the row's previous request left. Only the token counts that penalties need are on the device, where the sampled tokens
are: the host may learn them a step later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...kernels import sampling
from ..sampling_params import SamplingParams
from ..step import NON_FINITE, Int32, Int64, RowStart, TokenBitmask, TokenLogprobs
from .token_history import TokenHistory, to_device

PENALIZED_ROWS = 64  # rows that get their penalties at once, which takes some 28 bytes a vocabulary entry of each
# Columns of the host's table, and rows of the packed copy. float64 holds every one exactly.
_TEMPERATURE, _TOP_K, _TOP_P, _MIN_P, _REPETITION, _FREQUENCY, _PRESENCE, _SCALARS = range(8)


@dataclass(slots=True, frozen=True)
class SampleMasks:
    """The allowed tokens of a step's constrained samples."""

    samples: Int32  # [K] indices into the samples
    bitmask: TokenBitmask  # [K, ceil(vocab_size / 32)]


@dataclass(slots=True)
class Sampled:
    """The tokens of one step. ``tokens`` [S] int64 stays on the device; `to_result` brings everything to the host."""

    tokens: Tensor
    _host_tokens: Tensor  # copied right behind the sampling, so that reading it does not wait for later steps
    _logprobs: tuple[Tensor, ...] | None  # of `sampling.logprobs`
    _logprob_samples: list[tuple[int, int]]  # (index into the samples, k) of each row of _logprobs
    _copied: torch.cuda.Event | None

    def to_result(self) -> tuple[Int32, dict[int, TokenLogprobs]]:
        """Waits for this step only. Tokens (or `NON_FINITE`) int32 [S], logprobs (n = 1) by index into the samples."""
        if self._copied is not None:
            self._copied.synchronize()
        found: dict[int, TokenLogprobs] = {}
        if self._logprobs is not None:
            chosen, ranks, ids, top = (part.numpy() for part in self._logprobs)
            ranks, ids = ranks.astype(np.int32), ids.astype(np.int32)
            for i, (sample, k) in enumerate(self._logprob_samples):
                one = slice(i, i + 1)
                found[sample] = TokenLogprobs(chosen[one], ranks[one], ids[one, :k], top[one, :k])
        return self._host_tokens.numpy().astype(np.int32), found


class Sampler:
    """Samples tokens for ``max_rows`` page-table rows over a vocabulary of ``vocab_size`` logits.

    ``kernels``: those of the device, if it has any.

    ``eos_ids`` are the model's end-of-sequence tokens. They are suppressed, with a request's ``stop_token_ids``, while
    the request has produced fewer than ``min_tokens`` (unless it ignores end-of-sequence tokens).
    """

    def __init__(
        self,
        max_rows: int,
        vocab_size: int,
        device: torch.device | str,
        eos_ids: Sequence[int] = (),
        kernels: sampling.SamplingKernels | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self._kernels = kernels
        self._top_p_window = vocab_size if self.device.type == "cuda" else sampling.TOP_WINDOW
        if kernels is not None:
            self._top_p_window = 1
        self._eos_ids = [token for token in eos_ids if 0 <= token < vocab_size]
        self._scalars = np.zeros((max_rows, _SCALARS))
        self._seeds = np.zeros(max_rows, np.uint64)
        self._prompt_lens = np.zeros(max_rows, np.int64)
        self._min_tokens = np.zeros(max_rows, np.int64)
        self._logprobs = np.full(max_rows, -1, np.int64)  # -1: off
        self._plain_greedy = np.zeros(max_rows, np.bool_)  # argmax of the raw logits, and nothing else
        self._greedy = np.zeros(max_rows, np.bool_)
        self._filtered = np.zeros(max_rows, np.bool_)
        self._biased = np.zeros(max_rows, np.bool_)
        self._penalized = np.zeros(max_rows, np.bool_)
        self._bias: dict[int, tuple[Int64, npt.NDArray[np.float32]]] = {}
        self._stop_ids: dict[int, Int64] = {}
        self._history = TokenHistory(max_rows, vocab_size, self.device)

    def start(self, start: RowStart) -> None:
        """Gives the row to a request, new or resumed. Nothing of the row's previous request remains."""
        row, params = start.row, start.params
        greedy, filtered = params.greedy, _filters(params, self.vocab_size)
        top_k = params.top_k if 0 < params.top_k < self.vocab_size else self.vocab_size
        self._scalars[row] = (
            1.0 if greedy else params.temperature,
            top_k,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.frequency_penalty,
            params.presence_penalty,
        )
        self._seeds[row] = start.seed
        self._prompt_lens[row] = start.prompt_len
        self._logprobs[row] = -1 if params.logprobs is None else params.logprobs
        self._greedy[row] = greedy
        self._filtered[row] = filtered and not greedy

        self._stop_ids.pop(row, None)
        self._min_tokens[row] = 0
        stop_ids = [*params.stop_token_ids, *([] if params.ignore_eos else self._eos_ids)]
        if params.min_tokens and stop_ids and not params.constrained:  # a constraint's masks already suppress them
            self._stop_ids[row] = np.unique(np.array(stop_ids, np.int64))
            self._min_tokens[row] = params.min_tokens

        self._bias.pop(row, None)
        self._biased[row] = bool(params.logit_bias)
        if params.logit_bias:
            ids = np.fromiter(params.logit_bias.keys(), np.int64, len(params.logit_bias))
            self._bias[row] = ids, np.fromiter(params.logit_bias.values(), np.float32, len(params.logit_bias))

        self._penalized[row] = params.penalized
        if self._penalized[row]:
            self._history.start(row, start.tokens, start.prompt_len)
        else:
            self._history.forget(row)
        self._plain_greedy[row] = greedy and not (
            self._penalized[row] or self._biased[row] or self._min_tokens[row] or params.logprobs is not None
        )

    def sample(self, logits: Tensor, rows: Int32, positions: Int64, masks: SampleMasks | None = None) -> Sampled:
        """Samples one token for each row of ``logits``, without modifying them and without waiting for the device.

        ``logits`` [S, V] raw, of any floating dtype; ``rows`` [S] page-table rows; ``positions`` [S] position of the
        new token in its request. The token depends on the logits, the request, its mask and the position alone. A row
        that occurs several times has the same penalties for all its samples: those of the tokens before this step.
        """
        at = rows.astype(np.int64)
        plain = bool(self._plain_greedy[at].all())
        adjusted = logits if plain else self._adjust(logits, at, positions)
        if masks is not None:
            bitmask = self._to_device(masks.bitmask.view(np.int32))
            adjusted = sampling.apply_bitmask(adjusted, self._to_device(masks.samples.astype(np.int64)), bitmask)
        if plain:
            tokens = sampling.greedy(adjusted)
            return self._finish(tokens, sampling.is_finite(adjusted, tokens), None, [])
        tokens, finite = self._sample(adjusted, at, positions)
        self._history.append(at, tokens, self._penalized[at])
        wanted = np.flatnonzero(self._logprobs[at] >= 0)
        if not len(wanted):
            return self._finish(tokens, finite, None, [])
        ks = self._logprobs[at[wanted]]
        index = self._to_device(wanted)
        found = sampling.logprobs(logits[index], tokens[index], int(ks.max()))
        return self._finish(tokens, finite, found, list(zip(wanted.tolist(), ks.tolist(), strict=True)))

    def _adjust(self, logits: Tensor, rows: Int64, positions: Int64) -> Tensor:
        """Applies penalties, bias and suppression to a float32 copy; without any of them, returns ``logits`` itself."""
        penalized = np.flatnonzero(self._penalized[rows])
        biased = np.flatnonzero(self._biased[rows])
        min_tokens = self._min_tokens[rows]
        suppressed = np.flatnonzero((min_tokens > 0) & (positions - self._prompt_lens[rows] < min_tokens))
        if not (len(penalized) or len(biased) or len(suppressed)):
            return logits
        logits = logits.to(torch.float32, copy=True)
        for first in range(0, len(penalized), PENALIZED_ROWS):
            some = penalized[first : first + PENALIZED_ROWS]
            counts, seen = self._history.of(rows[some])
            packed = self._to_device(self._scalars[rows[some], _REPETITION:].T.astype(np.float32))
            index = self._to_device(some)
            logits[index] = sampling.penalize(logits[index], counts, seen, packed[0], packed[1], packed[2])
        if len(biased):
            bias = [self._bias[row] for row in rows[biased].tolist()]
            at = np.repeat(biased, [len(ids) for ids, _ in bias])
            tokens = np.concatenate([ids for ids, _ in bias])
            values = np.concatenate([values for _, values in bias])
            sampling.add_bias_(logits, self._to_device(at), self._to_device(tokens), self._to_device(values))
        if len(suppressed):
            stop_ids = [self._stop_ids[row] for row in rows[suppressed].tolist()]
            at = np.repeat(suppressed, [len(ids) for ids in stop_ids])
            sampling.suppress_(logits, self._to_device(at), self._to_device(np.concatenate(stop_ids)))
        return logits

    def _sample(self, logits: Tensor, rows: Int64, positions: Int64) -> tuple[Tensor, Tensor]:
        """Tokens int64 [S], and whether each row is finite, bool [S]."""
        random = np.flatnonzero(~self._greedy[rows])
        if not len(random):
            tokens = sampling.greedy(logits)
            return tokens, sampling.is_finite(logits, tokens)
        all_random = len(random) == len(rows)
        where = None if all_random else self._to_device(random)
        some = logits if where is None else logits[where]
        sampled = self._sample_random(some, rows[random], positions[random])
        if where is None:
            return sampled
        tokens = sampling.greedy(logits)
        finite = sampling.is_finite(logits, tokens)
        tokens[where], finite[where] = sampled
        return tokens, finite

    def _sample_random(self, logits: Tensor, rows: Int64, positions: Int64) -> tuple[Tensor, Tensor]:
        scalars = self._scalars[rows]
        packed = self._to_device(np.vstack([scalars.T[:_REPETITION], sampling.uniforms(self._seeds[rows], positions)]))
        filtered = np.flatnonzero(self._filtered[rows])
        if not len(filtered):
            return self._unfiltered(logits, packed)
        top_k, top_p = scalars[filtered, _TOP_K].astype(np.int64), scalars[filtered, _TOP_P]
        window = sampling.window_for(top_k, top_p, self.vocab_size, self._top_p_window)
        if len(filtered) == len(rows):
            return self._filtered_rows(logits, packed, window)
        tokens, finite = self._unfiltered(logits, packed)
        index = self._to_device(filtered)
        tokens[index], finite[index] = self._filtered_rows(logits[index], packed[:, index], window)
        return tokens, finite

    def _unfiltered(self, logits: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
        sample = (self._kernels or sampling).sample_logits
        return sample(logits, packed[_TEMPERATURE].float(), packed[-1])

    def _filtered_rows(self, logits: Tensor, packed: Tensor, window: int) -> tuple[Tensor, Tensor]:
        probs, finite = sampling.unnormalized_probs(logits.float(), packed[_TEMPERATURE].float())
        filters = packed[_TOP_K].long(), packed[_TOP_P], packed[_MIN_P].float()
        keep = sampling.keep_threshold(probs, *filters, window, self._kernels)
        return sampling.sample(torch.where(probs >= keep, probs, 0.0), packed[-1]), finite

    def _finish(
        self,
        tokens: Tensor,
        finite: Tensor,
        found: tuple[Tensor, ...] | None,
        samples: list[tuple[int, int]],
    ) -> Sampled:
        host_tokens = torch.where(finite, tokens, NON_FINITE)  # the device goes on with a token that exists
        if self.device.type != "cuda":
            return Sampled(tokens, host_tokens, found, samples, None)
        host_tokens = _copy_out(host_tokens)
        host_found = None if found is None else tuple(map(_copy_out, found))
        copied = torch.cuda.Event()
        copied.record()
        return Sampled(tokens, host_tokens, host_found, samples, copied)

    def _to_device(self, array: npt.NDArray[np.generic]) -> Tensor:
        return to_device(array, self.device)


def _copy_out(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def _filters(params: SamplingParams, vocab_size: int) -> bool:
    return 0 < params.top_k < vocab_size or params.top_p < 1.0 or params.min_p > 0.0
