"""The outputs of prompts in process: collected from deltas, in chunks or as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..errors import BranchwiseError, EngineDead, Overloaded
from ..logprobs import TokenLogprob
from ..messages import BranchRun, CacheReport, Delta, Finished, Generate
from ..outputs import Output


@dataclass(slots=True)
class RequestOutput:
    """All samples of one prompt. The properties are those of the first sample."""

    outputs: list[Output]

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        return self.outputs[0].finish_reason

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """One for each generated token, if ``params.logprobs`` is set."""
        return self.outputs[0].logprobs

    @property
    def prompt_logprobs(self) -> dict[int, TokenLogprob]:
        """By position, from 1 (or ``prompt_logprob_start``) on, if ``params.prompt_logprobs`` is set."""
        return self.outputs[0].prompt_logprobs

    @property
    def prompt_tokens(self) -> int:
        return self.outputs[0].prompt_tokens

    @property
    def cached_tokens(self) -> int:
        return self.outputs[0].cached_tokens

    @property
    def cache(self) -> CacheReport | None:
        """How much of the prompt was cached, and why not more."""
        return self.outputs[0].cache


@dataclass(slots=True, frozen=True)
class StreamChunk:
    """The new part of one sample. ``finish_reason`` is set in its last chunk."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    cache: CacheReport | None = None
    matched: int | str | None = None  # the stop token id or stop string that ended it
    logprobs: Sequence[TokenLogprob] = ()
    output: Output = field(default_factory=Output)  # the sample so far


class Collector:
    """The samples of prompts while they arrive."""

    def __init__(self, messages: Sequence[Generate | BranchRun]) -> None:
        self._ids = [message.ids for message in messages]
        self._outputs = {id: Output(i) for ids in self._ids for i, id in enumerate(ids)}

    @property
    def results(self) -> list[RequestOutput]:
        return [RequestOutput([self._outputs[id] for id in ids]) for ids in self._ids]

    def feed(self, delta: Delta) -> StreamChunk:
        """Raises the request's error, if that is how it ended."""
        output = self._outputs[delta.id]
        known, known_logprobs = len(output.token_ids), len(output.logprobs)
        output.feed(delta)
        if delta.finish is not None and delta.finish.reason == "error":
            raise error_of(delta.finish)
        return StreamChunk(
            output.index,
            delta.text,
            output.token_ids[known:],
            output.finish_reason,
            delta.cache,
            output.matched,
            output.logprobs[known_logprobs:],
            output,
        )


def error_of(finish: Finished) -> BranchwiseError:
    if finish.error is None:
        return EngineDead("the request failed")
    error = finish.error.error()
    if error.status == 503:
        return Overloaded(error.message)
    return error if 400 <= error.status < 500 else EngineDead(error.message)
