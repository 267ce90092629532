"""One load-making client of an OpenAI-compatible ``/v1/completions``, with token-id prompts, and what it measures."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from ..client import error_message
from .ideal import IdealCache

MAX_ERRORS_KEPT = 3


@dataclass(slots=True)
class Measured:
    """What one workload's requests measured. Times in seconds; counts in tokens, of requests that succeeded."""

    latency: list[float] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)  # send to first text; streaming only
    itl: list[float] = field(default_factory=list)  # between chunks of text; streaming only
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0  # as the server claims
    failed: int = 0
    errors: list[str] = field(default_factory=list)  # the first few that differ, for the person who looks
    # (prompt, None) when a request was sent, (prompt, output ids) when it was answered: for the ideal, computed later
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


class RequestFailed(Exception):
    """The server answered, but not with a completion."""


@dataclass(slots=True)
class _Reply:
    text: str = ""
    usage: dict[str, Any] = field(default_factory=dict)


class CompletionsClient:
    """Sends completions one at a time per caller; any number of callers at once.

    ``reset`` starts a new `Measured`. A failed request is counted and gives ``[]``: the program it belongs to goes on.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        model: str,
        *,
        stream: bool = False,
        on_done: Callable[[], None] | None = None,
    ) -> None:
        self._session, self._url, self._model, self._stream = session, url.rstrip("/"), model, stream
        self._on_done = on_done
        self.measured = Measured()

    def reset(self) -> Measured:
        self.measured = Measured()
        return self.measured

    async def generate(
        self, prompt: list[int], max_tokens: int, *, seed: int | None = None, temperature: float = 0.0
    ) -> list[int]:
        """Continues ``prompt`` by exactly ``max_tokens`` tokens; returns their ids as read back from the text."""
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
            reply = await self._post(body, start, measured)
        except (aiohttp.ClientError, TimeoutError, RequestFailed, msgspec.DecodeError) as error:
            measured.fail(str(error) or repr(error))
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

    async def _post(self, body: dict[str, Any], start: float, measured: Measured) -> _Reply:
        async with self._session.post(self._url + "/v1/completions", data=msgspec.json.encode(body)) as response:
            if response.status != 200:
                raise RequestFailed(f"HTTP {response.status}: {_said(await response.read())}")
            if not self._stream:
                whole = msgspec.json.decode(await response.read())
                return _Reply(_text(whole), whole.get("usage") or {})
            reply, last = _Reply(), start
            async for line in response.content:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                chunk = msgspec.json.decode(line[6:])
                if "error" in chunk:
                    raise RequestFailed(f"error in the stream: {error_message(chunk)}")
                reply.usage = chunk.get("usage") or reply.usage
                piece = _text(chunk) if chunk.get("choices") else ""
                if piece:
                    now = time.perf_counter()
                    (measured.itl if reply.text else measured.ttft).append(now - last)
                    last = now
                    reply.text += piece
            return reply


def _said(body: bytes) -> str:
    """The message of a refusal, or how its body begins when it has none."""
    try:
        said = error_message(msgspec.json.decode(body))
    except msgspec.DecodeError:
        said = None
    return said or body[:300].decode("utf-8", "replace")


def _text(reply: dict[str, Any]) -> str:
    try:
        return reply["choices"][0]["text"] or ""
    except (KeyError, IndexError, TypeError) as error:
        raise RequestFailed(f"not a completion: {str(reply)[:200]}") from error


def ids_of(text: str) -> list[int]:
    """Token ids back from text, exact for the WordLevel tokenizer of the bench's dummy models (``t17 t4 …``)."""
    return [int(word[1:]) for word in text.split() if word[:1] == "t" and word[1:].isdigit()]


def open_session(api_key: str | None) -> aiohttp.ClientSession:
    headers = {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        headers=headers,
        timeout=aiohttp.ClientTimeout(total=900),
        read_bufsize=1 << 20,
    )


async def warm_up(client: CompletionsClient, prompts: list[list[int]], max_tokens: int) -> None:
    await asyncio.gather(*(client.generate(prompt, max_tokens) for prompt in prompts))
