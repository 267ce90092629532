"""OpenAI's responses with choices: whole, or in chunks, each with the new part of one choice."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from ....messages import Delta
from ....outputs import Output
from ..engine_client import Batch
from ..fields.parse import StreamOptions
from ..fields.usage import usage
from ..plumbing.sse import DONE, error_event, event


class Choice(Protocol):
    """One sample."""

    @property
    def output(self) -> Output: ...

    def feed(self, delta: Delta) -> None: ...

    def whole(self, index: int) -> dict[str, Any]: ...

    def pieces(self, index: int) -> Iterable[dict[str, Any]]:
        """The parts that have not been sent, each the choice of a chunk."""
        ...


class Choices:
    """``n`` samples of each prompt in a row; ``head``: what whole answers and chunks begin with."""

    def __init__(self, head: dict[str, Any], choices: Sequence[Choice], n: int, options: StreamOptions | None) -> None:
        self._head = head
        self._choices = choices
        self._n = n
        self._include_usage = options is not None and bool(options.include_usage)
        self._running_usage = self._include_usage and options is not None and bool(options.continuous_usage_stats)

    def whole(self, batch: Batch) -> dict[str, Any]:
        for index, delta in batch:
            self._choices[index].feed(delta)
        choices = [choice.whole(index) for index, choice in enumerate(self._choices)]
        return {**self._head, "choices": choices, "usage": self._usage()}

    def events(self, batch: Batch) -> Iterable[bytes]:
        for index, delta in batch:
            self._choices[index].feed(delta)
        running = self._usage() if self._running_usage else None  # once: it looks at every choice
        for index in sorted({index for index, _ in batch}) if len(batch) > 1 else (batch[0][0],):
            for piece in self._choices[index].pieces(index):
                chunk = self._chunk(piece)
                if self._include_usage:
                    chunk["usage"] = running
                yield event(chunk)

    def _chunk(self, piece: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "choices": [piece]}

    def end(self) -> Iterable[bytes]:
        if self._include_usage:
            yield event({**self._head, "choices": [], "usage": self._usage()})
        yield DONE

    def fail(self, error: Exception) -> bytes:
        return error_event(error)

    def _usage(self) -> dict[str, Any]:
        return usage([choice.output for choice in self._choices], self._n)
