"""The base of library programs (`tools`, `search`): one ``async def`` for both kinds of state, and user callbacks."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

from ..loop import MAX_THREADS, in_thread
from .errors import at_site, call_site
from .state import AsyncState, BaseState, State

T = TypeVar("T")


class Callbacks:
    """Calls the user's functions, for one library program."""

    def __init__(self) -> None:
        self._gate = asyncio.Semaphore(MAX_THREADS)

    async def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Awaits an ``async def`` function; calls any other in a thread, with blocking states."""
        with at_site(None):
            if inspect.iscoroutinefunction(function):
                return await function(*args, **kwargs)
            blocking = [State(arg._interpreter) if isinstance(arg, AsyncState) else arg for arg in args]
            async with self._gate:
                return await asyncio.wrap_future(in_thread(partial(function, *blocking, **kwargs)))


def anywhere(s: BaseState, work: Callable[[AsyncState, Callbacks], Awaitable[T]]) -> Any:
    """Runs ``work``: returns an awaitable in an async program, blocks in any other."""
    site = call_site()

    async def at() -> T:
        with at_site(site):
            state = s.aio if isinstance(s, State) else s
            if not isinstance(state, AsyncState):
                raise TypeError(f"the first argument must be a state, not {type(s).__name__}")
            return await work(state, Callbacks())

    if isinstance(s, State):
        return s.run_here(at())
    return at()
