"""The contract of one step: the plan that the executor gets from the planner, and the result that it returns.

Arrays are NumPy's, over the step's requests (R), query tokens (T) or sampled query tokens (S). Nothing here uses torch.
Plans and results have a byte form (`step_codec`), so that a plan can be sent to an executor in another process.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..radix.node import Int32 as Int32
from .sampling_params import SamplingParams

Int64 = npt.NDArray[np.int64]
TokenBitmask = npt.NDArray[np.uint32]  # [..., ceil(vocab_size / 32)]: bit t % 32 of word t // 32 is token t

NON_FINITE = -2  # in place of a sampled token: its logits hold NaN or infinity
PENDING = -1  # placeholder for a token id that is only on the device so far: the last token its row sampled


def _no_indices() -> Int32:
    return np.empty(0, np.int32)


@dataclass(slots=True, frozen=True)
class RowStart:
    """A request takes a row of the page table: all that the executor needs of it.

    ``tokens`` are the known tokens (the prompt, and outputs if it resumes after a retraction); the first
    ``prompt_len`` are the prompt. ``seed`` is always set: the engine chooses one for an unseeded request.
    """

    row: int
    params: SamplingParams
    seed: int
    tokens: Int32
    prompt_len: int


@dataclass(slots=True)
class StepPlan:
    """One forward pass: chunks of prompts and decodes together. Decodes (q_len 1, sampled) come first.

    A step applies, in this order: ``table_*``, ``copies``, ``starts``. Then each layer writes the keys and values of
    all query tokens to the pool before its attention reads the pool. So a request may read a page that another request
    of the same step writes.
    """

    step: int
    rows: Int32  # [R] page-table row of each request; no row appears twice
    q_lens: Int32  # [R] query tokens of each, >= 1
    kv_lens: Int32  # [R] tokens in the KV pool once this step has written
    token_ids: Int32  # [T] query tokens, requests concatenated; PENDING where the value is only on the device so far
    num_decodes: int  # the first num_decodes requests have q_len 1 and are sampled
    # [S] indices into T, ascending: query tokens whose logits are sampled. A request may have several; the row's last
    # token is then the sample of its last query token.
    samples: Int32
    table_rows: Int32  # [U] page-table writes: table[rows[i], cols[i]] = pages[i]
    table_cols: Int32
    table_pages: Int32
    # [C, 2] (source page, destination page): copy-on-write. All sources are read before any destination is written: a
    # source that was evicted while this step was planned may be the destination of another copy.
    copies: Int32
    starts: list[RowStart] = field(default_factory=list)
    # Logprobs of prompt tokens: (index into R, k, first position). The logits of the query token at position p give the
    # logprob of token p + 1; those of the last prompt token are sampled instead.
    prompt_logprobs: list[tuple[int, int, int]] = field(default_factory=list)
    # [K] indices into samples whose tokens are constrained: the step is launched without sampling, and
    # `PendingStep.sample` brings the allowed tokens.
    constrained: Int32 = field(default_factory=_no_indices)

    @property
    def num_tokens(self) -> int:
        """T, the query tokens of the step."""
        return len(self.token_ids)

    @property
    def query_starts(self) -> Int64:
        """[R] the first query token of each request."""
        return np.cumsum(self.q_lens, dtype=np.int64) - self.q_lens

    @property
    def sampled_requests(self) -> Int64:
        """[S] index into R of the request of each sample."""
        return np.arange(len(self.rows)).repeat(self.q_lens)[self.samples]

    @property
    def sample_positions(self) -> Int64:
        """[S] the position in its request that each sampled token gets: behind the query token."""
        of = self.sampled_requests
        return (self.kv_lens - self.q_lens)[of] + (self.samples - self.query_starts[of]) + 1


@dataclass(slots=True)
class TokenLogprobs:
    """Logprobs of n tokens: the chosen token's and the k best (descending), from the raw logits."""

    chosen: npt.NDArray[np.float32]  # [n]; NaN where the logits hold NaN or infinity
    ranks: Int32  # [n] of the chosen token: how many tokens are at least as likely
    top_ids: Int32  # [n, k]
    top: npt.NDArray[np.float32]  # [n, k]


@dataclass(slots=True)
class StepResult:
    """The samples of one step, in the order of ``plan.samples``."""

    tokens: Int32  # [S]; `NON_FINITE` where nothing could be sampled
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)  # index into samples -> n = 1
    # index into R -> (position of the first token the rows describe, logprobs of prompt tokens from there)
    prompt_logprobs: dict[int, tuple[int, TokenLogprobs]] = field(default_factory=dict)
    # KV bytes that attention reads if each request reads its own, and those that shared reads saved of them.
    kv_bytes: int = 0
    kv_bytes_saved: int = 0


class PendingStep(Protocol):
    """A step that has been launched."""

    def sample(self, masks: TokenBitmask) -> None:
        """Enqueues the sampling of a step with ``plan.constrained``. Called once, before the next launch.

        ``masks`` [K, ceil(vocab_size / 32)]: the allowed tokens of each constrained sample.
        """
        ...

    def result(self) -> StepResult:
        """Blocks until the step has run. Called exactly once, in launch order, after `sample` where that is needed."""
        ...


class Executor(Protocol):
    """Owns weights, KV pool, page table and sampler state of one device, and runs steps on it."""

    num_pages: int
    page_size: int
    vocab_size: int

    def launch(self, plan: StepPlan) -> PendingStep:
        """Enqueues one step after all earlier ones; a step with ``plan.constrained`` without its sampling.

        The plan's arrays must not be modified afterwards.
        """
        ...

    def prepare_next(self) -> bool:
        """Does a piece of the preparation that was left for later: some 20 ms on a GPU, one weight on a CPU, of which
        that of the output layer may take a second. Called while no step runs.

        Returns whether more may be left; False always where nothing was.
        """
        ...

    def beat(self) -> None:
        """Returns once every device of this executor has answered. Called only while no step is in flight."""
        ...

    def close(self) -> None:
        """Frees all device memory. The executor cannot be used afterwards."""
        ...
