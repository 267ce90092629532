"""The engine in your own process: no sockets, the same core, tree and detokenizer that the server runs.

engine = Engine("path/to/model")
print(engine.generate("Once upon a time", SamplingParams(max_tokens=32)).text)
"""

from __future__ import annotations

import asyncio
import atexit
import itertools
import os
import queue
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from .branches.pieces import encode_message
from .config import EngineConfig, check
from .core import EngineCore
from .detokenizer import DetokenizerCore
from .errors import EngineDead, InvalidRequest
from .grammar.compiler import GrammarCompiler
from .limits import check_token_ids
from .messages import Control, Delta, Finished, Generate, Stats
from .model_folder import model_folder
from .request_output import Collector, RequestOutput, StreamChunk
from .sampling_params import SamplingParams, validate
from .tokenizer import Tokenizer
from .torch_environment import prepare_torch

if TYPE_CHECKING:
    from .branches.handle import AsyncBranch, Branch

Prompt = str | Sequence[int]
BranchPiece = Prompt | Sequence[Mapping[str, Any]]  # messages, where a branch begins

_running: weakref.WeakSet[Engine] = weakref.WeakSet()


class Engine:
    """Serves a model in process. Thread-safe; one background thread drives the core.

    ``model``: a folder, a hub id, or "" for the model that ships with the package. Other keywords are the fields of
    `EngineConfig`. Raises `LoadError` if the model or a setting cannot be loaded.
    """

    def __init__(self, model: str | Path = "", **settings: Any) -> None:
        prepare_torch()
        from .executor.executor import ModelExecutor  # torch: seconds to import

        config = check(EngineConfig(model=str(model), **settings))
        executor = ModelExecutor.load(config)
        tokenizer = Tokenizer.load(model_folder(config.model))
        core = EngineCore(
            config,
            executor,
            executor.eos_ids,
            executor.max_model_len,
            gpu=executor.device.type == "cuda",
            grammars=GrammarCompiler(tokenizer, executor.vocab_size, executor.eos_ids),
        )
        self._start(core, tokenizer)

    @classmethod
    def from_core(cls, core: EngineCore, tokenizer: Tokenizer) -> Engine:
        """An engine around a core that is already built (tests, other executors)."""
        engine = cls.__new__(cls)
        engine._start(core, tokenizer)
        return engine

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

    # -- the engine's thread -------------------------------------------------------------------------------------------

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

    # -- submitting ----------------------------------------------------------------------------------------------------

    def _submit(
        self, prompt: Prompt, params: SamplingParams, sink: Callable[[Delta], None], cache_salt: str, priority: int
    ) -> list[int]:
        vocab_size = self._core.scheduler.limits.vocab_size
        validate(params, vocab_size)
        if isinstance(prompt, str):
            if not prompt:  # also where the tokenizer would make a lone <bos> of it
                raise InvalidRequest("prompt must not be empty", field="prompt")
            tokens = self.tokenizer.encode(prompt)
        else:
            ids = prompt.tolist() if isinstance(prompt, np.ndarray) else list(prompt)
            check_token_ids(ids, vocab_size, "prompt")
            tokens = np.array(ids, dtype=np.int32)
        data = np.asarray(tokens, dtype="<i4").tobytes()
        ids = [next(self._ids) for _ in range(params.n)]
        messages = []
        for i, id_ in enumerate(ids):
            messages.append(Generate(id_, data, params.sample(i), ("", cache_salt), priority))

        def job() -> None:
            for message in messages:
                self._core.add(message)

        self._on_thread(job, dict.fromkeys(ids, sink))
        return ids

    def _abort(self, ids: list[int]) -> None:
        def job() -> None:
            for id_ in ids:
                self._core.abort(id_)

        if self._dead is None:
            self._inbox.put(job)

    # -- what people call ----------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        cache_salt: str = "",
        priority: int = 0,
    ) -> Any:
        """Blocks until everything is generated. One prompt (text or token ids) gives a `RequestOutput`, a list of
        prompts a list of them in order. Raises `InvalidRequest` (a ValueError) naming the field and the limit."""
        single, items = _as_batch(prompts, params)
        inbox: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        collectors: list[Collector] = []
        owner: dict[int, Collector] = {}
        try:
            for prompt, param in items:
                ids = self._submit(prompt, param, inbox.put, cache_salt, priority)
                collectors.append(Collector(ids))
                owner.update(dict.fromkeys(ids, collectors[-1]))
            while not all(c.done for c in collectors):
                delta = inbox.get()
                owner[delta.id].feed(delta)
        except BaseException:
            self._abort(list(owner))
            raise
        results = [c.result for c in collectors]
        return results[0] if single else results

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, cache_salt: str = "", priority: int = 0
    ) -> Iterator[StreamChunk]:
        """Yields text as it is generated; leaving the loop early aborts the request."""
        inbox: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        ids = self._submit(prompt, params or SamplingParams(), inbox.put, cache_salt, priority)
        collector = Collector(ids)
        try:
            while not collector.done:
                yield collector.feed(inbox.get())
        finally:
            if not collector.done:
                self._abort(ids)

    async def astream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, cache_salt: str = "", priority: int = 0
    ) -> AsyncIterator[StreamChunk]:
        """`stream` for asyncio. Cancelling the task aborts the request."""
        async with _AsyncInbox() as inbox:
            ids = self._submit(prompt, params or SamplingParams(), inbox.put, cache_salt, priority)
            collector = Collector(ids)
            try:
                while not collector.done:
                    yield collector.feed(await inbox.get())
            finally:
                if not collector.done:
                    self._abort(ids)

    async def agenerate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        cache_salt: str = "",
        priority: int = 0,
    ) -> Any:
        """`generate` for asyncio."""
        single, items = _as_batch(prompts, params)

        async def one(prompt: Prompt, param: SamplingParams) -> RequestOutput:
            async with _AsyncInbox() as inbox:
                ids = self._submit(prompt, param, inbox.put, cache_salt, priority)
                collector = Collector(ids)
                try:
                    while not collector.done:
                        collector.feed(await inbox.get())
                finally:
                    if not collector.done:
                        self._abort(ids)
            return collector.result

        tasks = [asyncio.ensure_future(one(prompt, param)) for prompt, param in items]
        try:
            results = await asyncio.gather(*tasks)
        except BaseException:  # the first failure ends its siblings: their requests are aborted
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        return results[0] if single else results

    def branch(self, prompt: BranchPiece = (), *, cache_salt: str = "", ttl: float | None = None) -> Branch:
        """A branch that begins with ``prompt``: text, token ids, or messages (then the chat template's text); without
        one it is there to be extended. ``ttl``: seconds it lives after each use, at most ``branch_ttl``."""
        from .branches.handle import Branch

        return Branch.create(self, prompt, cache_salt, ttl)

    def tree(self, max_nodes: int = 1000) -> dict[str, Any]:
        """What the cache holds, as nested dicts."""
        return self._ask(lambda: self._core.scheduler.tree.dump(max_nodes=max_nodes))

    def stats(self) -> Stats:
        return self._ask(lambda: msgspec.structs.replace(self._core.stats()))

    def info(self) -> dict[str, Any]:
        return self._ask(self._core.info)

    def flush_cache(self) -> int:
        """Forgets everything no running request holds; returns the pages freed."""
        return self._ask(lambda: self._core.control(Control(0, "flush_cache")).value["evicted_pages"])

    def check(self) -> None:
        """Raises if any invariant of rows, leases, tree or pages is broken."""
        self._ask(self._core.check)

    def close(self) -> None:
        """Ends what is in flight with an error and frees the device. Idempotent."""
        if self._dead is None:
            self._inbox.put(None)
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


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


class AsyncEngine(Engine):
    """`Engine` whose ``generate`` and ``stream`` are the asynchronous ones."""

    generate = Engine.agenerate
    stream = Engine.astream  # type: ignore[assignment]

    async def branch(  # type: ignore[override]
        self, prompt: BranchPiece = (), *, cache_salt: str = "", ttl: float | None = None
    ) -> AsyncBranch:
        from .branches.handle import AsyncBranch

        return await AsyncBranch.create(self, prompt, cache_salt, ttl)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)


class _AsyncInbox:
    """Deltas from the engine's thread to one asyncio task. Closed first, so that a late delta meets no dead loop."""

    async def __aenter__(self) -> _AsyncInbox:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Delta] = asyncio.Queue()
        self._open = True
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._open = False

    def put(self, delta: Delta) -> None:
        if self._open:
            try:
                self._loop.call_soon_threadsafe(self._queue.put_nowait, delta)
            except RuntimeError:  # the loop was closed without closing us: nobody is left to tell
                self._open = False

    async def get(self) -> Delta:
        return await self._queue.get()


def _as_batch(
    prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
) -> tuple[bool, list[tuple[Prompt, SamplingParams]]]:
    single = isinstance(prompts, str) or (len(prompts) > 0 and all(isinstance(p, (int, np.integer)) for p in prompts))
    batch: list[Prompt] = [prompts] if single else list(prompts)  # type: ignore[list-item, arg-type]
    if params is None:
        params = SamplingParams()
    each = [params] * len(batch) if isinstance(params, SamplingParams | Mapping) else list(params)
    if len(each) != len(batch):
        raise InvalidRequest(f"params has {len(each)} entries for {len(batch)} prompts", field="params")
    if not batch:
        raise InvalidRequest("prompts must not be empty", field="prompts")
    return single, list(zip(batch, each, strict=True))
