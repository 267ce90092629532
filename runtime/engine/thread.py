"""The thread that drives an engine in process: others queue work for it, and hear through sinks what comes of it."""

from __future__ import annotations

import atexit
import itertools
import os
import queue
import threading
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ..errors import EngineDead
from ..messages import Delta, Finished
from ..tokenizer.detokenizer import DetokenizerCore
from ..tokenizer.pieces import encode_message
from ..tokenizer.tokenizer import Tokenizer
from .core import EngineCore

_running: weakref.WeakSet[EngineThread] = weakref.WeakSet()


class EngineThread:
    """Only its thread touches the core. Every request's sink hears exactly one end, also if the engine dies first."""

    def _start(self, core: EngineCore, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._core = core
        self._detokenizer = DetokenizerCore(tokenizer)
        core.branches.encode = partial(encode_message, tokenizer)
        self._ids = itertools.count(1)
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._sinks: dict[int, Callable[[Delta], None]] = {}
        self._dead: str | None = None
        self._gate = threading.Lock()  # between submitting and ending: no request slips in behind the end
        self._thread = threading.Thread(target=self._run, name="branchwise-engine", daemon=True)
        self._thread.start()
        _running.add(self)

    def _run(self) -> None:
        try:
            while True:
                wait: float | None = None
                if self._core.has_work:  # with nothing to compute, wait a moment for news instead of spinning
                    wait = 0.0 if self._core.advanced else 0.001
                try:
                    while True:
                        job = self._inbox.get(timeout=wait)
                        if job is None:
                            self._end("the engine was closed")
                            return
                        job()
                        wait = 0.0
                except queue.Empty:
                    pass
                self._step()
        except BaseException as error:  # a panic of Rust's is no `Exception`, and whoever waits must hear of it
            self._end(f"the engine failed: {type(error).__name__}: {error}")
            raise

    def _step(self) -> None:
        output = self._core.step()
        if output is None:
            return
        deltas, stopped = self._detokenizer.feed(output)
        for settled in self._detokenizer.take_settled():
            self._core.branches.settled(settled)
        for id_ in stopped:
            self._core.stop_matched(id_)
        for delta in deltas:
            sink = self._sinks.get(delta.id) if delta.finish is None else self._sinks.pop(delta.id, None)
            if sink is not None:
                sink(delta)

    def _end(self, why: str) -> None:
        with self._gate:
            self._dead = why
            sinks, self._sinks = self._sinks, {}
        for id_, sink in sinks.items():
            sink(Delta(id_, finish=Finished(id_, "error", error=why)))
        self._core.close()

    def _on_thread(self, job: Callable[[], None], sinks: Mapping[int, Callable[[Delta], None]] | None = None) -> None:
        """Queues ``job``. From here on each of ``sinks`` hears how its request ends, also if the engine dies first."""
        with self._gate:
            if self._dead is not None:
                raise EngineDead(self._dead)
            self._sinks.update(sinks or {})
            self._inbox.put(job)

    def _ask(self, question: Callable[[], Any]) -> Any:
        answer: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

        def job() -> None:
            try:
                answer.put((True, question()))
            except Exception as error:  # handed to the caller, who raises it
                answer.put((False, error))

        self._on_thread(job)
        while True:
            try:
                ok, value = answer.get(timeout=1.0)
                break
            except queue.Empty:
                if self._dead is not None:
                    raise EngineDead(self._dead) from None
        if not ok:
            raise value
        return value

    def close(self) -> None:
        """Ends what is in flight with an error and frees the device. Idempotent."""
        if self._dead is None:
            self._inbox.put(None)
        self._thread.join()


@atexit.register
def _close_all() -> None:
    """A thread that is cut down inside a step takes the process with it: torch aborts."""
    for engine in list(_running):
        engine.close()


def _disown() -> None:
    """In a forked process, which has the engines but not their threads."""
    for engine in _running:
        engine._gate = threading.Lock()
        engine._dead = "the engine belongs to the process that made it: make one in this process"


os.register_at_fork(after_in_child=_disown)
