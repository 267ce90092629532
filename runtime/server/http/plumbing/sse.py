"""Server-sent events, JSON responses, and the detection of disconnected clients."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import msgspec
from fastapi import Response
from starlette.types import Scope

from ..engine_client import EngineCall
from .connection import connection_of
from .errors import ClientGone, describe

DONE = b"data: [DONE]\n\n"

_encode = msgspec.json.Encoder().encode

T = TypeVar("T")


def event(value: object) -> bytes:
    return b"data: " + _encode(value) + b"\n\n"


def typed_event(value: Mapping[str, Any]) -> bytes:
    """An event with an ``event:`` line: the value's ``type``."""
    return b"event: " + value["type"].encode() + b"\n" + event(value)


def error_event(error: Exception) -> bytes:
    return event(describe(error)[1])


async def wait(call: EngineCall, scope: Scope, what: Callable[[], Awaitable[T]]) -> T:
    """``await what()``, ended by `ClientGone` when the client leaves. On any error the call is closed."""
    try:
        with connection_of(scope).watched(lambda: call.fail(ClientGone())):
            return await what()
    except BaseException:
        call.close()
        raise


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(_encode(value), status, headers, media_type="application/json")
