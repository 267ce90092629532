"""``GET /ui/events``: server-sent events, each a complete snapshot of the tree, the requests and the figures.

Listeners with the same rights share one producer, which stops when the last of them leaves. It asks the scheduler at
most twice a second, and less often where a snapshot is expensive: its work in both processes is bounded to `SHARE` of a
core. A listener that reads slowly skips snapshots.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import Request, Response
from starlette.responses import StreamingResponse

from ....errors import InvalidRequest
from ..native.tree_text import Decode, add_text, decoder
from ..plumbing.auth import is_admin
from ..plumbing.errors import describe
from ..plumbing.routes import Routes, count, read_query
from ..plumbing.sse import event
from ..state import AppState

INTERVAL = 0.5  # seconds between snapshots at least
SHARE = 0.005  # of a core, for what is timed; encoding a snapshot between the processes costs about as much again
SILENCE = 10.0  # seconds without a change after which a comment is sent, so that proxies keep the connection open
DEFAULT_NODES, MAX_NODES = 1000, 4000
MAX_LISTENERS = 64
_QUERY = {"max_nodes": count("Nodes of the tree at most.", MAX_NODES, DEFAULT_NODES)}

Ask = Callable[[], Awaitable[dict[str, Any]]]


def routes(state: AppState) -> Routes:
    routes = Routes("ui")
    feeds = Feeds(state)

    @routes.add("GET", "/ui/events", query=_QUERY, events=True)
    async def events(request: Request) -> Response:
        """The tree and its requests as they change. A tenant gets its own part, the operator all of it."""
        [nodes] = read_query(request, _QUERY)
        owner = None if is_admin() else state.namespaces.of(None)[0]
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(_events(feeds.get(owner, nodes)), media_type="text/event-stream", headers=headers)

    return routes


class Feeds:
    """The producers, by the part of the tree that their listeners may see."""

    def __init__(self, state: AppState) -> None:
        self._state = state
        self._feeds: dict[tuple[str | None, int], Feed] = {}

    def get(self, owner: str | None, max_nodes: int) -> Feed:
        """Raises `InvalidRequest` (503) if there are too many listeners."""
        self._feeds = {key: feed for key, feed in self._feeds.items() if feed.listeners}
        if sum(feed.listeners for feed in self._feeds.values()) >= MAX_LISTENERS:
            raise InvalidRequest(None, f"{MAX_LISTENERS} pages are open, the most there can be", status=503)
        key = (owner, max_nodes)
        if key not in self._feeds:
            decode = decoder(self._state.tokenizer, remembered=max_nodes)
            question = {"owner": owner, "max_nodes": max_nodes}
            self._feeds[key] = Feed(
                lambda: self._state.client.control("watch", question),
                lambda found: self._complete(found, decode, sums=owner is None),
            )
        return self._feeds[key]

    def _complete(self, found: dict[str, Any], decode: Decode, sums: bool) -> None:
        add_text(found["tree"], decode, keep_preview=False)
        if sums:
            found["figures"] = self._state.metrics.figures()
        found["model"] = self._state.model_name


class Feed:
    """One producer of snapshots: keeps the newest and notifies its listeners.

    ``ask`` gets a snapshot from the scheduler, with the ``seconds`` that it took there; ``complete`` adds labels and
    figures in this process. The time of both bounds the rate.
    """

    def __init__(self, ask: Ask, complete: Callable[[dict[str, Any]], None] = lambda found: None) -> None:
        self._ask = ask
        self._complete = complete
        self._changed = asyncio.Condition()
        self._task: asyncio.Task[None] | None = None
        self._compared: dict[str, Any] = {}
        self.listeners = 0
        self.version = 0  # of `event`
        self.event = b""
        self.failed = False

    @contextlib.contextmanager
    def listening(self) -> Any:
        """Registers a listener: snapshots are produced while there is one."""
        self.listeners += 1
        if self._task is None:
            self._task = asyncio.create_task(self._produce())
        try:
            yield
        finally:
            self.listeners -= 1
            if not self.listeners and self._task is not None:
                self._task.cancel()
                self._task = None

    async def newer(self, version: int) -> int:
        """Waits for a snapshot after ``version``; returns its version."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.version != version)
        return self.version

    async def _produce(self) -> None:
        while not self.failed:
            try:
                found = await self._ask()
                began = time.thread_time()
                spent = float(found.pop("seconds"))
                self._complete(found)
                if found != self._compared:
                    self._compared, made = found, event(found)
                    await self._publish(made)
                spent += time.thread_time() - began
            except Exception as error:  # the engine has failed, or the server is stopping: listeners get the error
                self.failed = True
                await self._publish(event(describe(error)[1]))
                return
            await asyncio.sleep(max(INTERVAL, spent / SHARE))

    async def _publish(self, made: bytes) -> None:
        async with self._changed:
            self.event = made
            self.version += 1
            self._changed.notify_all()


async def _events(feed: Feed) -> AsyncIterator[bytes]:
    """The events for one listener, until it disconnects or the feed fails."""
    version = 0
    with feed.listening():
        while True:
            try:
                version = await asyncio.wait_for(feed.newer(version), SILENCE)
                yield feed.event
            except TimeoutError:
                yield b": alive\n\n"
            if feed.failed:
                return
