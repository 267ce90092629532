"""``POST /v1/responses``: OpenAI's responses, as a chat that nobody remembers."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from .....errors import InvalidRequest
from ...plumbing.body import read_json_object
from ...plumbing.openapi import takes
from ...plumbing.respond import respond
from ...plumbing.shortcut import Handler
from ...state import AppState
from ..chat.renamed import renamed
from ..chat.turn import Turns
from .answer import Answer
from .request import ResponsesRequest, chat_of, read

PATH = "/v1/responses"


def handler(state: AppState) -> Handler:
    turns = Turns(state)

    async def responses(request: Request) -> Response:
        """Answer a conversation (OpenAI's responses). Nothing is stored."""
        body = read(await read_json_object(request))
        state.check_model(body.model)
        chat, sources = chat_of(body, state.config)
        try:
            turn = await turns.turn(chat)
            answer = Answer(state, body, turn)
            call = state.client.open([turn.prompt])
            fail = partial(answer.fail, sources=sources)
            return await respond(call, request, answer, stream=body.stream, fail=fail)
        except InvalidRequest as error:  # from the engine too: it compiles schemas and counts the prompt's tokens
            raise renamed(error, sources) from error

    return responses


def router(_site: AppState) -> APIRouter:
    """What OpenAI has for responses that are stored, to say that none are."""
    routes = APIRouter()

    @routes.get("/v1/responses/{id}", include_in_schema=False)
    @routes.delete("/v1/responses/{id}", include_in_schema=False)
    @routes.post("/v1/responses/{id}/cancel", include_in_schema=False)
    @routes.get("/v1/responses/{id}/input_items", include_in_schema=False)
    async def stored(id: str) -> Response:
        raise InvalidRequest(
            f"there is no response {id[:80]!r}: this server stores none. A client that closes its connection cancels.",
            field="response_id",
            status=404,
        )

    @routes.post("/v1/responses/input_tokens", include_in_schema=False)
    @routes.post("/v1/responses/compact", include_in_schema=False)
    async def absent() -> Response:
        raise InvalidRequest(
            "this server has no such route: /tokenize and /v1/messages/count_tokens count; nothing compacts", status=404
        )

    return routes


def schema() -> dict[str, Any]:
    return takes(ResponsesRequest)
