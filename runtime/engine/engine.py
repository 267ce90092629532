"""The engine in your own process: no sockets, the same core, tree and detokenizer that the server runs.

engine = Engine("path/to/model")
print(engine.generate("Once upon a time", SamplingParams(max_tokens=32)).text)
print(engine.chat([{"role": "user", "content": "Who are you?"}]).text)
"""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypedDict, Unpack, overload

import msgspec
import numpy as np

from ..chat.conversation import Conversation
from ..chat.openai_messages import openai_turns
from ..chat.openai_tools import openai_tools
from ..chat.prompt import chat_prompt
from ..config import EngineConfig, check
from ..errors import InvalidRequest, bad
from ..executor.torch_environment import prepare_torch
from ..grammar.compiler import GrammarCompiler
from ..limits import check_token_ids
from ..messages import Control, Delta, Generate, Stats
from ..models.folder import model_folder
from ..models.sampling_defaults import sampling_defaults
from ..sampling_params import SamplingParams, validate
from ..tokenizer.tokenizer import Tokenizer
from .core import EngineCore
from .inbox import AsyncInbox
from .request_output import Collector, RequestOutput, StreamChunk
from .thread import EngineThread

if TYPE_CHECKING:
    from .branch import Branch

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]  # of one conversation, as OpenAI's chat completions have them
BranchPiece = Prompt | Messages  # messages, where a branch begins


class ChatOptions(TypedDict, total=False):
    """What `EngineBase.chat_prompt` takes beside the messages; `Engine.chat` says what each is."""

    tools: list[dict[str, Any]] | None
    chat_template_kwargs: Mapping[str, Any] | None
    add_generation_prompt: bool | None
    continue_final_message: bool


class EngineBase(EngineThread):
    """What `Engine` and `AsyncEngine` share: loading, submitting, what they know, and what they do for asyncio."""

    def __init__(self, model: str | Path = "", **settings: Any) -> None:
        prepare_torch()
        from ..executor.executor import ModelExecutor  # torch: seconds to import

        config = check(EngineConfig(model=str(model), **settings))
        folder = model_folder(config.model)
        preferred = sampling_defaults(config, folder)
        executor = ModelExecutor.load(config)
        tokenizer = Tokenizer.load(folder)
        core = EngineCore(
            config,
            executor,
            executor.eos_ids,
            executor.max_model_len,
            gpu=executor.device.type == "cuda",
            grammars=GrammarCompiler(tokenizer, executor.vocab_size, executor.eos_ids),
            preferred=preferred,
        )
        self._start(core, tokenizer)

    @classmethod
    def from_core(cls, core: EngineCore, tokenizer: Tokenizer) -> Self:
        """An engine around a core that is already built (tests, other executors)."""
        engine = cls.__new__(cls)
        engine._start(core, tokenizer)
        return engine

    def _submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        sink: Callable[[Delta], None],
        cache_salt: str,
        priority: int,
    ) -> list[int]:
        if params is None:
            params = self.default_params()
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
        message = Generate(ids, params, tokens=data, namespace=("", cache_salt), priority=priority)
        self._on_thread(lambda: self._core.add(message), dict.fromkeys(ids, sink))
        return ids

    def _abort(self, ids: list[int]) -> None:
        def job() -> None:
            for id_ in ids:
                self._core.abort(id_)

        if self._dead is None:
            self._inbox.put(job)

    def default_params(self, **changes: Any) -> SamplingParams:
        """What is drawn with where ``params`` are left out: `SamplingParams` with the model's own defaults, and
        ``changes`` to them. `SamplingParams(...)` itself has none of the model's."""
        return SamplingParams(**{**self._core.preferred, **changes})

    def chat_prompt(
        self,
        messages: Messages,
        *,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
    ) -> list[int]:
        """The token ids of the prompt that a conversation becomes, the very ones ``/v1/chat/completions`` would send:
        for `stream` and `branch`, or to count them. `chat` says what the arguments are."""
        conversation = Conversation(
            turns=openai_turns(messages),
            tools=openai_tools(tools),
            chat_template_kwargs=chat_template_kwargs,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
        checked = chat_prompt(self.tokenizer.chat_template, conversation)
        ids: list[int] = self.tokenizer.encode(checked.text(), add_special_tokens=False).tolist()
        return ids

    def _chat_prompts(
        self, messages: Messages | Sequence[Messages], **how: Unpack[ChatOptions]
    ) -> tuple[bool, list[list[int]]]:
        """Whether it is one conversation, and the prompts of all."""
        if not isinstance(messages, list | tuple):
            raise bad("messages", f"must be a list of messages or of such lists, got {type(messages).__name__}")
        if not messages or not isinstance(messages[0], list | tuple):
            return True, [self.chat_prompt(messages, **how)]
        prompts = []
        for i, one in enumerate(messages):
            if not isinstance(one, list | tuple):
                raise bad(f"messages[{i}]", f"must be a list of messages like the first, got {type(one).__name__}")
            try:
                prompts.append(self.chat_prompt(one, **how))
            except InvalidRequest as error:
                raise InvalidRequest(f"conversation {i}: {error.message}", field=error.field) from error
        return False, prompts

    async def astream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, cache_salt: str = "", priority: int = 0
    ) -> AsyncIterator[StreamChunk]:
        """`stream` for asyncio. Cancelling the task aborts the request."""
        async with AsyncInbox() as inbox:
            ids = self._submit(prompt, params, inbox.put, cache_salt, priority)
            collector = Collector(ids)
            try:
                while not collector.done:
                    yield collector.feed(await inbox.get())
            finally:
                if not collector.done:
                    self._abort(ids)

    @overload
    async def agenerate(  # type: ignore[overload-overlap]  # a str is a Sequence[str] too, and one prompt
        self, prompts: Prompt, params: SamplingParams | None = None, *, cache_salt: str = "", priority: int = 0
    ) -> RequestOutput: ...

    @overload
    async def agenerate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        cache_salt: str = "",
        priority: int = 0,
    ) -> list[RequestOutput]: ...

    async def agenerate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        cache_salt: str = "",
        priority: int = 0,
    ) -> RequestOutput | list[RequestOutput]:
        """`generate` for asyncio."""
        single, items = _as_batch(prompts, params)

        async def one(prompt: Prompt, param: SamplingParams | None) -> RequestOutput:
            async with AsyncInbox() as inbox:
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

    @overload
    async def achat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        cache_salt: str = "",
        priority: int = 0,
        **how: Unpack[ChatOptions],
    ) -> RequestOutput: ...

    @overload
    async def achat(
        self,
        messages: Sequence[Messages],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        cache_salt: str = "",
        priority: int = 0,
        **how: Unpack[ChatOptions],
    ) -> list[RequestOutput]: ...

    async def achat(
        self,
        messages: Messages | Sequence[Messages],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        cache_salt: str = "",
        priority: int = 0,
        **how: Unpack[ChatOptions],
    ) -> RequestOutput | list[RequestOutput]:
        """`chat` for asyncio. Conversations are made into prompts beside the loop."""
        single, prompts = await asyncio.to_thread(self._chat_prompts, messages, **how)
        results = await self.agenerate(prompts, params, cache_salt=cache_salt, priority=priority)
        return results[0] if single else results

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


class Engine(EngineBase):
    """Serves a model in process. Thread-safe; one background thread drives the core.

    ``model``: a folder, a hub id, or "" for the model that ships with the package. Other keywords are the fields of
    `EngineConfig`. Raises `LoadError` if the model or a setting cannot be loaded.
    """

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is a Sequence[str] too, and one prompt
        self, prompts: Prompt, params: SamplingParams | None = None, *, cache_salt: str = "", priority: int = 0
    ) -> RequestOutput: ...

    @overload
    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        cache_salt: str = "",
        priority: int = 0,
    ) -> list[RequestOutput]: ...

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        cache_salt: str = "",
        priority: int = 0,
    ) -> RequestOutput | list[RequestOutput]:
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
        ids = self._submit(prompt, params, inbox.put, cache_salt, priority)
        collector = Collector(ids)
        try:
            while not collector.done:
                yield collector.feed(inbox.get())
        finally:
            if not collector.done:
                self._abort(ids)

    @overload
    def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        cache_salt: str = "",
        priority: int = 0,
        **how: Unpack[ChatOptions],
    ) -> RequestOutput: ...

    @overload
    def chat(
        self,
        messages: Sequence[Messages],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        cache_salt: str = "",
        priority: int = 0,
        **how: Unpack[ChatOptions],
    ) -> list[RequestOutput]: ...

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        cache_salt: str = "",
        priority: int = 0,
        **how: Unpack[ChatOptions],
    ) -> RequestOutput | list[RequestOutput]:
        """The next turn of a conversation, as `generate` of the prompt that the model's chat template makes of it: a
        list of messages gives a `RequestOutput`, a list of conversations a list of them in order. The text is as the
        model wrote it, calls and thinking included. Stream it with ``engine.stream(engine.chat_prompt(messages))``.

        Messages and ``tools`` are OpenAI's; ``chat_template_kwargs`` are variables of the template, such as
        ``{"enable_thinking": False}``. ``add_generation_prompt``: whether the assistant's turn is begun; None: unless
        ``continue_final_message``, which goes on with the last message instead. Raises `InvalidRequest` naming the
        field, also where the model has no chat template.
        """
        single, prompts = self._chat_prompts(messages, **how)
        results = self.generate(prompts, params, cache_salt=cache_salt, priority=priority)
        return results[0] if single else results

    def branch(self, prompt: BranchPiece = (), *, cache_salt: str = "", ttl: float | None = None) -> Branch:
        """A branch that begins with ``prompt``: text, token ids, or messages (then the chat template's text); without
        one it is there to be extended. ``ttl``: seconds it lives after each use, at most ``branch_ttl``."""
        from .branch import Branch

        return Branch.create(self, prompt, cache_salt, ttl)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _as_batch(
    prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None
) -> tuple[bool, list[tuple[Prompt, SamplingParams | None]]]:
    single = isinstance(prompts, str) or (len(prompts) > 0 and all(isinstance(p, (int, np.integer)) for p in prompts))
    batch: list[Prompt] = [prompts] if single else list(prompts)  # type: ignore[list-item, arg-type]
    alike = params is None or isinstance(params, SamplingParams | Mapping)
    each: list[Any] = [params] * len(batch) if alike else list(params)  # type: ignore[arg-type]
    if len(each) != len(batch):
        raise InvalidRequest(f"params has {len(each)} entries for {len(batch)} prompts", field="params")
    if not batch:
        raise InvalidRequest("prompts must not be empty", field="prompts")
    return single, list(zip(batch, each, strict=True))
