"""An `Engine` in this process as a backend: no sockets, token ids in and out."""

from __future__ import annotations

import asyncio
import uuid
from array import array
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from ...runtime.errors import BranchwiseError, InvalidRequest
from ...runtime.sampling_params import SamplingParams
from .backend import Ask, Capabilities, Completion, OnDelta, Piece, Rope, Usage, settle
from .codec import Codec
from .errors import BackendError

if TYPE_CHECKING:
    from ...runtime.engine import Engine, RequestOutput
    from ...runtime.outputs import Output

CONSTRAINTS = frozenset({"regex", "json_schema"}) & set(SamplingParams.__struct_fields__)


class EngineBackend:
    """``cached=False``: nothing is reused from one request to the next (each gets a salt of its own), to compare."""

    def __init__(self, engine: Engine, *, cache_salt: str = "", cached: bool = True) -> None:
        self.name = "the engine in this process"
        self.usage = Usage()
        self.capabilities = Capabilities(constraints=CONSTRAINTS, prefill=cached)
        self._engine = engine
        self._salt = cache_salt
        self._cached = cached
        self._codec: Codec | None = None

    async def codec(self) -> Codec:
        if self._codec is None:
            self._codec = Codec(self._engine.tokenizer)
        return self._codec

    async def create(self) -> Rope:
        return Rope()

    async def fork(self, handle: Rope, n: int) -> list[Rope]:
        return [handle.fork() for _ in range(n)]

    async def extend(self, handle: Rope, piece: Piece) -> None:
        handle.extend(_ids(piece))

    async def generate(self, handle: Rope, ask: Ask, on_delta: OnDelta | None = None) -> list[Completion]:
        params = msgspec.structs.replace(ask.params, **ask.constraint) if ask.constraint else ask.params
        prompt = array("i", handle.tokens())  # it is kept until the answer is there: four bytes a token, not eight
        self._sent(prompt)
        try:
            if on_delta is not None and params.n == 1 and params.logprobs is None:
                return [await self._stream(handle, prompt, params, on_delta)]
            if self._cached:
                found: list[RequestOutput] = [await self._engine.agenerate(prompt, params, cache_salt=self._salt)]
            else:
                found = await self._apart([prompt] * params.n, [params.sample(i) for i in range(params.n)])
        except BranchwiseError as error:
            raise _refused(error) from error
        codec, tail = await self.codec(), handle.tail()
        done = []
        for one in (output for part in found for output in part.outputs):
            self.usage.count(one.prompt_tokens, one.cached_tokens, one.completion_tokens)
            meta = _meta(one, params, codec if ask.text_in_logprobs else None)
            done.append(Completion(one.text, meta, settle(codec, tail, one.token_ids, one.text, meta["finish_reason"])))
        if params.max_tokens != 0:
            handle.extend(done[0].ids or [])
            if on_delta is not None:
                on_delta(done[0].text)
        return done

    async def _stream(
        self, handle: Rope, prompt: Sequence[int], params: SamplingParams, on_delta: OnDelta
    ) -> Completion:
        ids: list[int] = []
        text, reason, cache = "", None, None
        async for chunk in self._engine.astream(prompt, params, cache_salt=self._salt if self._cached else _nobodys()):
            ids += chunk.token_ids
            text += chunk.text
            reason, cache = chunk.finish_reason or reason, chunk.cache or cache
            if chunk.text:
                on_delta(chunk.text)
        codec = await self.codec()
        finish = _finish(reason, _matched(ids, text, params, codec) if reason == "stop" else None, len(ids))
        kept = settle(codec, handle.tail(), ids, text, finish)
        handle.extend(kept)
        hit = 0 if cache is None else cache.hit_tokens
        self.usage.count(len(prompt), hit, len(ids))
        return Completion(text, _counts(finish, len(prompt), len(ids), cache), kept)

    async def score(self, handle: Rope, continuations: Sequence[Piece]) -> list[list[tuple[int | str, float]]]:
        prompt = handle.tokens()
        params = SamplingParams(max_tokens=0, prompt_logprobs=0, prompt_logprob_start=len(prompt))
        wholes = [[*prompt, *_ids(piece)] for piece in continuations]
        for whole in wholes:
            self._sent(whole)
        try:
            if self._cached:
                found: list[RequestOutput] = await self._engine.agenerate(wholes, params, cache_salt=self._salt)
            else:
                found = await self._apart(wholes, [params] * len(wholes))
        except BranchwiseError as error:
            raise _refused(error) from error
        rows: list[list[tuple[int | str, float]]] = []
        for whole, one in zip(wholes, found, strict=True):
            self.usage.count(one.prompt_tokens, one.cached_tokens, 0)
            rows.append([(whole[i], one.prompt_logprobs[i].logprob) for i in range(len(prompt), len(whole))])
        return rows

    async def close(self, handle: Rope) -> None:
        pass

    async def flush_cache(self) -> None:
        self._engine.flush_cache()

    def without_cache(self) -> EngineBackend:
        """A twin that reuses nothing, to measure what reuse is worth."""
        return EngineBackend(self._engine, cached=False)

    def _sent(self, prompt: Sequence[int]) -> None:
        self.usage.requests += 1
        self.usage.sent_tokens += len(prompt)

    async def _apart(self, prompts: Sequence[Any], params: Sequence[SamplingParams]) -> list[RequestOutput]:
        """Each prompt by itself, in a namespace of its own."""
        each = zip(prompts, params, strict=True)
        return await asyncio.gather(*(self._engine.agenerate(a, b, cache_salt=_nobodys()) for a, b in each))


def _nobodys() -> str:
    """A salt that nobody else has."""
    return uuid.uuid4().hex


def _ids(piece: Piece) -> list[int]:
    if not isinstance(piece, list):
        raise TypeError(f"an engine takes token ids, got {type(piece).__name__}")
    return piece


def _refused(error: BranchwiseError) -> BackendError:
    return BackendError(str(error), status=error.status if isinstance(error, InvalidRequest) else 0)


def _matched(ids: list[int], text: str, params: SamplingParams, codec: Codec) -> int | str | None:
    """What ended a streamed answer: chunks do not say."""
    if ids and (ids[-1] in params.stop_token_ids or ids[-1] in codec.tokenizer.special_ids):
        return ids[-1]
    read = codec.text_of(ids)
    return next((stop for stop in params.stop if text + stop in read), params.stop[0] if params.stop else None)


def _finish(reason: str | None, matched: int | str | None, count: int) -> dict[str, Any]:
    if reason == "stop":
        return {"type": "stop", "matched": matched}
    return {"type": "length", "length": count} if reason == "length" else {"type": reason}


def _counts(finish: Mapping[str, Any], prompt: int, completion: int, cache: Any) -> dict[str, Any]:
    meta: dict[str, Any] = {
        "finish_reason": dict(finish),
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "cached_tokens": 0 if cache is None else cache.hit_tokens,
    }
    if cache is not None:
        meta["cache"] = {"hit_tokens": cache.hit_tokens, "reason": cache.reason}
        if cache.diverged_at is not None:
            meta["cache"]["diverged_at"] = cache.diverged_at
    return meta


def _meta(one: Output, params: SamplingParams, codec: Codec | None) -> dict[str, Any]:
    """As the server's ``meta_info``."""
    finish = _finish(one.finish_reason, one.matched, one.completion_tokens)
    meta = _counts(finish, one.prompt_tokens, one.completion_tokens, one.cache)
    if params.logprobs is not None:

        def entry(value: float, id: int) -> list[Any]:
            return [value, id, None if codec is None else codec.tokenizer.token_text(id)]

        meta["output_token_logprobs"] = [entry(row.logprob, row.token) for row in one.logprobs]
        if params.logprobs:
            meta["output_top_logprobs"] = [[entry(value, id) for id, value in row.top] for row in one.logprobs]
    return meta
