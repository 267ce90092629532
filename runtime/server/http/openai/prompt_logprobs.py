"""vLLM's ``prompt_logprobs``: a map from token id to logprob for each prompt token."""

from __future__ import annotations

from typing import Any

from ....outputs import Output
from ....tokenizer.tokenizer import Tokenizer
from .chat.logprobs import LEAST_LOGPROB


def describe_prompt_logprobs(tokenizer: Tokenizer, output: Output) -> list[dict[str, Any] | None]:
    """One entry a prompt token: the token's own logprob and those of the k likeliest, by token id as JSON has keys.

    None where there is no logprob: nothing precedes the first token.
    """
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
