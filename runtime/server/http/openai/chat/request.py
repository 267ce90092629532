"""``/v1/chat/completions``: what clients may send, and what it says about sampling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from .....sampling_params import SamplingParams
from ...fields.requests import UNSUPPORTED, OpenAIFields, StreamOptions, Strings, openai_sampling
from ...plumbing.errors import bad


class ChatFields(OpenAIFields):
    """What every route that talks in conversations takes beside the conversation itself."""

    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    separate_reasoning: bool = Field(True, description="Thinking is kept apart from the answer.")
    add_generation_prompt: bool | None = Field(None, description="null: unless continue_final_message.")
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[Any] | None = None


class ChatRequest(ChatFields):
    """OpenAI's chat completions, and the fields vLLM and SGLang add to them."""

    messages: list[Any] = Field(description="Objects with a role and a content: a string, or a list of text parts.")
    max_completion_tokens: int | None = Field(None, description="null: as many as the context allows.")
    max_tokens: int | None = Field(None, description="The older name of max_completion_tokens.")
    n: int = 1
    logprobs: bool = False
    top_logprobs: int | None = None
    stream_options: StreamOptions | None = None
    reasoning_effort: str | None = None
    modalities: Strings | None = None


# Fields other servers take that would change the result; of those of the other routes, some are this one's own.
CHAT_UNSUPPORTED = (UNSUPPORTED - ChatRequest.model_fields.keys()) | {
    *("functions", "function_call", "audio", "web_search_options", "moderation", "chat_template", "echo", "best_of"),
    *("mm_processor_kwargs", "media_io_kwargs", "return_token_ids", "return_tokens_as_token_ids"),
}


def names(request: ChatRequest) -> dict[str, str]:
    """Our names of the fields, in this request's words."""
    return {
        "max_tokens": "max_completion_tokens" if request.max_completion_tokens is not None else "max_tokens",
        "include_stop": "include_stop_str_in_output",
        "logprobs": "top_logprobs",
    }


def sampling(request: ChatRequest, preferred: Mapping[str, float], *, skip_special_tokens: bool) -> SamplingParams:
    """Not checked against its bounds yet: `prompts.prepare_params` does that."""
    limit = request.max_completion_tokens
    if limit is None:
        limit = request.max_tokens
    elif request.max_tokens is not None and request.max_tokens != limit:
        raise bad("max_tokens", f"must equal max_completion_tokens ({limit}) or be left out, got {request.max_tokens}")
    if request.top_logprobs is not None and not request.logprobs:
        raise bad("top_logprobs", "needs logprobs to be true")
    if request.stream_options is not None and not request.stream:
        raise bad("stream_options", "needs stream to be true")
    if request.modalities is not None and request.modalities != ["text"]:
        raise bad("modalities", 'must be ["text"]: this server writes text only')
    return openai_sampling(
        request,
        preferred,
        max_tokens=limit,
        n=request.n,
        skip_special_tokens=skip_special_tokens,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )
