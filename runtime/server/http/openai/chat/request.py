"""``/v1/chat/completions``: the fields of a request, and its conversion to a `ChatSpec`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from .....chat.conversation import Conversation
from .....chat.openai_messages import openai_turns
from .....chat.openai_tools import openai_tools
from .....errors import InvalidRequest
from ...chat.prepare import conversation_text
from ...chat.spec import ChatSpec, openai_tool_choice
from ...chat.tool_use import tool_limits
from ...fields.known import ANSWER_FIELDS, UNSUPPORTED
from ...fields.parse import StreamOptions, Strings, parse
from ...fields.prompts import check_label, openai_priority
from ...fields.sampling import (
    OpenAIFields,
    ParsedSampling,
    check_prompt_logprobs,
    openai_sampling,
    prompt_logprobs_field,
)
from ...state import AppState


class ChatFields(OpenAIFields):
    """The fields of OpenAI's chat routes beside the conversation itself."""

    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    separate_reasoning: bool = Field(True, description="Thinking is kept apart from the answer.")
    add_generation_prompt: bool | None = Field(None, description="null: unless continue_final_message.")
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[Any] | None = None
    parse_special: bool = Field(False, description="Text that spells a special token becomes one.")


class ChatRequest(ChatFields):
    """OpenAI's chat completions, and the fields vLLM and SGLang add to them."""

    messages: list[Any] = Field(description="Objects with a role and a content: a string, or a list of text parts.")
    max_completion_tokens: int | None = Field(None, description="null: as many as the context allows.")
    max_tokens: int | None = Field(None, description="The older name of max_completion_tokens.")
    n: int = 1
    logprobs: bool = False
    top_logprobs: int | None = None
    prompt_logprobs: int | None = prompt_logprobs_field()
    stream_options: StreamOptions | None = None
    reasoning_effort: str | None = None
    modalities: Strings | None = None


# Fields other servers take that would change the result; of those of the other routes, some are this one's own.
CHAT_UNSUPPORTED = (
    UNSUPPORTED
    | ANSWER_FIELDS
    | {"audio", "web_search_options", "moderation", "mm_processor_kwargs", "media_io_kwargs"}
)


def chat_spec(body: ChatRequest, state: AppState) -> ChatSpec:
    """Raises `InvalidRequest`."""
    check_label(body.rid, "rid")
    conversation = chat_conversation(body, state)
    params, names = chat_sampling(body, state.preferred)
    return ChatSpec(
        conversation=conversation,
        params=params,
        names=names,
        cache=body,
        tool_choice=openai_tool_choice(body.tool_choice, conversation.tools),
        **shared_fields(body),
    )


def shared_fields(body: ChatFields) -> dict[str, Any]:
    """The fields of a `ChatSpec` that both of OpenAI's chat routes name alike."""
    return {
        "parallel_tool_calls": body.parallel_tool_calls,
        "separate_reasoning": body.separate_reasoning,
        "priority": openai_priority(body.priority),
        "stream": body.stream,
        "echo_tokens": body.return_token_ids,
    }


def template_options(body: ChatFields) -> dict[str, Any]:
    """The fields of a `Conversation` beside turns and tools."""
    return {
        "chat_template_kwargs": body.chat_template_kwargs,
        "documents": body.documents,
        "add_generation_prompt": body.add_generation_prompt,
        "continue_final_message": body.continue_final_message,
        "parse_special": body.parse_special,
    }


def chat_conversation(body: ChatRequest, state: AppState) -> Conversation:
    left_out: list[str] = []
    return Conversation(
        turns=openai_turns(body.messages, state.config.max_messages),
        tools=openai_tools(body.tools, tool_limits(state.config), left_out=left_out),
        left_out=left_out,
        reasoning_effort=body.reasoning_effort,
        **template_options(body),
    )


async def chat_text(state: AppState, raw: Mapping[str, Any], within: str = "") -> tuple[str, Conversation]:
    """The prompt of a conversation in another route's body, where it has a chat's fields; and the conversation."""
    body = parse(ChatRequest, raw, within, CHAT_UNSUPPORTED)
    conversation = chat_conversation(body, state)
    return await conversation_text(state, conversation), conversation


def chat_sampling(request: ChatRequest, preferred: Mapping[str, float]) -> ParsedSampling:
    """``preferred``: the served model's `sampling_defaults`. Bounds are checked later, by `prepare_params`."""
    names = {"prompt": "messages", "include_stop": "include_stop_str_in_output", "logprobs": "top_logprobs"}
    limit = request.max_tokens
    if request.max_completion_tokens is not None:
        limit, names["max_tokens"] = request.max_completion_tokens, "max_completion_tokens"
    if request.max_tokens is not None and request.max_tokens != limit:
        raise InvalidRequest(
            "max_tokens", f"must equal max_completion_tokens ({limit}) or be left out, got {request.max_tokens}"
        )
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidRequest("top_logprobs", "needs logprobs to be true")
    if request.stream_options is not None and not request.stream:
        raise InvalidRequest("stream_options", "needs stream to be true")
    if request.modalities is not None and request.modalities != ["text"]:
        raise InvalidRequest("modalities", 'must be ["text"]: this server writes text only')
    return openai_sampling(
        request,
        preferred,
        names,
        max_tokens=limit,
        n=request.n,
        skip_special_tokens=request.skip_special_tokens,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        prompt_logprobs=check_prompt_logprobs(request.prompt_logprobs, stream=request.stream),
    )
