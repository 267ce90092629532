"""A Branchwise server as a stateless backend: every request carries its whole prompt, as token ids."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..client import TIMEOUT, AsyncClient
from ..errors import BackendError
from ..loop import Once
from .backend import Capabilities, GenerationRequest, OnDelta, TokenScores
from .codec import Codec
from .token_backend import SampleReply, TokenBackend

if TYPE_CHECKING:
    from ...runtime.step import Int32

RETRY_SECONDS = 60.0  # how long a request is repeated while the server is too busy to take it
_WIRE = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "seed": "sampling_seed"}


class ServerBackend(TokenBackend):
    """See `TokenBackend`. ``timeout``: seconds without a byte from the server."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float = TIMEOUT,
        cache_salt: str | None = None,
        cached: bool = True,
    ) -> None:
        super().__init__(url, Capabilities(constraints=None, prefill=cached), cache_salt=cache_salt, cached=cached)
        self.http = AsyncClient(url, api_key, timeout=timeout, retry_seconds=RETRY_SECONDS, traffic=self.usage)
        self._api_key, self._timeout = api_key, timeout
        self._codec = Once(self._fetch_codec)

    async def codec(self) -> Codec:
        """The server's own tokenizer, fetched once."""
        return await self._codec.get()

    async def _fetch_codec(self) -> Codec:
        from ...runtime.tokenizer.tokenizer import Tokenizer

        dump = await self.http.get("/tokenizer")
        return Codec(await asyncio.to_thread(Tokenizer.of_dump, dump))

    async def flush_cache(self) -> None:
        await self.http.post("/flush_cache", {})

    def without_cache(self) -> ServerBackend:
        """A backend of the same server that reuses nothing, for comparison."""
        return ServerBackend(self.name, api_key=self._api_key, timeout=self._timeout, cached=False)

    async def _complete(
        self, prompt: Int32, request: GenerationRequest, salt: str | None, on_delta: OnDelta | None
    ) -> list[SampleReply]:
        body = {"input_ids": prompt.tolist(), **_salted(salt), **wire(request)}
        return await self._replies("/generate", body, on_delta)

    async def _replies(self, path: str, body: Mapping[str, Any], on_delta: OnDelta | None) -> list[SampleReply]:
        """One reply a sample. With ``on_delta`` the one reply is streamed."""
        if on_delta is None:
            found = await self.http.post(path, body)
        else:
            shown, found = 0, {}
            async for found in self.http.events(path, {**body, "stream": True}):  # each holds everything so far
                on_delta(found["text"][shown:])
                shown = len(found["text"])
        try:
            replies = found if isinstance(found, list) else [found]
            return [SampleReply(one["text"], one["output_ids"], one["meta_info"]) for one in replies]
        except (KeyError, TypeError) as error:
            raise BackendError(f"{self.name} answered in another form; is it a Branchwise server?") from error

    async def _score(self, prompts: list[Int32], start: int, salt: str | None) -> list[tuple[int, TokenScores]]:
        body = {
            "input_ids": [prompt.tolist() for prompt in prompts],
            "sampling_params": {"max_new_tokens": 0},
            "return_logprob": True,
            "logprob_start_len": start,
            **_salted(salt),
        }
        metas = [reply["meta_info"] for reply in await self.http.post("/generate", body)]
        return [
            (meta["cached_tokens"], [(id, value) for value, id, _ in meta["input_token_logprobs"]]) for meta in metas
        ]


def wire(request: GenerationRequest) -> dict[str, Any]:
    """A generation in SGLang's fields: only what the program sets, so that the server chooses the rest."""
    sampling: dict[str, Any] = {"max_new_tokens": request.params.max_tokens}
    for name, value in request.options.items():
        if name != "logprobs" and value is not None:
            sampling[_WIRE.get(name, name)] = value
    body: dict[str, Any] = {"sampling_params": {**sampling, **request.constraint}}
    if request.params.logprobs is not None:
        body |= {"return_logprob": True, "top_logprobs_num": request.params.logprobs}
        body |= {"return_text_in_logprobs": request.text_in_logprobs}
    return body


def _salted(salt: str | None) -> dict[str, Any]:
    return {} if salt is None else {"cache_salt": salt}
