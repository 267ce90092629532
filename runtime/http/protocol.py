"""HTTP/1.1 below the application: what reaches nobody's middleware is bounded and answered here."""

from __future__ import annotations

import asyncio

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .errors import error_body

MAX_PIPELINED = 64  # requests of one connection that wait for the one before them
HEAD_SECONDS = 20.0  # from connecting, or from a request's first byte, to the end of its head


def bounded(max_head_bytes: int) -> type[HttpProtocol]:
    """The protocol with a bound of this server's own."""
    return type("BoundedProtocol", (HttpProtocol,), {"max_head_bytes": max_head_bytes})


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's parser has no bound on headers: anybody, with a key or without, could fill the memory with them."""

    max_head_bytes = 64 * 1024  # request line and headers; trailers
    _loose = 0  # bytes since the parser last completed something: a head, a piece of body, a chunk's header

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_here()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_head()

    def _expect_head(self) -> None:
        """A connection that sends nothing, or half a request, holds a file descriptor: not for ever."""
        self._head_is_here()
        self._timer = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _head_is_here(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def data_received(self, data: bytes) -> None:
        # Looked at before this piece is counted: its end may already be a body.
        if self._loose > self.max_head_bytes:
            self.send_400_response(f"the request's headers are larger than {self.max_head_bytes} bytes")
            return
        self._loose += len(data)
        super().data_received(data)

    def on_headers_complete(self) -> None:
        self._loose = 0
        self._head_is_here()
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError("too many pipelined requests")  # the parser's caller answers 400 and closes
        super().on_headers_complete()

    def on_chunk_header(self) -> None:
        self._loose = 0

    def on_body(self, body: bytes) -> None:
        self._loose = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._loose = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """In the shape of every other error, and the end of the connection."""
        body = msgspec.json.encode(error_body(400, msg))
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
