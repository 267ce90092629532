"""Programs: functions of a state; run alone, in batches or streamed, blocking or on asyncio."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

from ..loop import MAX_THREADS, background_loop, in_limited_thread, in_thread
from .backends import resolve
from .expressions import Sampling, gen, make_sampling
from .program_run import ProgramRun
from .session import Path, Session
from .state import AsyncState, BaseState, State

MAX_TASKS = 1024  # ``async def`` programs of a batch at a time: each holds connections and branches

# The arguments of `gen` that a run may give as defaults for all its gens.
_SAMPLING = frozenset(inspect.signature(gen).parameters) - {"name", "dtype", "choices", "choices_method", "seed"}
_ALIASES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}  # SGLang accepts both names
_RUN_ARGUMENTS = {"backend", "stream", "seed"}


def function(body: Callable[..., Any]) -> Function:
    """Makes a program of a function whose first parameter is the state."""
    if not callable(body):
        raise TypeError("@function takes no arguments: SGLang's speculative API execution is not supported")
    return Function(body)


class Function:
    """A program. ``run``, ``run_batch`` and ``stream`` block; ``arun``, ``arun_batch`` and ``astream`` are awaited. All
    take the program's arguments, the backend, a ``seed``, and any of ``gen``'s sampling arguments as defaults for the
    program's gens."""

    def __init__(self, body: Callable[..., Any], bound: Mapping[str, Any] | None = None) -> None:
        functools.update_wrapper(self, body)
        self._body = body
        self._bound = dict(bound or {})
        self.is_async = inspect.iscoroutinefunction(body)
        signature = inspect.signature(body)
        if not signature.parameters:
            raise TypeError(f"{body.__name__} must take a state as its first parameter")
        _, *rest = signature.parameters.values()
        self._signature = signature.replace(parameters=rest)
        self.arg_names = [parameter.name for parameter in rest]
        clash = _RUN_ARGUMENTS.intersection(self.arg_names)
        if clash:
            raise TypeError(f"{body.__name__}: {', '.join(sorted(clash))} means something else to run()")

    def bind(self, **arguments: Any) -> Function:
        """The program with some of its arguments given."""
        for name in arguments:
            if name not in self.arg_names:
                raise TypeError(f"{self._body.__name__} has no argument {name!r}")
        return Function(self._body, {**self._bound, **arguments})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """With a state first: runs the program in that state. Otherwise `run`."""
        if args and isinstance(args[0], BaseState):
            return self._body(args[0], *args[1:], **{**self._bound, **kwargs})
        return self.run(*args, **kwargs)

    # -- blocking ------------------------------------------------------------------------------------------------------

    def run(
        self, *args: Any, backend: Any = None, stream: bool = False, seed: int | None = None, **kwargs: Any
    ) -> State:
        """Runs the program and waits for everything it appended. Raises `ProgramError` for a failure that the program
        itself did not receive. ``stream``: returns at once; read along with ``text_iter``."""
        run = self._start(args, kwargs, backend, seed, streams=stream, loop=background_loop())
        if not stream:
            return run.run()
        in_thread(run.run)
        return run.state

    def stream(self, *args: Any, variable: str | None = None, **kwargs: Any) -> Iterator[str]:
        """The text as it is generated: of one variable, or all."""
        return self.run(*args, stream=True, **kwargs).text_iter(variable)

    def run_batch(
        self,
        batch: Sequence[Any],
        *,
        backend: Any = None,
        seed: int | None = None,
        num_threads: int | str = "auto",
        progress_bar: bool = False,
        generator_style: bool = False,
        **defaults: Any,
    ) -> Any:
        """Runs the program once for each item: a dict of arguments, a list or tuple of them, or just one. At most
        ``num_threads`` run at a time (64 for functions, 1,024 for ``async def`` programs). Returns the states in the
        batch's order; that of a failed run is among them, and ``error()`` or any read of it says why.
        ``generator_style``: yields each state once it and those before it are done."""
        runs = self._start_batch(batch, defaults, backend, seed, background_loop())
        limit = _limit(num_threads, MAX_TASKS if self.is_async else MAX_THREADS)
        states = self._run_all(runs, limit, progress_bar)
        return states if generator_style else list(states)

    def _run_all(self, runs: list[ProgramRun], limit: int, progress_bar: bool) -> Iterator[State]:
        with _progress(len(runs), progress_bar) as step:
            if self.is_async:
                loop, gate = background_loop(), asyncio.Semaphore(limit)
                futures = [asyncio.run_coroutine_threadsafe(run.arun_quietly(gate), loop) for run in runs]
                yield from _in_order(futures, step)
                return
            with ThreadPoolExecutor(min(limit, max(1, len(runs))), "branchwise-batch") as pool:
                yield from _in_order([pool.submit(run.run_quietly) for run in runs], step)

    # -- asyncio -------------------------------------------------------------------------------------------------------

    async def arun(self, *args: Any, backend: Any = None, seed: int | None = None, **kwargs: Any) -> AsyncState:
        """`run`, awaited. An ``async def`` program runs on the caller's loop, a function in a thread."""
        run = self._start(args, kwargs, backend, seed, loop=self._async_loop())
        await (run.arun() if self.is_async else in_limited_thread(run.run))
        return run.async_state

    async def astream(
        self,
        *args: Any,
        variable: str | None = None,
        backend: Any = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[str]:
        """`stream` for asyncio. Leaving early ends an ``async def`` program; a function continues in its thread."""
        run = self._start(args, kwargs, backend, seed, streams=True, loop=self._async_loop())
        task = asyncio.ensure_future(run.arun() if self.is_async else in_limited_thread(run.run))
        try:
            async for piece in run.async_state.text_iter(variable):
                yield piece
            await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def arun_batch(
        self,
        batch: Sequence[Any],
        *,
        backend: Any = None,
        seed: int | None = None,
        concurrency: int | str = "auto",
        progress_bar: bool = False,
        **defaults: Any,
    ) -> list[AsyncState]:
        """`run_batch`, awaited."""
        runs = self._start_batch(batch, defaults, backend, seed, self._async_loop())
        gate = asyncio.Semaphore(_limit(concurrency, MAX_TASKS if self.is_async else MAX_THREADS))
        with _progress(len(runs), progress_bar) as step:

            async def one(run: ProgramRun) -> None:
                if self.is_async:
                    await run.arun_quietly(gate)
                else:
                    async with gate:
                        await asyncio.wrap_future(in_thread(run.run_quietly))
                step()

            await asyncio.gather(*(one(run) for run in runs))
        return [run.async_state for run in runs]

    def _async_loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop() if self.is_async else background_loop()

    # -- arguments -----------------------------------------------------------------------------------------------------

    def _start_batch(
        self,
        batch: Sequence[Any],
        defaults: Mapping[str, Any],
        backend: Any,
        seed: int | None,
        loop: asyncio.AbstractEventLoop,
    ) -> list[ProgramRun]:
        backend = resolve(backend)
        runs = []
        for i, item in enumerate(batch):
            args, kwargs = ((), item) if isinstance(item, Mapping) else (item, {})
            if not isinstance(args, (tuple, list)):
                args = (args,)
            runs.append(self._start(args, {**defaults, **kwargs}, backend, seed, path=(i,), loop=loop))
        return runs

    def _start(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        backend: Any,
        seed: int | None,
        *,
        loop: asyncio.AbstractEventLoop,
        path: Path = (),
        streams: bool = False,
    ) -> ProgramRun:
        """A run that is ready to go. Checks the program's arguments and the sampling defaults."""
        names = {**self._bound, **kwargs}
        known = (_SAMPLING | _ALIASES.keys()).difference(self.arg_names)  # the program's own names take precedence
        sampling = {_ALIASES.get(name, name): names.pop(name) for name in list(names) if name in known}
        if "use_thread" not in self.arg_names:
            names.pop("use_thread", None)  # SGLang's; it has no effect here
        try:
            bound = self._signature.bind(*args, **names)
        except TypeError as error:
            raise TypeError(f"{self._body.__name__}: {error}") from None
        defaults = make_sampling(**sampling) if sampling else Sampling()
        session = Session(resolve(backend), loop, defaults, seed=seed, path=path, streams=streams)
        return ProgramRun(self._body, self.is_async, bound.args, bound.kwargs, session)


@contextmanager
def _progress(total: int, shown: bool) -> Iterator[Callable[[], None]]:
    """A function to be called after each step of ``total``; if ``shown``, it advances a progress bar."""
    if not shown:
        yield lambda: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    with Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)


def _in_order(futures: Sequence[Future[State]], step: Callable[[], None]) -> Iterator[State]:
    counted: set[Future[State]] = set()
    for future in futures:
        while not future.done():
            done, _ = wait([one for one in futures if one not in counted], return_when=FIRST_COMPLETED)
            for _one in done - counted:
                step()
            counted |= done
        yield future.result()


def _limit(given: int | str, default: int) -> int:
    if given == "auto":
        return default
    if not isinstance(given, int) or given < 1:
        raise ValueError(f"concurrency must be a positive number or 'auto', got {given!r}")
    return given
