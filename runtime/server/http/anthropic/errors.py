"""Errors in Anthropic's shape, wherever they arise: key check, body limit or route."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..plumbing.errors import describe
from ..plumbing.request_id import KEY
from ..plumbing.routes import MESSAGE, ErrorShape
from ..plumbing.sse import typed_event

ROOT = "/v1/messages"
OVERLOADED = 529  # Anthropic's own status, which its clients handle
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    OVERLOADED: "overloaded_error",
}
NO_THREADS = "thread_unsupported_request"  # error code that makes Anthropic's package send whole conversations


def error_body(status: int, message: str, id: str, code: str | None = None) -> dict[str, Any]:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    details = {"details": {"error_code": code, "unsupported": ["thread"]}} if code == NO_THREADS else {}
    return {"type": "error", "error": {"type": kind, "message": message, **details}, "request_id": id}


def _status(status: int) -> int:
    """Anthropic's status for one of ours."""
    return OVERLOADED if status == 503 else status


SHAPE = ErrorShape(
    prefix="Messages",
    schema={
        "type": "object",
        "title": "MessagesError",
        "description": "Anthropic's: the body of every 4xx and 5xx of /v1/messages; within a stream, its last event.",
        "required": ["type", "error", "request_id"],
        "properties": {
            "type": {"const": "error"},
            "error": {
                "type": "object",
                "required": ["type", "message"],
                "properties": {
                    "type": {"type": "string", "description": "Follows from the status."},
                    "message": MESSAGE,
                    "details": {"type": "object", "description": "Only where a thread was asked for."},
                },
                "additionalProperties": False,
            },
            "request_id": {"type": "string"},
        },
    },
    status=_status,
    body=lambda status, message, param, code: error_body(
        _status(status), message, "req_0123456789abcdef0123456789abcdef"
    ),
)


def error_event(error: Exception, request_id: str) -> bytes:
    """The last event of a stream that fails midway."""
    status, body = describe(error)
    return typed_event(error_body(_status(status), body["error"]["message"], request_id))


class MessagesErrors:
    """Gives every response below `ROOT` a ``request-id``, and every error Anthropic's body and status.

    The outermost middleware but one: the others refuse in OpenAI's shape before any route is reached.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not f"{scope['path']}/".startswith(f"{ROOT}/"):
            await self._app(scope, receive, send)
            return
        id = scope[KEY]
        held: Message | None = None  # the head of an error, until its body is here
        body = b""

        async def reshaped(message: Message) -> None:
            nonlocal held, body
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message["headers"])
                headers["request-id"] = id
                if message["status"] >= 400 and headers.get("content-type") == "application/json":
                    message["status"] = _status(message["status"])
                    held = message
                    return
            elif held is not None:
                body += message.get("body", b"")
                if message.get("more_body"):
                    return
                said = msgspec.json.decode(body)["error"]
                message["body"] = msgspec.json.encode(error_body(held["status"], said["message"], id, said["code"]))
                MutableHeaders(raw=held["headers"])["content-length"] = str(len(message["body"]))
                await send(held)
            await send(message)

        await self._app(scope, receive, reshaped)
