"""``POST /v1/messages/count_tokens``: how many tokens a request's prompt would have."""

from __future__ import annotations

from fastapi import Request, Response

from ....errors import renaming
from ..chat.prepare import ChatPreparer
from ..native.tokens import token_ids
from ..plumbing.body import read_json_object
from ..plumbing.routes import Routes
from ..plumbing.sse import json_response
from ..state import AppState
from .errors import ROOT, SHAPE
from .request import CountRequest, read
from .spec import NAMES, messages_spec


def routes(state: AppState) -> Routes:
    routes = Routes("messages", SHAPE)
    preparer = ChatPreparer(state)

    @routes.add("POST", f"{ROOT}/count_tokens", body=CountRequest, fast=True)
    async def count_tokens(request: Request) -> Response:
        """How many tokens the prompt of such a request has."""
        body = read(CountRequest, await read_json_object(request))
        state.check_model(body.model)
        with renaming(NAMES):
            chat = await preparer.prepare(messages_spec(body, state))
        ids = await token_ids(state, chat.prompt.text or "", special=False)
        return json_response({"input_tokens": len(ids)})

    return routes
