"""``POST /v1/responses``: OpenAI's responses. Nothing is stored."""

from __future__ import annotations

from fastapi import Request, Response

from .....errors import InvalidRequest, renaming
from ...chat.prepare import ChatPreparer, PreparedChat
from ...native.tokens import token_ids
from ...plumbing.body import read_json_object
from ...plumbing.respond import respond
from ...plumbing.routes import Routes
from ...plumbing.sse import json_response
from ...state import AppState
from .reply import ResponseReply
from .request import NAMES, ResponsesRequest, read, response_spec


def routes(state: AppState) -> Routes:
    routes = Routes("responses")
    preparer = ChatPreparer(state)

    async def prepared(request: Request) -> tuple[ResponsesRequest, PreparedChat]:
        body = read(await read_json_object(request))
        state.check_model(body.model)
        with renaming(NAMES):
            return body, await preparer.prepare(response_spec(body, state))

    @routes.add("POST", "/v1/responses", body=ResponsesRequest, generates=True, fast=True)
    async def responses(request: Request) -> Response:
        """Answer a conversation (OpenAI's responses). Nothing is stored."""
        body, chat = await prepared(request)
        reply = ResponseReply(state, body, chat.samples[0], chat.tools)
        call = state.client.open([chat.prompt], [body.rid])
        return await respond(call, request, reply, stream=body.stream, names=chat.names, headers=chat.headers)

    @routes.add("POST", "/v1/responses/input_tokens", body=ResponsesRequest, fast=True)
    async def input_tokens(request: Request) -> Response:
        """How many tokens the prompt of such a request has."""
        _, chat = await prepared(request)
        ids = await token_ids(state, chat.prompt.text or "", special=False)
        return json_response({"object": "response.input_tokens", "input_tokens": len(ids)})

    # OpenAI's routes for stored responses, to say that none are.
    @routes.add("GET", "/v1/responses/{id}", "/v1/responses/{id}/input_items", hidden=True)
    @routes.add("DELETE", "/v1/responses/{id}", hidden=True)
    @routes.add("POST", "/v1/responses/{id}/cancel", hidden=True)
    async def stored(id: str) -> Response:
        raise InvalidRequest(
            "response_id",
            f"{id[:80]!r} does not exist: this server stores no responses. Closing the connection cancels one.",
            status=404,
        )

    @routes.add("POST", "/v1/responses/compact", hidden=True)
    async def absent() -> Response:
        raise InvalidRequest(None, "this server has no such route: nothing compacts conversations", status=404)

    return routes
