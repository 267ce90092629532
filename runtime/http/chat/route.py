"""``POST /v1/chat/completions``: a conversation through the model's own template, answered whole or streamed."""

from __future__ import annotations

import time
import uuid
from typing import Any

from fastapi import Request, Response

from ..body import read_json_object
from ..chunks import Choices
from ..openapi import takes
from ..requests import parse
from ..respond import respond
from ..shortcut import Handler
from ..site import Site
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
        return await respond(call, request, answer, stream=body.stream, n=body.n)

    return chat_completions


class _Answer(Choices):
    """One request: what has come of each of its samples, in OpenAI's words."""

    def __init__(self, site: Site, body: ChatRequest, choices: list[Choice]) -> None:
        self._readers = choices
        head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": site.model_name,
            "service_tier": None,
            "system_fingerprint": None,
        }
        super().__init__(head, choices, len(choices), body.stream_options)

    def _usage(self) -> dict[str, Any]:
        thinking = sum(choice.reasoning_tokens for choice in self._readers)
        return super()._usage() | {"completion_tokens_details": {"reasoning_tokens": thinking}}


def schema() -> dict[str, Any]:
    return takes(ChatRequest)
