"""The background event loop of blocking programs, threads for functions that block, and values made once."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import contextvars
import os
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T")

MAX_THREADS = 64  # at a time, for the blocking functions of one batch, library program or loop


class Closable(Protocol):
    """Something to close on its loop before the process ends."""

    loop: asyncio.AbstractEventLoop

    async def close(self) -> None: ...


close_at_exit: weakref.WeakSet[Closable] = weakref.WeakSet()

_gates: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = weakref.WeakKeyDictionary()
_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def background_loop() -> asyncio.AbstractEventLoop:
    """The loop that blocking calls run on, in a daemon thread. Started by the first call."""
    global _loop
    with _lock:
        if _loop is None or _loop.is_closed():
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="branchwise-loop", daemon=True).start()
        return _loop


def runs_on(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether the caller is a task or callback of ``loop``."""
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False


def run_blocking(work: Coroutine[Any, Any, T]) -> T:
    """Runs ``work`` on the background loop and blocks until it is done. An interrupt cancels it."""
    loop = background_loop()
    if runs_on(loop):  # it cannot wait for itself: run the work on a loop of its own
        return in_thread(lambda: asyncio.run(work)).result()
    future = asyncio.run_coroutine_threadsafe(work, loop)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def in_thread(work: Callable[[], T]) -> Future[T]:
    """Runs ``work`` in a new thread rather than in asyncio's pool: work that waits for other work could exhaust it."""
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


async def in_limited_thread(work: Callable[[], T]) -> T:
    """`in_thread`, awaited; at most `MAX_THREADS` at a time on one loop, so ``work`` must not call it again."""
    gate = _gates.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(MAX_THREADS))
    async with gate:
        return await asyncio.wrap_future(in_thread(work))


class _Cancelled(Exception):
    """The caller that was making the value was cancelled."""


class Once(Generic[T]):
    """A value made by its first reader, on whichever loop; readers on all loops wait for that one."""

    def __init__(self, make: Callable[[], Awaitable[T]]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._value: Future[T] | None = None

    async def get(self) -> T:
        """Raises what ``make`` raised; the next call tries again."""
        while True:
            with self._lock:
                value, first = self._value, self._value is None
                if value is None:
                    value = self._value = Future()
                    value.set_running_or_notify_cancel()  # a reader that is cancelled must not cancel the others
            if first:
                return await self._fill(value)
            try:
                return value.result() if value.done() else await asyncio.wrap_future(value)
            except _Cancelled:
                continue

    async def _fill(self, value: Future[T]) -> T:
        try:
            made = await self._make()
        except BaseException as error:
            self._value = None
            value.set_exception(error if isinstance(error, Exception) else _Cancelled())
            raise
        value.set_result(made)
        return made


def _after_fork() -> None:
    """A forked process inherits the loop but not the thread that runs it."""
    global _lock, _loop
    _lock, _loop = threading.Lock(), None


os.register_at_fork(after_in_child=_after_fork)


@atexit.register
def _at_exit() -> None:
    """Cancels what still runs on the background loop and closes what it holds, within two seconds."""
    if _loop is not None and _loop.is_running():
        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(_close_all(_loop), _loop).result(2.0)


async def _close_all(loop: asyncio.AbstractEventLoop) -> None:
    closing = (one.close() for one in list(close_at_exit) if one.loop is loop)
    await asyncio.gather(*closing, return_exceptions=True)
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    if tasks:  # runs that were cancelled just now
        _, tasks = await asyncio.wait(tasks, timeout=1.0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await loop.shutdown_asyncgens()
