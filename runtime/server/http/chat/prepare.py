"""Prepares a chat request: renders its prompt, and makes a reader for each sample's answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from ....chat.breakpoints import breakpoint_positions
from ....chat.conversation import Conversation, OfferedTool
from ....chat.prompt import ChatPrompt, chat_prompt
from ....errors import renaming
from ....messages import Generate
from ....sampling_params import validate
from ..fields.cache import MAX_BREAKPOINTS, caching
from ..fields.prompts import check_count, check_priority, make_prompt, prepare_params
from ..state import AppState
from .arguments import bound_arguments
from .sample import Sample
from .spec import ChatSpec
from .tool_use import Formats, ToolUse

LEFT_OUT = "x-branchwise-tools-left-out"  # a response header
MAX_HEADER = 1024  # characters
INLINE = 32_768  # characters of a conversation rendered on the event loop; a longer one would stall it

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PreparedChat:
    """One engine prompt and the readers of its samples."""

    prompt: Generate
    samples: list[Sample]
    tools: Mapping[str, OfferedTool]  # by the names that the model calls
    names: Mapping[str, str]  # the client's names of our fields, for errors of the engine
    headers: Mapping[str, str]  # of the response


class ChatPreparer:
    """One per server. Detects how its model writes calls and thinking at the first request."""

    def __init__(self, state: AppState) -> None:
        self._state = state
        self._formats: Formats | None = None

    async def prepare(self, spec: ChatSpec) -> PreparedChat:
        """Raises `InvalidRequest`."""
        state = self._state
        limits = state.client.limits  # before the tokenizer: it raises while there is none
        template = state.tokenizer.required_template
        if self._formats is None:
            self._formats = Formats.of(state.config, state.tokenizer, template)
        tools = ToolUse(spec, self._formats, template)
        skips = spec.params.skip_special_tokens and not tools.keeps_special
        params = msgspec.structs.replace(spec.params, skip_special_tokens=skips)
        with renaming(spec.names):
            params = prepare_params(params, limits.vocab_size)
        check_count(params.n, state.config.max_samples_per_request, "n")
        prompt = await _checked_prompt(state, msgspec.structs.replace(spec.conversation, tools=tools.offered))

        def rendered() -> tuple[str, list[tuple[int, str | float | None]]]:
            text = prompt.text()
            found = breakpoint_positions(prompt, text, MAX_BREAKPOINTS)
            return text, [(at, breakpoint.ttl) for at, breakpoint in found]

        text, marks = await _beside_the_loop(prompt, rendered)
        with renaming(spec.names):
            constrained = validate(tools.constrained(params, text), limits.vocab_size)
        names = dict(spec.names)
        if constrained is not params:  # our grammar includes the client's constraint
            kind = params.constraint_kind
            names["ebnf"] = "tools" if kind is None or tools.forced else names.get(kind, kind)
        made = make_prompt(
            text,
            constrained,
            limits,
            names["prompt"],
            priority=check_priority(spec.priority),
            stream=spec.stream,
            echo_tokens=spec.echo_tokens,
            add_special_tokens=False,
            shorten=spec.shorten,
            **caching(state, spec.cache, marks=marks),
        )
        one_call = not spec.parallel_tool_calls
        samples = [Sample(state.tokenizer, params, tools.parser(text), one_call=one_call) for _ in range(params.n)]
        offered = {tool.tool.name: tool for tool in tools.offered}
        left_out = ", ".join(spec.conversation.left_out)[:MAX_HEADER]
        return PreparedChat(made, samples, offered, names, {LEFT_OUT: left_out} if left_out else {})


async def conversation_text(state: AppState, conversation: Conversation) -> str:
    """The prompt that a conversation becomes."""
    prompt = await _checked_prompt(state, conversation)
    return await _beside_the_loop(prompt, prompt.text)


async def _checked_prompt(state: AppState, conversation: Conversation) -> ChatPrompt:
    prompt = chat_prompt(state.tokenizer.required_template, conversation)
    await bound_arguments(prompt.turns, prompt.template, state.config.max_json_values)
    return prompt


async def _beside_the_loop(prompt: ChatPrompt, render: Callable[[], T]) -> T:
    """``render()``, in a thread for a long conversation."""
    turns = prompt.turns
    short = len(turns) <= 64 and sum(len(text) for turn in turns for text in turn.texts) <= INLINE
    if short and "documents" not in prompt.variables:
        return render()
    return await asyncio.to_thread(render)
