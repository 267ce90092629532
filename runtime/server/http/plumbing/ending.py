"""Answers requests that are cancelled because the server ends while they do something without the engine."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..engine_client import EngineClient
from .errors import response_for


class AnswerCancelled:
    """A request that waits for the engine gets its error from there; one that tokenizes a long text is cancelled by
    the HTTP server instead, which would answer with a plain "Internal Server Error"."""

    def __init__(self, app: ASGIApp, client: EngineClient) -> None:
        self._app = app
        self._client = client

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def noticed(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, noticed)
        except asyncio.CancelledError:
            if started or scope["type"] != "http" or self._client.state in ("ready", "leaving"):
                raise
            await response_for(self._client.unavailable())(scope, receive, send)
