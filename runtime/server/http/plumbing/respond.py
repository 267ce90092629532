"""Responds to a request with a call's output: whole, or as a stream of events."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from ....errors import InvalidRequest, renaming
from ..engine_client import Batch, EngineCall
from ..fields.usage import cache_headers
from .connection import connection_of
from .errors import ClientGone
from .sse import json_response, wait


class Reply(Protocol):
    """The output of a call in a dialect's format."""

    def whole(self, batch: Batch) -> Any:
        """The response as JSON values; ``batch``: all of the call's output."""
        ...

    def events(self, batch: Batch) -> Iterable[bytes]:
        """The events of one batch."""
        ...

    def end(self) -> Iterable[bytes]:
        """The events after the last batch."""
        ...

    def fail(self, error: Exception) -> bytes:
        """The last event of a stream that fails midway."""
        ...


async def respond(
    call: EngineCall,
    request: Request,
    reply: Reply,
    *,
    stream: bool,
    n: int = 1,
    names: Mapping[str, str] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """The whole response, or a stream once its first batch has arrived. Closes the call.

    ``n``: samples of each prompt, for the cache header. ``names``: the client's names in the engine's errors, as
    `InvalidRequest.renamed` takes them. ``headers``: of the response, beside the cache header.
    """
    names = names or {}
    with renaming(names):
        batch = await wait(call, request.scope, call.batch if stream else call.all)
    headers = {**(headers or {}), **(cache_headers(request.scope["headers"], batch, n) or {})}
    if stream:
        return _EventStream(call, batch, reply, headers, names)
    with call:
        return json_response(reply.whole(batch), headers=headers)


class _EventStream(Response):
    """Streams a call whose ``first`` batch has arrived, so that errors before it had their own status.

    The call is closed in every case: a client that disconnects stops its requests at once.
    """

    media_type = "text/event-stream"

    def __init__(
        self, call: EngineCall, first: Batch, reply: Reply, headers: Mapping[str, str], names: Mapping[str, str]
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]
        self._call, self._first, self._reply, self._names = call, first, reply, names

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
        render, call = self._reply.events, self._call
        try:
            batch = self._first
            while batch:
                chunk = b"".join(render(batch))
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                batch = await call.batch()
            last = b"".join(self._reply.end())
        except ClientGone:
            raise
        except Exception as error:
            # The status has been sent: the error is the last event, and no [DONE] follows it.
            last = self._reply.fail(error.renamed(self._names) if isinstance(error, InvalidRequest) else error)
        await send({"type": "http.response.body", "body": last, "more_body": False})
