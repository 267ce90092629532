"""A step while it is planned, and its assembly into the arrays of a `StepPlan`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..step import PENDING, Int32, RowStart, StepPlan
from .ledger import Ledger
from .request import Request
from .scheduled_step import ScheduledStep

_EMPTY: Int32 = np.empty(0, dtype=np.int32)


class Chunk(NamedTuple):
    """Consecutive prompt tokens of one request. ``start`` is the position of the first."""

    request: Request
    row: int
    tokens: Int32
    start: int
    samples: bool  # the last token's logits

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


@dataclass(slots=True)
class Draft:
    """The decisions about a step so far. ``budget``: query tokens that can still be scheduled."""

    step: int
    budget: int
    decode_rows: Int32 = field(default_factory=lambda: _EMPTY)
    chunks: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    starts: list[RowStart] = field(default_factory=list)
    swaps: list[Int32] = field(default_factory=list)
    finishing: list[Request] = field(default_factory=list)
    short_tokens: int = 0  # query tokens of short prompts
    retracted: bool = False
    yields: int = 0  # requests retracted for the sake of other owners

    @property
    def empty(self) -> bool:
        return not len(self.decode_rows) and not self.chunks

    def build(self, ledger: Ledger) -> ScheduledStep:
        """Advances the rows past this step and returns its plan. Decodes (and last chunks of one token) come first."""
        rows = ledger.rows
        decode = self.decode_rows
        tokens = [rows.last_token[decode]]
        rows.last_token[decode] = PENDING
        rows.computed[decode] += 1
        rows.length[decode] += 1
        singles = [c for c in self.chunks if c.samples and len(c.tokens) == 1]
        longer = [c for c in self.chunks if not (c.samples and len(c.tokens) == 1)]
        longer.sort(key=lambda chunk: len(chunk.tokens))  # attention takes short ones together with decodes
        chunks = singles + longer

        sampling = [rows.requests[row] for row in decode.tolist()] + [c.request for c in chunks if c.samples]
        n, extra = len(decode), len(chunks)
        q_lens = np.ones(n + extra, dtype=np.int32)
        q_lens[n:] = [len(c.tokens) for c in chunks]
        is_sampled = np.ones(n + extra, dtype=np.bool_)
        is_sampled[n:] = [c.samples for c in chunks]
        sampled = np.flatnonzero(is_sampled)  # one sample each: of the last query token
        logprobs: list[tuple[int, int, int]] = []
        prompt_logprobs: dict[int, Request] = {}
        for i, chunk in enumerate(chunks, start=len(decode)):
            request = chunk.request
            k = request.params.prompt_logprobs
            if k is not None and request.prompt_logprob_next <= min(chunk.end, request.prompt_len - 1):
                logprobs.append((i, max(k, 1), request.prompt_logprob_next))  # at least the best: the tree keeps it
                prompt_logprobs[i] = request
                request.prompt_logprob_next = min(chunk.end, request.prompt_len - 1) + 1
        table_rows, table_cols, table_pages = ledger.take_writes()
        ledger.swap(self.swaps)
        plan = StepPlan(
            step=self.step,
            rows=np.concatenate([decode, np.fromiter((c.row for c in chunks), np.int32, extra)]),
            q_lens=q_lens,
            kv_lens=np.concatenate([rows.computed[decode], np.fromiter((c.end for c in chunks), np.int32, extra)]),
            token_ids=np.concatenate(tokens + [c.tokens for c in chunks]),
            num_decodes=n + len(singles),
            samples=(np.cumsum(q_lens, dtype=np.int32) - 1)[sampled],
            table_rows=table_rows,
            table_cols=table_cols,
            table_pages=table_pages,
            copies=np.array(self.copies, dtype=np.int32).reshape(-1, 2),
            starts=self.starts,
            prompt_logprobs=logprobs,
        )
        if rows.constrained.any():
            plan.constrained = np.flatnonzero(rows.constrained[plan.rows[sampled]]).astype(np.int32)
        ledger.clock += plan.num_tokens
        prompt_tokens = sum(max(0, min(c.end, c.request.prompt_len) - c.start) for c in chunks)
        at, positions = plan.rows[sampled], plan.kv_lens[sampled]
        return ScheduledStep(
            plan, sampling, at, rows.order[at], positions, prompt_logprobs, self.finishing, prompt_tokens
        )
