"""Server-sent events over a call, and the detection of disconnected clients."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, TypeVar

import msgspec
from fastapi import Response
from starlette.types import Receive, Scope, Send

from ....errors import InvalidRequest
from ..engine_client import Batch, EngineCall
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


class EventStream(Response):
    """Streams a call whose first batch has arrived (so errors before it had their own status).

    ``render(batch)`` gives the events of a batch; ``end()`` those after the last; ``fail(error)`` the last event of a
    stream that fails midway, its fields `renamed` by ``names``. The call is closed in every case: a client that
    disconnects stops its requests at once.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        call: EngineCall,
        first: Batch,
        render: Callable[[Batch], Iterable[bytes]],
        end: Callable[[], Iterable[bytes]],
        headers: Mapping[str, str] | None = None,
        names: Mapping[str, str] | None = None,
        fail: Callable[[Exception], bytes] = error_event,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._call = call
        self._first = first
        self._render = render
        self._end = end
        self._names = names or {}
        self._fail = fail

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with connection_of(scope).watched(lambda: self._call.fail(ClientGone())):
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                await self._stream(send)
        except ClientGone:
            pass  # the client has gone: closing the call aborts its requests
        finally:
            self._call.close()

    async def _stream(self, send: Send) -> None:
        render, call = self._render, self._call
        try:
            batch = self._first
            while batch:
                chunk = b"".join(render(batch))
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                batch = await call.batch()
            last = b"".join(self._end())
        except ClientGone:
            raise
        except Exception as error:
            # The status has been sent: the error is the last event, and no [DONE] follows it.
            last = self._fail(error.renamed(self._names) if isinstance(error, InvalidRequest) else error)
        await send({"type": "http.response.body", "body": last, "more_body": False})


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(_encode(value), status, headers, media_type="application/json")
