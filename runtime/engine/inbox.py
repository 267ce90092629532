"""From the engine's thread to an asyncio task."""

from __future__ import annotations

import asyncio

from ..messages import Delta


class AsyncInbox:
    """Deltas from the engine's thread to one asyncio task. Closed first, so that a late delta meets no dead loop."""

    async def __aenter__(self) -> AsyncInbox:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Delta] = asyncio.Queue()
        self._open = True
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._open = False

    def put(self, delta: Delta) -> None:
        if self._open:
            try:
                self._loop.call_soon_threadsafe(self._queue.put_nowait, delta)
            except RuntimeError:  # the loop was closed without closing us: nobody is left to tell
                self._open = False

    async def get(self) -> Delta:
        return await self._queue.get()
