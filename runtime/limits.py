"""Checks of prompts: token ids against the vocabulary, lengths against the context and the KV pool.

The scheduler checks every prompt it is given. HTTP and the tokenizer process check before it, so that one bad prompt
fails its whole request before the others generate anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from .errors import InvalidRequest
from .messages import Limits
from .sampling_params import SamplingParams

MAX_LABEL = 512  # characters of a name or id chosen by a client
MAX_DEPTH = 64  # nested objects and lists in what a client sends


def check_token_ids(ids: Sequence[Any] | npt.NDArray[np.integer[Any]], vocab_size: int, path: str) -> None:
    """Checks that each is an integer from 0 to ``vocab_size - 1``. Raises `InvalidRequest` at the first other."""
    if not len(ids):
        raise InvalidRequest(path, "must not be empty")
    if isinstance(ids, np.ndarray):
        if ids.view(f"u{ids.itemsize}").max() < vocab_size:  # as unsigned, a negative id exceeds every size
            return
        wrong = np.flatnonzero((ids < 0) | (ids >= vocab_size))
        suspects: Iterable[tuple[int, Any]] = [(int(position), int(ids[position])) for position in wrong[:1]]
    elif set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab_size:
        return
    else:
        suspects = enumerate(ids)
    for position, token in suspects:
        if type(token) is not int:
            kind = "list" if isinstance(token, np.ndarray) else type(token).__name__
            raise InvalidRequest(f"{path}[{position}]", f"must be an integer token id, got {kind}")
        if not 0 <= token < vocab_size:
            raise InvalidRequest(
                f"{path}[{position}]",
                f"must be a token id from 0 to {vocab_size - 1}, got {token}",
                value=token,
                limit=vocab_size - 1,
            )


def check_text_length(text: str, longest_token: int | None, limits: Limits, path: str) -> None:
    """Refuses a text that is too long for any tokenization. To be called before it is tokenized, which takes a second
    and 40 MB for each megabyte. ``longest_token``: of `Tokenizer.longest_token`. Raises `InvalidRequest`."""
    if longest_token is None:
        return
    bound, size = min(limits.max_model_len, limits.pool_tokens), len(text.encode())
    if size > bound * longest_token:
        raise InvalidRequest(
            path, f"has {size} bytes, at least {size // longest_token} tokens; the limit is {bound} tokens"
        )


def fit(
    prompt_tokens: int,
    params: SamplingParams,
    limits: Limits,
    *,
    path: str = "prompt",
    counted: str = "tokens",
    shorten: bool = False,
) -> SamplingParams:
    """Check prompt and completion, in tokens, against the context length and the whole KV pool.

    ``params.max_tokens=None`` becomes what is left, and with ``shorten`` so does a ``max_tokens`` above that. ``path``
    names the prompt in errors, ``counted`` what was counted. Raises `InvalidRequest` with the value and the limit.
    """
    if prompt_tokens == 0:
        raise InvalidRequest(path, "must not be empty")
    if limits.max_model_len <= limits.pool_tokens:
        bound, what, flag = limits.max_model_len, "tokens of the model's context", "--max-model-len"
    else:
        bound, what, flag = limits.pool_tokens, "tokens of the whole KV pool", "--kv-cache-tokens"
    if prompt_tokens > bound:
        problem = f"has {prompt_tokens} {counted}, more than the {bound} {what}; shorten it or raise {flag}"
        raise InvalidRequest(path, problem, value=prompt_tokens, limit=bound)
    room = bound - prompt_tokens
    if params.max_tokens is None or (shorten and params.max_tokens > room):
        if room == 0:
            problem = f"has {prompt_tokens} {counted} and leaves no room to generate: the limit is {bound} {what}"
            raise InvalidRequest(path, problem, value=prompt_tokens, limit=bound)
        return msgspec.structs.replace(params, max_tokens=room, min_tokens=min(params.min_tokens, room))
    if params.max_tokens > room:
        raise InvalidRequest(
            "max_tokens",
            f"{params.max_tokens} + {{0}} {prompt_tokens} = {params.max_tokens + prompt_tokens} tokens, "
            f"more than the {bound} {what}; lower it or raise {flag}",
            others=(path,),
            value=params.max_tokens,
            limit=room,
        )
    return params
