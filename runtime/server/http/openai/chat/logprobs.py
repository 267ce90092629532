"""A token's logprob as OpenAI's APIs report it."""

from __future__ import annotations

from typing import Any

from .....logprobs import TokenLogprob
from .....tokenizer.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0  # JSON has no -inf


def describe_logprob(tokenizer: Tokenizer, row: TokenLogprob, alternatives: int | None) -> dict[str, Any]:
    """``alternatives``: how many likeliest tokens to list."""
    best = row.top[: alternatives or 0]
    token = _token(tokenizer, row.token, row.logprob)
    return {**token, "top_logprobs": [_token(tokenizer, *entry) for entry in best]}


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token)
    return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(data)}
