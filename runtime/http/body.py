"""Request bodies: bounded, and parsed as strict JSON."""

from __future__ import annotations

import gc
from typing import Any

import msgspec
from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import InvalidRequest
from .errors import response_for


class BodyLimit:
    """Refuses bodies over ``max_bytes``: by their Content-Length before reading, by counting otherwise."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._max:
            # Whatever follows on this connection is the body we will not read.
            response = response_for(self._too_large())
            response.headers["Connection"] = "close"
            await response(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > self._max:
                    raise self._too_large()
            return message

        await self._app(scope, counted, send)

    def _too_large(self) -> InvalidRequest:
        return InvalidRequest(f"the request body must be at most {self._max} bytes", status=413)


async def read_json_object(request: Request) -> dict[str, Any]:
    """The body as a JSON object. NaN, Infinity, lone surrogates, invalid UTF-8 and absurd nesting are a 400."""
    body = await request.body()
    # Decoding makes one object after the other and no garbage: the collector would walk them all again and again.
    gc.disable()
    try:
        value = msgspec.json.decode(body)
    except UnicodeDecodeError as error:
        raise InvalidRequest("the body is not valid UTF-8") from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    finally:
        gc.enable()
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body must be a JSON object, got {type(value).__name__}")
    return value
