"""One sample of a chat: from its deltas to ``message``, or to the pieces of it a stream sends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .....chat.tools import (
    ArgumentsDelta,
    CallEnd,
    CallStart,
    ContentDelta,
    Event,
    Markup,
    Parsed,
    ReasoningDelta,
    StreamParser,
    assemble,
)
from .....logprobs import TokenLogprob
from .....messages import Delta
from .....outputs import Output
from .....sampling_params import SamplingParams
from .....tokenizer.tokenizer import Tokenizer
from .places import TokenPlaces

LEAST_LOGPROB = -9999.0  # JSON has no -inf


class Choice:
    """What has come of one sample. ``parser`` splits its text; None: all of it is content.

    ``one_call``: calls after the first are left out.
    """

    def __init__(
        self, tokenizer: Tokenizer, params: SamplingParams, parser: StreamParser | None, *, one_call: bool
    ) -> None:
        self.output = Output()
        self.reasoning_tokens = 0  # of thinking, without the markers around it
        self._tokenizer = tokenizer
        self._params = params
        self._parser = parser
        self._one_call = one_call
        self._places = None
        if parser is not None:
            self._places = TokenPlaces(tokenizer, skip_special_tokens=params.skip_special_tokens)
        self._new: list[Event] = []  # since the last `take`
        self._all: list[Event] = []
        self._calls = 0
        self._said_tokens = 0
        self._begun = False

    def feed(self, delta: Delta) -> None:
        before = len(self.output.token_ids)
        self.output.feed(delta)
        if self._parser is None or self._places is None:
            if delta.text:
                self._new.append(ContentDelta(delta.text))
            return
        self._places.add(self.output.token_ids[before:])
        events = self._parser.feed(delta.text)
        if delta.finish is not None:
            events += self._parser.finish()
        for event in events:
            count = self._places.through(event.source)
            if isinstance(event, ReasoningDelta):
                self.reasoning_tokens += count
        self._new += events

    @property
    def finish_reason(self) -> str | None:
        reason = self.output.finish_reason
        return "tool_calls" if reason == "stop" and self._calls else reason

    def whole(self, index: int) -> dict[str, Any]:
        """The choice of an answer that is sent as one."""
        self.take()
        parsed = assemble(self._all)
        return {
            "index": index,
            "message": self._message(parsed),
            "logprobs": self._logprobs(),
            "finish_reason": self.finish_reason,
        }

    def _message(self, parsed: Parsed) -> dict[str, Any]:
        calls = parsed.calls
        message: dict[str, Any] = {
            "role": "assistant",
            "content": parsed.content if parsed.content or not calls else None,
            "refusal": None,
        }
        if parsed.reasoning:
            message["reasoning_content"] = parsed.reasoning
        if calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in calls
            ]
        return message

    def pieces(self, index: int) -> Iterable[dict[str, Any]]:
        """What is new, as the choices of as many chunks. The last of all has the finish reason."""
        new = self.take()
        deltas = [piece for event in new if (piece := self._piece(event)) is not None]
        if not self._begun:
            self._begun = True
            said = None if new and isinstance(new[0], CallStart) else ""
            deltas.insert(0, {"role": "assistant", "content": said, "refusal": None})
        logprobs, reason = self._logprobs(), self.finish_reason
        if not deltas and (reason is not None or (logprobs is not None and logprobs["content"])):
            deltas.append({})
        for i, delta in enumerate(deltas, 1):
            last = i == len(deltas)
            yield {
                "index": index,
                "delta": delta,
                "logprobs": logprobs if last else None,
                "finish_reason": reason if last else None,
            }

    def take(self) -> Sequence[Event]:
        """What the text that is new turns out to be. Of a call that is left out only the `Markup` remains."""
        new, self._new = self._new, []
        if self._one_call:
            new = [_without_more_calls(event) for event in new]
        self._calls += sum(isinstance(event, CallStart) for event in new)
        if self._parser is not None:
            self._all += new
        elif not self._all:
            self._all = new  # of an answer in one piece; nobody asks about a stream's
        return new

    def _piece(self, event: Event) -> dict[str, Any] | None:
        match event:
            case ContentDelta(text=text):
                return {"content": text}
            case ReasoningDelta(text=text):
                return {"reasoning_content": text}
            case CallStart(index=index, id=id, name=name):
                function = {"name": name, "arguments": ""}
                return {"tool_calls": [{"index": index, "id": id, "type": "function", "function": function}]}
            case ArgumentsDelta(index=index, text=text) if text:
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
        return None

    # -- logprobs ------------------------------------------------------------------------------------------------------

    def _logprobs(self) -> dict[str, Any] | None:
        if self._params.logprobs is None:
            return None
        return {"content": [self.described(row) for row in self.take_logprobs()], "refusal": None}

    def take_logprobs(self) -> Sequence[TokenLogprob]:
        """Of the tokens that are new; a stop token that is not shown has none."""
        rows = self.output.logprobs
        end = len(rows) - (isinstance(self.output.matched, int) and not self._params.include_stop)
        new, self._said_tokens = rows[self._said_tokens : end], max(end, self._said_tokens)
        return new

    def described(self, row: TokenLogprob) -> dict[str, Any]:
        """In OpenAI's words."""
        best = row.top[: self._params.logprobs]
        return {**self._token(row.token, row.logprob), "top_logprobs": [self._token(*entry) for entry in best]}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._tokenizer.token_bytes(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(data)}


def _without_more_calls(event: Event) -> Event:
    """``event``, unless it is of a call after the first."""
    if isinstance(event, (CallStart, ArgumentsDelta, CallEnd)) and event.index:
        return Markup(event.source)
    return event
