"""The scheduler process: the engine core's loop, between an inbox and the detokenizer."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq

from ...config import EngineConfig, ServerConfig
from ...engine.core import EngineCore
from ...executor.torch_environment import prepare_torch
from ...grammar.compiler import GrammarCompiler
from ...messages import (
    Abort,
    BranchOp,
    BranchRun,
    Control,
    Generate,
    Message,
    Progress,
    Ready,
    Settled,
    Shutdown,
    StopMatched,
)
from ...models.folder import model_folder
from ...models.sampling_defaults import sampling_defaults
from ...step import Executor
from ...tokenizer.tokenizer import Tokenizer
from .channels import Inbox, Outbox, ToScheduler

STATS_SECONDS = 0.2  # shortest time between two `Stats` while there is work; one more when it ends
NULL_POOL_TOKENS = 1 << 20
NULL_CONTEXT = 32_768


class SchedulerWorker:
    """Runs the engine core on messages from the tokenizer, the detokenizer and HTTP."""

    def __init__(self, config: ServerConfig, context: zmq.Context[Any], run_dir: Path, http: Outbox) -> None:
        self._inbox: Inbox[ToScheduler] = Inbox(context, run_dir, "scheduler")
        self._detokenizer = Outbox(context, run_dir, "detokenizer")
        self._tokenizer = Outbox(context, run_dir, "tokenizer")
        self._http = http
        folder = model_folder(config.engine.model)
        preferred = sampling_defaults(config.engine, folder)
        loaded = _load(config, http)
        executor = loaded.executor
        tokenizer = Tokenizer.load(folder)
        self._core = EngineCore(
            config.engine,
            executor,
            loaded.eos_ids,
            loaded.max_model_len,
            gpu=loaded.gpu,
            grammars=GrammarCompiler(tokenizer, executor.vocab_size, loaded.eos_ids),
            preferred=preferred,
        )
        self._stats_at = 0.0
        # Objects made so far live as long as the process: exclude them from garbage collection during steps.
        gc.collect()
        gc.freeze()
        info = {
            "vocab_size": executor.vocab_size,
            "max_model_len": loaded.max_model_len,
            "pool_tokens": executor.num_pages * executor.page_size,
            "page_size": executor.page_size,
            "num_pages": executor.num_pages,
            "memory_plan": loaded.memory_plan,
            "preferred_sampling_params": preferred,
        }
        http.send([Ready("scheduler", info)])

    def run(self) -> None:
        """Steps while there is work and blocks while there is none, until `Shutdown` has arrived and every request has
        ended."""
        core = self._core
        leaving = False
        timeout_ms: int | None = None
        while True:
            for message in self._inbox.receive(timeout_ms):
                leaving |= self._handle(message)
            self._answer_branches()  # before the step, which may take long
            output = core.step()
            if output is not None:
                self._detokenizer.send([output])
            self._answer_branches()
            working = core.has_work
            self._report(working)
            if not working:
                if leaving:
                    break
                expires = core.sweep()
                timeout_ms = None if expires is None else int(1000 * expires) + 1
            else:
                # If nothing can advance (grammars are compiling), wait a moment instead of spinning.
                timeout_ms = 0 if core.advanced else 1
        self._detokenizer.send([Shutdown()])
        core.close()
        self._detokenizer.close()
        self._tokenizer.close(0)
        self._inbox.close()

    def _handle(self, message: ToScheduler) -> bool:
        """Returns whether it was `Shutdown`."""
        match message:
            case Generate():
                self._core.add(message)
            case BranchOp() | BranchRun():
                self._core.branches.take(message)
            case Settled():
                self._core.branches.settled(message)
            case Abort():
                self._core.abort(message.id)
            case StopMatched():
                self._core.stop_matched(message.id)
            case Control():
                self._http.send([self._core.control(message)])
            case Shutdown():
                return True
        return False

    def _answer_branches(self) -> None:
        branches = self._core.branches
        if branches.replies:
            self._http.send(branches.replies)
            branches.replies.clear()
        if branches.to_encode:
            self._tokenizer.send(branches.to_encode)
            branches.to_encode.clear()

    def _report(self, working: bool) -> None:
        now = time.monotonic()
        if not working or now - self._stats_at >= STATS_SECONDS:
            self._stats_at = now
            messages: list[Message] = [self._core.stats()]
            self._http.send(messages)


@dataclass(slots=True)
class _Loaded:
    executor: Executor
    eos_ids: tuple[int, ...]
    max_model_len: int
    memory_plan: list[str]  # lines for display
    gpu: bool  # whether steps overlap by default


def _load(config: ServerConfig, http: Outbox) -> _Loaded:
    if config.null_executor:
        return _load_null(config.engine, config.null_step_seconds)
    prepare_torch()
    from ...executor.executor import ModelExecutor

    def progress(done: int, total: int) -> None:
        http.send([Progress("scheduler", "loading weights", done, total)])

    executor = ModelExecutor.load(config.engine, progress)
    return _Loaded(
        executor,
        executor.eos_ids,
        executor.max_model_len,
        list(executor.memory_plan.lines()),
        gpu=executor.device.type == "cuda",
    )


def _load_null(engine: EngineConfig, step_seconds: float) -> _Loaded:
    from ...executor.null import NullExecutor

    pages = -(-(engine.kv_cache_tokens or NULL_POOL_TOKENS) // engine.page_size)
    vocab_size = Tokenizer.load(Path(engine.model)).vocab_size
    executor = NullExecutor(pages, engine.page_size, vocab_size, step_seconds)
    return _Loaded(
        executor,
        (),
        engine.max_model_len or NULL_CONTEXT,
        ["no model: tokens are computed from their positions"],
        gpu=False,
    )
