"""An `Engine` in this process as a backend: no sockets, token ids in and out."""

from __future__ import annotations

import asyncio
import uuid
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ...runtime.errors import BranchwiseError, InvalidRequest
from ...runtime.sampling_params import SamplingParams
from .backend import Capabilities, Completion, GenerationRequest, OnDelta, Piece, SharedTokens, Usage, settle
from .codec import Codec
from .errors import BackendError

if TYPE_CHECKING:
    from ...runtime.engine.base import EngineBase
    from ...runtime.engine.request_output import RequestOutput, StreamChunk
    from ...runtime.logprobs import TokenLogprob
    from ...runtime.messages import CacheReport

CONSTRAINTS = frozenset({"regex", "json_schema"}) & set(SamplingParams.__struct_fields__)


class _Sample(Protocol):
    """What there is to know of one answer."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob]
    cache: CacheReport | None
    matched: int | str | None

    @property
    def finish_reason(self) -> str | None: ...


class _Streamed:
    """The chunks of a stream, put together."""

    def __init__(self) -> None:
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.cache: CacheReport | None = None
        self.matched: int | str | None = None
        self.finish_reason: str | None = None

    def feed(self, chunk: StreamChunk) -> None:
        self.text += chunk.text
        self.token_ids += chunk.token_ids
        self.logprobs += chunk.logprobs
        self.cache = chunk.cache or self.cache
        self.matched, self.finish_reason = chunk.matched, chunk.finish_reason


class EngineBackend:
    """``cached=False``: nothing is reused from one request to the next (each gets a salt of its own), to compare."""

    def __init__(self, engine: EngineBase, *, cache_salt: str = "", cached: bool = True) -> None:
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

    async def create(self) -> SharedTokens:
        return SharedTokens()

    async def fork(self, handle: SharedTokens, n: int) -> list[SharedTokens]:
        return [handle.fork() for _ in range(n)]

    async def extend(self, handle: SharedTokens, piece: Piece) -> None:
        handle.extend(_ids(piece))

    async def generate(
        self, handle: SharedTokens, ask: GenerationRequest, on_delta: OnDelta | None = None
    ) -> list[Completion]:
        params = self._engine.default_params(**ask.options, **ask.constraint)
        prompt = array("i", handle.tokens())  # it is kept until the answer is there: four bytes a token, not eight
        self._sent(prompt)
        try:
            if on_delta is not None and params.n == 1:
                found: Sequence[_Sample] = [await self._stream(prompt, params, on_delta)]
            elif self._cached:
                request = await self._engine.agenerate(prompt, params, cache_salt=self._salt)
                found = request.outputs
            else:
                alone = await self._apart([prompt] * params.n, [params.sample(i) for i in range(params.n)])
                found = [one.outputs[0] for one in alone]
        except BranchwiseError as error:
            raise _refused(error) from error
        codec, tail = await self.codec(), handle.tail()
        done = []
        for one in found:
            cached = 0 if one.cache is None else one.cache.hit_tokens
            self.usage.count(len(prompt), cached, len(one.token_ids))
            meta = _meta(one, len(prompt), params, codec if ask.text_in_logprobs else None)
            done.append(Completion(one.text, meta, settle(codec, tail, one.token_ids, one.text, meta["finish_reason"])))
        if params.max_tokens != 0:
            handle.extend(done[0].ids or [])
            if on_delta is not None and params.n > 1:
                on_delta(done[0].text)
        return done

    async def _stream(self, prompt: Sequence[int], params: SamplingParams, on_delta: OnDelta) -> _Sample:
        whole = _Streamed()
        salt = self._salt if self._cached else _nobodys()
        async for chunk in self._engine.astream(prompt, params, cache_salt=salt):
            whole.feed(chunk)
            if chunk.text:
                on_delta(chunk.text)
        return whole

    async def score(self, handle: SharedTokens, continuations: Sequence[Piece]) -> list[list[tuple[int | str, float]]]:
        prompt = handle.tokens()
        params = SamplingParams(max_tokens=0, prompt_logprobs=0, prompt_logprob_start=len(prompt))
        wholes = [[*prompt, *_ids(piece)] for piece in continuations]
        for whole in wholes:
            self._sent(whole)
        try:
            if self._cached:
                found = await self._engine.agenerate(wholes, params, cache_salt=self._salt)
            else:
                found = await self._apart(wholes, [params] * len(wholes))
        except BranchwiseError as error:
            raise _refused(error) from error
        rows: list[list[tuple[int | str, float]]] = []
        for whole, one in zip(wholes, found, strict=True):
            self.usage.count(one.prompt_tokens, one.cached_tokens, 0)
            rows.append([(whole[i], one.prompt_logprobs[i].logprob) for i in range(len(prompt), len(whole))])
        return rows

    async def close(self, handle: SharedTokens) -> None:
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


def _meta(one: _Sample, prompt_tokens: int, params: SamplingParams, codec: Codec | None) -> dict[str, Any]:
    """As the server's ``meta_info``."""
    count, cache = len(one.token_ids), one.cache
    finish: dict[str, Any] = {"type": one.finish_reason}
    if one.finish_reason == "stop":
        finish["matched"] = one.matched
    elif one.finish_reason == "length":
        finish["length"] = count
    meta: dict[str, Any] = {
        "finish_reason": finish,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": count,
        "cached_tokens": 0 if cache is None else cache.hit_tokens,
    }
    if cache is not None:
        meta["cache"] = {"hit_tokens": cache.hit_tokens, "reason": cache.reason}
        if cache.diverged_at is not None:
            meta["cache"]["diverged_at"] = cache.diverged_at
    if params.logprobs is not None:

        def entry(value: float, id: int) -> list[Any]:
            return [value, id, None if codec is None else codec.tokenizer.token_text(id)]

        meta["output_token_logprobs"] = [entry(row.logprob, row.token) for row in one.logprobs]
        if params.logprobs:
            meta["output_top_logprobs"] = [[entry(value, id) for id, value in row.top] for row in one.logprobs]
    return meta
