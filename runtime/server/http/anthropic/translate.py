"""What a request to ``/v1/messages`` asks, as a request to ``/v1/chat/completions``."""

from __future__ import annotations

from typing import Any

from ..openai.chat.request import ChatRequest
from ..plumbing.errors import bad
from .conversation import Conversation
from .request import CountRequest, MessagesRequest, Thinking, ToolChoice


def chat_request(body: CountRequest, max_messages: int) -> tuple[ChatRequest, dict[str, str]]:
    """The chat, and the client's paths for its fields: see `chat.renamed`. Raises `InvalidRequest`."""
    conversation = Conversation(body, max_messages)
    fields: dict[str, Any] = {
        "messages": conversation.messages,
        "tools": conversation.tools,
        "continue_final_message": conversation.continued,
    }
    sources = {
        **conversation.sources,
        "tools[].function": "tools[]",
        "tools[].function.parameters": "tools[].input_schema",
        "stop": "stop_sequences",
        "chat_template_kwargs": "thinking",
        "reasoning_effort": "output_config.effort",
        "prompt_cache_breakpoint": "cache_control",
        "continue_final_message": "messages",
    }
    if body.tool_choice is not None:
        fields["tool_choice"] = _choice(body.tool_choice, bool(body.tools))
        fields["parallel_tool_calls"] = not body.tool_choice.disable_parallel_tool_use
    if body.thinking is not None:
        fields["chat_template_kwargs"] = _thinking(body.thinking)
    config = body.output_config
    if config is not None:
        fields["reasoning_effort"] = config.effort
    format = config.format if config is not None and config.format is not None else body.output_format
    if format is not None:
        name = "output_format" if format is body.output_format else "output_config.format"
        if body.output_format is not None and format is not body.output_format:
            raise bad(name, "and output_format cannot both be given")
        fields["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": format.schema_}}
        sources["response_format"] = name
    if isinstance(body, MessagesRequest):
        fields |= _sampling(body)
    return ChatRequest(**fields), sources


def _choice(choice: ToolChoice, any_tools: bool) -> str | dict[str, Any]:
    match choice.type:
        case "any" if not any_tools:
            raise bad("tool_choice.type", "any needs tools")
        case "any":
            return "required"
        case "tool" if choice.name is None:
            raise bad("tool_choice.name", "is required with type tool")
        case "tool":
            return {"type": "function", "function": {"name": choice.name}}
    return choice.type


def _thinking(thinking: Thinking) -> dict[str, Any]:
    """By the names that models' templates have for it."""
    wanted = thinking.type != "disabled"
    variables: dict[str, Any] = {"enable_thinking": wanted, "thinking": wanted}
    if thinking.budget_tokens is not None:
        variables["thinking_budget"] = thinking.budget_tokens
    return variables


def _sampling(body: MessagesRequest) -> dict[str, Any]:
    budget = None if body.thinking is None else body.thinking.budget_tokens
    if budget is not None and not 0 < budget < body.max_tokens:
        raise bad(
            "thinking.budget_tokens", f"must be at least 1 and less than max_tokens ({body.max_tokens}), got {budget}"
        )
    return {
        "max_tokens": body.max_tokens,
        "stream": body.stream,
        "stop": body.stop_sequences,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "min_p": body.min_p,
        "seed": body.seed,
        "cache_salt": body.cache_salt,
        "prompt_cache_key": body.prompt_cache_key,
    }
