"""A Branchwise server as a backend, the stateless way: every request carries the whole prompt, as token ids."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from .backend import Capabilities, Completion, GenerationRequest, OnDelta, Piece, SharedTokens, Usage, settle
from .codec import Codec
from .errors import BackendError
from .http import TIMEOUT, Http
from .loop import Once

_WIRE = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "seed": "sampling_seed"}


class ServerBackend:
    """``cached=False``: nothing is reused from one request to the next (each gets a salt of its own), to compare."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float = TIMEOUT,
        cache_salt: str | None = None,
        cached: bool = True,
    ) -> None:
        self.name = url
        self.usage = Usage()
        self.capabilities = Capabilities(constraints=None, prefill=cached)
        self.http = Http(url, api_key, timeout, self.usage)
        self._api_key, self._timeout = api_key, timeout
        self._salt = cache_salt
        self._cached = cached
        self._codec = Once(self._fetch_codec)

    async def codec(self) -> Codec:
        """The server's own tokenizer, fetched from it once."""
        return await self._codec.get()

    async def _fetch_codec(self) -> Codec:
        from ...runtime.tokenizer.tokenizer import Tokenizer

        dump = await self.http.get("/tokenizer")
        return Codec(await asyncio.to_thread(Tokenizer.of_dump, dump))

    async def create(self) -> SharedTokens:
        return SharedTokens()

    async def fork(self, handle: SharedTokens, n: int) -> list[SharedTokens]:
        return [handle.fork() for _ in range(n)]

    async def extend(self, handle: SharedTokens, piece: Piece) -> None:
        handle.extend(piece)  # type: ignore[arg-type]

    async def generate(
        self, handle: SharedTokens, ask: GenerationRequest, on_delta: OnDelta | None = None
    ) -> list[Completion]:
        body = {**self._prompt(handle), **wire(ask)}
        self.usage.sent_tokens += handle.length
        if on_delta is not None and ask.params.n == 1:
            replies = [await self._follow({**body, "stream": True}, on_delta)]
        else:
            replies = await self._post(
                body if self._cached else [self._alone(handle, ask, i) for i in range(ask.params.n)]
            )
        tail = handle.tail()
        done = [await self.completion(reply, tail) for reply in replies]
        if ask.params.max_tokens != 0:
            handle.extend(done[0].ids or [])
            if on_delta is not None and ask.params.n > 1:
                on_delta(done[0].text)
        return done

    async def completion(self, reply: Mapping[str, Any], tail: list[int]) -> Completion:
        """What one reply means for the state."""
        try:
            text, meta = reply["text"], reply["meta_info"]
            self.usage.count(meta["prompt_tokens"], meta["cached_tokens"], meta["completion_tokens"])
            ids = settle(await self.codec(), tail, reply["output_ids"], text, meta["finish_reason"] or {})
        except (KeyError, TypeError) as error:
            raise BackendError(f"{self.name} answered in another shape; is it Branchwise?") from error
        return Completion(text, meta, ids)

    async def _follow(self, body: Mapping[str, Any], on_delta: OnDelta, path: str = "/generate") -> dict[str, Any]:
        """The last event of a stream: each holds everything so far."""
        shown, last = 0, {}
        async for event in self.http.events(path, body):
            last = event
            on_delta(event["text"][shown:])
            shown = len(event["text"])
        return last

    async def score(self, handle: SharedTokens, continuations: Sequence[Piece]) -> list[list[tuple[int | str, float]]]:
        prompt = handle.tokens()
        wholes = [[*prompt, *piece] for piece in continuations]  # type: ignore[misc]
        self.usage.sent_tokens += sum(map(len, wholes))
        asked = {"sampling_params": {"max_new_tokens": 0}, "return_logprob": True, "logprob_start_len": len(prompt)}
        body: Any = {"input_ids": wholes, **asked, **self._salted()}
        if not self._cached:
            body = [{"input_ids": whole, **asked, **self._salted()} for whole in wholes]
        rows: list[list[tuple[int | str, float]]] = []
        for reply in await self._post(body):
            meta = reply["meta_info"]
            self.usage.count(meta["prompt_tokens"], meta["cached_tokens"], 0)
            rows.append([(id, value) for value, id, _ in meta["input_token_logprobs"]])
        return rows

    async def close(self, handle: SharedTokens) -> None:
        pass

    async def flush_cache(self) -> None:
        await self.http.post("/flush_cache", {})

    def without_cache(self) -> ServerBackend:
        """A twin that reuses nothing, to measure what reuse is worth."""
        return ServerBackend(self.name, api_key=self._api_key, timeout=self._timeout, cached=False)

    async def _post(self, body: Any) -> list[Any]:
        """The replies to one request, or to several that are to have nothing in common."""
        if isinstance(body, list):
            return await asyncio.gather(*(self.http.post("/generate", one) for one in body))
        reply = await self.http.post("/generate", body)
        return reply if isinstance(reply, list) else [reply]

    def _alone(self, handle: SharedTokens, ask: GenerationRequest, i: int) -> dict[str, Any]:
        """Sample ``i`` as a request of its own."""
        return {**self._prompt(handle), **wire(ask.sample(i))}

    def _prompt(self, handle: SharedTokens) -> dict[str, Any]:
        return {"input_ids": handle.tokens(), **self._salted()}

    def _salted(self) -> dict[str, Any]:
        salt = self._salt if self._cached else uuid.uuid4().hex
        return {} if salt is None else {"cache_salt": salt}


def wire(ask: GenerationRequest) -> dict[str, Any]:
    """SGLang's fields of a generation: what the program says, so that the rest is the server's to choose."""
    sampling: dict[str, Any] = {"max_new_tokens": ask.params.max_tokens}
    for name, value in ask.options.items():
        if name != "logprobs" and value is not None:
            sampling[_WIRE.get(name, name)] = value
    body: dict[str, Any] = {"sampling_params": {**sampling, **ask.constraint}}
    if ask.params.logprobs is not None:
        body |= {"return_logprob": True, "top_logprobs_num": ask.params.logprobs}
        body |= {"return_text_in_logprobs": ask.text_in_logprobs}
    return body
