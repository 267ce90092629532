"""``POST /v1/chat/completions``: a conversation through the model's own template, answered whole or streamed."""

from __future__ import annotations

import time
import uuid
from typing import Any

from fastapi import Request, Response

from ...fields.requests import parse
from ...plumbing.body import read_json_object
from ...plumbing.openapi import takes
from ...plumbing.respond import respond
from ...plumbing.shortcut import Handler
from ...state import AppState
from ..chunks import Choices
from .choice import Choice
from .request import CHAT_UNSUPPORTED, ChatRequest
from .turn import Turns

PATH = "/v1/chat/completions"


def handler(state: AppState) -> Handler:
    turns = Turns(state)

    async def chat_completions(request: Request) -> Response:
        """Answer a conversation (OpenAI's)."""
        body = parse(ChatRequest, await read_json_object(request), unsupported=CHAT_UNSUPPORTED)
        state.check_model(body.model)
        turn = await turns.turn(body)
        answer = _Answer(state, body, turn.choices)
        call = state.client.open([turn.prompt])
        return await respond(call, request, answer, stream=body.stream, n=body.n)

    return chat_completions


class _Answer(Choices):
    """One request: what has come of each of its samples, in OpenAI's words."""

    def __init__(self, state: AppState, body: ChatRequest, choices: list[Choice]) -> None:
        self._readers = choices
        head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": state.model_name,
            "service_tier": None,
            "system_fingerprint": None,
        }
        super().__init__(head, choices, len(choices), body.stream_options)

    def _usage(self) -> dict[str, Any]:
        thinking = sum(choice.reasoning_tokens for choice in self._readers)
        return super()._usage() | {"completion_tokens_details": {"reasoning_tokens": thinking}}


def schema() -> dict[str, Any]:
    return takes(ChatRequest)
