"""Scores of continuations: the logprobs of their tokens, collected from the deltas of their engine requests."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ...messages import Delta
from ...outputs import Output


@dataclass(slots=True)
class Score:
    """Of one continuation. A logprob is None where no token precedes: the first of an unconditional continuation, if
    the model's texts do not begin with a special token. ``sum`` and ``mean`` leave such a token out."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    cached_tokens: int = 0  # of the prompt: the branch and the continuation
    prompt_tokens: int = 0
    refilled: int = 0
    cached_logprobs: int = 0  # of the logprobs, those that were remembered
    unconditional: Score | None = None  # the same tokens without the branch, if requested

    @property
    def sum(self) -> float:
        return float(sum(value for value in self.logprobs if value is not None))

    @property
    def mean(self) -> float:
        """Per token."""
        counted = len(self.logprobs) - self.logprobs.count(None)
        return self.sum / counted if counted else 0.0


class ScoreCollector:
    """``unconditional``: the second half of the engine requests scores the continuations without the branch."""

    def __init__(self, requests: int, *, unconditional: bool) -> None:
        self._outputs = [Output() for _ in range(requests)]
        self._values: list[list[float]] = [[] for _ in range(requests)]
        self._unconditional = unconditional

    def feed(self, index: int, delta: Delta) -> None:
        """Takes the next delta of an engine request, given by its index."""
        for piece in delta.prompt_logprobs or ():  # in order, and the continuation's only
            self._values[index] += np.frombuffer(piece.rows.chosen, "<f4").tolist()
        delta.prompt_logprobs = None
        self._outputs[index].feed(delta)

    @property
    def scores(self) -> list[Score]:
        scores = [self._score(index) for index in range(len(self._outputs))]
        if not self._unconditional:
            return scores
        half = len(scores) // 2
        for score, alone in zip(scores[:half], scores[half:], strict=True):
            score.unconditional = alone
        return scores[:half]

    def _score(self, index: int) -> Score:
        output, values = self._outputs[index], self._values[index]
        unknown = len(output.prompt) - len(values)
        score = Score(output.prompt, [*[None] * unknown, *values], output.cached_tokens, output.prompt_tokens)
        if output.cache is not None:
            score.refilled, score.cached_logprobs = output.cache.refilled, output.cache.cached_logprobs
        return score
