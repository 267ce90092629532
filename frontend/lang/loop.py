"""Where programs run: the one background loop of programs that block, started when first needed, and their threads."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import contextvars
import os
import threading
import weakref
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")

MAX_THREADS = 64  # that one batch, library program or loop has at a time for functions that block


class Guest(Protocol):
    """What has something to give back, on its loop, before the process ends."""

    loop: asyncio.AbstractEventLoop

    async def leave(self) -> None: ...


guests: weakref.WeakSet[Guest] = weakref.WeakSet()

_gates: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = weakref.WeakKeyDictionary()
_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def background_loop() -> asyncio.AbstractEventLoop:
    global _loop
    with _lock:
        if _loop is None or _loop.is_closed():
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="branchwise-loop", daemon=True).start()
        return _loop


def in_thread(work: Callable[[], T]) -> Future[T]:
    """``work`` in a thread of its own. Not in asyncio's pool: it may wait for others that need a thread, too."""
    done: Future[T] = Future()
    done.set_running_or_notify_cancel()  # from here on it cannot be cancelled

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(run,), name="branchwise-program", daemon=True).start()
    return done


async def aside(work: Callable[[], T]) -> T:
    """`in_thread`, awaited. At most `MAX_THREADS` of one loop's at a time: ``work`` must not come back here."""
    loop = asyncio.get_running_loop()
    gate = _gates.setdefault(loop, asyncio.Semaphore(MAX_THREADS))
    async with gate:
        return await asyncio.wrap_future(in_thread(work))


class _GaveUp(Exception):
    """Who was making it was cancelled."""


class Once(Generic[T]):
    """Something to be made when it is first needed, on whichever loop; everybody else waits for the first."""

    def __init__(self, make: Callable[[], Awaitable[T]]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._made: Future[T] | None = None

    async def get(self) -> T:
        """Raises what making it raised; the next call tries again."""
        while True:
            with self._lock:
                made, mine = self._made, self._made is None
                if made is None:
                    made = self._made = Future()
                    made.set_running_or_notify_cancel()  # one who waits and is cancelled cancels nobody else
            if mine:
                return await self._first(made)
            try:
                return made.result() if made.done() else await asyncio.wrap_future(made)
            except _GaveUp:
                continue

    async def _first(self, made: Future[T]) -> T:
        try:
            value = await self._make()
        except BaseException as error:
            self._made = None
            made.set_exception(error if isinstance(error, Exception) else _GaveUp())
            raise
        made.set_result(value)
        return value


def _forget() -> None:
    """A forked process has the loop, but not the thread that runs it."""
    global _lock, _loop
    _lock, _loop = threading.Lock(), None


os.register_at_fork(after_in_child=_forget)


@atexit.register
def _leave() -> None:
    """What is under way is ended, given back and closed, if that takes no longer than a moment."""
    if _loop is not None and _loop.is_running():
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(_end(_loop), _loop).result(2.0)


async def _end(loop: asyncio.AbstractEventLoop) -> None:
    await asyncio.gather(*(guest.leave() for guest in list(guests) if guest.loop is loop), return_exceptions=True)
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    if tasks:  # runs that had been told to end just now
        _, tasks = await asyncio.wait(tasks, timeout=1.0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await loop.shutdown_asyncgens()
