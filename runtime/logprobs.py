"""Logprobs as bytes between processes, and as tuples for callers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .messages import LogprobRows
from .step import TokenLogprobs


class TokenLogprob(NamedTuple):
    """One token's logprob, the k likeliest alternatives as (token id, logprob), best first, and the token's rank: how
    many tokens are at least as likely."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    rank: int

    @property
    def by_likelihood(self) -> dict[int, tuple[float, int]]:
        """(logprob, rank) by token id: of the token itself, and then of the alternatives."""
        found = {self.token: (self.logprob, self.rank)}
        found |= {id: (logprob, rank) for rank, (id, logprob) in enumerate(self.top, 1)}
        return found


def pack(rows: TokenLogprobs) -> LogprobRows:
    """The same rows as bytes."""
    return LogprobRows(
        rows.top.shape[1],
        rows.chosen.astype("<f4").tobytes(),
        rows.ranks.astype("<i4").tobytes(),
        rows.top_ids.astype("<i4").tobytes(),
        rows.top.astype("<f4").tobytes(),
    )


def unpack(tokens: list[int], rows: LogprobRows) -> list[TokenLogprob]:
    """The logprobs of ``tokens``, which the rows describe in order."""
    chosen = np.frombuffer(rows.chosen, dtype="<f4").tolist()
    ranks = np.frombuffer(rows.ranks, dtype="<i4").tolist()
    ids = np.frombuffer(rows.top_ids, dtype="<i4").reshape(len(chosen), rows.k).tolist()
    top = np.frombuffer(rows.top, dtype="<f4").reshape(len(chosen), rows.k).tolist()
    return [
        TokenLogprob(token, value, list(zip(best_ids, best, strict=True)), rank)
        for token, value, rank, best_ids, best in zip(tokens, chosen, ranks, ids, top, strict=True)
    ]
