"""From a chat request to what is run for it: the prompt its template makes, and who reads each sample's answer.

Every route that talks in conversations comes through here: each first says what it wants as a `ChatRequest`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .....chat.prompt import chat_prompt, tool_definitions
from .....chat.template import ChatTemplate
from .....errors import InvalidRequest
from .....messages import Generate
from .....sampling_params import validate
from ...fields.cache import caching
from ...fields.prompts import check_count, check_priority, make_prompt, prepare_params
from ...fields.requests import parse
from ...state import AppState
from .arguments import bound_arguments
from .choice import Choice
from .marks import chat_marks
from .request import CHAT_UNSUPPORTED, ChatRequest, names, sampling
from .tools import Formats, ToolUse, tool_limits

INLINE = 32_768  # characters of a conversation that is rendered right here; a longer one must not stall the loop


@dataclass(frozen=True, slots=True)
class Turn:
    """One engine prompt and the readers of its samples."""

    prompt: Generate
    choices: list[Choice]


class Turns:
    """Makes turns for one server; learns how its model writes calls and thinking when the first request comes."""

    def __init__(self, state: AppState) -> None:
        self._site = state
        self._formats: Formats | None = None

    async def turn(self, body: ChatRequest) -> Turn:
        """Raises `InvalidRequest`, in the words of the chat route: others have `renamed` for it."""
        state = self._site
        limits = state.client.limits  # before the tokenizer: it raises while there is none
        template = chat_template(state)
        if self._formats is None:
            self._formats = Formats.of(state.config, state.tokenizer, template)
        tools = ToolUse(body, self._formats, template, state.config)
        called = names(body)
        skips = body.skip_special_tokens and not tools.keeps_special
        params = sampling(body, state.preferred, skip_special_tokens=skips)
        params = prepare_params(params, limits, called, state.config)
        check_count(params.n, state.config.max_samples_per_request, "n")
        text = await rendered(state, body, tools.definitions)

        async def again(messages: list[Any], definitions: list[dict[str, Any]] | None) -> str:
            return await rendered(state, body.model_copy(update={"messages": messages}), definitions)

        prompt = make_prompt(
            text,
            validate(tools.constrained(params, text), limits.vocab_size, called),
            limits,
            "messages",
            called,
            priority=check_priority(body.priority),
            stream=body.stream,
            add_special_tokens=False,
            **caching(state, body, marks=await chat_marks(body.messages, body.tools, tools.definitions, text, again)),
        )
        choices = [
            Choice(state.tokenizer, params, tools.parser(text), one_call=tools.one_call) for _ in range(params.n)
        ]
        return Turn(prompt, choices)


def chat_template(state: AppState) -> ChatTemplate:
    template = state.tokenizer.chat_template
    if template is None:
        raise InvalidRequest(
            "this model has no chat template: send a prompt to /v1/completions instead", field="messages"
        )
    return template


async def conversation_text(state: AppState, raw: Mapping[str, Any], within: str = "") -> tuple[str, ChatRequest]:
    """The prompt that a body's conversation becomes, where a body may also hold one: its fields are a chat's."""
    state.client.limits  # noqa: B018 - raises until there is a tokenizer
    chat = parse(ChatRequest, raw, within, CHAT_UNSUPPORTED)
    return await rendered(state, chat, tool_definitions(chat.tools, tool_limits(state.config))), chat


async def rendered(state: AppState, body: ChatRequest, tools: list[dict[str, Any]] | None) -> str:
    """The prompt's text. A long conversation is rendered in a thread."""
    template = chat_template(state)
    if len(body.messages) <= state.config.max_messages:  # more are about to be refused
        await bound_arguments(body.messages, template, state.config.max_json_values)
    prompt = chat_prompt(
        template,
        body.messages,
        definitions=tools,
        chat_template_kwargs=body.chat_template_kwargs,
        documents=body.documents,
        reasoning_effort=body.reasoning_effort,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        max_messages=state.config.max_messages,
    )
    messages = prompt.messages
    if len(messages) <= 64 and sum(len(message["content"]) for message in messages) <= INLINE and not body.documents:
        return prompt.text()
    return await asyncio.to_thread(prompt.text)
