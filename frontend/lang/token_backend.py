"""The base of backends that take and return token ids: prompts, usage, and where a generated text ends in tokens."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .backend import Capabilities, Completion, GenerationRequest, OnDelta, Piece, TokenScores, Usage
from .codec import TAIL, Codec, Run

if TYPE_CHECKING:
    from ...runtime.step import Int32
    from .handles import Prompt


@dataclass
class SampleReply:
    """One sample as the engine or server returned it: ``ids`` include a stop token, ``meta`` is SGLang's
    ``meta_info``."""

    text: str
    ids: list[int]
    meta: dict[str, Any]


class TokenBackend:
    """Base class. Subclasses implement `codec`, `flush_cache`, `_complete` and `_score`.

    ``cached=False``: no request reuses another's prefix, for comparison: each gets a cache salt of its own.
    """

    def __init__(self, name: str, capabilities: Capabilities, *, cache_salt: str | None, cached: bool) -> None:
        self.name = name
        self.capabilities = capabilities
        self.usage = Usage()
        self._cache_salt = cache_salt
        self._cached = cached

    async def codec(self) -> Codec:
        raise NotImplementedError

    async def flush_cache(self) -> None:
        raise NotImplementedError

    async def _complete(
        self, prompt: Int32, request: GenerationRequest, salt: str | None, on_delta: OnDelta | None
    ) -> list[SampleReply]:
        """All samples after ``prompt``, int32 [length]. ``on_delta`` only with one sample."""
        raise NotImplementedError

    async def _score(self, prompts: list[Int32], start: int, salt: str | None) -> list[tuple[int, TokenScores]]:
        """For each prompt, the number of cached tokens and the scores of its tokens from ``start`` on."""
        raise NotImplementedError

    async def create(self) -> Any:
        from .handles import Prompt  # numpy takes 0.2 s to import: not before the first request

        return Prompt()

    async def fork(self, handle: Any, n: int) -> list[Any]:
        return [handle.fork() for _ in range(n)]

    async def extend(self, handle: Any, piece: Piece) -> None:
        handle.extend(token_ids(piece))

    async def close(self, handle: Any) -> None:
        pass

    async def generate(
        self, handle: Any, request: GenerationRequest, on_delta: OnDelta | None = None
    ) -> list[Completion]:
        prompt, samples = handle.array(), request.params.n
        if self._cached or samples == 1:
            self.usage.sent_tokens += len(prompt)
            replies = await self._complete(prompt, request, self._salt(), on_delta if samples == 1 else None)
        else:
            self.usage.sent_tokens += samples * len(prompt)
            alone = (self._complete(prompt, request.sample(i), self._salt(), None) for i in range(samples))
            replies = [reply for (reply,) in await asyncio.gather(*alone)]
        return await self._append(handle, request, replies, on_delta)

    async def score(self, handle: Any, continuations: Sequence[Piece]) -> list[TokenScores]:
        start = handle.length
        prompts = [handle.array(token_ids(piece)) for piece in continuations]
        self.usage.sent_tokens += sum(map(len, prompts))
        if self._cached:
            scored = await self._score(prompts, start, self._salt())
        else:
            alone = (self._score([prompt], start, self._salt()) for prompt in prompts)
            scored = [one for (one,) in await asyncio.gather(*alone)]
        for prompt, (cached, _) in zip(prompts, scored, strict=True):
            self.usage.count(len(prompt), cached, 0)
        return [scores for _, scores in scored]

    async def _append(
        self, handle: Prompt, request: GenerationRequest, replies: list[SampleReply], on_delta: OnDelta | None
    ) -> list[Completion]:
        """Counts the replies and appends the first one's tokens to the handle."""
        codec, completions = await self.codec(), []
        for reply in replies:
            meta = reply.meta
            self.usage.count(meta["prompt_tokens"], meta["cached_tokens"], meta["completion_tokens"])
            completions.append(Completion(reply.text, meta, self._kept_ids(codec, handle, reply)))
        if request.params.max_tokens != 0:
            handle.extend(completions[0].ids or [])
            if on_delta is not None and len(completions) > 1:
                on_delta(completions[0].text)
        return completions

    def _kept_ids(self, codec: Codec, handle: Prompt, reply: SampleReply) -> list[int]:
        """The tokens of ``reply.text`` after the handle's: without a stop token, cut where a stop string cut the
        text."""
        ids, finish = reply.ids, reply.meta["finish_reason"] or {}
        matched = finish.get("matched") if finish.get("type") == "stop" else None
        if isinstance(matched, str):
            kept, rest = codec.kept(ids, reply.text, handle.tokens.last(TAIL).tolist())
            return kept + codec.encode([Run(rest)])
        return ids[:-1] if ids and ids[-1] == matched else ids

    def _salt(self) -> str | None:
        return self._cache_salt if self._cached else uuid.uuid4().hex


def token_ids(piece: Piece) -> list[int]:
    if not isinstance(piece, list):
        raise TypeError(f"this backend takes token ids, got {type(piece).__name__}")
    return piece
