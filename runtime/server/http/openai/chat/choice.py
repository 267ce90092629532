"""One sample as a choice of chat completions: a whole message, or the deltas of a stream."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .....chat.blocks import BlockDelta, BlockEvent, BlockKind, BlockStart
from .....messages import Delta
from .....outputs import Output
from .....tokenizer.tokenizer import Tokenizer
from ...chat.sample import Sample
from .logprobs import describe_logprob


class ChatChoice:
    """Implements `chunks.Choice`."""

    def __init__(self, tokenizer: Tokenizer, sample: Sample) -> None:
        self.sample = sample
        self._tokenizer = tokenizer
        self._new: list[BlockEvent] = []  # since the last `pieces`
        self._begun = False

    @property
    def output(self) -> Output:
        return self.sample.output

    def feed(self, delta: Delta) -> None:
        self._new += self.sample.feed(delta)

    def whole(self, index: int) -> dict[str, Any]:
        return {
            "index": index,
            "message": self._message(),
            "logprobs": self._logprobs(),
            "finish_reason": self.sample.finish_reason,
        }

    def _message(self) -> dict[str, Any]:
        content, reasoning = self._joined("text"), self._joined("thinking")
        calls = [
            {"id": block.call_id, "type": "function", "function": {"name": block.name, "arguments": block.text}}
            for block in self.sample.blocks
            if block.kind == "call"
        ]
        message: dict[str, Any] = {"role": "assistant", "content": content if content or not calls else None}
        message["refusal"] = None
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        return message

    def _joined(self, kind: BlockKind) -> str:
        return "".join(block.text for block in self.sample.blocks if block.kind == kind)

    def pieces(self, index: int) -> Iterable[dict[str, Any]]:
        """What is new, as the choices of as many chunks. The last of all has the finish reason."""
        new, self._new = self._new, []
        deltas = [delta for event in new if (delta := _delta(event)) is not None]
        if not self._begun:
            self._begun = True
            first_is_call = bool(new) and isinstance(new[0], BlockStart) and new[0].block.kind == "call"
            deltas.insert(0, {"role": "assistant", "content": None if first_is_call else "", "refusal": None})
        logprobs, reason = self._logprobs(), self.sample.finish_reason
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

    def _logprobs(self) -> dict[str, Any] | None:
        alternatives = self.sample.params.logprobs
        if alternatives is None:
            return None
        rows = self.sample.new_logprobs()
        return {"content": [describe_logprob(self._tokenizer, row, alternatives) for row in rows], "refusal": None}


_FIELDS = {"text": "content", "thinking": "reasoning_content"}


def _delta(event: BlockEvent) -> dict[str, Any] | None:
    match event:
        case BlockDelta(block=block, text=text) if text:
            if block.kind != "call":
                return {_FIELDS[block.kind]: text}
            return {"tool_calls": [{"index": block.call_index, "function": {"arguments": text}}]}
        case BlockStart(block=block) if block.kind == "call":
            function = {"name": block.name, "arguments": ""}
            call = {"index": block.call_index, "id": block.call_id, "type": "function", "function": function}
            return {"tool_calls": [call]}
    return None
