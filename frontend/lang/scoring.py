"""How a strand does a ``select``: every choice is scored as the continuation, in one call, and the best one stays.

Token boundaries are healed: the last words before the choices wait untokenized and are encoded together with each
choice, so ``"The answer is"`` + ``" yes"`` and ``"Answer: "`` + ``"yes"`` are both read as a tokenizer would read them
whole. What all choices share from there goes into the prompt; each choice is scored from where they part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .backend import check_score
from .choices import Scored
from .codec import Codec, Run, safe_cut
from .errors import BackendError
from .expressions import Select

if TYPE_CHECKING:
    from .interpreter import Interpreter
    from .slots import Slot

Pairs = list[tuple[int | str, float]]


async def run_select(strand: Interpreter, select: Select, slot: Slot) -> None:
    transcript = await strand.written()
    check_score(strand.backend)
    if transcript.as_messages:
        raise BackendError(f"{strand.backend.name} cannot score choices in a chat: write the prompt as text")
    codec = strand.session.codec
    outs = transcript.take()
    if codec is None:
        if select.method.unconditional:
            raise BackendError(
                f"{select.method} needs the model's tokenizer, which {strand.backend.name} does not give"
            )
        await strand.hand_over(outs)
        scored = [_scored(pairs, []) for pairs in await strand.backend.score(strand.handle, list(select.choices))]
        best = select.method.pick(scored)
        await strand.extend(select.choices[best])
    else:
        best, scored = await _select_tokens(strand, codec, select, outs)
    choice = select.choices[best]
    transcript.wrote(None, choice)
    strand.uncomputed = 1
    strand.show()
    if slot.feed is not None:
        slot.feed.put(choice)
    slot.set(choice, _meta(select, scored, best))


async def _select_tokens(
    strand: Interpreter, codec: Codec, select: Select, outs: list[Any]
) -> tuple[int, list[Scored]]:
    waiting: list[Run] = []
    if outs and isinstance(outs[-1], Run):
        last = outs[-1]
        cut = safe_cut(last.text)
        outs = [*outs[:-1], Run(last.text[:cut], last.special)]
        waiting = [Run(last.text[cut:], last.special)]
    await strand.hand_over(outs)
    opening = strand.handle.length == 0
    bare = codec.encode(waiting, opening=opening)
    wholes = [codec.encode([*waiting, Run(choice)], opening=opening) for choice in select.choices]
    shared = _shared(bare, wholes)
    await strand.extend(bare[:shared])
    endings = [whole[shared:] for whole in wholes]
    neutral = codec.neutral
    start = strand.handle
    if not start.length:
        start = await strand.backend.create()
        await strand.backend.extend(start, neutral)
    rows: list[Pairs] = await strand.backend.score(start, endings)
    free: list[Pairs] = [[] for _ in endings]
    if select.method.unconditional:
        nothing = await strand.backend.create()
        await strand.backend.extend(nothing, neutral)
        free = await strand.backend.score(nothing, endings)
        await strand.backend.close(nothing)
    if start is not strand.handle:
        await strand.backend.close(start)
    scored = [_scored(row, alone) for row, alone in zip(rows, free, strict=True)]
    best = select.method.pick(scored)
    await strand.extend(endings[best])
    return best, scored


def _shared(bare: list[int], wholes: list[list[int]]) -> int:
    """How many first tokens are the same in all."""
    count = 0
    for column in zip(bare, *wholes, strict=False):
        if len(set(column)) > 1:
            break
        count += 1
    return count


def _scored(row: Pairs, alone: Pairs) -> Scored:
    return Scored(
        tuple(token for token, _ in row), tuple(value for _, value in row), tuple(value for _, value in alone)
    )


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
