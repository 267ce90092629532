"""Responds to a request with a call's output: whole, or as a stream of events."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from fastapi import Request, Response

from ....errors import renaming
from ..engine_client import Batch, EngineCall
from ..fields.usage import cache_headers
from .sse import EventStream, error_event, json_response, wait


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


async def respond(
    call: EngineCall,
    request: Request,
    reply: Reply,
    *,
    stream: bool,
    n: int = 1,
    names: Mapping[str, str] | None = None,
    headers: Mapping[str, str] | None = None,
    fail: Callable[[Exception], bytes] = error_event,
) -> Response:
    """The whole response, or a stream once its first batch has arrived. Closes the call.

    ``n``: samples of each prompt, for the cache header. ``names``: the client's names in the engine's errors, as
    `InvalidRequest.renamed` takes them. ``headers``: of the response, beside the cache header. ``fail``: as in
    `EventStream`.
    """
    names = names or {}
    if stream:
        with renaming(names):
            first = await wait(call, request.scope, call.batch)
        headers = {**(headers or {}), **(cache_headers(request.scope["headers"], first, n) or {})}
        return EventStream(call, first, reply.events, reply.end, headers, names, fail)
    with call, renaming(names):
        batch = await wait(call, request.scope, call.all)
    headers = {**(headers or {}), **(cache_headers(request.scope["headers"], batch, n) or {})}
    return json_response(reply.whole(batch), headers=headers)
