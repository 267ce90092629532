"""An answer as Anthropic's message: whole, or as the events of a stream."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from ....chat.blocks import Block, BlockDelta, BlockEvent, BlockStart, BlockStop
from ....outputs import Output
from ..chat.sample import Sample
from ..engine_client import Batch
from ..plumbing.sse import typed_event
from .errors import error_event
from .tool_input import ToolInput

# An aborted answer can be continued: a client sends it back as the last message.
_STOPS = {"length": "max_tokens", "abort": "pause_turn", "tool_calls": "tool_use", "stop": "end_turn"}
_NOT_YET = {"stop_reason": None, "stop_sequence": None}


class MessageReply:
    """Implements `respond.Reply`. Every block of the answer is a block of the message's content."""

    def __init__(self, model: str, sample: Sample, request_id: str) -> None:
        self._id = f"msg_{uuid.uuid4().hex}"
        self._model, self._request_id = model, request_id
        self._sample = sample
        self._begun = False
        self._inputs: dict[int, ToolInput] = {}  # of calls, by the index of their blocks

    def whole(self, batch: Batch) -> dict[str, Any]:
        for _, delta in batch:
            self._sample.feed(delta)
        return self._message([_content_block(block) for block in self._sample.blocks])

    def events(self, batch: Batch) -> Iterable[bytes]:
        events = [event for _, delta in batch for event in self._sample.feed(delta)]
        if not self._begun:
            self._begun = True
            yield typed_event({"type": "message_start", "message": {**self._message([]), **_NOT_YET}})
            yield typed_event({"type": "ping"})
        for event in events:
            for change in self._changes(event):
                yield typed_event(change)

    def end(self) -> Iterable[bytes]:
        reason, sequence = self._stop()
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        yield typed_event({"type": "message_delta", "delta": delta, "usage": self._usage()})
        yield typed_event({"type": "message_stop"})

    def fail(self, error: Exception) -> bytes:
        return error_event(error, self._request_id)

    def _changes(self, event: BlockEvent) -> Iterator[dict[str, Any]]:
        block = event.block
        match event:
            case BlockStart():
                begun = _content_block(Block(block.index, block.kind, block.call_index, block.call_id, block.name))
                yield {"type": "content_block_start", "index": block.index, "content_block": begun}
            case BlockDelta(text=text) if block.kind == "call":
                piece = self._inputs.setdefault(block.index, ToolInput()).feed(text)
                if piece:
                    yield _delta(block, {"type": "input_json_delta", "partial_json": piece})
            case BlockDelta(text=text) if text:
                yield _delta(block, {"type": f"{block.kind}_delta", block.kind: text})
            case BlockStop():
                if block.kind == "thinking":
                    yield _delta(block, {"type": "signature_delta", "signature": ""})
                yield {"type": "content_block_stop", "index": block.index}

    # -- around the blocks ---------------------------------------------------------------------------------------------

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
        output, reason = self._sample.output, self._sample.finish_reason
        if output.finish_reason == "stop" and isinstance(output.matched, str):
            return "stop_sequence", output.matched
        return (None if reason is None else _STOPS.get(reason, reason)), None

    def _usage(self) -> dict[str, Any]:
        return {
            **input_usage(self._sample.output),
            "output_tokens": self._sample.output.completion_tokens,
            "output_tokens_details": {"thinking_tokens": self._sample.reasoning_tokens},
        }


def _content_block(block: Block) -> dict[str, Any]:
    match block.kind:
        case "text":
            return {"type": "text", "text": block.text}
        case "thinking":
            return {"type": "thinking", "thinking": block.text, "signature": ""}
    id = block.call_id  # a template's own kind of id, or OpenAI's
    id = f"toolu_{id.removeprefix('call_')}" if id.startswith("call_") else id
    # The input as the model wrote it: not decoded and encoded again, which would change numbers.
    input = ToolInput()
    input.feed(block.text)
    return {"type": "tool_use", "id": id, "name": block.name, "input": msgspec.Raw(input.text.encode())}


def _delta(block: Block, delta: dict[str, Any]) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": block.index, "delta": delta}


def input_usage(output: Output) -> dict[str, int]:
    """The prompt's tokens as Anthropic divides them; the three add up to all of them.

    Read: from the cache. Created: computed, and kept by a breakpoint; known when the request has ended. The rest was
    computed too and stays in the cache while there is room, but no breakpoint pins it.
    """
    read = output.cached_tokens
    kept = 0 if output.cache is None else output.cache.pinned_tokens
    created = max(0, kept - read)
    return {
        "input_tokens": output.prompt_tokens - read - created,
        "cache_creation_input_tokens": created,
        "cache_read_input_tokens": read,
    }
