"""Programs: functions of a state, run alone, in batches or read along, blocking or on asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from .backend import Backend
from .backends import as_backend, default_backend
from .errors import ProgramError, call_site
from .expressions import Sampling, gen, make_sampling
from .interpreter import Interpreter
from .loop import MAX_THREADS, aside, background_loop, in_thread
from .session import Path, Session
from .state import AsyncState, BaseState, State

MAX_TASKS = 1024  # programs of a batch that are ``async def``: no threads, but every one holds connections and branches

# What a run may give its gens: the arguments of `gen` that are not about one of them.
_SAMPLING = frozenset(inspect.signature(gen).parameters) - {"name", "dtype", "choices", "choices_method", "seed"}
_ALIASES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}  # SGLang has both


def function(body: Callable[..., Any]) -> Function:
    """Makes a program of a function whose first parameter is the state."""
    if not callable(body):
        raise TypeError("@function takes no arguments: speculative API execution does not exist here")
    return Function(body)


class Function:
    """``run``, ``run_batch`` and ``stream`` block; ``arun``, ``arun_batch`` and ``astream`` are awaited. All take the
    program's own arguments, the backend, a ``seed``, and any of ``gen``'s sampling arguments as defaults for the
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
        clash = _RUN.intersection(self.arg_names)
        if clash:
            raise TypeError(f"{body.__name__}: {', '.join(sorted(clash))} means something else to run()")

    def bind(self, **arguments: Any) -> Function:
        """The program with some of its arguments given."""
        for name in arguments:
            if name not in self.arg_names:
                raise TypeError(f"{self._body.__name__} has no argument {name!r}")
        return Function(self._body, {**self._bound, **arguments})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """With a state first: the program's text and variables become part of that state. Otherwise `run`."""
        if args and isinstance(args[0], BaseState):
            return self._body(args[0], *args[1:], **{**self._bound, **kwargs})
        return self.run(*args, **kwargs)

    # -- blocking ------------------------------------------------------------------------------------------------------

    def run(
        self, *args: Any, backend: Any = None, stream: bool = False, seed: int | None = None, **kwargs: Any
    ) -> State:
        """Runs the program and waits for everything it asked for. Raises `ProgramError` for a failure that the program
        has not itself been told of. ``stream``: returns at once; follow with ``text_iter``."""
        job = self._job(args, kwargs, backend, seed, (), stream)
        if not stream:
            return job.run()
        job.state._run = in_thread(job.run)
        return job.state

    def stream(self, *args: Any, variable: str | None = None, **kwargs: Any) -> Iterator[str]:
        """The text as it comes: of one variable, or all."""
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
        """Each item (a dict of arguments, a list or tuple of them, or just one) is run once, at most ``num_threads`` at
        a time (64 for functions, 1,024 for ``async def`` programs). States come back in the batch's order; one that
        failed is there too, and its ``error()`` or any read of it says why. ``generator_style``: each as soon as it and
        those before it are done."""
        jobs = self._jobs(batch, defaults, backend, seed)
        most = _count(num_threads, MAX_TASKS if self.is_async else MAX_THREADS)
        found = self._run_jobs(jobs, most, progress_bar)
        return found if generator_style else list(found)

    def _run_jobs(self, jobs: list[_Job], most: int, progress_bar: bool) -> Iterator[State]:
        with _Progress(len(jobs), progress_bar) as progress:
            if self.is_async:
                loop = background_loop()
                gate = asyncio.Semaphore(most)
                futures = [asyncio.run_coroutine_threadsafe(job.gated(gate), loop) for job in jobs]
                yield from _in_order(jobs, futures, progress)
                return
            with ThreadPoolExecutor(min(most, max(1, len(jobs))), "branchwise-batch") as pool:
                yield from _in_order(jobs, [pool.submit(job.run_kept) for job in jobs], progress)

    # -- asyncio -------------------------------------------------------------------------------------------------------

    async def arun(self, *args: Any, backend: Any = None, seed: int | None = None, **kwargs: Any) -> AsyncState:
        """`run`, awaited. An ``async def`` program runs on this loop, a function in a thread."""
        loop = asyncio.get_running_loop() if self.is_async else None
        job = self._job(args, kwargs, backend, seed, (), False, loop)
        if self.is_async:
            await job.arun()
        else:
            await aside(job.run)
        return job.awaitable

    async def astream(self, *args: Any, variable: str | None = None, **kwargs: Any) -> AsyncIterator[str]:
        """`stream` for asyncio. Leaving early ends an ``async def`` program; a function goes on in its thread."""
        backend, seed = kwargs.pop("backend", None), kwargs.pop("seed", None)
        loop = asyncio.get_running_loop() if self.is_async else None
        job = self._job(args, kwargs, backend, seed, (), True, loop)
        task = asyncio.ensure_future(job.arun() if self.is_async else aside(job.run))
        job.awaitable._run = task
        try:
            async for chunk in job.awaitable.text_iter(variable):
                yield chunk
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
        loop = asyncio.get_running_loop() if self.is_async else None
        jobs = self._jobs(batch, defaults, backend, seed, loop)
        gate = asyncio.Semaphore(_count(concurrency, MAX_TASKS if self.is_async else MAX_THREADS))
        with _Progress(len(jobs), progress_bar) as progress:

            async def one(job: _Job) -> None:
                if self.is_async:
                    await job.gated(gate)
                else:
                    async with gate:
                        await asyncio.wrap_future(in_thread(job.run_kept))
                progress.step()

            await asyncio.gather(*(one(job) for job in jobs))
        return [job.awaitable for job in jobs]

    # -- jobs ----------------------------------------------------------------------------------------------------------

    def _jobs(
        self,
        batch: Sequence[Any],
        defaults: Mapping[str, Any],
        backend: Any,
        seed: int | None,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> list[_Job]:
        backend = _backend(backend)
        jobs = []
        for i, item in enumerate(batch):
            args, kwargs = ((), item) if isinstance(item, Mapping) else (_arguments(item), {})
            jobs.append(self._job(args, {**defaults, **kwargs}, backend, seed, (i,), False, loop))
        return jobs

    def _job(
        self,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        backend: Any,
        seed: int | None,
        path: Path,
        streams: bool,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> _Job:
        """Checks the program's arguments and the defaults before anything runs."""
        names = {**self._bound, **kwargs}
        known = (_SAMPLING | _ALIASES.keys()).difference(self.arg_names)  # the program's own names come first
        sampling = {_ALIASES.get(name, name): names.pop(name) for name in list(names) if name in known}
        if "use_thread" not in self.arg_names:
            names.pop("use_thread", None)  # SGLang's; no program needs a thread of its own here
        try:
            bound = self._signature.bind(*args, **names)
        except TypeError as error:
            raise TypeError(f"{self._body.__name__}: {error}") from None
        session = Session(
            _backend(backend),
            loop or background_loop(),
            make_sampling(**sampling) if sampling else Sampling(),
            seed=seed,
            path=path,
            streams=streams,
        )
        return _Job(self._body, self.is_async, bound.args, bound.kwargs, session)


_RUN = {"backend", "stream", "seed"}


def _arguments(item: Any) -> Sequence[Any]:
    """An item of a batch that is no dict: a program's arguments in a list, or the one it takes."""
    return item if isinstance(item, (tuple, list)) else (item,)


class _Job:
    """One run of one program: its session and its first state."""

    def __init__(
        self, body: Callable[..., Any], is_async: bool, args: Any, kwargs: Mapping[str, Any], session: Session
    ) -> None:
        self._body, self._is_async, self._args, self._kwargs = body, is_async, args, dict(kwargs)
        self.session = session
        self.strand = Interpreter(session)
        self.state = State(self.strand)  # those for whoever asked for the run; the program has one of its own
        self.awaitable = AsyncState(self.strand)

    def run(self) -> State:
        """Blocks; raises what the program raised, or a failure it was not told of."""
        loop = self.session.loop
        if self.session.on_loop:
            raise ProgramError("a blocking run on the event loop: use arun()", site=call_site())
        if self._is_async:
            asyncio.run_coroutine_threadsafe(self.arun(), loop).result()
            return self.state
        try:
            value = self._body(State(self.strand), *self._args, **self._kwargs)
        except BaseException as error:
            asyncio.run_coroutine_threadsafe(self._stop(error), loop).result()
            raise
        asyncio.run_coroutine_threadsafe(self._finish(value), loop).result()
        return self.state

    async def arun(self) -> None:
        """On the session's loop."""
        try:
            value = await self._body(AsyncState(self.strand), *self._args, **self._kwargs)
            await self._finish(value)
        except BaseException as error:
            await self._stop(error)
            raise

    def run_kept(self) -> State:
        with contextlib.suppress(Exception):  # the state carries it: every read raises
            self.run()
        return self.state

    async def gated(self, gate: asyncio.Semaphore) -> State:
        async with gate:
            with contextlib.suppress(Exception):
                await self.arun()
        return self.state

    async def _finish(self, value: Any) -> None:
        await self.session.finish()
        self.strand.ended = True
        await self.strand.end()
        await self.session.release_all()
        unseen = self.session.unseen
        if unseen is not None:
            self.strand.failure = self.strand.failure or unseen  # a branch's: whoever keeps the state is told
            raise unseen
        self.strand.value, self.strand.returned = value, True

    async def _stop(self, error: BaseException) -> None:
        """What is under way is aborted; from now on every read of the state raises ``error``."""
        if self.strand.failure is None:
            self.strand.failure = error if isinstance(error, ProgramError) else _of(error)
        await self.session.cancel()
        await self.strand.end()
        await self.session.release_all()


def _of(error: BaseException) -> ProgramError:
    failure = ProgramError(f"{type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


class _Progress:
    """One line that counts."""

    def __init__(self, total: int, shown: bool) -> None:
        self._bar: Any = None
        if shown:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

            self._bar = Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._task = self._bar.add_task("", total=total)

    def step(self) -> None:
        if self._bar is not None:
            self._bar.advance(self._task)

    def __enter__(self) -> _Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def _in_order(jobs: list[_Job], futures: Sequence[Future[Any]], progress: _Progress) -> Iterator[State]:
    counted: set[Future[Any]] = set()
    for job, future in zip(jobs, futures, strict=True):
        while not future.done():
            done, _ = wait([one for one in futures if one not in counted], return_when=FIRST_COMPLETED)
            for _one in done - counted:
                progress.step()
            counted |= done
        future.result()
        yield job.state


def _count(asked: int | str, most: int) -> int:
    if asked == "auto":
        return most
    if not isinstance(asked, int) or asked < 1:
        raise ValueError(f"concurrency must be a positive number or 'auto', got {asked!r}")
    return asked


def _backend(given: Any) -> Backend:
    return default_backend() if given is None else as_backend(given)
