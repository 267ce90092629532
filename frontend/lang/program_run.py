"""One run of a program: its session, its first state, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .errors import ProgramError, call_site
from .interpreter import Interpreter
from .session import Session
from .state import AsyncState, State


class ProgramRun:
    """``state`` and ``async_state``: the caller's views of the first state. The program gets a view of its own."""

    def __init__(
        self,
        body: Callable[..., Any],
        is_async: bool,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        session: Session,
    ) -> None:
        self._body, self._is_async, self._args, self._kwargs = body, is_async, args, kwargs
        self._session = session
        self._interpreter = Interpreter(session)
        self.state = State(self._interpreter, follows=session.streams)
        self.async_state = AsyncState(self._interpreter, follows=session.streams)

    def run(self) -> State:
        """Blocks. Raises what the program raised, or a failure that the program did not receive."""
        loop = self._session.loop
        if self._session.on_loop:
            raise ProgramError("a blocking run on the event loop: use arun()", site=call_site())
        if self._is_async:
            asyncio.run_coroutine_threadsafe(self.arun(), loop).result()
            return self.state
        try:
            value = self._body(State(self._interpreter), *self._args, **self._kwargs)
            asyncio.run_coroutine_threadsafe(self._finish(value), loop).result()
        except BaseException as error:
            asyncio.run_coroutine_threadsafe(self._stop(error), loop).result()
            raise
        return self.state

    async def arun(self) -> None:
        """On the session's loop."""
        try:
            await self._finish(await self._body(AsyncState(self._interpreter), *self._args, **self._kwargs))
        except BaseException as error:
            await self._stop(error)
            raise

    def run_quietly(self) -> State:
        """`run`, for a batch: the state keeps the error, and every read of it raises."""
        with contextlib.suppress(Exception):
            self.run()
        return self.state

    async def arun_quietly(self, gate: asyncio.Semaphore) -> State:
        async with gate:
            with contextlib.suppress(Exception):
                await self.arun()
        return self.state

    async def _finish(self, value: Any) -> None:
        await self._session.wait()
        self._interpreter.closed = True
        if (unreported := self._session.unreported) is not None:
            raise unreported
        await self._interpreter.end()
        await self._session.release_all()
        self._interpreter.finish(value)

    async def _stop(self, error: BaseException) -> None:
        """Cancels all work. From now on every read of the state raises ``error``."""
        interpreter = self._interpreter
        if interpreter.failure is None:
            interpreter.failure = error if isinstance(error, ProgramError) else _program_error(error)
        interpreter.closed = True
        await self._session.cancel()
        await interpreter.end()
        await self._session.release_all()
        interpreter.finish(None, interpreter.failure)


def _program_error(cause: BaseException) -> ProgramError:
    error = ProgramError(f"{type(cause).__name__}: {cause}")
    error.__cause__ = cause
    return error
