"""Sets ``x-request-id`` on every response, to the client's or to a new one. OpenAI's clients show it as
``_request_id``."""

from __future__ import annotations

import os
import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

KEY = "branchwise.request_id"  # in the scope of a request
_HEADER = b"x-request-id"
_GIVEN = re.compile(rb"[!-~]{1,128}")


class RequestId:
    """The outermost middleware, since others respond too. Keeps a client's id of 1 to 128 visible characters."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(_HEADER, b"")
        id = given if _GIVEN.fullmatch(given) else f"req_{os.urandom(16).hex()}".encode()
        scope[KEY] = id.decode()

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (_HEADER, id)]
            await send(message)

        await self._app(scope, receive, named)
