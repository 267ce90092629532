"""``POST /v1/messages``: a conversation in Anthropic's form, answered whole or streamed, or its tokens counted."""

from __future__ import annotations

from typing import TypeVar

from fastapi import Request, Response

from ....errors import renaming
from ..chat.prepare import ChatPreparer, PreparedChat
from ..native.tokens import token_ids
from ..plumbing.body import read_json_object
from ..plumbing.request_id import KEY
from ..plumbing.respond import respond
from ..plumbing.routes import Routes
from ..plumbing.sse import json_response
from ..state import AppState
from .errors import ROOT, SHAPE
from .reply import MessageReply
from .request import CountRequest, MessagesRequest, read
from .spec import NAMES, messages_spec

Body = TypeVar("Body", bound=CountRequest)


def routes(state: AppState) -> Routes:
    routes = Routes("messages", SHAPE)
    preparer = ChatPreparer(state)

    async def prepared(kind: type[Body], request: Request) -> tuple[Body, PreparedChat]:
        body = read(kind, await read_json_object(request))
        state.check_model(body.model)
        with renaming(NAMES):
            return body, await preparer.prepare(messages_spec(body, state))

    @routes.add("POST", ROOT, body=MessagesRequest, generates=True, fast=True)
    async def messages(request: Request) -> Response:
        """Anthropic's messages: the next turn of a conversation, as blocks."""
        body, chat = await prepared(MessagesRequest, request)
        reply = MessageReply(state.model_name, chat.samples[0], request.scope[KEY])
        call = state.client.open([chat.prompt])
        return await respond(call, request, reply, stream=body.stream, names=chat.names, headers=chat.headers)

    @routes.add("POST", f"{ROOT}/count_tokens", body=CountRequest, fast=True)
    async def count_tokens(request: Request) -> Response:
        """How many tokens the prompt of such a request has."""
        _, chat = await prepared(CountRequest, request)
        ids = await token_ids(state, chat.prompt.text or "", special=False)
        return json_response({"input_tokens": len(ids)})

    return routes
