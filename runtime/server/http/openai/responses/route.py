"""``POST /v1/responses``: OpenAI's responses. Nothing is stored."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from .....errors import InvalidRequest, renaming
from ...chat.prepare import ChatPreparer
from ...plumbing.body import read_json_object
from ...plumbing.openapi import takes
from ...plumbing.respond import respond
from ...plumbing.shortcut import Handler
from ...state import AppState
from .reply import ResponseReply
from .request import NAMES, ResponsesRequest, read, response_spec

PATH = "/v1/responses"


def handler(state: AppState) -> Handler:
    preparer = ChatPreparer(state)

    async def responses(request: Request) -> Response:
        """Answer a conversation (OpenAI's responses). Nothing is stored."""
        body = read(await read_json_object(request))
        state.check_model(body.model)
        state.client.limits  # noqa: B018 - raises until there is a tokenizer
        with renaming(NAMES):
            chat = await preparer.prepare(response_spec(body, state))
        reply = ResponseReply(state, body, chat.samples[0])
        call = state.client.open([chat.prompt])
        return await respond(call, request, reply, stream=body.stream, names=chat.names, fail=reply.fail)

    return responses


def router(_state: AppState) -> APIRouter:
    """OpenAI's routes for stored responses, to say that none are."""
    routes = APIRouter()

    @routes.get("/v1/responses/{id}", include_in_schema=False)
    @routes.delete("/v1/responses/{id}", include_in_schema=False)
    @routes.post("/v1/responses/{id}/cancel", include_in_schema=False)
    @routes.get("/v1/responses/{id}/input_items", include_in_schema=False)
    async def stored(id: str) -> Response:
        raise InvalidRequest(
            "response_id",
            f"{id[:80]!r} does not exist: this server stores no responses. Closing the connection cancels one.",
            status=404,
        )

    @routes.post("/v1/responses/input_tokens", include_in_schema=False)
    @routes.post("/v1/responses/compact", include_in_schema=False)
    async def absent() -> Response:
        raise InvalidRequest(
            None,
            "this server has no such route: /tokenize and /v1/messages/count_tokens count; nothing compacts",
            status=404,
        )

    return routes


def schema() -> dict[str, Any]:
    return takes(ResponsesRequest)
