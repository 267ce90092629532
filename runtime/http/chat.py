"""``POST /v1/chat/completions``: a conversation through the model's own template, answered whole or streamed."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import Request, Response

from ..chat_template import ChatTemplate
from ..errors import InvalidRequest
from .body import read_json_object
from .cache_fields import caching
from .chat_choice import Choice
from .chat_marks import chat_marks
from .chat_messages import bad, conversation
from .chat_request import CHAT_UNSUPPORTED, ChatRequest, generation_prompt, names, sampling, variables
from .chat_tools import Formats, ToolUse
from .prompts import check_count, check_priority, make_prompt, prepare_params
from .requests import parse
from .shortcut import Handler
from .site import Site
from .sse import DONE, Batch, EventStream, event, json_response, wait
from .usage import cache_headers, usage

PATH = "/v1/chat/completions"
INLINE = 32_768  # characters of a conversation that is rendered right here; a longer one must not stall the loop


def handler(site: Site) -> Handler:
    formats: Formats | None = None  # known once the tokenizer is there

    async def chat_completions(request: Request) -> Response:
        nonlocal formats
        body = parse(ChatRequest, await read_json_object(request), unsupported=CHAT_UNSUPPORTED)
        site.check_model(body.model)
        limits = site.client.limits  # before the tokenizer: it raises while there is none
        template = chat_template(site)
        if formats is None:
            formats = Formats.of(site.config, site.tokenizer, template)
        tools = ToolUse(body, formats, template, site.config.max_tools)
        params = sampling(body, skip_special_tokens=body.skip_special_tokens and not tools.keeps_special)
        called = names(body)
        params = prepare_params(params, limits, called, site.config)
        check_count(params.n, site.config.max_prompts_per_request, "n")
        text = await rendered(site, body, tools.definitions)

        async def again(messages: list[Any]) -> str:
            return await rendered(site, body.model_copy(update={"messages": messages}), tools.definitions)

        prompt = make_prompt(
            text,
            prepare_params(tools.constrained(params, text), limits, called, site.config),
            limits,
            "messages",
            called,
            priority=check_priority(body.priority),
            whole=not body.stream,
            rendered=True,
            **caching(site, body, marks=await chat_marks(body.messages, text, again)),
        )
        choices = [Choice(site.tokenizer, params, tools.parser(text), one_call=tools.one_call) for _ in range(params.n)]
        answer = _Answer(site, body, choices)
        call = site.client.open([prompt])
        if body.stream:
            first = await wait(call, request.receive, call.batch)
            return EventStream(call, first, answer.events, answer.end, answer.headers(request, first))
        with call:
            batch = await wait(call, request.receive, call.all)
        return json_response(answer.whole(batch), headers=answer.headers(request, batch))

    return chat_completions


def chat_template(site: Site) -> ChatTemplate:
    template = site.tokenizer.chat_template
    if template is None:
        raise InvalidRequest(
            "this model has no chat template: send a prompt to /v1/completions instead", field="messages"
        )
    return template


async def rendered(site: Site, body: ChatRequest, tools: list[dict[str, Any]] | None) -> str:
    """The prompt's text. A long conversation is rendered in a thread."""
    template = chat_template(site)
    if not body.messages:
        raise bad("messages", "must not be empty")
    if len(body.messages) > site.config.max_messages:
        raise bad("messages", f"must have at most {site.config.max_messages} entries, got {len(body.messages)}")
    add = generation_prompt(body.add_generation_prompt, body.continue_final_message)
    messages = conversation(body.messages, template)
    if body.continue_final_message and messages[-1]["role"] != "assistant":
        raise bad("continue_final_message", "needs a last message of role assistant")
    named = variables(body.chat_template_kwargs, template, body.documents, body.reasoning_effort)
    if tools is not None:
        named["tools"] = tools
    if len(messages) <= 64 and sum(len(message["content"]) for message in messages) <= INLINE and not body.documents:
        return template.render(messages, add, named, body.continue_final_message)
    return await asyncio.to_thread(template.render, messages, add, named, body.continue_final_message)


class _Answer:
    """One request: what has come of each of its samples, in OpenAI's words."""

    def __init__(self, site: Site, body: ChatRequest, choices: list[Choice]) -> None:
        self._choices = choices
        options = body.stream_options
        self._include_usage = options is not None and bool(options.include_usage)
        self._running_usage = self._include_usage and options is not None and bool(options.continuous_usage_stats)
        self._counts_reasoning = body.separate_reasoning
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": site.model_name,
            "service_tier": None,
            "system_fingerprint": None,
        }

    def whole(self, batch: Batch) -> dict[str, Any]:
        for index, delta in batch:
            self._choices[index].feed(delta)
        choices = [choice.whole(index) for index, choice in enumerate(self._choices)]
        return {**self._head, "choices": choices, "usage": self._usage()}

    def events(self, batch: Batch) -> Iterable[bytes]:
        for index, delta in batch:
            self._choices[index].feed(delta)
        for index in sorted({index for index, _ in batch}) if len(batch) > 1 else (batch[0][0],):
            for piece in self._choices[index].pieces(index):
                chunk: dict[str, Any] = {**self._head, "choices": [piece]}
                if self._include_usage:
                    chunk["usage"] = self._usage() if self._running_usage else None
                yield event(chunk)

    def end(self) -> Iterable[bytes]:
        if self._include_usage:
            yield event({**self._head, "choices": [], "usage": self._usage()})
        yield DONE

    def headers(self, request: Request, batch: Batch) -> Mapping[str, str] | None:
        found = ((index, delta.prompt_tokens, delta.cache) for index, delta in batch)
        return cache_headers(request.headers, found, len(self._choices))

    def _usage(self) -> dict[str, Any]:
        thinking = sum(choice.reasoning_tokens for choice in self._choices)
        return usage([choice.output for choice in self._choices], len(self._choices), thinking)


def schema() -> dict[str, Any]:
    return {"requestBody": {"content": {"application/json": {"schema": ChatRequest.model_json_schema()}}}}
