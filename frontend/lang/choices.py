"""How ``select`` chooses: three methods over the logprobs of each choice's tokens, as SGLang has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scored:
    """One choice: its tokens from where the choices part from the prompt, and their logprobs there.

    ``unconditional``: the same tokens' logprobs without the prompt, if the method asked for them.
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
    """Token by token, as a greedy decoder that may only write a choice. One that has ended goes on at its mean.

    Choices with the same token share its logprob, so rounding in separate forward passes cannot part them.
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
"""The choice whose tokens are the likeliest on average."""

greedy_token_selection = ChoicesMethod("greedy_token_selection", _greedy)
"""The choice a greedy decoder would write if it could write nothing else."""

unconditional_likelihood_normalized = ChoicesMethod(
    "unconditional_likelihood_normalized", _against_unconditional, unconditional=True
)
"""The choice that the prompt makes likelier than it is by itself, on average over its tokens."""
