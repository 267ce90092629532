"""``POST /v1/messages``: a conversation in Anthropic's form, answered whole or streamed."""

from __future__ import annotations

from functools import partial

from fastapi import Request, Response

from ....errors import renaming
from ..chat.prepare import ChatPreparer
from ..plumbing.body import read_json_object
from ..plumbing.respond import respond
from ..plumbing.routes import Routes
from ..state import AppState
from .errors import ROOT, SHAPE, error_event
from .reply import MessageReply
from .request import MessagesRequest, read
from .spec import NAMES, messages_spec


def routes(state: AppState) -> Routes:
    routes = Routes("messages", SHAPE)
    preparer = ChatPreparer(state)

    @routes.add("POST", ROOT, body=MessagesRequest, generates=True, fast=True)
    async def messages(request: Request) -> Response:
        """Anthropic's messages: the next turn of a conversation, as blocks."""
        body = read(MessagesRequest, await read_json_object(request))
        state.check_model(body.model)
        with renaming(NAMES):
            chat = await preparer.prepare(messages_spec(body, state))
        reply = MessageReply(state.model_name, chat.samples[0])
        call = state.client.open([chat.prompt])
        fail = partial(error_event, scope=request.scope)
        return await respond(
            call, request, reply, stream=body.stream, names=chat.names, headers=chat.headers, fail=fail
        )

    return routes
