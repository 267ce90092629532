"""The load generator's client: an OpenAI-compatible ``/v1/completions`` with token-id prompts, and what it measures."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..client import AsyncClient
from ..errors import BackendError
from .ideal import IdealCache

TIMEOUT = 900.0  # seconds without a byte from the server
MAX_ERRORS_KEPT = 3


@dataclass(slots=True)
class Measured:
    """The measurements of one workload. Times in seconds; token counts of the requests that succeeded."""

    latency: list[float] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)  # from sending to the first text; streaming only
    itl: list[float] = field(default_factory=list)  # between chunks of text; streaming only
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0  # as the server reports
    failed: int = 0
    errors: list[str] = field(default_factory=list)  # the first few different messages
    # (prompt, None) when a request was sent, (prompt, output ids) when it was answered: replayed later by `ideal`
    history: list[tuple[list[int], list[int] | None]] = field(default_factory=list)

    def fail(self, error: str) -> None:
        self.failed += 1
        if error not in self.errors and len(self.errors) < MAX_ERRORS_KEPT:
            self.errors.append(error)

    def ideal(self) -> IdealCache:
        cache = IdealCache()
        for prompt, output in self.history:
            if output is None:
                cache.sent(prompt)
            else:
                cache.received(prompt, output)
        return cache


@dataclass(slots=True)
class _Reply:
    text: str = ""
    usage: dict[str, Any] = field(default_factory=dict)


def open_client(url: str, api_key: str | None) -> AsyncClient:
    """A client with as many connections as there are requests in flight, that never repeats a request."""
    return AsyncClient(url, api_key, timeout=TIMEOUT, max_connections=0)


class CompletionsClient:
    """Sends completions and measures them, for any number of concurrent callers.

    ``reset`` starts a new `Measured`. A failed request is counted and returns ``[]``, so that its program continues.
    """

    def __init__(
        self, client: AsyncClient, model: str, *, stream: bool = False, on_done: Callable[[], None] | None = None
    ) -> None:
        self._client, self._model, self._stream = client, model, stream
        self._on_done = on_done
        self.measured = Measured()

    def reset(self) -> Measured:
        self.measured = Measured()
        return self.measured

    async def generate(
        self, prompt: list[int], max_tokens: int, *, seed: int | None = None, temperature: float = 0.0
    ) -> list[int]:
        """Continues ``prompt`` by exactly ``max_tokens`` tokens; returns their ids, read back from the text."""
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "ignore_eos": True,
            "stream": self._stream,
        }
        if seed is not None:
            body["seed"] = seed
        if self._stream:
            body["stream_options"] = {"include_usage": True}
        measured = self.measured
        measured.history.append((prompt, None))
        start = time.perf_counter()
        try:
            reply = await self._request(body, start, measured)
        except BackendError as error:
            measured.fail(f"HTTP {error.status}: {error.reason}" if error.status else str(error))
            return []
        finally:
            if self._on_done is not None:
                self._on_done()
        measured.latency.append(time.perf_counter() - start)
        measured.prompt_tokens += len(prompt)
        completion_tokens = reply.usage.get("completion_tokens", max_tokens)
        measured.output_tokens += completion_tokens
        measured.cached_tokens += (reply.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        ids = ids_of(reply.text)
        if len(ids) == completion_tokens:
            measured.history.append((prompt, ids))
        return ids

    async def _request(self, body: dict[str, Any], start: float, measured: Measured) -> _Reply:
        if not self._stream:
            answer = await self._client.post("/v1/completions", body)
            return _Reply(_text(answer), answer.get("usage") or {})
        reply, last = _Reply(), start
        async for event in self._client.events("/v1/completions", body):
            reply.usage = event.get("usage") or reply.usage
            piece = _text(event) if event.get("choices") else ""
            if piece:
                now = time.perf_counter()
                (measured.itl if reply.text else measured.ttft).append(now - last)
                last = now
                reply.text += piece
        return reply


def _text(reply: dict[str, Any]) -> str:
    try:
        return reply["choices"][0]["text"] or ""
    except (KeyError, IndexError, TypeError) as error:
        raise BackendError(f"not a completion: {str(reply)[:200]}") from error


def ids_of(text: str) -> list[int]:
    """Token ids read from text; exact for the WordLevel tokenizer of the benchmark's dummy models (``t17 t4 …``)."""
    return [int(word[1:]) for word in text.split() if word[:1] == "t" and word[1:].isdigit()]


async def warm_up(client: CompletionsClient, prompts: list[list[int]], max_tokens: int) -> None:
    await asyncio.gather(*(client.generate(prompt, max_tokens) for prompt in prompts))
