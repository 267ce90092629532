"""The thread that drives an engine in process: other threads queue messages and questions for it.

An interrupt (Ctrl-C) may raise `KeyboardInterrupt` in the main thread wherever that runs Python code, so what must not
be cut in two is one call into C: a queue's `put`, a `threading.Lock`. Callers wait on queues of their own and never
inside `Future.result`, which could leave the future locked and this thread waiting for the lock.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import itertools
import os
import queue
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from ..errors import EngineDead
from ..messages import BranchOp, BranchRun, ControlReply, Delta, Finished, Generate, Refusal
from ..tokenizer.detokenizer import DetokenizerCore
from ..tokenizer.pieces import encode_message
from ..tokenizer.tokenizer import Tokenizer
from .core import EngineCore
from .request_output import Collector, RequestOutput, StreamChunk

T = TypeVar("T")
Sink = Callable[[Delta], None]
Inbox = queue.SimpleQueue[Delta]

_IDLE_SECONDS = 0.001  # between looks at the core while it has work but can advance nothing: grammars are compiling

STUCK_SECONDS = 5.0  # how long to wait at the end for a thread whose executor has failed

_running: weakref.WeakSet[EngineThread] = weakref.WeakSet()


class _Follower(weakref.ref[Inbox]):
    """Delivers deltas to the inbox of a thread that follows requests.

    Its callback is the `put` of the engine's jobs: once the inbox is garbage-collected, for whatever reason, the
    follower itself becomes a job, and the engine ends its requests.
    """

    ids: Sequence[int] = ()

    def deliver(self, delta: Delta) -> None:
        inbox = self()
        if inbox is not None:
            inbox.put(delta)


class EngineThread:
    """Owns an `EngineCore`: only this thread steps it.

    Every request's sink gets exactly one terminal delta and every future a result, also if the engine fails first.
    The thread holds no reference to the `Engine` in front of it, so that one can be garbage-collected.
    """

    def __init__(self, core: EngineCore, tokenizer: Tokenizer) -> None:
        self.core = core
        self.tokenizer = tokenizer
        self._detokenizer = DetokenizerCore(tokenizer)
        core.branches.encode = partial(encode_message, tokenizer)
        self._ids = itertools.count(1)
        self._jobs: queue.SimpleQueue[Callable[[], None] | _Follower | None] = queue.SimpleQueue()
        self._sinks: dict[int, Sink] = {}
        self._futures: set[Future[Any]] = set()  # unanswered
        self._dead: str | None = None
        self._gate = threading.Lock()  # a job is queued before the end and answered, or refused after it
        self._thread = threading.Thread(target=self._run, name="branchwise-engine", daemon=True)
        self._thread.start()
        _running.add(self)

    # -- for other threads ---------------------------------------------------------------------------------------------

    def new_ids(self, count: int) -> list[int]:
        return list(itertools.islice(self._ids, count))

    def submit(self, messages: Sequence[Generate | BranchRun], sink: Sink) -> None:
        """Queues requests. ``sink`` is called on the engine's thread. Raises `EngineDead`."""

        def job() -> None:
            for message in messages:
                if isinstance(message, Generate):
                    self.core.add(message)
                else:
                    self.core.branches.take(message)

        self._queue(job, sinks=dict.fromkeys(_ids_of(messages), sink))

    def abort(self, ids: Iterable[int]) -> None:
        """Ends requests; their sinks get a terminal delta. Nothing happens to those that have ended or never began."""
        ids = list(ids)

        def job() -> None:
            for id in ids:
                self.core.abort(id)

        with contextlib.suppress(EngineDead):
            self._queue(job)

    def follow(self, messages: Sequence[Generate | BranchRun]) -> Generator[Delta, None, None]:
        """Submits requests and yields their deltas until all have ended. Closing the iterator aborts what is left."""
        inbox: Inbox = queue.SimpleQueue()
        follower = _Follower(inbox, self._jobs.put)
        follower.ids = _ids_of(messages)
        unfinished = set(follower.ids)
        try:  # also around `submit`: an interrupt inside it must not leave a request running
            self.submit(messages, follower.deliver)
            while unfinished:
                delta = inbox.get()
                if delta.finish is not None:
                    unfinished.discard(delta.id)
                yield delta
        finally:
            if unfinished:
                self.abort(unfinished)

    async def afollow(self, messages: Sequence[Generate | BranchRun]) -> AsyncGenerator[Delta, None]:
        """`follow` for asyncio."""
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[Delta] = asyncio.Queue()

        def sink(delta: Delta) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: its reader is gone
                loop.call_soon_threadsafe(inbox.put_nowait, delta)

        unfinished = set(_ids_of(messages))
        try:
            self.submit(messages, sink)
            while unfinished:
                delta = await inbox.get()
                if delta.finish is not None:
                    unfinished.discard(delta.id)
                yield delta
        finally:
            if unfinished:
                self.abort(unfinished)

    def complete(self, messages: Sequence[Generate | BranchRun]) -> list[RequestOutput]:
        """Blocks until all of them are generated. Raises the error of one that fails, and aborts the others."""
        collector = Collector(messages)
        with contextlib.closing(self.follow(messages)) as deltas:
            for delta in deltas:
                collector.feed(delta)
        return collector.results

    async def acomplete(self, messages: Sequence[Generate | BranchRun]) -> list[RequestOutput]:
        """`complete` for asyncio."""
        collector = Collector(messages)
        async with contextlib.aclosing(self.afollow(messages)) as deltas:
            async for delta in deltas:
                collector.feed(delta)
        return collector.results

    def stream(self, owner: object, message: Generate | BranchRun) -> Generator[StreamChunk, None, None]:
        """The output in chunks. Closing the iterator aborts what is left. ``owner``: stays alive until then."""
        collector = Collector([message])
        with contextlib.closing(self.follow([message])) as deltas:
            for delta in deltas:
                yield collector.feed(delta)

    async def astream(self, owner: object, message: Generate | BranchRun) -> AsyncGenerator[StreamChunk, None]:
        """`stream` for asyncio."""
        collector = Collector([message])
        async with contextlib.aclosing(self.afollow([message])) as deltas:
            async for delta in deltas:
                yield collector.feed(delta)

    def ask(self, question: Callable[[], T]) -> T:
        """Runs ``question`` on the engine's thread and waits for it; returns or raises its outcome. Raises
        `EngineDead`."""

        def job(future: Future[T]) -> None:
            try:
                future.set_result(question())
            except Exception as error:  # the caller handles it
                future.set_exception(error)

        return self._wait(job, Future())

    def operate(self, op: BranchOp) -> Any:
        """Waits for the value that an operation on a branch is answered with. Raises `InvalidRequest`, `EngineDead`.

        Its text is tokenized here, on the caller's thread.
        """
        future: Future[Any] = Future()
        with self._giving_back(op, future):
            return self._wait(self._operation(op), future)

    async def aoperate(self, op: BranchOp) -> Any:
        """`operate` for asyncio."""
        future: Future[Any] = Future()
        with self._giving_back(op, future):
            self._promise(self._operation(op), future)
            return await asyncio.wrap_future(future)

    @contextlib.contextmanager
    def _giving_back(self, op: BranchOp, future: Future[Any]) -> Iterator[None]:
        """If the caller is cancelled or interrupted, deletes the branches that ``op`` makes: nobody has their ids."""

        def delete(made: Future[Any]) -> None:
            if made.cancelled() or made.exception() is not None:
                return
            for id in made.result().get("ids") or [made.result()["id"]]:
                with contextlib.suppress(EngineDead):
                    self._promise(self._operation(BranchOp(0, "delete", op.namespace, id)), Future())

        try:
            yield
        except (asyncio.CancelledError, KeyboardInterrupt):
            if op.what in ("create", "fork"):
                future.add_done_callback(delete)
            raise

    def stop(self) -> None:
        """Tells the thread to end, without waiting for it."""
        self._jobs.put(None)

    def close(self) -> None:
        """Ends requests in flight with an error and frees the device. Idempotent."""
        self.stop()
        self._thread.join(None if self._dead is None else STUCK_SECONDS)

    def executor_failed(self, failed: Future[str]) -> None:
        """Ends every request with the reason. The engine's thread may be stuck in a step, and then stays there."""
        self._tell_all(f"the engine failed: {failed.result()}")
        self.stop()

    def _operation(self, op: BranchOp) -> Callable[[Future[Any]], None]:
        [op.id] = self.new_ids(1)
        encode_message(self.tokenizer, op)

        def job(future: Future[Any]) -> None:
            self.core.branches.waiters[op.id] = partial(_answer, future)
            self.core.branches.take(op)

        return job

    def _wait(self, job: Callable[[Future[T]], None], future: Future[T]) -> T:
        done: queue.SimpleQueue[Future[T]] = queue.SimpleQueue()
        future.add_done_callback(done.put)
        self._promise(job, future)
        return done.get().result()

    def _promise(self, job: Callable[[Future[T]], None], future: Future[T]) -> None:
        """Queues the job, which answers ``future``. The caller must leave the future alone until it is done."""

        def run() -> None:
            if future.set_running_or_notify_cancel():
                job(future)

        future.add_done_callback(self._futures.discard)
        self._queue(run, future=future)

    def _queue(
        self, job: Callable[[], None], sinks: dict[int, Sink] | None = None, future: Future[Any] | None = None
    ) -> None:
        with self._gate:
            if self._dead is not None:
                raise EngineDead(self._dead)
            self._sinks.update(sinks or {})
            if future is not None:
                self._futures.add(future)
            self._jobs.put(job)

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._run_jobs():
                self._step()
            self._end("the engine was closed")
        except EngineDead as error:  # with the executor's reason
            self._end(f"the engine failed: {error}")
        except BaseException as error:  # a Rust panic is not an `Exception`, and callers must get it too
            self._end(f"the engine failed: {type(error).__name__}: {error}")
            raise

    def _run_jobs(self) -> bool:
        """Runs what is queued; while there is nothing to compute, blocks until the next branch or pin expires. Returns
        False at the end."""
        if self.core.has_work:
            wait: float | None = 0.0 if self.core.advanced else _IDLE_SECONDS
        else:
            wait = self.core.idle()
        with contextlib.suppress(queue.Empty):
            while True:
                job = self._jobs.get(timeout=wait)
                if job is None:
                    return False
                if isinstance(job, _Follower):
                    self._end_unread(job.ids)
                else:
                    job()
                wait = 0.0
        return True

    def _end_unread(self, ids: Iterable[int]) -> None:
        for id in ids:
            self._sinks.pop(id, None)
            self.core.abort(id)

    def _step(self) -> None:
        output = self.core.step()
        if output is None:
            return
        deltas, stopped = self._detokenizer.feed(output)
        for settled in self._detokenizer.take_settled():
            self.core.branches.settled(settled)
        for id in stopped:
            self.core.stop_matched(id)
        for delta in deltas:
            sink = self._sinks.get(delta.id) if delta.finish is None else self._sinks.pop(delta.id, None)
            if sink is not None:
                sink(delta)

    def _end(self, why: str) -> None:
        self._tell_all(why)
        self.core.close()

    def _tell_all(self, why: str) -> None:
        with self._gate:
            self._dead = self._dead or why  # the first reason counts
            why = self._dead
            sinks, self._sinks = self._sinks, {}
            futures = list(self._futures)
        for id, sink in sinks.items():
            sink(Delta(id, finish=Finished(id, "error", error=Refusal(None, why, 500))))
        for future in futures:
            if future.running() or future.set_running_or_notify_cancel():
                future.set_exception(EngineDead(why))

    def disown(self) -> None:
        """For a forked process, which has the engine's memory but not its thread."""
        self._gate = threading.Lock()
        self._dead = "the engine belongs to the process that made it: make one in this process"


def _ids_of(messages: Sequence[Generate | BranchRun]) -> list[int]:
    return [id for message in messages for id in message.ids]


def _answer(future: Future[Any], reply: ControlReply) -> None:
    if reply.error is None:
        future.set_result(reply.value)
    else:
        future.set_exception(reply.error.error())


@atexit.register
def _close_all() -> None:
    """A thread that the interpreter kills inside a step takes the process with it: torch aborts."""
    for thread in list(_running):
        thread.close()


def _disown_all() -> None:
    for thread in list(_running):
        thread.disown()


os.register_at_fork(after_in_child=_disown_all)
