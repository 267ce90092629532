"""A client that leaves is nothing to write home about."""

from __future__ import annotations

import logging
from typing import Any

from starlette.applications import Starlette
from starlette.routing import Route

from branchwise.runtime.server.http.plumbing.connection import KEY, Connection, connection_of
from branchwise.runtime.server.http.plumbing.errors import ClientGone, install


async def test_a_client_that_leaves_leaves_no_traceback(caplog):
    async def route(request: Any) -> Any:
        raise ClientGone

    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    sent = []

    async def send(message: Any) -> None:
        sent.append(message)

    app = Starlette(routes=[Route("/x", route)])
    install(app, ())  # type: ignore[arg-type]
    scope = {
        "type": "http",
        "method": "GET",
        "path": "/x",
        "headers": [],
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "server": ("localhost", 1),
        "http_version": "1.1",
    }
    with caplog.at_level(logging.DEBUG):
        await app(scope, receive, send)
    assert not [record for record in caplog.records if record.name.startswith(("branchwise", "uvicorn"))]
    assert sent[0]["status"] == 499


def test_only_the_request_being_served_hears_of_the_loss() -> None:
    heard: list[int] = []
    connection = Connection()
    assert connection_of({KEY: connection}) is connection
    with connection.watched(lambda: heard.append(1)):
        pass
    with connection.watched(lambda: heard.append(2)):
        connection.lost()
    assert heard == [2]


def test_a_loss_before_the_request_is_watched_counts() -> None:
    heard: list[int] = []
    connection = Connection()
    connection.lost()
    with connection.watched(lambda: heard.append(1)):
        assert heard == [1]
