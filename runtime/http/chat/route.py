"""``POST /v1/chat/completions``: a conversation through the model's own template, answered whole or streamed."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import Request, Response

from ..body import read_json_object
from ..openapi import takes
from ..requests import parse
from ..shortcut import Handler
from ..site import Site
from ..sse import DONE, Batch, EventStream, event, json_response, wait
from ..usage import cache_headers, usage
from .choice import Choice
from .request import CHAT_UNSUPPORTED, ChatRequest
from .turn import Turns

PATH = "/v1/chat/completions"


def handler(site: Site) -> Handler:
    turns = Turns(site)

    async def chat_completions(request: Request) -> Response:
        """Answer a conversation (OpenAI's)."""
        body = parse(ChatRequest, await read_json_object(request), unsupported=CHAT_UNSUPPORTED)
        site.check_model(body.model)
        turn = await turns.turn(body)
        answer = _Answer(site, body, turn.choices)
        call = site.client.open([turn.prompt])
        if body.stream:
            first = await wait(call, request.receive, call.batch)
            return EventStream(call, first, answer.events, answer.end, answer.headers(request, first))
        with call:
            batch = await wait(call, request.receive, call.all)
        return json_response(answer.whole(batch), headers=answer.headers(request, batch))

    return chat_completions


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
        running = self._usage() if self._running_usage else None  # once: it looks at every choice
        for index in sorted({index for index, _ in batch}) if len(batch) > 1 else (batch[0][0],):
            for piece in self._choices[index].pieces(index):
                chunk: dict[str, Any] = {**self._head, "choices": [piece]}
                if self._include_usage:
                    chunk["usage"] = running
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
    return takes(ChatRequest)
