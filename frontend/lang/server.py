"""A Branchwise server as a backend, the stateless way: every request carries the whole prompt, as token ids."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...runtime.sampling_params import SamplingParams
from .backend import Ask, Capabilities, Completion, OnDelta, Piece, Rope, Usage, settle
from .codec import Codec
from .errors import BackendError
from .http import Http

_WIRE = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "seed": "sampling_seed"}
_NOT_SAMPLING = {"logprobs", "prompt_logprobs", "prompt_logprob_start", "include_stop"}
_DEFAULT = SamplingParams()


class ServerBackend:
    """``tokenizer``: a folder or hub id, where the server's own is not on this machine. Without one, text is sent, and
    the server reads the whole of it anew each time."""

    def __init__(
        self,
        url: str,
        facts: Mapping[str, Any],
        *,
        api_key: str | None = None,
        tokenizer: str | Path | None = None,
        timeout: float = 600.0,
        cache_salt: str | None = None,
        cached: bool = True,
    ) -> None:
        self.name = url
        self.usage = Usage()
        self.capabilities = Capabilities(constraints=None, prefill=cached)
        self.http = Http(url, api_key, timeout, self.usage)
        self._facts = facts
        self._api_key, self._timeout = api_key, timeout
        self._tokenizer = tokenizer
        self._salt = cache_salt
        self._cached = cached
        self._found: Codec | None = None
        self._looked = False

    async def codec(self) -> Codec | None:
        if not self._looked:
            self._found = await asyncio.to_thread(find_codec, self._tokenizer, self._facts)
            self._looked = True
        return self._found

    async def create(self) -> Rope:
        return Rope()

    async def fork(self, handle: Rope, n: int) -> list[Rope]:
        return [handle.fork() for _ in range(n)]

    async def extend(self, handle: Rope, piece: Piece) -> None:
        handle.extend(piece)  # type: ignore[arg-type]

    async def generate(self, handle: Rope, ask: Ask, on_delta: OnDelta | None = None) -> list[Completion]:
        body = {**self._prompt(handle), **wire(ask)}
        self.usage.sent_tokens += await self._size(handle)
        if on_delta is not None and ask.params.n == 1:
            replies = [await self._follow({**body, "stream": True}, on_delta)]
        else:
            replies = await self._post(
                body if self._cached else [self._alone(handle, ask, i) for i in range(ask.params.n)]
            )
        tail = handle.tail()
        done = [await self.completion(reply, tail) for reply in replies]
        if ask.params.max_tokens != 0:
            await self.keep(handle, done[0])
            if on_delta is not None and ask.params.n > 1:
                on_delta(done[0].text)
        return done

    async def keep(self, handle: Rope, done: Completion) -> None:
        handle.extend(done.text if done.ids is None else done.ids)

    async def completion(self, reply: Mapping[str, Any], tail: list[int]) -> Completion:
        """What one reply means for the state."""
        try:
            text, meta = reply["text"], reply["meta_info"]
            self.usage.count(meta["prompt_tokens"], meta["cached_tokens"], meta["completion_tokens"])
            codec = await self.codec()
            finish = meta["finish_reason"] or {}
            ids = None if codec is None else settle(codec, tail, reply["output_ids"], text, finish)
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

    async def score(self, handle: Rope, continuations: Sequence[Piece]) -> list[list[tuple[int | str, float]]]:
        if await self.codec() is None:
            raise BackendError(f"select on {self.name} needs the model's tokenizer: give tokenizer=")
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

    async def close(self, handle: Rope) -> None:
        pass

    async def flush_cache(self) -> None:
        await self.http.post("/flush_cache", {})

    async def aclose(self) -> None:
        await self.http.aclose()

    def without_cache(self) -> ServerBackend:
        """A twin that reuses nothing, to measure what reuse is worth."""
        return ServerBackend(
            self.name,
            self._facts,
            api_key=self._api_key,
            tokenizer=self._tokenizer,
            timeout=self._timeout,
            cached=False,
        )

    async def _post(self, body: Any) -> list[Any]:
        """The replies to one request, or to several that are to have nothing in common."""
        if isinstance(body, list):
            return await asyncio.gather(*(self.http.post("/generate", one) for one in body))
        reply = await self.http.post("/generate", body)
        return reply if isinstance(reply, list) else [reply]

    def _alone(self, handle: Rope, ask: Ask, i: int) -> dict[str, Any]:
        """Sample ``i`` as a request of its own."""
        return {**self._prompt(handle), **wire(replace(ask, params=ask.params.sample(i)))}

    def _prompt(self, handle: Rope) -> dict[str, Any]:
        asked = {"text": handle.text()} if self._found is None else {"input_ids": handle.tokens()}
        return {**asked, **self._salted()}

    def _salted(self) -> dict[str, Any]:
        salt = self._salt if self._cached else uuid.uuid4().hex
        return {} if salt is None else {"cache_salt": salt}

    async def _size(self, handle: Rope) -> int:
        return handle.length if self._found is not None else handle.length // 4


def wire(ask: Ask) -> dict[str, Any]:
    """SGLang's fields of a generation. What has its default value is not sent."""
    sampling: dict[str, Any] = {"max_new_tokens": ask.params.max_tokens}
    for name in SamplingParams.__struct_fields__:
        value = getattr(ask.params, name)
        if name not in _NOT_SAMPLING and name not in ask.constraint and value != getattr(_DEFAULT, name):
            sampling[_WIRE.get(name, name)] = value
    body: dict[str, Any] = {"sampling_params": {**sampling, **ask.constraint}}
    if ask.params.logprobs is not None:
        body |= {"return_logprob": True, "top_logprobs_num": ask.params.logprobs}
        body |= {"return_text_in_logprobs": ask.text_in_logprobs}
    return body


def find_codec(tokenizer: str | Path | None, facts: Mapping[str, Any]) -> Codec | None:
    """The given tokenizer, else the server's own where its folder is on this machine."""
    from ...runtime.model_folder import model_folder
    from ...runtime.tokenizer import Tokenizer

    if tokenizer is not None:
        return Codec(Tokenizer.load(model_folder(str(tokenizer))))
    folder = Path(facts.get("config", {}).get("engine", {}).get("model", ""))
    return Codec(Tokenizer.load(folder)) if (folder / "tokenizer.json").is_file() else None
