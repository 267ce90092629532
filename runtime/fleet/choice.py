"""Which replica a prompt goes to: a pure function of what each has cached and how busy it is."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]


class Weights(NamedTuple):
    """What the terms of `costs` count.

    A token ahead in the queue counts less than one to compute: it delays this request, while computing what another
    replica has cached delays all that come after, and evicts as much.
    """

    queued: float = 0.25  # of a token ahead in the replica's queue
    running: float = 16.0  # tokens to compute that one running request delays as much as
    recent: float = 2.0  # mean prompts that a replica must save to take twice its share of the work


DEFAULT_WEIGHTS = Weights()
_FEW = 16  # prompts
_NEAR = 1 / 16  # of a prompt: replicas that cost so much more than the best are as good


class Loads(NamedTuple):
    """How busy each of n replicas is, as far as the router knows. float64 [n]."""

    queued: Float64  # prompt tokens that it has been given and not computed
    running: Float64  # requests that it generates for
    recent: Float64  # prompt tokens computed lately, in an exponential window of minutes


def costs(
    prompt_tokens: int, cached_tokens: Int64, loads: Loads, mean_prompt: float, weights: Weights = DEFAULT_WEIGHTS
) -> Float64:
    """The cost of each replica, in tokens: float64 [n].

    Tokens to compute less those cached, tokens that are computed before them, and a share for work done lately. The
    last term spreads prompts that are cached nowhere, so that all caches turn over at one rate: together they then
    evict what one large LRU cache would. It has no unit of its own: it compares a replica with the mean, and is scaled
    by the mean prompt, so that it means the same at any rate of requests and any number of replicas. Where replicas
    have computed less than `_FEW` prompts lately, a share says little: the mean counts as that much.
    """
    mean = max(float(loads.recent.mean()) if len(loads.recent) else 0.0, _FEW * mean_prompt)
    busier = loads.recent / mean if mean > 0 else np.zeros(len(loads.recent))
    computed = prompt_tokens - np.minimum(cached_tokens, prompt_tokens)
    return (
        computed
        + weights.queued * loads.queued
        + weights.running * loads.running
        + weights.recent * mean_prompt * busier
    )


def choose(
    prompt_tokens: int,
    cached_tokens: Int64,
    loads: Loads,
    mean_prompt: float,
    allowed: npt.NDArray[np.bool_] | None = None,
    weights: Weights = DEFAULT_WEIGHTS,
    order: Float64 | None = None,
) -> int:
    """Of the replicas of nearly the least cost the one with the least recent work; of several, the first in ``order``.

    Many prompts begin alike, so a replica that has only the first blocks of a prompt is as good as one that has none.
    Where several routers choose, each knows the recent work of its own requests, and with another ``order`` they choose
    different ones (Kimi's trace on 1,000 replicas with eight routers: 76 % of the hits of one shared cache without).

    ``allowed`` bool [n]: those that may be chosen. Raises ValueError if there is none. ``order`` float64 [n]: by
    default that of the numbers.
    """
    cost = costs(prompt_tokens, cached_tokens, loads, mean_prompt, weights)
    if allowed is not None:
        cost = np.where(allowed, cost, np.inf)
    if not len(cost) or not np.isfinite(cost).any():
        raise ValueError("no replica may be chosen")
    near = np.flatnonzero(cost <= cost.min() + _NEAR * prompt_tokens)
    recent = loads.recent[near]
    near = near[recent == recent.min()]
    return int(near[0] if order is None else near[np.argmin(order[near])])
