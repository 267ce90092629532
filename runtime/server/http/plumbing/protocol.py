"""HTTP/1.1 below the application: bounds on heads, bodies and slow clients, which middleware cannot enforce."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from .connection import KEY, Connection
from .errors import RETRY_AFTER_SECONDS, error_body

if TYPE_CHECKING:
    from uvicorn._types import ASGISendEvent

MAX_PIPELINED = 64  # requests of one connection that wait for earlier ones


def bounded(max_head_bytes: int, max_connections: int) -> type[HttpProtocol]:
    """The protocol with this server's bounds."""
    bounds = {"max_head_bytes": max_head_bytes, "max_connections": max_connections}
    return type("BoundedProtocol", (HttpProtocol,), bounds)


class HttpProtocol(HttpToolsProtocol):
    """Bounds what uvicorn does not: the size of a head, and the time of a head, a body and an unread response.

    Without them any client, with or without a key, could exhaust memory or file descriptors.
    """

    max_head_bytes = 64 * 1024  # request line and headers; trailers
    max_connections = 65_536  # one more is answered with a 503 and closed
    head_seconds = 20.0  # from connecting, or from a request's first byte, to the end of its head
    # From the head to the end of the body: body_seconds + bytes / body_bytes, at most body_most_seconds.
    body_seconds, body_bytes, body_most_seconds = 30.0, 16 * 1024, 300.0
    unread_seconds = 60.0  # for which a client may leave a full send buffer unread
    half_closed_seconds = 0.5  # for an answer to a client that has closed its side: most such clients have left

    _loose = 0  # bytes since the parser last completed something: a head, a piece of body, a chunk's header
    _head_timer: asyncio.TimerHandle | None = None
    _body_timer: asyncio.TimerHandle | None = None
    _unread_timer: asyncio.TimerHandle | None = None
    _in_head = _in_body = False
    _body_since = 0.0  # the loop's time when the first piece of a request came without its end
    _body_seen = 0  # bytes
    _half_closed_timer: asyncio.TimerHandle | None = None
    _running: RequestResponseCycle | None = None  # the request being answered; `cycle` is the last one that was sent
    _owed = 0  # whole requests that have not been answered
    connection: Connection
    _problem: str | None = None  # of the request that the parser must refuse
    _refusal: tuple[int, str] | None = None  # to be sent after the pending answers

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.connection = Connection()
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            self._refuse(
                503, f"{self.max_connections} connections are open, as many as the server takes; try again later"
            )
        else:
            self._head_timer = self.loop.call_later(self.head_seconds, self._close)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._body_timer, self._unread_timer, self._half_closed_timer):
            if timer is not None:
                timer.cancel()
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)
        self.connection.lost()

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """Closes the connection after `half_closed_seconds`: a client that closed its sending side may still read."""
        if self.cycle is None or self.cycle.response_complete or self._in_body:
            return None
        self.cycle.keep_alive = False
        self._half_closed_timer = self.loop.call_later(self.half_closed_seconds, self._end_half_closed)
        return True

    def _end_half_closed(self) -> None:
        if self._running is not None and self._running.response_started:
            self._close()
        else:
            self._owed = 0
            self._refuse(400, "the client closed its side of the connection before the answer; keep it open meanwhile")

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None:
            return
        # Checked before this piece is counted: its end may belong to a body.
        if self._loose > self.max_head_bytes:
            self.send_400_response(f"the request's headers are larger than {self.max_head_bytes} bytes")
            return
        self._loose += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        # Timers only for what takes more than one piece: most requests arrive whole.
        if self._in_body:
            if self._body_timer is None:
                self._body_since = self.loop.time()
                self._body_timer = self.loop.call_later(self.body_seconds, self._body_is_late)
        elif self._head_timer is None and (self._in_head or self.cycle.response_complete):
            # Any data, such as an empty line, has ended the timer of an idle connection.
            self._head_timer = self.loop.call_later(self.head_seconds, self._close)

    # -- heads ---------------------------------------------------------------------------------------------------------

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._end_head_timer()  # that of the connection's beginning
        self._in_head = True

    def _end_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def on_headers_complete(self) -> None:
        self._loose = 0
        self._in_head, self._in_body, self._body_seen = False, True, 0
        self._end_head_timer()
        if len(self.pipeline) >= MAX_PIPELINED:
            self._problem = f"more than {MAX_PIPELINED} requests are pipelined"
        elif sum(name == b"host" for name, _ in self.headers) > 1:
            self._problem = "the request has more than one Host header"
        if self._problem is not None:
            raise ValueError(self._problem)  # the parser's caller answers 400 and closes
        self.scope[KEY] = self.connection  # type: ignore[literal-required]
        super().on_headers_complete()
        if self.parser.get_http_version() == "1.0":
            self.cycle.send = _unchunked(self.cycle)  # type: ignore[assignment, method-assign]

    # -- bodies --------------------------------------------------------------------------------------------------------

    def on_chunk_header(self) -> None:
        self._loose = 0

    def on_body(self, body: bytes) -> None:
        self._loose = 0
        self._body_seen += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._loose = 0
        self._end_body_timer()
        self._owed += 1
        super().on_message_complete()
        if not self.pipeline:  # a large body has paused reading, which is how a client that leaves is noticed
            self.flow.resume_reading()

    def _end_body_timer(self) -> None:
        self._in_body = False
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None

    def _body_is_late(self) -> None:
        now = self.loop.time()
        if self.flow.read_paused:  # the server is not reading: the request before this one is not answered yet
            self._body_since = now
        allowed = min(self.body_seconds + self._body_seen / self.body_bytes, self.body_most_seconds)
        end = self._body_since + allowed
        if now < end:
            self._body_timer = self.loop.call_at(end, self._body_is_late)
        elif self.cycle.response_started:
            self._close()
        else:
            seconds = now - self._body_since
            self._refuse(408, f"the request's body did not arrive in time: {self._body_seen} bytes in {seconds:.0f} s")

    # -- answers -------------------------------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        self._owed = max(0, self._owed - 1)
        if self._refusal is not None and not self._owed:
            self.pipeline.clear()
            if not self.transport.is_closing():
                self._refuse(*self._refusal)
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread_timer = self.loop.call_later(self.unread_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, self._problem or msg)

    def _refuse(self, status: int, message: str) -> None:
        """Send an error in OpenAI's shape and close the connection, after the answers to earlier requests."""
        if self._owed:
            self._refusal = status, message
            self._in_head = False  # nothing more is read
            self._end_head_timer()
            self._end_body_timer()
            return
        body = msgspec.json.encode(error_body(status, message))
        retry = f"retry-after: {RETRY_AFTER_SECONDS}\r\n" if status == 503 else ""
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n{retry}connection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self._close()

    def _close(self) -> None:
        """Close once everything written has been sent, or after ``unread_seconds``."""
        self.transport.close()
        if self.transport.get_write_buffer_size():
            self.loop.call_later(self.unread_seconds, self.transport.abort)


def _unchunked(cycle: RequestResponseCycle) -> Callable[[ASGISendEvent], Coroutine[Any, Any, None]]:
    """``cycle.send`` for HTTP/1.0, which has no chunks: a body of unknown length ends where the connection does."""
    send = cycle.send
    until_close = False

    async def send_unchunked(message: ASGISendEvent) -> None:
        nonlocal until_close
        if message["type"] == "http.response.start":
            until_close = not any(name.lower() == b"content-length" for name, _ in message.get("headers", []))
            if until_close:
                cycle.chunked_encoding = False
        elif until_close and message["type"] == "http.response.body":
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    return send_unchunked
