"""Where a command's answers come from: an engine in this process, or a server at a URL. One interface for both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from ...runtime.errors import InvalidRequest, LoadError
from ...runtime.models.sampling_defaults import DEFAULTED
from ...runtime.sampling_params import SamplingParams
from ..client import Client
from ..errors import BackendError

if TYPE_CHECKING:
    from ...runtime.engine.engine import Engine

Message = dict[str, str]


@dataclass(frozen=True)
class Answer:
    """One prompt's answer, and what the tree saved on it."""

    text: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    cache_reason: str


class Backend(Protocol):
    def generate(self, prompts: list[str], params: SamplingParams) -> list[Answer]: ...

    @property
    def has_template(self) -> bool:
        """Whether the model has a chat template; without one a conversation is written as plain text."""
        ...

    @property
    def preferred(self) -> Mapping[str, Any]:
        """The sampling that the model itself wants; empty: it says nothing, or is not asked."""
        ...

    def converse(self, messages: list[Message], params: SamplingParams) -> Iterator[str]:
        """Pieces of the next turn's text. It is cut to what fits behind the conversation."""
        ...


class InProcess:
    """An engine in this process: no sockets."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def generate(self, prompts: list[str], params: SamplingParams) -> list[Answer]:
        return [
            Answer(
                text=output.text,
                finish_reason=output.finish_reason,
                prompt_tokens=output.prompt_tokens,
                completion_tokens=len(output.token_ids),
                cached_tokens=output.cached_tokens,
                cache_reason="" if output.cache is None else output.cache.reason,
            )
            for output in self.engine.generate(list(prompts), params)
        ]

    @property
    def has_template(self) -> bool:
        return self.engine.tokenizer.chat_template is not None

    @property
    def preferred(self) -> Mapping[str, Any]:
        return self.engine.info()["preferred_sampling_params"] or {}

    def converse(self, messages: list[Message], params: SamplingParams) -> Iterator[str]:
        facts = self.engine.info()
        if self.has_template:
            prompt = self.engine.chat_prompt(messages)
        else:
            prompt = self.engine.tokenizer.encode(plain(messages)).tolist()
        params = _fitting(params, len(prompt), min(facts["max_model_len"], facts["pool_tokens"]))
        for chunk in self.engine.stream(prompt, params):
            yield chunk.text


class Remote:
    """A running server: ``/generate`` for prompts, ``/v1/chat/completions`` for conversations."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def generate(self, prompts: list[str], params: SamplingParams) -> list[Answer]:
        text = prompts[0] if len(prompts) == 1 else list(prompts)  # an error about one of a list says which
        replies = self.client.post("/generate", {"text": text, "sampling_params": _wire(params)})
        try:
            return [_answer(reply) for reply in ([replies] if isinstance(replies, dict) else replies)]
        except (KeyError, TypeError) as error:
            raise BackendError(f"{self.client.url}/generate answered in another shape; is it Branchwise?") from error

    @cached_property
    def _model(self) -> Mapping[str, Any]:
        return self.client.get("/get_model_info")

    @property
    def has_template(self) -> bool:
        return bool(self._model["has_chat_template"])

    @property
    def preferred(self) -> Mapping[str, Any]:
        return self._model.get("preferred_sampling_params") or {}

    def converse(self, messages: list[Message], params: SamplingParams) -> Iterator[str]:
        prompt: dict[str, Any] = {"messages": messages} if self.has_template else {"prompt": plain(messages)}
        counted, facts = self.client.post("/tokenize", prompt), self.client.get("/get_server_info")["engine"]
        params = _fitting(params, counted["count"], min(facts["max_model_len"], facts["pool_tokens"]))
        body = {**prompt, "stream": True, "max_tokens": params.max_tokens, "seed": params.seed, **_drawn(params)}
        for event in self.client.events("/v1/chat/completions" if self.has_template else "/v1/completions", body):
            for choice in event["choices"]:
                yield choice["delta"].get("content") or "" if self.has_template else choice["text"]


def sampling(backend: Backend, flags: Mapping[str, Any], **own: Any) -> SamplingParams:
    """As the flags say (None: not given), else as the model wants it, or the command's ``own`` if that is silent."""
    given = {name: value for name, value in flags.items() if value is not None}
    return SamplingParams(**{**(backend.preferred or own), **given})


def plain(messages: list[Message]) -> str:
    """A conversation for a model that has no template for one."""
    return "".join(f"{message['role'].capitalize()}: {message['content']}\n" for message in messages) + "Assistant:"


def _fitting(params: SamplingParams, prompt_tokens: int, limit: int) -> SamplingParams:
    """The parameters with no more tokens to generate than fit behind the prompt."""
    room = limit - prompt_tokens
    if room < 1:
        raise InvalidRequest(None, f"the conversation has {prompt_tokens:,} tokens and {limit:,} fit")
    most = params.max_tokens
    return msgspec.structs.replace(params, max_tokens=room if most is None else min(most, room))


def _drawn(params: SamplingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in DEFAULTED}


def _wire(params: SamplingParams) -> dict[str, Any]:
    wire: dict[str, Any] = {"max_new_tokens": params.max_tokens, **_drawn(params)}
    if params.seed is not None:
        wire["sampling_seed"] = params.seed
    if params.stop:
        wire["stop"] = list(params.stop)
    return wire


def _answer(reply: dict[str, Any]) -> Answer:
    meta = reply["meta_info"]
    return Answer(
        text=reply["text"],
        finish_reason=meta["finish_reason"]["type"],
        prompt_tokens=meta["prompt_tokens"],
        completion_tokens=meta["completion_tokens"],
        cached_tokens=meta["cached_tokens"],
        cache_reason=meta["cache"]["reason"],
    )


@contextmanager
def open_backend(
    url: str | None, api_key: str | None, model: str, **engine_fields: Any
) -> Iterator[InProcess | Remote]:
    """A server if there is a URL, else an engine, closed at the end. Raises `BackendError` or `LoadError`."""
    if url is not None and model:
        raise LoadError("--model loads a model here, --url asks a server for the one it serves: give one of the two")
    if url is not None:
        yield Remote(Client(url, api_key))
        return
    from rich.status import Status

    from .console import err

    with Status("loading", console=err):
        from ...runtime.engine.engine import Engine

        engine = Engine(model, **engine_fields)
    try:
        yield InProcess(engine)
    finally:
        engine.close()
