"""The base of `Engine` and `AsyncEngine`: loads a model, and generates for asyncio."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self, Unpack, overload

import msgspec

from ..config import engine_config
from ..messages import Control, Generate, Stats
from ..sampling_params import SamplingParams, validate
from ..tokenizer.tokenizer import Tokenizer
from .core import EngineCore
from .loading import load_engine
from .prompts import (
    BatchParams,
    ChatOptions,
    ChatRequestOptions,
    Messages,
    Prompt,
    RequestOptions,
    chat_batch,
    chat_tokens,
    prompt_batch,
    prompt_tokens,
)
from .request_output import RequestOutput, StreamChunk
from .thread import EngineThread


class EngineBase:
    """Loads a model and starts the thread that drives it, which ends with `close` or when the object is collected."""

    def __init__(self, model: str | Path = "", **settings: Any) -> None:
        failed: Future[str] = Future()
        loaded = load_engine(engine_config(str(model), settings), failed=failed)
        self._start(loaded.core, loaded.tokenizer())
        failed.add_done_callback(self._thread.executor_failed)

    @classmethod
    def from_core(cls, core: EngineCore, tokenizer: Tokenizer) -> Self:
        """An engine around a core that is already built (tests, other executors)."""
        engine = cls.__new__(cls)
        engine._start(core, tokenizer)
        return engine

    def _start(self, core: EngineCore, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._core = core
        self._thread = EngineThread(core, tokenizer)
        weakref.finalize(self, self._thread.stop).atexit = False

    def close(self) -> None:
        """Ends requests in flight with an error and frees the device. Idempotent."""
        self._thread.close()

    @property
    def vocab_size(self) -> int:
        return self._core.scheduler.limits.vocab_size

    def default_params(self, **changes: Any) -> SamplingParams:
        """Parameters used where ``params`` is left out: `SamplingParams` with the model's own defaults, and ``changes``
        to them. `SamplingParams(...)` itself has none of the model's."""
        return SamplingParams(**{**self._core.preferred, **changes})

    def chat_prompt(self, messages: Messages, **options: Unpack[ChatOptions]) -> list[int]:
        """Token ids of the prompt that a conversation becomes, the same as ``/v1/chat/completions`` makes: for `stream`
        and `branch`, or to count them. `Engine.chat` describes the arguments."""
        return chat_tokens(self.tokenizer, messages, **options)

    # -- requests ------------------------------------------------------------------------------------------------------

    def _checked(self, params: SamplingParams | None) -> SamplingParams:
        return validate(self.default_params() if params is None else params, self.vocab_size)

    def _requests(
        self, items: Iterable[tuple[Prompt, SamplingParams | None]], *, cache_salt: str = "", priority: int = 0
    ) -> list[Generate]:
        requests = []
        for prompt, given in items:
            params = self._checked(given)
            tokens = prompt_tokens(self.tokenizer, prompt, self.vocab_size).astype("<i4", copy=False).tobytes()
            ids = self._thread.new_ids(params.n)
            requests.append(Generate(ids, params, tokens=tokens, namespace=("", cache_salt), priority=priority))
        return requests

    def astream(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Unpack[RequestOptions]
    ) -> AsyncIterator[StreamChunk]:
        """`Engine.stream` for asyncio. Cancelling the task aborts the request."""
        return self._thread.astream(self, *self._requests([(prompt, params)], **options))

    @overload
    async def agenerate(  # type: ignore[overload-overlap]  # a str is a Sequence[str] too, and one prompt
        self, prompts: Prompt, params: SamplingParams | None = None, **options: Unpack[RequestOptions]
    ) -> RequestOutput: ...

    @overload
    async def agenerate(
        self, prompts: Sequence[Prompt], params: BatchParams = None, **options: Unpack[RequestOptions]
    ) -> list[RequestOutput]: ...

    async def agenerate(
        self, prompts: Prompt | Sequence[Prompt], params: BatchParams = None, **options: Unpack[RequestOptions]
    ) -> RequestOutput | list[RequestOutput]:
        """`Engine.generate` for asyncio. Cancelling the task, or a failure of one prompt, aborts all of them."""
        single, items = prompt_batch(prompts, params)
        results = await self._thread.acomplete(self._requests(items, **options))
        return results[0] if single else results

    @overload
    async def achat(
        self, messages: Messages, params: SamplingParams | None = None, **options: Unpack[ChatRequestOptions]
    ) -> RequestOutput: ...

    @overload
    async def achat(
        self, messages: Sequence[Messages], params: BatchParams = None, **options: Unpack[ChatRequestOptions]
    ) -> list[RequestOutput]: ...

    async def achat(
        self,
        messages: Messages | Sequence[Messages],
        params: BatchParams = None,
        *,
        cache_salt: str = "",
        priority: int = 0,
        **options: Unpack[ChatOptions],
    ) -> RequestOutput | list[RequestOutput]:
        """`Engine.chat` for asyncio. Templates are rendered in a thread."""
        single, prompts = await asyncio.to_thread(chat_batch, self.tokenizer, messages, **options)
        results = await self.agenerate(prompts, params, cache_salt=cache_salt, priority=priority)
        return results[0] if single else results

    # -- the engine ----------------------------------------------------------------------------------------------------

    def tree(self, max_nodes: int = 1000) -> dict[str, Any]:
        """The cached prefixes, as nested dicts."""
        return self._thread.ask(lambda: self._core.scheduler.tree.dump(max_nodes=max_nodes))

    def stats(self) -> Stats:
        return self._thread.ask(lambda: msgspec.structs.replace(self._core.stats()))

    def info(self) -> dict[str, Any]:
        return self._thread.ask(self._core.info)

    def flush_cache(self) -> int:
        """Evicts everything that no running request uses, pins and branches included; returns the pages freed."""
        return int(self._thread.ask(lambda: self._core.control(Control(0, "flush_cache"))).value["evicted_pages"])

    def check(self) -> None:
        """Raises if an invariant of rows, leases, tree or pages is broken."""
        self._thread.ask(self._core.check)
