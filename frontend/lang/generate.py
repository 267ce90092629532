"""How a strand does a ``gen``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .backend import Completion, GenerationRequest, check_constraint
from .errors import BackendError
from .expressions import Gen, convert

if TYPE_CHECKING:
    from .interpreter import Interpreter
    from .slots import Slot


async def run_gen(strand: Interpreter, gen: Gen, slot: Slot, seed: int | None) -> None:
    """The prompt so far goes to the backend, what comes back into the state and the variable."""
    transcript = await strand.written()
    sampling = gen.sampling.over(strand.session.defaults)
    check_constraint(strand.backend, sampling.constraint)
    options = {"seed": seed, **sampling.options}

    def on_delta(text: str) -> None:
        strand.show_delta(text)
        if slot.feed is not None:
            slot.feed.put(text)

    tools: Sequence[Mapping[str, Any]] = ()
    if transcript.as_messages:
        await _put_messages(strand)
        tools = transcript.variables.values.get("tools", ())
    else:
        await strand.hand_over(transcript.take())
        if not strand.handle.length:
            raise BackendError("there is nothing to go on from: the prompt is empty")
    ask = GenerationRequest(options, sampling.constraint, sampling.text_in_logprobs, tools)
    streams = strand.session.streams
    done: list[Completion] = await strand.backend.generate(strand.handle, ask, on_delta if streams else None)
    transcript.wrote(done[0].ids, done[0].text)
    strand.uncomputed = 1  # the last token drawn has not been read yet
    if streams:
        strand.show()
        if slot.feed is not None and slot.feed.empty:
            slot.feed.put(done[0].text)
    try:
        values = [convert(one.text, gen.dtype) for one in done]
    except (ValueError, KeyError) as error:
        kind = getattr(gen.dtype, "__name__", "value")
        raise BackendError(f"the text is not a complete {kind}: {done[0].text!r} ({_why(done[0])})") from error
    many = ask.params.n > 1
    slot.set(values if many else values[0], [one.meta for one in done] if many else done[0].meta)


async def _put_messages(strand: Interpreter) -> None:
    """For a server that only chats: the conversation, which the server's own template turns into a prompt."""
    transcript = strand.transcript
    if transcript is None or transcript.speaking != "assistant":
        raise BackendError(f"{strand.backend.name} only chats: gen must stand in the assistant's turn")
    *before, mine = transcript.messages()
    if mine.content:
        raise BackendError(f"{strand.backend.name} only chats: an assistant's turn must begin with its gen")
    if transcript.loose:
        raise BackendError(f"{strand.backend.name} only chats: text must stand in a turn")
    for message in before[strand.handle.length :]:
        await strand.backend.extend(strand.handle, message)
    transcript.take_as_messages()
    strand.show()


def _why(one: Completion) -> str:
    return f"finish_reason: {(one.meta.get('finish_reason') or {}).get('type')}"
