"""A server out of descriptors: its log, and how many connections it takes."""

from __future__ import annotations

import asyncio
import logging
import resource
from typing import Any

import pytest

from branchwise.runtime.server.accept_errors import LOG_SECONDS, accept_errors_limited
from branchwise.runtime.server.startup import ACCEPT_BURST, MAX_DESCRIPTORS, most_connections

FAILED = {"message": "socket.accept() out of system resource", "exception": OSError(24, "Too many open files")}


async def test_one_line_says_how_often_accepting_failed(caplog: pytest.LogCaptureFixture) -> None:
    loop, now = asyncio.get_running_loop(), 0.0
    with accept_errors_limited(loop, lambda: now):
        for _ in range(500):
            loop.call_exception_handler(FAILED)
        now = LOG_SECONDS
        loop.call_exception_handler(FAILED)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "Too many open files" in messages[0] and "(1 failed attempts)" in messages[0]
    assert "(500 failed attempts)" in messages[1]


async def test_other_errors_go_where_they_went(caplog: pytest.LogCaptureFixture) -> None:
    loop = asyncio.get_running_loop()
    seen: list[dict[str, Any]] = []

    def before(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        seen.append(context)

    loop.set_exception_handler(before)
    with accept_errors_limited(loop):
        loop.call_exception_handler({"message": "another"})
    assert loop.get_exception_handler() is before
    assert [one["message"] for one in seen] == ["another"]
    loop.set_exception_handler(None)
    with accept_errors_limited(loop), caplog.at_level(logging.ERROR, "asyncio"):
        loop.call_exception_handler({"message": "a third"})
    assert "a third" in caplog.text


@pytest.mark.parametrize("soft", [64, 256, 1024, 65_536])
def test_connections_leave_room_for_the_process_itself(monkeypatch: pytest.MonkeyPatch, soft: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, soft))
    assert 0 < most_connections() < soft
    if soft >= 1024:
        assert soft - most_connections() >= 4 * ACCEPT_BURST + 100
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert most_connections() == MAX_DESCRIPTORS
