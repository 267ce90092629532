"""A client that leaves is nothing to write home about."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from branchwise.runtime.server.http.engine_client import EngineClient
from branchwise.runtime.server.http.plumbing.connection import KEY, Connection, connection_of
from branchwise.runtime.server.http.plumbing.errors import ClientGone
from branchwise.runtime.server.http.plumbing.router import Router
from branchwise.runtime.server.http.plumbing.routes import Route


async def test_a_client_that_leaves_leaves_no_traceback(client: EngineClient, caplog: pytest.LogCaptureFixture) -> None:
    async def route(request: Any) -> Any:
        raise ClientGone

    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    sent = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/x", "headers": []}
    with caplog.at_level(logging.DEBUG):
        await Router([Route("GET", "/x", route)], client)(scope, receive, send)
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
