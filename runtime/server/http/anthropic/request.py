"""``/v1/messages``: the fields of a request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import Field

from ....errors import InvalidRequest
from ..fields.known import ANSWER_FIELDS, UNSUPPORTED
from ..fields.parse import Strict, Strings, parse
from ..fields.sampling import models_own
from .errors import NO_THREADS

R = TypeVar("R", bound="CountRequest")


class CacheControl(Strict):
    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] = "5m"


class TextBlock(Strict):
    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None


class ToolUseBlock(Strict):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    cache_control: CacheControl | None = None


class ToolResultBlock(Strict):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[Any] = Field("", description="A string, or a list of text blocks.")
    is_error: bool = False
    cache_control: CacheControl | None = None


class ThinkingBlock(Strict):
    type: Literal["thinking"]
    thinking: str
    signature: str = Field("", description="Ignored.")


class RedactedThinkingBlock(Strict):
    type: Literal["redacted_thinking"]
    data: str = Field("", description="Ignored: only Anthropic can decrypt it.")


class ToolDefinition(Strict):
    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = Field(None, description="The input follows the schema, by construction.")
    defer_loading: bool | None = Field(None, description="Accepted; every tool is loaded at once.")
    input_examples: list[dict[str, Any]] | None = Field(None, description="Shown to the model after the description.")
    cache_control: CacheControl | None = None


class ToolChoiceField(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = Field(None, description="Of the tool, for type tool.")
    disable_parallel_tool_use: bool | None = None


class ThinkingField(Strict):
    """Told to chat templates that know it as ``enable_thinking`` or ``thinking``."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, description="Told to templates that know it as thinking_budget.")
    display: Literal["summarized"] | None = None


class OutputFormat(Strict):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Strict):
    format: OutputFormat | None = None
    effort: str | None = Field(None, description="Told to chat templates that know it as reasoning_effort.")


class Metadata(Strict):
    user_id: str | None = None


class CountRequest(Strict):
    """``/v1/messages/count_tokens``: the fields that shape a prompt."""

    messages: list[Any] = Field(description="Objects with a role and a content: a string, or a list of blocks.")
    model: str | None = None
    system: str | list[Any] | None = Field(None, description="A string, or a list of text blocks.")
    tools: list[Any] | None = Field(None, description="Objects with a name, an input_schema and a description.")
    tool_choice: ToolChoiceField | None = None
    thinking: ThinkingField | None = None
    cache_control: CacheControl | None = Field(None, description="As if on the last block.")
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = Field(None, description="The older name of output_config.format.")
    parse_special: bool = Field(False, description="Text that spells a special token becomes one.")


class MessagesRequest(CountRequest):
    """Anthropic's messages, and four fields of our other routes."""

    max_tokens: int
    stream: bool = False
    stop_sequences: Strings | None = None
    temperature: float | None = models_own("temperature")
    top_p: float | None = models_own("top_p")
    top_k: int | None = models_own("top_k")
    metadata: Metadata | None = None
    seed: int | None = None
    min_p: float | None = models_own("min_p")
    cache_salt: str | None = None
    prompt_cache_key: str | None = Field(None, description="A part of the key's cache, kept apart from the others.")


# Fields that would change the result and that we do not have; those of our other routes among them.
MESSAGES_UNSUPPORTED = (UNSUPPORTED - MessagesRequest.model_fields.keys()) | {"container", "mcp_servers"}


def read(kind: type[R], raw: Mapping[str, Any]) -> R:
    """Raises `InvalidRequest`."""
    if raw.get("thread") is not None:
        raise InvalidRequest(
            "thread",
            "is not supported by this server, which stores no conversations: send all messages",
            code=NO_THREADS,
        )
    generates = issubclass(kind, MessagesRequest)
    return parse(kind, raw, unsupported=MESSAGES_UNSUPPORTED | ANSWER_FIELDS if generates else MESSAGES_UNSUPPORTED)
