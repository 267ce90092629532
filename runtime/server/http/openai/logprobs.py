"""Logprobs of tokens: as OpenAI's APIs report them, and vLLM's ``prompt_logprobs``."""

from __future__ import annotations

from typing import Any

from ....logprobs import TokenLogprob
from ....outputs import Output
from ....tokenizer.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0  # JSON has no -inf


def describe_logprob(
    tokenizer: Tokenizer, row: TokenLogprob, alternatives: int | None, *, as_ids: bool = False
) -> dict[str, Any]:
    """``alternatives``: how many likeliest tokens to list. ``as_ids``: vLLM's ``token_id:123`` instead of texts."""
    best = row.top[: alternatives or 0]
    token = _token(tokenizer, row.token, row.logprob, as_ids)
    return {**token, "top_logprobs": [_token(tokenizer, *entry, as_ids) for entry in best]}


def describe_prompt_logprobs(tokenizer: Tokenizer, output: Output) -> list[dict[str, Any] | None]:
    """vLLM's ``prompt_logprobs``: for each prompt token its own logprob and those of the k likeliest, by token id
    as text. None where there is no logprob: nothing precedes the first token."""
    described: list[dict[str, Any] | None] = []
    for position in range(len(output.prompt)):
        row = output.prompt_logprobs.get(position)
        if row is None:
            described.append(None)
            continue
        described.append(
            {
                str(id): {
                    "logprob": max(logprob, LEAST_LOGPROB),
                    "rank": rank,
                    "decoded_token": tokenizer.token_text(id),
                }
                for id, (logprob, rank) in row.by_likelihood.items()
            }
        )
    return described


def _token(tokenizer: Tokenizer, token: int, logprob: float, as_ids: bool) -> dict[str, Any]:
    data = tokenizer.token_bytes(token)
    text = f"token_id:{token}" if as_ids else data.decode("utf-8", "replace")
    return {"token": text, "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(data)}
