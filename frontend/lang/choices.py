"""How ``select`` chooses: SGLang's three methods over the logprobs of each choice's tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scored:
    """One choice: its tokens after what all choices share, and their logprobs.

    ``unconditional``: the same tokens' logprobs without the prompt, if the method needs them.
    """

    tokens: tuple[int | str, ...]
    logprobs: tuple[float, ...]
    unconditional: tuple[float, ...] = ()

    @property
    def mean(self) -> float:
        return sum(self.logprobs) / len(self.logprobs)


@dataclass(frozen=True)
class ChoicesMethod:
    name: str
    pick: Callable[[Sequence[Scored]], int]  # the index of the chosen one
    unconditional: bool = False

    def __repr__(self) -> str:
        return self.name


def _likeliest(scored: Sequence[Scored]) -> int:
    return max(range(len(scored)), key=lambda i: scored[i].mean)


def _greedy(scored: Sequence[Scored]) -> int:
    """Chooses like a greedy decoder that may only write one of the choices.

    A choice that has ended continues at its mean logprob.

    Choices with the same token share its logprob, so that rounding in separate forward passes cannot separate them.
    """
    left = list(range(len(scored)))
    for position in range(max(len(one.tokens) for one in scored)):
        first: dict[int | str | None, float] = {}
        for i in left:
            ended = position >= len(scored[i].tokens)
            token = None if ended else scored[i].tokens[position]
            value = scored[i].mean if ended else scored[i].logprobs[position]
            first[token] = max(first.get(token, value), value) if ended else first.get(token, value)
        best = max(first, key=lambda token: first[token])
        left = [i for i in left if _token(scored[i], position) == best]
        if len(left) == 1:
            break
    return left[0]


def _token(one: Scored, position: int) -> int | str | None:
    return one.tokens[position] if position < len(one.tokens) else None


def _against_unconditional(scored: Sequence[Scored]) -> int:
    def gain(i: int) -> float:
        one = scored[i]
        return sum(a - b for a, b in zip(one.logprobs, one.unconditional, strict=True)) / len(one.logprobs)

    return max(range(len(scored)), key=gain)


token_length_normalized = ChoicesMethod("token_length_normalized", _likeliest)
"""The choice with the highest mean logprob."""

greedy_token_selection = ChoicesMethod("greedy_token_selection", _greedy)
"""The choice that greedy decoding constrained to the choices writes."""

unconditional_likelihood_normalized = ChoicesMethod(
    "unconditional_likelihood_normalized", _against_unconditional, unconditional=True
)
"""The choice whose mean logprob the prompt raises the most."""
