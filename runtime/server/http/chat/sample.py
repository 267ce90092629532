"""One sample of a chat, read from its deltas into blocks."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from ....chat.blocks import Block, BlockEvent, BlockReader
from ....chat.tools.events import ArgumentsDelta, CallEnd, CallStart, ContentDelta, Event, ReasoningDelta
from ....chat.tools.parser import StreamParser
from ....logprobs import TokenLogprob
from ....messages import Delta
from ....outputs import Output
from ....sampling_params import SamplingParams
from ....tokenizer.tokenizer import Tokenizer
from .places import TokenPlaces

_CUT_OFF = ("length", "abort")  # finish reasons that end a block before the model did


class Sample:
    """``parser`` splits the text; None: all of it is content. ``one_call``: calls after the first are left out."""

    def __init__(
        self, tokenizer: Tokenizer, params: SamplingParams, parser: StreamParser | None, *, one_call: bool
    ) -> None:
        self.output = Output()
        self.params = params
        self.reasoning_tokens = 0  # of thinking, without the markers around it
        self._parser = parser
        self._one_call = one_call
        self._reader = BlockReader()
        self._places: TokenPlaces | None = None
        if parser is not None or params.logprobs is not None:
            self._places = TokenPlaces(tokenizer, skip_special_tokens=params.skip_special_tokens)
        self._unplaced: deque[TokenLogprob] = deque()
        self._reported = 0  # logprobs that `new_logprobs` has returned

    @property
    def blocks(self) -> Sequence[Block]:
        return self._reader.blocks

    @property
    def finish_reason(self) -> str | None:
        """The engine's, or ``tool_calls`` for an answer with calls that did not end inside one, as at a stop string."""
        reason = self.output.finish_reason
        if reason != "stop" or not any(block.kind == "call" for block in self.blocks):
            return reason
        last = self.blocks[-1]
        return "tool_calls" if last.kind != "call" or last.complete else "stop"

    def feed(self, delta: Delta) -> list[BlockEvent]:
        """Adds ``delta`` to the blocks; returns the changes."""
        before = len(self.output.token_ids)
        self.output.feed(delta)
        events: list[Event]
        if self._parser is not None:
            events = self._parser.feed(delta.text)
            if delta.finish is not None:
                events += self._parser.finish()
        else:
            events = [ContentDelta(delta.text)] if delta.text else []
        if self._places is not None:
            self._places.add(self.output.token_ids[before:])
            if self.params.logprobs is not None:
                self._unplaced.extend(self.output.logprobs[before : self._shown_logprobs()])
        for event in events:
            logprobs = self._place(event) if self._places is not None else ()
            if not (self._one_call and isinstance(event, (CallStart, ArgumentsDelta, CallEnd)) and event.index):
                self._reader.read(event, logprobs)
        if delta.finish is not None:
            self._reader.finish(delta.finish.reason not in _CUT_OFF, list(self._unplaced))
        return self._reader.take()

    def break_off(self) -> None:
        """The request failed midway: the open block stays as far as it came."""
        self._reader.finish(False)

    def new_logprobs(self) -> Sequence[TokenLogprob]:
        """The logprobs of the tokens since the last call, in any block."""
        end = self._shown_logprobs()
        new, self._reported = self.output.logprobs[self._reported : end], max(end, self._reported)
        return new

    def _place(self, event: Event) -> list[TokenLogprob]:
        """Counts the tokens that begin in the event's source, and takes their logprobs."""
        assert self._places is not None
        count = self._places.through(event.source)
        if isinstance(event, ReasoningDelta):
            self.reasoning_tokens += count
        return [self._unplaced.popleft() for _ in range(min(count, len(self._unplaced)))]

    def _shown_logprobs(self) -> int:
        """How many there are to report: a stop token that is not in the text has none."""
        hidden = isinstance(self.output.matched, int) and not self.params.include_stop
        return len(self.output.logprobs) - hidden
