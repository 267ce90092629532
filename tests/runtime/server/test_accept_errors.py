"""A server out of descriptors: its log, and how many connections it takes."""

from __future__ import annotations

import asyncio
import logging
import resource

import pytest

from branchwise.runtime.server.client_warnings import LOG_SECONDS, ClientWarnings
from branchwise.runtime.server.startup import ACCEPT_BURST, MAX_DESCRIPTORS, most_connections

FAILED = {"message": "socket.accept() out of system resource", "exception": OSError(24, "Too many open files")}


async def test_one_line_says_how_often_accepting_failed(caplog: pytest.LogCaptureFixture) -> None:
    loop, now = asyncio.get_running_loop(), 0.0
    limited, logger = ClientWarnings(lambda: now), logging.getLogger("asyncio")
    logger.addFilter(limited)
    try:
        for _ in range(500):
            loop.call_exception_handler(FAILED)
        loop.call_exception_handler({"message": "another"})
        now = LOG_SECONDS
        loop.call_exception_handler(FAILED)
    finally:
        logger.removeFilter(limited)
    assert [record.getMessage() for record in caplog.records] == [
        "cannot accept connections: [Errno 24] Too many open files",
        "another",
        "cannot accept connections: [Errno 24] Too many open files (499 more since the last such line)",
    ]
    assert not any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize("soft", [64, 256, 1024, 65_536])
def test_connections_leave_room_for_the_process_itself(monkeypatch: pytest.MonkeyPatch, soft: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, soft))
    assert 0 < most_connections() < soft
    if soft >= 1024:
        assert soft - most_connections() >= 4 * ACCEPT_BURST + 100
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert most_connections() == MAX_DESCRIPTORS
