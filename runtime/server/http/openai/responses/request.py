"""``/v1/responses``: the fields of a request, and its conversion to a `ChatSpec`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from .....chat.conversation import Conversation
from .....chat.openai_tools import openai_tools
from .....errors import InvalidRequest, shown
from ...chat.spec import ChatSpec, openai_tool_choice
from ...chat.tool_use import tool_limits
from ...fields.parse import Strict, Strings, parse
from ...fields.prompts import check_label
from ...fields.sampling import ParsedSampling, openai_sampling
from ...state import AppState
from ..chat.request import CHAT_UNSUPPORTED, ChatFields, shared_fields, template_options
from .items import response_turns

LOGPROBS = "message.output_text.logprobs"
# What `include` may name. Of the rest, this server has no such thing to leave out, or has it in every answer.
INCLUDABLE = (
    LOGPROBS,
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
)
MAX_METADATA, MAX_KEY, MAX_VALUE = 16, 64, 512  # entries; characters: OpenAI's


class TextOptions(Strict):
    format: dict[str, Any] | None = Field(None, description="type: text, json_object, or json_schema with a schema.")
    verbosity: Literal["low", "medium", "high"] | None = Field(None, description="Accepted; it changes nothing.")


class ReasoningOptions(Strict):
    effort: str | None = Field(None, description="The chat template's reasoning_effort.")
    summary: str | None = Field(None, description="Accepted; the thinking itself is in the answer.")


class ResponsesStreamOptions(Strict):
    include_obfuscation: bool | None = Field(None, description="Accepted; nothing is padded.")


class ResponsesRequest(ChatFields):
    """OpenAI's responses without those stored earlier, and the fields that vLLM and SGLang add."""

    input: Any = Field(description="A string, or a list of items: messages, function calls, their outputs, reasoning.")
    instructions: str | None = Field(None, description="A system message before the input.")
    max_output_tokens: int | None = Field(None, description="null: as many as the context allows.")
    text: TextOptions | None = None
    include: Strings | None = Field(None, description=f"{LOGPROBS}, for top_logprobs.")
    top_logprobs: int | None = None
    stream_options: ResponsesStreamOptions | None = None
    reasoning: ReasoningOptions | None = None
    metadata: dict[str, Any] | None = Field(None, description="Up to 16 strings, given back as they are.")
    store: bool | None = Field(None, description="Accepted; nothing is stored.")
    truncation: str | None = Field(None, description="disabled: what does not fit is refused.")
    max_tool_calls: int | None = Field(None, description="Accepted; it is about tools that run on a server.")
    safety_identifier: str | None = None
    response_format: None = Field(None, description="text.format, on this route.")


_STORED = "is not supported by this server, which stores no responses: send the whole conversation as input"
_ELSEWHERE = "is not a field of this route: it is called "
# Fields whose error states what to do instead.
REFUSED = {
    "previous_response_id": _STORED,
    "conversation": _STORED,
    "background": "is not supported by this server: wait for the answer, or stream it",
    "prompt": "is not supported by this server, which has no prompt templates: send instructions and input",
    "messages": f"{_ELSEWHERE}input",
    "max_tokens": f"{_ELSEWHERE}max_output_tokens",
    "max_completion_tokens": f"{_ELSEWHERE}max_output_tokens",
    "response_format": f"{_ELSEWHERE}text.format",
    "reasoning_effort": f"{_ELSEWHERE}reasoning.effort",
    "logprobs": f'is not a field of this route: ask with include: ["{LOGPROBS}"]',
    "n": "is not a field of this route: a request makes one response",
}
UNSUPPORTED = CHAT_UNSUPPORTED | {"context_management"}

# This route's names of the fields that errors may be about.
NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
}


def read(raw: Mapping[str, Any]) -> ResponsesRequest:
    """Raises `InvalidRequest`."""
    for name, why in REFUSED.items():
        if raw.get(name) is not None and raw[name] is not False:
            raise InvalidRequest(name, why)
    body = parse(ResponsesRequest, raw, unsupported=UNSUPPORTED)
    if body.truncation not in (None, "disabled"):
        raise InvalidRequest("truncation", "must be disabled: what of the input does not fit is refused, not left out")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options", "needs stream to be true")
    for i, name in enumerate(body.include or ()):
        if name not in INCLUDABLE:
            raise InvalidRequest(f"include[{i}]", f"must be one of {', '.join(INCLUDABLE)}, got {shown(name)}")
    if body.top_logprobs and LOGPROBS not in (body.include or ()):
        raise InvalidRequest("top_logprobs", f'needs include to have "{LOGPROBS}"')
    if body.max_tool_calls is not None and body.max_tool_calls < 1:
        raise InvalidRequest("max_tool_calls", f"must be at least 1, got {body.max_tool_calls}")
    for field in ("user", "safety_identifier"):
        check_label(getattr(body, field), field)
    _check_metadata(body.metadata or {})
    return body


def response_spec(body: ResponsesRequest, state: AppState) -> ChatSpec:
    """Raises `InvalidRequest`."""
    left_out: list[str] = []
    conversation = Conversation(
        turns=response_turns(body.instructions, body.input, state.config.max_messages, left_out),
        tools=openai_tools(body.tools, tool_limits(state.config), flat=True, left_out=left_out),
        left_out=left_out,
        reasoning_effort=None if body.reasoning is None else body.reasoning.effort,
        **template_options(body),
    )
    params, names = response_sampling(body, state.preferred)
    return ChatSpec(
        conversation=conversation,
        params=params,
        names=names,
        cache=body,
        tool_choice=openai_tool_choice(body.tool_choice, conversation.tools),
        **shared_fields(body),
    )


def response_sampling(body: ResponsesRequest, preferred: Mapping[str, float]) -> ParsedSampling:
    """``preferred``: the served model's `sampling_defaults`. Bounds are checked later, by `prepare_params`."""
    wanted = LOGPROBS in (body.include or ())
    return openai_sampling(
        body,
        preferred,
        {**NAMES, "prompt": "input", "include_stop": "include_stop_str_in_output", "logprobs": "top_logprobs"},
        None if body.text is None else body.text.format,
        max_tokens=body.max_output_tokens,
        skip_special_tokens=body.skip_special_tokens,
        logprobs=(body.top_logprobs or 0) if wanted else None,
    )


def _check_metadata(metadata: Mapping[str, Any]) -> None:
    if len(metadata) > MAX_METADATA:
        raise InvalidRequest("metadata", f"must have at most {MAX_METADATA} entries, got {len(metadata)}")
    for key, value in metadata.items():
        if len(key) > MAX_KEY:
            raise InvalidRequest("metadata", f"keys must be at most {MAX_KEY} characters, got {len(key)}")
        if not isinstance(value, str):
            raise InvalidRequest(f"metadata.{key}", f"must be a string, got {type(value).__name__}")
        if len(value) > MAX_VALUE:
            raise InvalidRequest(f"metadata.{key}", f"must be at most {MAX_VALUE} characters, got {len(value)}")
