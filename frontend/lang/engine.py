"""An `Engine` in this process as a backend: token ids in and out, no sockets."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

from ...runtime.errors import BranchwiseError, InvalidRequest
from ...runtime.sampling_params import SamplingParams
from ..errors import BackendError
from .backend import Capabilities, GenerationRequest, OnDelta, TokenScores
from .codec import Codec
from .token_backend import SampleReply, TokenBackend

if TYPE_CHECKING:
    from ...runtime.engine.base import EngineBase
    from ...runtime.outputs import Output
    from ...runtime.step import Int32

CONSTRAINTS = frozenset({"regex", "json_schema"}) & set(SamplingParams.__struct_fields__)


class EngineBackend(TokenBackend):
    """See `TokenBackend`."""

    def __init__(self, engine: EngineBase, *, cache_salt: str = "", cached: bool = True) -> None:
        capabilities = Capabilities(constraints=CONSTRAINTS, prefill=cached)
        super().__init__("the engine in this process", capabilities, cache_salt=cache_salt, cached=cached)
        self._engine = engine
        self._codec: Codec | None = None

    async def codec(self) -> Codec:
        if self._codec is None:
            self._codec = Codec(self._engine.tokenizer)
        return self._codec

    async def flush_cache(self) -> None:
        self._engine.flush_cache()

    def without_cache(self) -> EngineBackend:
        """A backend of the same engine that reuses nothing, for comparison."""
        return EngineBackend(self._engine, cached=False)

    async def _complete(
        self, prompt: Int32, request: GenerationRequest, salt: str | None, on_delta: OnDelta | None
    ) -> list[SampleReply]:
        params = self._engine.default_params(**request.options, **request.constraint)
        ids = array("i", prompt.tobytes())
        self.usage.requests += 1
        samples: list[Output] = []
        try:
            if on_delta is None:
                samples = (await self._engine.agenerate(ids, params, cache_salt=salt or "")).outputs
            else:
                async for chunk in self._engine.astream(ids, params, cache_salt=salt or ""):
                    samples = [chunk.output]
                    if chunk.text:
                        on_delta(chunk.text)
        except BranchwiseError as error:
            raise _backend_error(error) from error
        codec = await self.codec() if request.text_in_logprobs else None
        return [SampleReply(one.text, one.token_ids, _meta(one, len(ids), params, codec)) for one in samples]

    async def _score(self, prompts: list[Int32], start: int, salt: str | None) -> list[tuple[int, TokenScores]]:
        params = SamplingParams(max_tokens=0, prompt_logprobs=0, prompt_logprob_start=start)
        ids = [array("i", prompt.tobytes()) for prompt in prompts]
        self.usage.requests += len(ids)
        try:
            outputs = await self._engine.agenerate(ids, params, cache_salt=salt or "")
        except BranchwiseError as error:
            raise _backend_error(error) from error
        return [
            (output.cached_tokens, [(one[i], output.prompt_logprobs[i].logprob) for i in range(start, len(one))])
            for one, output in zip(ids, outputs, strict=True)
        ]


def _backend_error(error: BranchwiseError) -> BackendError:
    return BackendError(str(error), status=error.status if isinstance(error, InvalidRequest) else 0)


def _meta(sample: Output, prompt_tokens: int, params: SamplingParams, codec: Codec | None) -> dict[str, Any]:
    """The sample's facts in the form of the server's ``meta_info``."""
    count, cache = len(sample.token_ids), sample.cache
    finish: dict[str, Any] = {"type": sample.finish_reason}
    if sample.finish_reason == "stop":
        finish["matched"] = sample.matched
    elif sample.finish_reason == "length":
        finish["length"] = count
    meta: dict[str, Any] = {
        "finish_reason": finish,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": count,
        "cached_tokens": 0 if cache is None else cache.hit_tokens,
    }
    if cache is not None:
        meta["cache"] = {"hit_tokens": cache.hit_tokens, "reason": cache.reason, **cache.tiers()}
        if cache.diverged_at is not None:
            meta["cache"]["diverged_at"] = cache.diverged_at
    if params.logprobs is not None:

        def entry(value: float, id: int) -> list[Any]:
            return [value, id, None if codec is None else codec.tokenizer.token_text(id)]

        meta["output_token_logprobs"] = [entry(row.logprob, row.token) for row in sample.logprobs]
        if params.logprobs:
            meta["output_top_logprobs"] = [[entry(value, id) for id, value in row.top] for row in sample.logprobs]
    return meta
