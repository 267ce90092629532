"""What the planner hands the executor, and what comes back: the contract of one step.

Everything is a NumPy array over the scheduled requests (R), their query tokens (T) or the rows that sample (S).
Nothing here knows torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from .sampling_params import SamplingParams

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

PENDING = -1  # a token id whose value is on the device: the last token its row sampled


@dataclass(slots=True, frozen=True)
class RowStart:
    """A request takes a row of the page table: everything the device side needs to know about it.

    ``tokens`` are the known tokens (prompt, and outputs if it resumes after a retraction); the first
    ``prompt_len`` are the prompt. ``seed`` is always set: an unseeded request gets one from the engine.
    """

    row: int
    params: SamplingParams
    seed: int
    tokens: Int32
    prompt_len: int


@dataclass(slots=True)
class StepPlan:
    """One forward pass: chunks of prompts and decodes together. Decodes (q_len 1, sampling) come first.

    A step first applies ``table_*``, then ``copies``, then writes K/V of every query token to the pool before
    attention reads it, layer by layer: so a page may be read by a request whose producer is in the same step.
    """

    step: int
    rows: Int32  # [R] page-table row of each request; no row appears twice
    q_lens: Int32  # [R] query tokens of each, >= 1
    kv_lens: Int32  # [R] tokens in the KV pool once this step has written
    token_ids: Int32  # [T] query tokens, requests concatenated; PENDING where the device knows the value
    num_decodes: int  # the first num_decodes requests have q_len 1 and sample
    samples: Int32  # [S] indices into R, ascending: requests whose last query token's logits are sampled
    table_rows: Int32  # [U] page-table writes: table[rows[i], cols[i]] = pages[i]
    table_cols: Int32
    table_pages: Int32
    # [C, 2] (source page, destination page): copy-on-write, before anything is written. All sources are read before any
    # destination is written: a source evicted while this step was planned may be another copy's destination.
    copies: Int32
    starts: list[RowStart] = field(default_factory=list)
    # requests of this step that want logprobs of prompt tokens: (index into R, k, first wanted position). Logits of
    # the query token at position p give the logprob of token p + 1; the last prompt token's are sampled, not returned.
    prompt_logprobs: list[tuple[int, int, int]] = field(default_factory=list)
    # [K] indices into samples of requests that may not draw any token: the step is launched without sampling, and
    # `PendingStep.sample` says which tokens they may.
    constrained: Int32 = field(default_factory=lambda: np.empty(0, dtype=np.int32))

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(slots=True)
class TokenLogprobs:
    """Logprobs of n tokens: the chosen token's and the k best (descending), from the raw logits."""

    chosen: npt.NDArray[np.float32]  # [n]
    top_ids: Int32  # [n, k]
    top: npt.NDArray[np.float32]  # [n, k]


@dataclass(slots=True)
class StepResult:
    """What one step sampled, in the order of ``plan.samples``."""

    tokens: Int32  # [S]
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)  # index into samples -> n = 1
    # index into R -> (position of the first token the rows describe, logprobs of prompt tokens from there)
    prompt_logprobs: dict[int, tuple[int, TokenLogprobs]] = field(default_factory=dict)


class PendingStep(Protocol):
    """A step that has been launched."""

    def sample(self, masks: npt.NDArray[np.uint32]) -> None:
        """Enqueues the sampling of a step that has ``plan.constrained``; called once, before the next launch.

        ``masks`` [K, ceil(vocab_size / 32)]: bit ``t % 32`` of word ``t // 32`` says whether token t may be drawn.
        """
        ...

    def result(self) -> StepResult:
        """Blocks until the step has run. Called exactly once, in launch order, after `sample` where that is needed."""
        ...


class Executor(Protocol):
    """The device side: owns weights, KV pool, page table and sampler state. One rank is a world of size one."""

    num_pages: int
    page_size: int
    vocab_size: int

    def launch(self, plan: StepPlan) -> PendingStep:
        """Enqueues one step after all earlier ones (of one with ``plan.constrained``, all but the sampling).

        The plan's arrays must not be modified afterwards.
        """
        ...

    def close(self) -> None: ...
