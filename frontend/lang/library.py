"""What library programs (`tools`, `search`) stand on: one ``async def`` for both kinds of state, and callbacks."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

from .errors import at_site, call_site
from .loop import MAX_THREADS, in_thread
from .state import AsyncState, BaseState, State

T = TypeVar("T")


class Callbacks:
    """Calls a program's own functions, for one library program."""

    def __init__(self) -> None:
        self._gate = asyncio.Semaphore(MAX_THREADS)

    async def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Awaited if it is ``async def``, else in a thread, with blocking states."""
        with at_site(None):
            if inspect.iscoroutinefunction(function):
                return await function(*args, **kwargs)
            blocking = [State(arg._strand) if isinstance(arg, AsyncState) else arg for arg in args]
            async with self._gate:
                return await asyncio.wrap_future(in_thread(partial(function, *blocking, **kwargs)))


def anywhere(s: BaseState, work: Callable[[AsyncState, Callbacks], Awaitable[T]]) -> Any:
    """Runs ``work``: awaited in an async program, waited for in any other."""
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
