"""Where a command's answers come from: an engine in this process, or a server at a URL. One interface for both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ...runtime.errors import LoadError
from ..client import ServerClient, ServerError

if TYPE_CHECKING:
    from ...runtime.engine import Engine
    from ...runtime.sampling_params import SamplingParams

Prompt = str | list[int]


@dataclass(frozen=True)
class Answer:
    """One prompt's answer, and what the tree saved on it."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    cache_reason: str


class Backend(Protocol):
    def generate(self, prompts: list[str], params: SamplingParams) -> list[Answer]: ...

    def stream(self, prompt: Prompt, params: SamplingParams) -> Iterator[str]:
        """Pieces of the answer's text; joined, they are the whole."""
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
                cache_reason=output.cache.reason,
            )
            for output in self.engine.generate(list(prompts), params)
        ]

    def stream(self, prompt: Prompt, params: SamplingParams) -> Iterator[str]:
        for chunk in self.engine.stream(prompt, params):
            yield chunk.text


class Remote:
    """A running server, over its native ``/generate``."""

    def __init__(self, client: ServerClient) -> None:
        self.client = client

    def generate(self, prompts: list[str], params: SamplingParams) -> list[Answer]:
        text = prompts[0] if len(prompts) == 1 else list(prompts)  # an error about one of a list says which
        replies = self.client.post("/generate", {"text": text, "sampling_params": _wire(params)})
        try:
            return [_answer(reply) for reply in ([replies] if isinstance(replies, dict) else replies)]
        except (KeyError, TypeError) as error:
            raise ServerError(f"{self.client.url}/generate answered in another shape; is it Branchwise?") from error

    def stream(self, prompt: Prompt, params: SamplingParams) -> Iterator[str]:
        named = {"text": prompt} if isinstance(prompt, str) else {"input_ids": prompt}
        shown = 0
        for event in self.client.events("/generate", {**named, "sampling_params": _wire(params), "stream": True}):
            text = event["text"]  # all of it so far, as SGLang does
            yield text[shown:]
            shown = len(text)


def _wire(params: SamplingParams) -> dict[str, Any]:
    wire: dict[str, Any] = {
        "max_new_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k or -1,
    }
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
    """A server if there is a URL, else an engine, closed at the end. Raises `ServerError` or `LoadError`."""
    if url is not None and model:
        raise LoadError("--model loads a model here, --url asks a server for the one it serves: give one of the two")
    if url is not None:
        yield Remote(ServerClient(url, api_key))
        return
    from rich.status import Status

    from .console import err

    with Status("loading", console=err):
        from ...runtime.engine import Engine

        engine = Engine(model, **engine_fields)
    try:
        yield InProcess(engine)
    finally:
        engine.close()
