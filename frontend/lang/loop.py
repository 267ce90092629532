"""The one background loop of programs that block: a single thread, started when first needed."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import threading

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def background_loop() -> asyncio.AbstractEventLoop:
    global _loop
    with _lock:
        if _loop is None or _loop.is_closed():
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="branchwise-loop", daemon=True).start()
        return _loop


@atexit.register
def _leave() -> None:
    """Connections are closed as they should be, if that takes no longer than a moment."""
    if _loop is not None and _loop.is_running():
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(_loop.shutdown_asyncgens(), _loop).result(2.0)
