"""Logprobs of prompt tokens: many rows of logits, in slices that bound the memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...kernels import sampling
from ..models.implementation import AnyDecoder
from ..step import Int32, Int64, RowStart, StepPlan, TokenLogprobs

SLICE = 256  # rows of logits computed at once


@dataclass(slots=True)
class PromptSpan:
    """The prompt tokens of one request whose logprobs this step computes."""

    index: int  # into the plan's requests
    k: int
    start: int  # position of the first such token
    offsets: Int64  # query tokens of the request's chunk whose logits give them
    targets: Int32  # the prompt tokens


@dataclass(slots=True)
class PromptRows:
    """Logprobs of n prompt tokens, still on the device."""

    index: int  # into the plan's requests
    start: int  # position of the first token
    chosen: Tensor  # float32 [n]
    ranks: Tensor  # int64 [n]
    top_ids: Tensor  # int64 [n, k]
    top: Tensor  # float32 [n, k]

    def to_host(self) -> TokenLogprobs:
        """Waits for the device."""
        ranks, ids = (part.cpu().numpy().astype(np.int32) for part in (self.ranks, self.top_ids))
        return TokenLogprobs(self.chosen.cpu().numpy(), ranks, ids, self.top.cpu().numpy())


class PromptLogprobRows:
    """Keeps the prompts whose logprobs were requested: a chunk's last logits belong to a token of the next chunk."""

    def __init__(self, decoder: AnyDecoder, device: torch.device) -> None:
        self._decoder, self._device = decoder, device
        self._prompts: dict[int, Int32] = {}  # page-table row -> prompt

    def start(self, start: RowStart) -> None:
        """A request takes a row, which forgets its previous request."""
        self._prompts.pop(start.row, None)
        if start.params.prompt_logprobs is not None:
            self._prompts[start.row] = start.tokens[: start.prompt_len]

    def spans(self, plan: StepPlan) -> list[PromptSpan]:
        """The requested logprobs that the plan's chunks can give. Requests without any are left out.

        The query token at position p gives the token at p + 1. The prompt's first token has no logprob.
        """
        spans = []
        for index, k, wanted in plan.prompt_logprobs:
            prompt = self._prompts[int(plan.rows[index])]
            end = int(plan.kv_lens[index])
            first = end - int(plan.q_lens[index])  # position of the chunk's first query token
            start, stop = max(wanted, first + 1), min(end + 1, len(prompt))
            if start < stop:
                spans.append(PromptSpan(index, k, start, np.arange(start, stop) - 1 - first, prompt[start:stop]))
        return spans

    def compute(self, spans: list[PromptSpan], hidden: Tensor) -> list[PromptRows]:
        """``hidden``: the rows of all spans, concatenated."""
        found, row = [], 0
        for span in spans:
            parts = []
            for at in range(0, len(span.targets), SLICE):
                targets = torch.from_numpy(span.targets[at : at + SLICE].astype(np.int64)).to(self._device)
                logits = self._decoder.logits(hidden[row + at : row + at + len(targets)])
                parts.append(sampling.logprobs(logits, targets, span.k))
            row += len(span.targets)
            found.append(PromptRows(span.index, span.start, *map(torch.cat, zip(*parts, strict=True))))
        return found
