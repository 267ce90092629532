"""``POST /v1/messages``: a conversation as Anthropic's clients hold it, answered whole or streamed."""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import Request, Response

from ....errors import InvalidRequest
from ..openai.chat.renamed import renamed
from ..openai.chat.turn import Turns
from ..plumbing.body import read_json_object
from ..plumbing.openapi import takes
from ..plumbing.respond import respond
from ..plumbing.shortcut import Handler
from ..state import AppState
from .errors import ROOT, error_event
from .message import MessageAnswer
from .request import MessagesRequest, read
from .translate import chat_request

PATH = ROOT


def handler(state: AppState) -> Handler:
    turns = Turns(state)

    async def messages(request: Request) -> Response:
        """Anthropic's messages: the next turn of a conversation, as blocks."""
        body = read(MessagesRequest, await read_json_object(request))
        state.check_model(body.model)
        chat, sources = chat_request(body, state.config.max_messages)
        try:
            turn = await turns.turn(chat)
            answer = MessageAnswer(state.model_name, turn.choices[0])
            call = state.client.open([turn.prompt])
            fail = partial(error_event, scope=request.scope)
            return await respond(call, request, answer, stream=body.stream, fail=fail)
        except InvalidRequest as error:
            raise renamed(error, sources) from error

    return messages


def schema() -> dict[str, Any]:
    return takes(MessagesRequest)
