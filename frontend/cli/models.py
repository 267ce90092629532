"""The model that a command uses: loaded in this process, or served at a URL. One interface for both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import msgspec

from ...runtime.errors import InvalidRequest, LoadError
from ...runtime.models.sampling_defaults import DEFAULTED
from ...runtime.sampling_params import SamplingParams
from ..client import Client
from ..errors import BackendError

if TYPE_CHECKING:
    from ...runtime.engine.engine import Engine

ChatTurn = dict[str, str]  # ``role`` and ``content``
OnText = Callable[[str], None]


@dataclass(frozen=True)
class Generated:
    """One prompt's answer, and how much of the prompt was cached."""

    text: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    cache_reason: str


class Model:
    """Base class."""

    name: str
    has_template: bool  # without a chat template a conversation is written as plain text

    @property
    def facts(self) -> Mapping[str, Any]:
        """The engine's limits, and the sampling defaults of the model."""
        raise NotImplementedError

    def generate(self, prompts: list[str], params: SamplingParams) -> list[Generated]:
        raise NotImplementedError

    def converse(self, turns: list[ChatTurn], params: SamplingParams, on_text: OnText) -> Generated:
        """The next turn, passed to ``on_text`` as it is generated. Its length is cut to what fits."""
        raise NotImplementedError

    def sampling(self, flags: Mapping[str, Any], **default: Any) -> SamplingParams:
        """The flags that were given (not None), over the model's defaults, or ``default`` if it has none."""
        given = {name: value for name, value in flags.items() if value is not None}
        return SamplingParams(**{**(self.facts["preferred_sampling_params"] or default), **given})

    def _fitting(self, params: SamplingParams, prompt_tokens: int) -> SamplingParams:
        limit = min(self.facts["max_model_len"], self.facts["pool_tokens"])
        room = limit - prompt_tokens
        if room < 1:
            raise InvalidRequest(None, f"the conversation has {prompt_tokens:,} tokens and {limit:,} fit")
        longest = params.max_tokens
        return msgspec.structs.replace(params, max_tokens=room if longest is None else min(longest, room))


class LocalModel(Model):
    """An engine in this process."""

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine = engine
        self.name = name
        self.has_template = engine.tokenizer.chat_template is not None

    @property
    def facts(self) -> Mapping[str, Any]:
        return self._engine.info()

    def generate(self, prompts: list[str], params: SamplingParams) -> list[Generated]:
        return [
            Generated(
                text=output.text,
                finish_reason=output.finish_reason,
                prompt_tokens=output.prompt_tokens,
                completion_tokens=len(output.token_ids),
                cached_tokens=output.cached_tokens,
                cache_reason="" if output.cache is None else output.cache.reason,
            )
            for output in self._engine.generate(list(prompts), params)
        ]

    def converse(self, turns: list[ChatTurn], params: SamplingParams, on_text: OnText) -> Generated:
        if self.has_template:
            prompt = self._engine.chat_prompt(turns)
        else:
            prompt = self._engine.tokenizer.encode(plain(turns)).tolist()
        text, tokens, cached, finish = "", 0, 0, None
        with closing(self._engine.stream(prompt, self._fitting(params, len(prompt)))) as stream:  # type: ignore[type-var]
            for chunk in stream:
                text, tokens, finish = text + chunk.text, tokens + len(chunk.token_ids), chunk.finish_reason
                cached = cached if chunk.cache is None else chunk.cache.hit_tokens
                on_text(chunk.text)
        return Generated(text, finish, len(prompt), tokens, cached, "")


class ServedModel(Model):
    """A running server: ``/generate`` for prompts, OpenAI's routes for conversations."""

    def __init__(self, client: Client) -> None:
        self._client = client

    @cached_property
    def _info(self) -> Mapping[str, Any]:
        return self._client.get("/get_model_info")

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"{self._info.get('served_model_name') or self._info['model_path']} at {self._client.url}"

    @property
    def has_template(self) -> bool:  # type: ignore[override]
        return bool(self._info["has_chat_template"])

    @cached_property
    def facts(self) -> Mapping[str, Any]:
        preferred = {"preferred_sampling_params": self._info.get("preferred_sampling_params")}
        return {**self._client.get("/get_server_info")["engine"], **preferred}

    def generate(self, prompts: list[str], params: SamplingParams) -> list[Generated]:
        text = prompts[0] if len(prompts) == 1 else list(prompts)  # errors about one of a list name its index
        replies = self._client.post("/generate", {"text": text, "sampling_params": _wire(params)})
        try:
            return [_generated(reply) for reply in ([replies] if isinstance(replies, dict) else replies)]
        except (KeyError, TypeError) as error:
            url = f"{self._client.url}/generate"
            raise BackendError(f"{url} answered in another form; is it a Branchwise server?") from error

    def converse(self, turns: list[ChatTurn], params: SamplingParams, on_text: OnText) -> Generated:
        prompt: dict[str, Any] = {"messages": turns} if self.has_template else {"prompt": plain(turns)}
        params = self._fitting(params, self._client.post("/tokenize", prompt)["count"])
        body = {**prompt, "max_tokens": params.max_tokens, "seed": params.seed, **_sampled(params)}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        text, finish, usage = "", None, dict[str, Any]()
        path = "/v1/chat/completions" if self.has_template else "/v1/completions"
        with closing(self._client.events(path, body)) as events:  # type: ignore[type-var]
            for event in events:
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    piece = (choice["delta"].get("content") if self.has_template else choice["text"]) or ""
                    text, finish = text + piece, choice.get("finish_reason")
                    on_text(piece)
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return Generated(text, finish, usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0), cached, "")


def plain(turns: list[ChatTurn]) -> str:
    """A conversation as text, for a model without a chat template."""
    return "".join(f"{turn['role'].capitalize()}: {turn['content']}\n" for turn in turns) + "Assistant:"


def _sampled(params: SamplingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in DEFAULTED}


def _wire(params: SamplingParams) -> dict[str, Any]:
    wire: dict[str, Any] = {"max_new_tokens": params.max_tokens, **_sampled(params)}
    if params.seed is not None:
        wire["sampling_seed"] = params.seed
    if params.stop:
        wire["stop"] = list(params.stop)
    return wire


def _generated(reply: dict[str, Any]) -> Generated:
    meta = reply["meta_info"]
    return Generated(
        text=reply["text"],
        finish_reason=meta["finish_reason"]["type"],
        prompt_tokens=meta["prompt_tokens"],
        completion_tokens=meta["completion_tokens"],
        cached_tokens=meta["cached_tokens"],
        cache_reason=meta["cache"]["reason"],
    )


@contextmanager
def open_model(model: str, url: str | None, api_key: str | None, **settings: Any) -> Iterator[Model]:
    """The server at ``url``, or an engine that is closed at the end. Raises `BackendError` or `LoadError`."""
    if url and model:
        raise LoadError("--model loads a model here, --url asks a server for the one it serves: give one of the two")
    if url:
        yield ServedModel(Client(url, api_key))
        return
    from rich.status import Status

    from .console import err

    with Status("loading", console=err):
        from ...runtime.engine.engine import Engine

        engine = Engine(model, **settings)
    try:
        yield LocalModel(engine, model or "the model that ships with the package")
    finally:
        engine.close()
