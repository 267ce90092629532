"""Converts a request to ``/v1/messages`` to a `ChatSpec`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....chat.conversation import Conversation, OfferedTool
from ....errors import InvalidRequest
from ....models.sampling_defaults import DEFAULTED
from ....sampling_params import MAX_TOKENS, SamplingParams
from ..chat.spec import ChatSpec, ToolChoice, named_tool
from ..chat.tool_use import tool_limits
from ..fields.cache import CacheFields
from ..fields.sampling import engine_seed
from ..state import AppState
from .conversation import ConversationReader
from .request import CountRequest, MessagesRequest, ThinkingField, ToolChoiceField

# This route's names of the fields that errors may be about.
NAMES = {
    "stop": "stop_sequences",
    "chat_template_kwargs": "thinking",
    "reasoning_effort": "output_config.effort",
    "prompt_cache_breakpoint": "cache_control",
    "continue_final_message": "messages",
}


def messages_spec(body: CountRequest, state: AppState) -> ChatSpec:
    """Raises `InvalidRequest`."""
    read = ConversationReader(body, state.config.max_messages, tool_limits(state.config))
    choice, config = body.tool_choice, body.output_config
    format, names = _answer_format(body)
    spec = ChatSpec(
        conversation=Conversation(
            turns=read.turns,
            tools=read.tools,
            left_out=read.left_out,
            chat_template_kwargs=None if body.thinking is None else _thinking(body.thinking),
            reasoning_effort=None if config is None else config.effort,
            continue_final_message=read.continued,
            parse_special=body.parse_special,
        ),
        params=SamplingParams(**format),
        names={**NAMES, "prompt": "messages", **names},
        cache=CacheFields.model_validate({}),
        tool_choice=ToolChoice() if choice is None else _choice(choice, read.tools),
        parallel_tool_calls=choice is None or not choice.disable_parallel_tool_use,
    )
    if isinstance(body, MessagesRequest):
        spec.params = messages_sampling(body, state.preferred, format)
        spec.stream = body.stream
        spec.shorten = True  # clients send 16,384 or 32,000 to any model
        spec.cache = CacheFields.model_validate(
            {name: getattr(body, name) for name in ("cache_salt", "prompt_cache_key")}
        )
    return spec


def messages_sampling(body: MessagesRequest, preferred: Any, format: Mapping[str, Any]) -> SamplingParams:
    """``preferred``: the served model's `sampling_defaults`; ``format``: the field with the answer's schema.

    Bounds are checked later, by `prepare_params`.
    """
    budget = None if body.thinking is None else body.thinking.budget_tokens
    if budget is not None and not 0 < budget < body.max_tokens:
        raise InvalidRequest(
            "thinking.budget_tokens", f"must be at least 1 and less than max_tokens ({body.max_tokens}), got {budget}"
        )
    said = {name: value for name in DEFAULTED if (value := getattr(body, name, None)) is not None}
    return SamplingParams(
        **{**preferred, **said},
        **format,
        max_tokens=min(body.max_tokens, MAX_TOKENS),  # the context leaves less
        stop=tuple(body.stop_sequences or ()),
        seed=engine_seed(body.seed),
    )


def _answer_format(body: CountRequest) -> tuple[dict[str, Any], dict[str, str]]:
    """The field of `SamplingParams` with the answer's schema, and its name in the request; empty without one."""
    config = body.output_config
    name, format = "output_config.format", None if config is None else config.format
    if format is not None and body.output_format is not None:
        raise InvalidRequest(name, "and output_format cannot both be given")
    if format is None:
        name, format = "output_format", body.output_format
    return ({}, {}) if format is None else ({"json_schema": format.schema_}, {"json_schema": name})


def _choice(choice: ToolChoiceField, tools: list[OfferedTool]) -> ToolChoice:
    match choice.type:
        case "any" if not tools:
            raise InvalidRequest("tool_choice.type", "any needs tools")
        case "any":
            return ToolChoice("required")
        case "tool":
            if choice.name is None:
                raise InvalidRequest("tool_choice.name", "is required with type tool")
            return named_tool(choice.name, tools)
        case "auto" | "none":
            return ToolChoice(choice.type)


def _thinking(thinking: ThinkingField) -> dict[str, Any]:
    """The template variables for it, by the names that models' chat templates use."""
    wanted = thinking.type != "disabled"
    variables: dict[str, Any] = {"enable_thinking": wanted, "thinking": wanted}
    if thinking.budget_tokens is not None:
        variables["thinking_budget"] = thinking.budget_tokens
    return variables
