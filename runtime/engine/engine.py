"""The engine in your own process: no sockets, and the same core, tree and detokenizer that the server runs.

engine = Engine("path/to/model")
print(engine.generate("Once upon a time", SamplingParams(max_tokens=32)).text)
print(engine.chat([{"role": "user", "content": "Who are you?"}]).text)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Self, Unpack, overload

from ..sampling_params import SamplingParams
from ..scheduler.branches.scores import Score
from .base import EngineBase
from .branch import Branch
from .prompts import (
    BatchParams,
    BranchPiece,
    ChatOptions,
    ChatRequestOptions,
    Messages,
    Prompt,
    RequestOptions,
    chat_batch,
    prompt_batch,
)
from .request_output import RequestOutput, StreamChunk


class Engine(EngineBase):
    """Serves a model in process. Thread-safe; one background thread drives the core.

    ``model``: a folder, a hub id, or "" for the model that ships with the package. Other keywords are the fields of
    `EngineConfig`. Raises `LoadError` if the model or a setting cannot be loaded.
    """

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is a Sequence[str] too, and one prompt
        self, prompts: Prompt, params: SamplingParams | None = None, **options: Unpack[RequestOptions]
    ) -> RequestOutput: ...

    @overload
    def generate(
        self, prompts: Sequence[Prompt], params: BatchParams = None, **options: Unpack[RequestOptions]
    ) -> list[RequestOutput]: ...

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: BatchParams = None, **options: Unpack[RequestOptions]
    ) -> RequestOutput | list[RequestOutput]:
        """Blocks until everything is generated. One prompt (text or token ids) gives a `RequestOutput`, a list of
        prompts a list of them in order. Raises `InvalidRequest` (a ValueError) naming the field and the limit."""
        single, items = prompt_batch(prompts, params)
        results = self._thread.complete(self._requests(items, **options))
        return results[0] if single else results

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Unpack[RequestOptions]
    ) -> Iterator[StreamChunk]:
        """Yields text as it is generated; leaving the loop early aborts the request."""
        return self._thread.stream(self, *self._requests([(prompt, params)], **options))

    @overload
    def chat(
        self, messages: Messages, params: SamplingParams | None = None, **options: Unpack[ChatRequestOptions]
    ) -> RequestOutput: ...

    @overload
    def chat(
        self, messages: Sequence[Messages], params: BatchParams = None, **options: Unpack[ChatRequestOptions]
    ) -> list[RequestOutput]: ...

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        params: BatchParams = None,
        *,
        cache_salt: str = "",
        priority: int = 0,
        **options: Unpack[ChatOptions],
    ) -> RequestOutput | list[RequestOutput]:
        """The next turn of a conversation, as `generate` of the prompt that the model's chat template makes of it: a
        list of messages gives a `RequestOutput`, a list of conversations a list of them in order. The text is as the
        model wrote it, calls and thinking included. Stream it with ``engine.stream(engine.chat_prompt(messages))``.

        Messages and ``tools`` are OpenAI's; ``chat_template_kwargs`` are variables of the template, such as
        ``{"enable_thinking": False}``. ``add_generation_prompt``: whether to begin the assistant's turn; None: unless
        ``continue_final_message``, which continues the last message instead. Text of the messages that spells a
        special token stays text, unless ``parse_special``. Raises `InvalidRequest` naming the field, also where the
        model has no chat template.
        """
        single, prompts = chat_batch(self.tokenizer, messages, **options)
        results = self.generate(prompts, params, cache_salt=cache_salt, priority=priority)
        return results[0] if single else results

    def score(self, prefix: Prompt, continuations: Sequence[Prompt], *, cache_salt: str = "") -> list[Score]:
        """Logprobs of the tokens of every continuation after ``prefix``, in order: what they share is computed once,
        and what is cached is not computed. To score one prefix again and again, keep a `branch` of it."""
        with self.branch(prefix, cache_salt=cache_salt) as branch:
            return branch.score(continuations)

    def branch(self, prompt: BranchPiece = (), *, cache_salt: str = "", ttl: float | None = None) -> Branch:
        """A branch that begins with ``prompt``: text, token ids, or messages (then the chat template's text); without
        one it is there to be extended. ``ttl``: seconds it lives after each use, at most ``branch_ttl``."""
        return Branch.create(self, prompt, cache_salt, ttl)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
