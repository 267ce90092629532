"""uvicorn's server, as a part of this one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator

import uvicorn

from ..config import ServerConfig
from .client_warnings import client_warnings
from .http.app import make_app
from .http.plumbing.protocol import HttpProtocol, bounded
from .http.state import AppState
from .startup import ACCEPT_BURST, BACKLOG, most_connections

UNREAD_SECONDS = 0.5  # that responses which nobody reads may take to end


class HttpServer(uvicorn.Server):
    """Serves the routes of ``state``. It leaves signals to the process."""

    def __init__(self, config: ServerConfig, state: AppState) -> None:
        debug = config.log_level == "debug"
        for name in ("uvicorn.error", "asyncio"):  # "Invalid HTTP request received."; failures to accept a connection
            logging.getLogger(name).addFilter(client_warnings)
        super().__init__(
            uvicorn.Config(
                make_app(state),
                http=bounded(config.max_header_bytes, most_connections()),
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="debug" if debug else "warning",
                access_log=debug,
                server_header=False,
                proxy_headers=False,  # no route uses the client's address
                timeout_keep_alive=75,
                backlog=ACCEPT_BURST,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for each in sockets or ():
            each.listen(BACKLOG)  # asyncio has set it to the burst

    def close_after_answers(self) -> None:
        """From now on every answer closes its connection, so that clients do not send another request on it."""
        close = (b"connection", b"close")
        self.config.encoded_headers.append(close)  # from which the default headers are made every second
        self.server_state.default_headers.append(close)

    async def end_unread(self) -> None:
        """Ends the connections on which a response waits for its client to read, so that it ends as if the client had
        left. Cancelled instead, each would be logged as an error of the application."""
        for connection in list(self.server_state.connections):
            if isinstance(connection, HttpProtocol) and connection.flow.write_paused:
                connection.transport.abort()
        if tasks := set(self.server_state.tasks):
            await asyncio.wait(tasks, timeout=UNREAD_SECONDS)
