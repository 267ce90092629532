"""``POST /v1/messages/count_tokens``: how many tokens a request's prompt would have."""

from __future__ import annotations

from typing import Any

from fastapi import Request, Response

from ...errors import InvalidRequest
from ..body import read_json_object
from ..chat.renamed import renamed
from ..chat.turn import Turns
from ..openapi import takes
from ..shortcut import Handler
from ..site import Site
from ..sse import json_response
from ..tokens import token_ids
from .errors import ROOT
from .request import CountRequest, read
from .translate import chat_request

PATH = f"{ROOT}/count_tokens"


def handler(site: Site) -> Handler:
    turns = Turns(site)

    async def count_tokens(request: Request) -> Response:
        """How many tokens the prompt of such a request has."""
        body = read(CountRequest, await read_json_object(request))
        site.check_model(body.model)
        chat, sources = chat_request(body, site.config.max_messages)
        try:
            turn = await turns.turn(chat)
        except InvalidRequest as error:
            raise renamed(error, sources) from error
        ids = await token_ids(site, turn.prompt.text or "", "messages", special=False)
        return json_response({"input_tokens": len(ids)})

    return count_tokens


def schema() -> dict[str, Any]:
    return takes(CountRequest)
