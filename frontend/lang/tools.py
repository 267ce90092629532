"""Tools: Python functions that the model may call. A library program, written in the language itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...runtime.chat.blocks import read_blocks, text_of
from ...runtime.chat.tools.definitions import Tool as Definition
from ...runtime.chat.tools.formats import markers
from ...runtime.chat.tools.parser import StreamParser
from .codec import Codec
from .errors import ProgramError, call_site
from .expressions import Expr, Gen, assistant, gen, role
from .library import Callbacks, anywhere
from .state import AsyncState
from .tool_schema import Tool, fitted, schema_of


@dataclass(frozen=True)
class ExecutedCall:
    """One tool call and its result; ``error`` is set if it failed."""

    name: str
    arguments: Mapping[str, Any]
    result: Any = None
    error: str | None = None

    @property
    def content(self) -> str:
        """The tool turn that answers it."""
        return json.dumps({"error": self.error} if self.error else self.result, ensure_ascii=False, default=str)


def tool_loop(s: Any, tools: Sequence[Tool], max_steps: int = 8, *, name: str = "answer", **sampling: Any) -> Any:
    """Lets the model answer and call ``tools``; its final answer becomes variable ``name``.

    ``tools``: functions with type hints, ``async def`` or not; the first paragraph of the docstring describes each to
    the model. A call that is invalid or fails is answered with ``{"error": ...}``. To be called where the assistant's
    turn would come. Returns the calls (an awaitable of them with an `AsyncState`). Raises `ProgramError` if the model
    still calls tools after ``max_steps`` turns, or its chat template does not write them.
    """
    return anywhere(s, lambda state, callbacks: _tool_loop(state, callbacks, tools, max_steps, name, sampling))


async def _tool_loop(
    s: AsyncState,
    callbacks: Callbacks,
    tools: Sequence[Tool],
    max_steps: int,
    name: str,
    sampling: Mapping[str, Any],
) -> list[ExecutedCall]:
    from ...runtime.chat.openai_tools import openai_tools  # imports NumPy: not before the first request

    known = {tool.__name__: tool for tool in tools}
    schemas = [schema_of(tool) for tool in tools]
    definitions = [offered.tool for offered in openai_tools(schemas)]
    s.use_tools(schemas)
    await s.sync()
    codec = s._interpreter.session.codec
    if codec is not None and codec.calls is None:
        problem = "how this model writes tool calls cannot be detected from its chat template"
        raise ProgramError(problem, site=call_site(), backend=s._interpreter.session.backend.name)
    calls: list[ExecutedCall] = []
    for _ in range(max_steps):
        s += assistant(_with_markers(gen(name, **sampling), codec))
        asked = parse_calls(await s[name], codec, definitions)
        if not asked:
            return calls
        for one in asked:
            calls.append(await _make(one, known, callbacks))
            s += role("tool", calls[-1].content)
    raise ProgramError(f"the model still calls tools after {max_steps} steps", variable=name, site=call_site())


def _with_markers(expr: Expr, codec: Codec | None) -> Expr:
    """Keeps special tokens in the text, if the model marks its calls or reasoning with them."""
    if not isinstance(expr, Gen):
        raise TypeError("the answer is written freely: choices cannot be given")
    if codec is None or not codec.special.intersection(markers(codec.calls, codec.thoughts)):
        return expr
    options = {**expr.sampling.options, "skip_special_tokens": False}
    return replace(expr, sampling=replace(expr.sampling, options=options))


def parse_calls(text: str, codec: Codec | None, tools: Sequence[Definition]) -> list[ExecutedCall]:
    """The calls in an answer, in the model's own form. A malformed one has its ``error`` set.

    Without a codec, the server has parsed them and they are in the Hermes form (see `openai_tools`).
    """
    form, thoughts = ("hermes", None) if codec is None else (codec.calls, codec.thoughts)
    before, ended, _ = text.partition(thoughts.end) if thoughts else ("", "", "")
    thinking = bool(ended) and thoughts is not None and thoughts.begin not in before  # the prompt began it
    parser = StreamParser(form, thoughts, tools, reasoning_open=thinking, unknown_tools="call")
    blocks = read_blocks(parser, text)
    found = [_parsed(block.name, block.text, block.complete) for block in blocks if block.kind == "call"]
    begins = codec.calls.begin if codec is not None and codec.calls is not None else ()
    if not found and any(marker in text_of(blocks, "text") for marker in begins):
        return [ExecutedCall("", {}, error="not a tool call: it has no name, or another form than it must have")]
    return found


def _parsed(name: str, text: str, complete: bool) -> ExecutedCall:
    try:
        arguments = json.loads(text)
    except ValueError:
        complete = False
    if not complete:
        return ExecutedCall(name, {}, error=f"the arguments are not complete JSON: {text}")
    if not isinstance(arguments, dict):
        return ExecutedCall(name, {}, error=f"the arguments must be an object, got {text}")
    return ExecutedCall(name, arguments)


async def _make(call: ExecutedCall, known: Mapping[str, Tool], callbacks: Callbacks) -> ExecutedCall:
    if call.error:
        return call
    tool = known.get(call.name)
    if tool is None:
        return replace(call, error=f"no tool is called {call.name!r}; there are {', '.join(known)}")
    try:
        arguments = fitted(tool, call.arguments)
    except ValueError as error:
        return replace(call, error=str(error))
    try:
        return replace(call, result=await callbacks.call(tool, **arguments))
    except Exception as error:  # a tool may raise anything; the model gets the error
        return replace(call, error=f"{type(error).__name__}: {error}")
