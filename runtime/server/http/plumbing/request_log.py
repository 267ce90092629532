"""A record of each HTTP request: a line of the log (``--log-requests``), a span of a trace, or both.

A record has counts and times, never a prompt or an answer. It is passed down by a context variable, so that routes do
not know of it: `EngineClient` attaches it to the calls that it opens.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ....messages import Delta
from ...log_format import FIELDS
from .request_id import KEY

logger = logging.getLogger("branchwise.requests")

MAX_PATH = 200  # characters
_record: ContextVar[RequestRecord | None] = ContextVar("request_record", default=None)


class TokenCounts(msgspec.Struct):
    """Token counts of one engine request."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0


class RequestRecord:
    """One HTTP request and its engine requests (prompts × n). Times are in seconds."""

    def __init__(self, id: str, method: str, path: str, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self.id, self.method, self.path, self.headers = id, method, path[:MAX_PATH], headers
        self.started_ns = time.time_ns()
        self._started = time.monotonic()
        self.status = 499  # until a response starts: the client left before
        self.owner: str | None = None  # of the cache namespace: a digest of the API key; None: no engine request
        self.samples: dict[int, TokenCounts] = {}
        self.first_token: float | None = None
        self.seconds = 0.0
        self.ends: list[str] = []  # finish reasons, each once
        self.error: dict[str, Any] = {}  # type, param and code of an error response or of a stream's last event

    def add(self, delta: Delta) -> None:
        """Count the output of one step of one engine request."""
        sample = self.samples.setdefault(delta.id, TokenCounts())
        if delta.tokens:
            if self.first_token is None:
                self.first_token = time.monotonic() - self._started
            sample.completion += len(delta.tokens) // 4
        if delta.cache is not None:
            sample.prompt, sample.cached = delta.prompt_tokens, delta.cache.hit_tokens
        finish = delta.finish
        if finish is not None:
            sample.prompt, sample.completion = finish.prompt_tokens, finish.completion_tokens
            if finish.reason not in self.ends:
                self.ends.append(finish.reason)

    def end(self) -> None:
        """Called once, when the response has ended."""
        self.seconds = time.monotonic() - self._started

    def fields(self) -> dict[str, Any]:
        """JSON-able, without what is unknown. Token counts are summed over the samples."""
        found: dict[str, Any] = {"id": self.id, "method": self.method, "path": self.path, "status": self.status}
        if self.owner is not None:
            samples = self.samples.values()
            found |= {
                "owner": self.owner[:8] or None,
                "prompt_tokens": sum(each.prompt for each in samples),
                "cached_tokens": sum(each.cached for each in samples),
                "completion_tokens": sum(each.completion for each in samples),
                "ttft": self.first_token and round(self.first_token, 4),
                "end": ",".join(self.ends) or "abort",
            }
        found |= {"error": self.error.get("type"), "param": self.error.get("param"), "code": self.error.get("code")}
        found["seconds"] = round(self.seconds, 4)
        return {name: value for name, value in found.items() if value is not None}


def current() -> RequestRecord | None:
    """The record of the request being served; None where requests are not recorded."""
    return _record.get()


def log_line(record: RequestRecord) -> None:
    """One line. The path and an error's field are the client's text: what is not printable is escaped."""
    fields = record.fields()
    shown = [f"{name}={value}" for name, value in fields.items() if name not in ("method", "path", "status")]
    text = " ".join([record.method, record.path, str(record.status), *shown])
    logger.info("%s", text if text.isprintable() else ascii(text), extra={FIELDS: fields})


class RequestLog:
    """Middleware inside of `RequestId`. ``sinks`` get each record when its response has ended."""

    def __init__(self, app: ASGIApp, sinks: Sequence[Callable[[RequestRecord], object]]) -> None:
        self._app = app
        self._sinks = sinks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(scope[KEY], scope["method"], scope["path"], scope["headers"])

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
            await send(message)

        token = _record.set(record)
        try:
            await self._app(scope, receive, noted)
        finally:
            _record.reset(token)
            record.end()
            for sink in self._sinks:
                sink(record)
