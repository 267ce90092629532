"""Converts prompts given in process (text, token ids, messages) to checked token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack

import numpy as np

from ..chat.conversation import Conversation
from ..chat.openai_messages import openai_turns
from ..chat.openai_tools import openai_tools
from ..chat.prompt import chat_prompt
from ..errors import InvalidRequest
from ..limits import check_token_ids
from ..sampling_params import SamplingParams
from ..step import Int32
from ..tokenizer.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]  # one conversation, in OpenAI's form
BatchParams = SamplingParams | Sequence[SamplingParams] | None  # for all prompts of a batch, or one for each
BranchPiece = Prompt | Messages  # messages: only at a branch's beginning


class RequestOptions(TypedDict, total=False):
    """Keywords of requests. ``priority``: larger is more urgent."""

    cache_salt: str
    priority: int


class ChatOptions(TypedDict, total=False):
    """Keywords of `EngineBase.chat_prompt`; `Engine.chat` describes them."""

    tools: list[dict[str, Any]] | None
    chat_template_kwargs: Mapping[str, Any] | None
    add_generation_prompt: bool | None
    continue_final_message: bool
    parse_special: bool


class ChatRequestOptions(ChatOptions, RequestOptions, total=False):
    """Keywords of `Engine.chat`."""


class RunOptions(TypedDict, total=False):
    """Keywords of `Branch.generate`. ``extend``: appended to the branch first."""

    extend: Prompt | None
    parse_special: bool
    priority: int


def token_array(ids: Sequence[int], vocab_size: int, field: str) -> Int32:
    """[n] checked token ids. Raises `InvalidRequest` naming the first that is wrong."""
    listed = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
    check_token_ids(listed, vocab_size, field)
    return np.array(listed, np.int32)


def prompt_tokens(tokenizer: Tokenizer, prompt: Prompt, vocab_size: int) -> Int32:
    """[n] token ids of one prompt. Raises `InvalidRequest`."""
    if not isinstance(prompt, str):
        return token_array(prompt, vocab_size, "prompt")
    if not prompt:  # also where the tokenizer would make a lone <bos> of it
        raise InvalidRequest("prompt", "must not be empty")
    return tokenizer.encode(prompt)


def chat_tokens(
    tokenizer: Tokenizer, messages: Messages, *, tools: list[dict[str, Any]] | None = None, **options: Any
) -> list[int]:
    """Token ids of the prompt that the chat template makes of one conversation; ``options`` are the other
    `ChatOptions`. Raises `InvalidRequest`."""
    conversation = Conversation(turns=openai_turns(messages), tools=openai_tools(tools), **options)
    prompt = chat_prompt(tokenizer.required_template, conversation)
    ids: list[int] = tokenizer.encode(prompt.text(), add_special_tokens=False).tolist()
    return ids


def chat_batch(
    tokenizer: Tokenizer, messages: Messages | Sequence[Messages], **options: Unpack[ChatOptions]
) -> tuple[bool, list[list[int]]]:
    """Whether ``messages`` is one conversation, and the token ids of each conversation's prompt."""
    if not isinstance(messages, list | tuple):
        raise InvalidRequest("messages", f"must be a list of messages or of such lists, got {type(messages).__name__}")
    if not messages or not isinstance(messages[0], list | tuple):
        return True, [chat_tokens(tokenizer, messages, **options)]
    prompts = []
    for i, one in enumerate(messages):
        if not isinstance(one, list | tuple):
            raise InvalidRequest(
                f"messages[{i}]", f"must be a list of messages like the first, got {type(one).__name__}"
            )
        try:
            prompts.append(chat_tokens(tokenizer, one, **options))
        except InvalidRequest as error:
            raise error.renamed({"messages": f"messages[{i}]"}) from error
    return False, prompts


def prompt_batch(
    prompts: Prompt | Sequence[Prompt], params: BatchParams
) -> tuple[bool, list[tuple[Prompt, SamplingParams | None]]]:
    """Whether ``prompts`` is one prompt, and each prompt with its parameters. Raises `InvalidRequest`."""
    single = isinstance(prompts, str) or (len(prompts) > 0 and all(isinstance(p, (int, np.integer)) for p in prompts))
    batch: list[Prompt] = [prompts] if single else list(prompts)  # type: ignore[list-item, arg-type]
    shared = params is None or isinstance(params, SamplingParams | Mapping)
    each: list[Any] = [params] * len(batch) if shared else list(params)  # type: ignore[arg-type]
    if len(each) != len(batch):
        raise InvalidRequest("params", f"has {len(each)} entries for {len(batch)} prompts")
    if not batch:
        raise InvalidRequest("prompts", "must not be empty")
    return single, list(zip(batch, each, strict=True))
