"""Best of n and beam search: library programs, written in the language itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from .expressions import gen
from .library import Callbacks, anywhere
from .state import AsyncState

Score = Callable[[Any], Any]  # of a state: a number, or an awaitable of one


def best_of(
    s: Any, n: int, expr: Any = None, *, score: Score | None = None, name: str = "best", **sampling: Any
) -> Any:
    """Samples ``n`` continuations of ``s`` and appends the best one's text, token for token.

    ``expr``: what to append in each branch; by default a ``gen`` of ``name`` with ``sampling``'s arguments. ``score``:
    a function of the branch (higher is better, ``async def`` or not); by default the mean logprob of ``name``. It may
    append to the branch it is given, which is a copy. Returns all scores, in the branches' order.
    """
    return anywhere(s, lambda state, callbacks: _best_of(state, callbacks, n, expr, score, name, sampling))


async def _best_of(
    s: AsyncState,
    callbacks: Callbacks,
    n: int,
    expr: Any,
    score: Score | None,
    name: str,
    sampling: dict[str, Any],
) -> list[float]:
    branches = s.fork(n)
    if score is None:
        sampling = {"logprobs": 0, **sampling}
    branches += gen(name, **sampling) if expr is None else expr
    if score is None:
        scores = await asyncio.gather(*(_mean_logprob(branch, name) for branch in branches))
    else:
        scores = await asyncio.gather(*(callbacks.call(score, branch.copy()) for branch in branches))
    best = branches[max(range(n), key=lambda i: scores[i])]
    found = best._interpreter.own_variables()
    s.join([best], "concate_and_append")
    for variable in found.values():
        s._interpreter.define(variable)
    return list(scores)


async def _mean_logprob(branch: AsyncState, name: str) -> float:
    rows = (await branch.meta(name))["output_token_logprobs"]
    return sum(row[0] for row in rows) / max(1, len(rows))


def search(
    s: Any,
    propose: Callable[[Any], Any],
    score: Score,
    beam: int = 3,
    depth: int = 3,
    *,
    branches: int = 5,
    done: Callable[[Any], Any] | None = None,
) -> Any:
    """Breadth-first beam search over continuations of ``s``: tree of thoughts (Yao et al., 2023).

    At each of ``depth`` levels every kept state is forked ``branches`` times; ``propose(fork)`` appends one step to a
    fork, ``score(fork)`` rates a copy of it (higher is better), and the ``beam`` best of all are kept. A score of None
    drops a branch. ``done(fork)``: whether the fork needs no further step. Returns the kept states, best first; ``s``
    is unchanged. The callbacks get blocking states in threads, or, if they are ``async def``, awaitable ones.
    """
    return anywhere(
        s, lambda state, callbacks: _search(state, callbacks, propose, score, beam, depth, branches, done, type(s))
    )


async def _search(
    s: AsyncState,
    callbacks: Callbacks,
    propose: Callable[[Any], Any],
    score: Score,
    beam: int,
    depth: int,
    branches: int,
    done: Callable[[Any], Any] | None,
    kind: type[Any],
) -> list[Any]:
    async def grow(fork: AsyncState) -> tuple[float, AsyncState, bool] | None:
        await callbacks.call(propose, fork)
        rated, over = await asyncio.gather(
            callbacks.call(score, fork.copy()), callbacks.call(done, fork) if done else _no()
        )
        return None if rated is None else (rated, fork, bool(over))

    kept: list[tuple[float, AsyncState, bool]] = [(0.0, s, False)]
    for _ in range(depth):
        finished = [one for one in kept if one[2]]
        forks = [fork for _, state, over in kept if not over for fork in state.fork(branches)]
        if not forks:
            break
        grown = await asyncio.gather(*(grow(fork) for fork in forks))
        kept = sorted([*finished, *(one for one in grown if one is not None)], key=lambda one: -one[0])[:beam]
    return [kind(state._interpreter) for _, state, _ in kept if state is not s]


async def _no() -> bool:
    return False
