"""``POST /v1/chat/completions``: a conversation through the model's own template, answered whole or streamed."""

from __future__ import annotations

import time
import uuid
from typing import Any

from fastapi import Request, Response

from ...chat.prepare import ChatPreparer, PreparedChat
from ...engine_client import Batch
from ...fields.parse import parse
from ...plumbing.body import read_json_object
from ...plumbing.respond import respond
from ...plumbing.routes import Routes
from ...state import AppState
from ..chunks import Choices
from ..logprobs import describe_prompt_logprobs
from ..sent_ids import SentIds
from .choice import ChatChoice
from .request import CHAT_UNSUPPORTED, ChatRequest, chat_spec


def routes(state: AppState) -> Routes:
    routes = Routes("chat")
    preparer = ChatPreparer(state)

    @routes.add("POST", "/v1/chat/completions", body=ChatRequest, generates=True, fast=True)
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation (OpenAI's)."""
        body = parse(ChatRequest, await read_json_object(request), unsupported=CHAT_UNSUPPORTED)
        state.check_model(body.model)
        chat = await preparer.prepare(chat_spec(body, state))
        reply = _ChatReply(state, body, chat)
        call = state.client.open([chat.prompt], [body.rid])
        return await respond(call, request, reply, stream=body.stream, n=body.n, names=chat.names, headers=chat.headers)

    return routes


class _ChatReply(Choices):
    """The choices of one request."""

    def __init__(self, state: AppState, body: ChatRequest, chat: PreparedChat) -> None:
        self._samples = chat.samples
        self._tokenizer = state.tokenizer
        head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": state.model_name,
            "service_tier": None,
            "system_fingerprint": None,
        }
        ids = {"token_ids": body.return_token_ids, "tokens_as_ids": body.return_tokens_as_token_ids}
        choices = [ChatChoice(state.tokenizer, sample, chat.tools, **ids) for sample in chat.samples]
        super().__init__(head, choices, len(choices), body.stream_options)
        self._prompt_ids = SentIds(chat.samples[0].output) if body.return_token_ids else None

    def whole(self, batch: Batch) -> dict[str, Any]:
        answer = super().whole(batch) | self._prompt_token_ids()
        if self._samples[0].params.prompt_logprobs is not None:
            answer["prompt_logprobs"] = describe_prompt_logprobs(self._tokenizer, self._samples[0].output)
        return answer

    def _chunk(self, piece: dict[str, Any]) -> dict[str, Any]:
        return super()._chunk(piece) | self._prompt_token_ids()

    def _prompt_token_ids(self) -> dict[str, Any]:
        """vLLM's ``prompt_token_ids``, which are null in all chunks but the first."""
        return {} if self._prompt_ids is None else {"prompt_token_ids": self._prompt_ids.take_prompt()}

    def _usage(self) -> dict[str, Any]:
        thinking = sum(sample.reasoning_tokens for sample in self._samples)
        return super()._usage() | {"completion_tokens_details": {"reasoning_tokens": thinking}}
