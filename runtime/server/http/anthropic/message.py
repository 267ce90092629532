"""An answer as Anthropic's message: the blocks that the model wrote, whole or as the events of a stream."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from ....chat.tools import ArgumentsDelta, CallEnd, CallStart, ContentDelta, ReasoningDelta
from ....outputs import Output
from ..engine_client import Batch
from ..openai.chat.choice import Choice
from ..plumbing.sse import typed_event
from .tool_input import ToolInput

# An aborted answer can be gone on with: sent back as the last message, it is continued.
_STOPS = {"length": "max_tokens", "abort": "pause_turn", "tool_calls": "tool_use", "stop": "end_turn"}


class _Words:
    """A block of ``text`` or ``thinking``."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._pieces: list[str] = []

    def whole(self) -> dict[str, Any]:
        signature = {"signature": ""} if self.kind == "thinking" else {}
        return {"type": self.kind, self.kind: "".join(self._pieces), **signature}

    def add(self, text: str) -> Iterator[dict[str, Any]]:
        if text:
            self._pieces.append(text)
            yield {"type": f"{self.kind}_delta", self.kind: text}

    def end(self) -> Iterator[dict[str, Any]]:
        if self.kind == "thinking":
            yield {"type": "signature_delta", "signature": ""}


class _ToolUse:
    kind = "tool_use"

    def __init__(self, id: str, name: str) -> None:
        self._id = f"toolu_{id.removeprefix('call_')}" if id.startswith("call_") else id  # or a template's own kind
        self._name = name
        self._input = ToolInput()

    def whole(self) -> dict[str, Any]:
        """The input as the model wrote it."""
        return {"type": self.kind, "id": self._id, "name": self._name, "input": msgspec.Raw(self._input.text.encode())}

    def add(self, text: str) -> Iterator[dict[str, Any]]:
        piece = self._input.feed(text)
        if piece:
            yield {"type": "input_json_delta", "partial_json": piece}

    def end(self) -> Iterator[dict[str, Any]]:
        yield from ()


class MessageAnswer:
    """``choice`` is its only sample."""

    def __init__(self, model: str, choice: Choice) -> None:
        self._id = f"msg_{uuid.uuid4().hex}"
        self._model = model
        self._choice = choice
        self._blocks: list[_Words | _ToolUse] = []
        self._open: _Words | _ToolUse | None = None  # the last of them, while it may go on
        self._begun = False

    def whole(self, batch: Batch) -> dict[str, Any]:
        for _ in self._deltas(batch):
            pass
        return self._message([block.whole() for block in self._blocks])

    def events(self, batch: Batch) -> Iterable[bytes]:
        deltas = list(self._deltas(batch))
        if not self._begun:
            self._begun = True
            yield typed_event({"type": "message_start", "message": {**self._message([]), **_NOT_YET}})
            yield typed_event({"type": "ping"})
        for delta in deltas:
            yield typed_event(delta)

    def end(self) -> Iterable[bytes]:
        for event in self._close():
            yield typed_event(event)
        reason, sequence = self._stop()
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        yield typed_event({"type": "message_delta", "delta": delta, "usage": self._usage()})
        yield typed_event({"type": "message_stop"})

    # -- blocks --------------------------------------------------------------------------------------------------------

    def _deltas(self, batch: Batch) -> Iterator[dict[str, Any]]:
        """The events of what is new."""
        for _, delta in batch:
            self._choice.feed(delta)
        for event in self._choice.take():
            match event:
                case ContentDelta(text=text):
                    yield from self._words("text", text)
                case ReasoningDelta(text=text):
                    yield from self._words("thinking", text)
                case CallStart(id=id, name=name):
                    yield from self._begin(_ToolUse(id, name))
                case ArgumentsDelta(text=text):
                    yield from self._add(text)
                case CallEnd():
                    yield from self._close()

    def _words(self, kind: str, text: str) -> Iterator[dict[str, Any]]:
        if text and (self._open is None or self._open.kind != kind):
            yield from self._begin(_Words(kind))
        yield from self._add(text)

    def _begin(self, block: _Words | _ToolUse) -> Iterator[dict[str, Any]]:
        yield from self._close()
        self._open = block
        self._blocks.append(block)
        index = len(self._blocks) - 1
        yield {"type": "content_block_start", "index": index, "content_block": block.whole()}

    def _add(self, text: str) -> Iterator[dict[str, Any]]:
        if self._open is not None:
            for delta in self._open.add(text):
                yield {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    def _close(self) -> Iterator[dict[str, Any]]:
        if self._open is not None:
            index = len(self._blocks) - 1
            for delta in self._open.end():
                yield {"type": "content_block_delta", "index": index, "delta": delta}
            yield {"type": "content_block_stop", "index": index}
            self._open = None

    # -- around them ---------------------------------------------------------------------------------------------------

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        reason, sequence = self._stop()
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": {**self._usage(), "server_tool_use": None, "service_tier": "standard"},
        }

    def _stop(self) -> tuple[str | None, str | None]:
        output, reason = self._choice.output, self._choice.finish_reason
        if output.finish_reason == "stop" and isinstance(output.matched, str):
            return "stop_sequence", output.matched
        return (None if reason is None else _STOPS.get(reason, reason)), None

    def _usage(self) -> dict[str, Any]:
        return {
            **input_usage(self._choice.output),
            "output_tokens": self._choice.output.completion_tokens,
            "output_tokens_details": {"thinking_tokens": self._choice.reasoning_tokens},
        }


_NOT_YET = {"stop_reason": None, "stop_sequence": None}


def input_usage(output: Output) -> dict[str, int]:
    """The prompt's tokens as Anthropic divides them; the three add up to all of them.

    Read: those that the cache had. Created: those that were computed and that a breakpoint keeps, known when the
    request has ended. The rest was computed too, and stays in the cache while there is room, but nobody asked for it.
    """
    read = output.cached_tokens
    kept = 0 if output.cache is None else output.cache.pinned_tokens
    created = max(0, kept - read)
    return {
        "input_tokens": output.prompt_tokens - read - created,
        "cache_creation_input_tokens": created,
        "cache_read_input_tokens": read,
    }
