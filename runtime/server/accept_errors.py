"""Keeps a server that is out of descriptors or memory from filling its log with one traceback for each attempt."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

logger = logging.getLogger(__name__)

LOG_SECONDS = 10.0  # least time between two lines
_ACCEPT = "socket.accept() out of system resource"  # asyncio's message


@contextlib.contextmanager
def accept_errors_limited(
    loop: asyncio.AbstractEventLoop, clock: Callable[[], float] = time.monotonic
) -> Iterator[None]:
    """While inside, failures to accept a connection are logged as one line every `LOG_SECONDS`.

    asyncio waits a second before it accepts again, but reports each attempt of one burst. Other errors are left to the
    handler that the loop had before.
    """
    before = loop.get_exception_handler()
    failed, logged = 0, -LOG_SECONDS

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal failed, logged
        if context.get("message") != _ACCEPT:
            if before is None:
                loop.default_exception_handler(context)
            else:
                before(loop, context)
            return
        failed += 1
        if clock() - logged >= LOG_SECONDS:
            logger.error("cannot accept connections: %s (%d failed attempts)", context.get("exception"), failed)
            failed, logged = 0, clock()

    loop.set_exception_handler(handle)
    try:
        yield
    finally:
        loop.set_exception_handler(before)
