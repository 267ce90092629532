"""Runs a ``select``: all choices are scored as the continuation in one call, and the best one is appended.

Token boundaries are healed: the last words before the choices are encoded together with each choice, so that
``"The answer is"`` + ``" yes"`` and ``"Answer: "`` + ``"yes"`` get the tokens of the whole text. The first tokens that
all choices share go into the prompt; each choice is scored from where they differ.
"""

from __future__ import annotations

from typing import Any

from ..errors import BackendError
from .backend import TokenScores, check_score
from .choices import Scored
from .codec import Codec, Run, safe_cut
from .expressions import Select
from .prompt_writer import PromptWriter
from .transcript import Out
from .variables import Variable


async def run_select(writer: PromptWriter, select: Select, variable: Variable) -> None:
    transcript, backend = await writer.open(), writer.backend
    check_score(backend)
    if transcript.as_messages:
        raise BackendError(f"{backend.name} cannot score choices in a chat: write the prompt as text")
    codec, outs = writer.session.codec, transcript.take()
    if codec is not None:
        best, scored = await _select_tokens(writer, codec, select, outs)
    elif select.method.unconditional:
        raise BackendError(f"{select.method} needs the model's tokenizer, which {backend.name} does not provide")
    else:
        await writer.write(outs)
        scored = [_scored(scores, []) for scores in await backend.score(writer.handle, list(select.choices))]
        best = select.method.pick(scored)
        await writer.extend(select.choices[best])
    choice = select.choices[best]
    writer.generated(None, choice, transcript)
    if variable.stream is not None:
        variable.stream.put(choice)
    variable.set(choice, _meta(select, scored, best))


async def _select_tokens(
    writer: PromptWriter, codec: Codec, select: Select, outs: list[Out]
) -> tuple[int, list[Scored]]:
    rest: list[Run] = []  # the last words, to be encoded with each choice
    if outs and isinstance(outs[-1], Run):
        text, special = outs[-1]
        cut = safe_cut(text)
        outs, rest = [*outs[:-1], Run(text[:cut], special)], [Run(text[cut:], special)]
    await writer.write(outs)
    opening = writer.handle.length == 0
    bare = codec.encode(rest, opening=opening)
    encoded = [codec.encode([*rest, Run(choice)], opening=opening) for choice in select.choices]
    shared = _shared_prefix(bare, encoded)
    await writer.extend(bare[:shared])
    endings = [ids[shared:] for ids in encoded]
    if writer.handle.length:
        conditional = await writer.backend.score(writer.handle, endings)
    else:
        conditional = await _score_alone(writer, codec, endings)
    unconditional: list[TokenScores] = [[] for _ in endings]
    if select.method.unconditional:
        unconditional = await _score_alone(writer, codec, endings)
    scored = [_scored(*pair) for pair in zip(conditional, unconditional, strict=True)]
    best = select.method.pick(scored)
    await writer.extend(endings[best])
    return best, scored


async def _score_alone(writer: PromptWriter, codec: Codec, endings: list[list[int]]) -> list[TokenScores]:
    """The scores of the endings without the prompt."""
    handle = await writer.backend.create()
    await writer.backend.extend(handle, codec.neutral)
    scores = await writer.backend.score(handle, endings)
    await writer.backend.close(handle)
    return scores


def _shared_prefix(bare: list[int], encoded: list[list[int]]) -> int:
    """The number of leading tokens that all of them share."""
    count = 0
    for column in zip(bare, *encoded, strict=False):
        if len(set(column)) > 1:
            break
        count += 1
    return count


def _scored(scores: TokenScores, unconditional: TokenScores) -> Scored:
    tokens, logprobs = tuple(token for token, _ in scores), tuple(value for _, value in scores)
    return Scored(tokens, logprobs, tuple(value for _, value in unconditional))


def _meta(select: Select, scored: list[Scored], best: int) -> dict[str, Any]:
    return {
        "finish_reason": {"type": "stop", "matched": None},
        "choices": list(select.choices),
        "choice_index": best,
        "choices_method": select.method.name,
        "normalized_prompt_logprobs": [one.mean for one in scored],
        "input_token_logprobs": [
            [[value, token, None] for token, value in zip(one.tokens, one.logprobs, strict=True)] for one in scored
        ],
    }
