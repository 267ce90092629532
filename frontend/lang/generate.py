"""Runs a ``gen``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import BackendError
from .backend import GenerationRequest, check_constraint
from .expressions import Gen, convert
from .prompt_writer import PromptWriter
from .transcript import Transcript
from .variables import Variable


async def run_gen(writer: PromptWriter, gen: Gen, variable: Variable, seed: int | None) -> None:
    """Sends the prompt to the backend, appends the answer to the state and sets the variable."""
    transcript, session = await writer.open(), writer.session
    sampling = gen.sampling.over(session.defaults)
    check_constraint(session.backend, sampling.constraint)

    def on_delta(text: str) -> None:
        writer.show_delta(text)
        if variable.stream is not None:
            variable.stream.put(text)

    tools: Sequence[Mapping[str, Any]] = ()
    if transcript.as_messages:
        await _write_turns(writer, transcript)
        tools = transcript.variables.values.get("tools", ())
    else:
        await writer.write(transcript.take())
        if not writer.handle.length:
            raise BackendError("the prompt is empty: append text before gen")
    options = {"seed": seed, **sampling.options}
    request = GenerationRequest(options, sampling.constraint, sampling.text_in_logprobs, tools)
    samples = await session.backend.generate(writer.handle, request, on_delta if session.streams else None)
    writer.generated(samples[0].ids, samples[0].text, transcript)
    if variable.stream is not None and variable.stream.empty:
        variable.stream.put(samples[0].text)
    try:
        values = [convert(one.text, gen.dtype) for one in samples]
    except (ValueError, KeyError) as error:
        kind = getattr(gen.dtype, "__name__", "value")
        reason = f"finish_reason: {(samples[0].meta.get('finish_reason') or {}).get('type')}"
        raise BackendError(f"the text is not a complete {kind}: {samples[0].text!r} ({reason})") from error
    if request.params.n > 1:
        variable.set(values, [one.meta for one in samples])
    else:
        variable.set(values[0], samples[0].meta)


async def _write_turns(writer: PromptWriter, transcript: Transcript) -> None:
    """For a server that only chats: sends it the turns, from which its own template makes the prompt."""
    name = writer.backend.name
    if transcript.speaking != "assistant":
        raise BackendError(f"{name} only chats: gen must stand in the assistant's turn")
    *before, own = transcript.turns()
    if own.content:
        raise BackendError(f"{name} only chats: an assistant's turn must begin with its gen")
    if transcript.loose:
        raise BackendError(f"{name} only chats: text must stand in a turn")
    for turn in before[writer.handle.length :]:
        await writer.backend.extend(writer.handle, turn)
    transcript.take_as_messages()
    writer.show()
