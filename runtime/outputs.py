"""The output of one engine request, accumulated from its deltas."""

from __future__ import annotations

from dataclasses import dataclass, field

from .logprobs import TokenLogprob, unpack
from .messages import CacheReport, Delta, Finished, Settled


@dataclass(slots=True)
class Output:
    """One sample of one prompt. `feed` it every delta of its engine request, in order."""

    index: int = 0  # which of the prompt's samples
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)  # one for each generated token
    prompt: list[int] = field(default_factory=list)  # set if the request needs the prompt or its logprobs
    prompt_logprobs: dict[int, TokenLogprob] = field(default_factory=dict)  # by position; position 0 has none
    prompt_tokens: int = 0
    cache: CacheReport | None = None
    finish: Finished | None = None
    matched: int | str | None = None  # the stop token id or stop string
    settled: Settled | None = None  # of a request on a branch: how much of the output it keeps

    def feed(self, delta: Delta) -> None:
        self.text += delta.text
        if delta.tokens:
            tokens = memoryview(delta.tokens).cast("i").tolist()
            self.token_ids += tokens
            if delta.logprobs is not None:
                for token, rows in zip(tokens, delta.logprobs, strict=False):
                    self.logprobs += unpack([token], rows)
        if delta.prompt is not None:
            self.prompt = memoryview(delta.prompt).cast("i").tolist()
        for piece in delta.prompt_logprobs or ():
            count = len(piece.rows.chosen) // 4
            described = unpack(self.prompt[piece.start : piece.start + count], piece.rows)
            self.prompt_logprobs.update(enumerate(described, piece.start))
        self.prompt_tokens = delta.prompt_tokens or self.prompt_tokens
        self.cache = delta.cache or self.cache
        if delta.finish is not None:
            self.finish = delta.finish
            self.settled = delta.settled
            self.prompt_tokens = delta.finish.prompt_tokens or self.prompt_tokens
            self.cache = delta.finish.cache or self.cache
            self.matched = delta.matched_stop if delta.matched_stop is not None else delta.finish.matched

    @property
    def finish_reason(self) -> str | None:
        """stop | length | abort | error, or None while it runs."""
        return None if self.finish is None else self.finish.reason

    @property
    def completion_tokens(self) -> int:
        return len(self.token_ids) if self.finish is None else self.finish.completion_tokens

    @property
    def cached_tokens(self) -> int:
        return 0 if self.cache is None else self.cache.hit_tokens
