"""HTTP/1.1 below the application: what reaches nobody's middleware is bounded and answered here."""

from __future__ import annotations

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .errors import error_body

MAX_HEAD_BYTES = 64 * 1024  # request line and headers


class HttpProtocol(HttpToolsProtocol):
    """uvicorn's parser has no bound on headers: anybody, with a key or without, could fill the memory with them."""

    _head_bytes = 0
    _in_head = True

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            # Looked at before this piece is counted: its end may already be a body.
            if self._head_bytes > MAX_HEAD_BYTES:
                self.send_400_response(f"the request's headers are larger than {MAX_HEAD_BYTES} bytes")
                return
            self._head_bytes += len(data)
        super().data_received(data)

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head, self._head_bytes = True, 0
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
