"""From tokens to text: one object for each request, and the core that turns a step's output into clients' deltas.

No sockets here: the detokenizer process and the in-process engine both drive `DetokenizerCore`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from ..messages import CacheReport, Delta, Finished, Settled, StepOutput
from ..sampling_params import SamplingParams
from .incremental import open_stream
from .special_stops import SpecialStops
from .stop_strings import StopMatcher
from .tokenizer import Tokenizer

BATCH_TOKENS = 128  # of an answer that is not streamed: sent in deltas of this many tokens


class IncrementalDetokenizer:
    """The text of one request's output, as far as it is certain after each token.

    Holds back incomplete UTF-8 and whatever may begin a stop string. ``tail`` are the last tokens of the prompt, all of
    them unless ``truncated``: their text is never emitted. Stop strings are searched for from the ``min_tokens``-th
    token on; a special token in a stop string matches also where special tokens are skipped.
    """

    __slots__ = ("_min_tokens", "_special", "_stops", "_stream", "_trace", "count")

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        tail: Sequence[int] = (),
        *,
        truncated: bool = False,
        trace: bool = False,
    ) -> None:
        self._stream = open_stream(tokenizer, tail, params.skip_special_tokens, truncated=truncated)
        self._special: SpecialStops | None = None
        stops = params.stop
        if stops and params.skip_special_tokens:
            self._special = SpecialStops(tokenizer, stops)
            stops = self._special.stops
        self._stops = StopMatcher(stops, params.include_stop) if stops else None
        self._min_tokens = params.min_tokens
        self._trace = _Trace() if trace and params.stop else None
        self.count = 0  # tokens pushed

    @property
    def matched_stop(self) -> str | None:
        """The stop string that ended the text: nothing is emitted after it."""
        matched = self._stops.matched if self._stops is not None else None
        return matched if matched is None or self._special is None else self._special.original(matched)

    def push(self, token: int, *, silent: bool = False) -> str:
        """The text to emit for one more token; ``silent`` counts the token but takes no text from it."""
        self.count += 1
        if silent:
            return ""
        text = self._stream.push(token)
        if self._special is not None and token in self._special.marks:
            text += self._stream.flush() + self._special.marks[token]
        return self._visible(self._until_stop(text))

    def finish(self) -> str:
        """The text still held back, when no more tokens will come. May complete a stop string."""
        text = self._until_stop(self._stream.flush())
        return self._visible(text + self._stops.flush() if self._stops is not None else text)

    @property
    def cut(self) -> tuple[int, str]:
        """After a match: how many tokens lie wholly before the end of the text, and the text after them.

        Raises `RuntimeError` unless built with ``trace``.
        """
        if self._trace is None:
            raise RuntimeError("IncrementalDetokenizer.cut needs trace=True")
        tokens, rest = self._trace.cut()
        return tokens, self._visible(rest)

    def _until_stop(self, text: str) -> str:
        """The part of ``text``, and of text held back before, that is emitted now."""
        shown = text if self._stops is None or self.count < self._min_tokens else self._stops.push(text)
        if self._trace is not None:
            self._trace.note(self.count, text, len(shown), self._stream.settled)
        return shown

    def _visible(self, text: str) -> str:
        if self._special is None or not text:
            return text
        matched = self._stops.matched if self._stops is not None else None
        return self._special.visible(text, matched if matched and text.endswith(matched) else None)


class _Trace:
    """The positions in a text at which its tokens end."""

    __slots__ = ("_ends", "_length", "_pieces", "_shown", "_tokens")

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._length = 0  # of the text so far
        self._shown = 0  # of it, characters emitted
        self._tokens, self._ends = [0], [0]  # the first tokens[i] tokens are exactly the first ends[i] characters

    def note(self, tokens: int, text: str, shown: int, settled: bool) -> None:
        self._pieces.append(text)
        self._length += len(text)
        self._shown += shown
        if settled:
            self._tokens.append(tokens)
            self._ends.append(self._length)

    def cut(self) -> tuple[int, str]:
        at = bisect_right(self._ends, self._shown) - 1
        return self._tokens[at], "".join(self._pieces)[self._ends[at] : self._shown]


@dataclass(slots=True)
class _Request:
    text: IncrementalDetokenizer
    prompt_tokens: int
    include_stop: bool
    settle: bool  # of a branch: its end is followed by a `Settled`
    stream: bool  # False: after the first token, deltas are merged in ``unsent``
    unsent: Delta | None = None
    cache: CacheReport | None = None
    queue_seconds: float = 0.0
    ended: bool = False  # by a stop string: the client has its terminal delta, the scheduler's `Finished` is to come


class DetokenizerCore:
    """State of every open request, until the scheduler's `Finished`. Each gets exactly one `Delta` with ``finish``."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._requests: dict[int, _Request] = {}
        self._settled: list[Settled] = []

    def __len__(self) -> int:
        """Requests with state."""
        return len(self._requests)

    def feed(self, step: StepOutput) -> tuple[list[Delta], list[int]]:
        """Deltas, at most one for each request, and the ids that a stop string ended but the scheduler still runs.

        Raises `RuntimeError` if the step breaks the protocol: tokens of a request that is not open.
        """
        for started in step.started:
            tail = np.frombuffer(started.tail, np.int32).tolist()
            truncated = len(tail) < started.prompt_tokens
            text = IncrementalDetokenizer(
                self._tokenizer, started.params, tail, truncated=truncated, trace=started.settle
            )
            self._requests[started.id] = _Request(
                text, started.prompt_tokens, started.params.include_stop, started.settle, started.stream
            )
        deltas: dict[int, Delta] = {}
        for started in step.started:
            if started.prompt is not None:
                self._delta(deltas, started.id).prompt = started.prompt
        for id, report in step.cache.items():
            request = self._requests.get(id)
            if request is not None and not request.ended:
                request.cache = report
                request.queue_seconds = step.queue_seconds.get(id, 0.0)
                self._delta(deltas, id).cache = report
        for piece in step.prompt_logprobs:
            request = self._requests.get(piece.id)
            if request is not None and not request.ended:
                delta = self._delta(deltas, piece.id)
                delta.prompt_logprobs = [*(delta.prompt_logprobs or ()), piece]
        stopped = self._feed_tokens(step, deltas)
        for finished in step.finished:
            self._finish(finished, deltas)
            stopped.pop(finished.id, None)
        return list(deltas.values()), list(stopped)

    def take_settled(self) -> list[Settled]:
        """The ends of branches that are certain now. Send them to the scheduler before the deltas go to clients: a
        client may extend a branch as soon as it has the answer."""
        settled, self._settled = self._settled, []
        return settled

    def _feed_tokens(self, step: StepOutput, deltas: dict[int, Delta]) -> dict[int, None]:
        stop_tokens = {finished.id: finished.matched for finished in step.finished if finished.matched is not None}
        stopped: dict[int, None] = {}
        ids = np.frombuffer(step.ids, np.int64).tolist()
        for i, (id, token) in enumerate(zip(ids, np.frombuffer(step.tokens, np.int32).tolist(), strict=True)):
            request = self._requests.get(id)
            if request is None:
                raise RuntimeError(f"a token of request {id}, which is not open")
            if request.ended:
                continue
            delta = deltas.get(id) or self._delta(deltas, id)
            delta.tokens += step.tokens[4 * i : 4 * i + 4]
            rows = step.logprobs.get(id)
            if rows is not None:
                delta.logprobs = [*(delta.logprobs or ()), rows]
            silent = stop_tokens.get(id) == token and not request.include_stop
            delta.text += request.text.push(token, silent=silent)
            if request.unsent is not None and (request.text.count == 1 or len(delta.tokens) >= 4 * BATCH_TOKENS):
                self._send(deltas, request)
            if request.text.matched_stop is not None:
                request.ended = True
                stopped[id] = None
                delta.matched_stop = request.text.matched_stop
                delta.finish = Finished(
                    id=id,
                    reason="stop",
                    prompt_tokens=request.prompt_tokens,
                    completion_tokens=request.text.count,
                    cache=request.cache,
                    queue_seconds=request.queue_seconds,
                )
                self._settle(request, delta, delta.finish)
                self._send(deltas, request)
        return stopped

    def _finish(self, finished: Finished, deltas: dict[int, Delta]) -> None:
        request = self._requests.pop(finished.id, None)
        if request is None:  # refused before it was started
            deltas[finished.id] = Delta(id=finished.id, finish=finished)
            return
        if request.ended:
            delta = deltas.get(finished.id)
            if delta is not None and delta.finish is not None:  # both in one step: the scheduler has more detail
                delta.finish = _by_stop_string(finished)
            return
        delta = self._delta(deltas, finished.id, request)
        delta.text += request.text.finish()
        delta.finish = finished
        self._settle(request, delta, finished)
        self._send(deltas, request)
        if request.text.matched_stop is not None:
            delta.matched_stop = request.text.matched_stop
            delta.finish = _by_stop_string(finished)

    def _settle(self, request: _Request, delta: Delta, finished: Finished) -> None:
        """A branch keeps what was returned: no stop token, no stop string, and nothing of what failed."""
        if not request.settle:
            return
        kept, rest = request.text.count, ""
        if request.text.matched_stop is not None:
            kept, rest = request.text.cut
        elif finished.reason == "error":
            kept = 0
        elif finished.matched is not None and not request.include_stop:
            kept -= 1
        delta.settled = Settled(finished.id, kept, rest)
        self._settled.append(delta.settled)

    def _delta(self, deltas: dict[int, Delta], id: int, request: _Request | None = None) -> Delta:
        delta = deltas.get(id)
        if delta is None:
            request = request or self._requests[id]
            delta = request.unsent or Delta(id=id, prompt_tokens=request.prompt_tokens)
            if request.stream:
                deltas[id] = delta
            else:
                request.unsent = delta
        return delta

    def _send(self, deltas: dict[int, Delta], request: _Request) -> None:
        """Adds what was merged so far to this step's deltas."""
        if request.unsent is not None:
            deltas[request.unsent.id] = request.unsent
            request.unsent = None


def _by_stop_string(finished: Finished) -> Finished:
    """The end of a request that the scheduler and a stop string ended in one step."""
    if finished.reason not in ("stop", "length"):
        return finished
    return msgspec.structs.replace(finished, reason="stop", matched=None)
