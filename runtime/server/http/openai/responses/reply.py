"""One response as clients see it: whole, or as the events of a stream."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .....chat.blocks import Block, BlockDelta, BlockEvent, BlockStart, BlockStop
from .....chat.conversation import OfferedTool
from .....chat.custom_tools import custom_input
from .....logprobs import TokenLogprob
from .....sampling_params import SamplingParams
from ...chat.sample import Sample
from ...engine_client import Batch
from ...fields.usage import usage
from ...plumbing.errors import describe
from ...plumbing.sse import typed_event
from ...state import AppState
from ..logprobs import describe_logprob
from .request import ResponsesRequest

# Finish reasons other than the model's own, and the status they give.
_STATUS = {"length": "incomplete", "abort": "cancelled"}
_ID_PREFIX = {"text": "msg", "thinking": "rs", "call": "fc"}
_TEXT_KIND = {"text": "output_text", "thinking": "reasoning_text"}


class ResponseReply:
    """Implements `respond.Reply`. Every block of the answer is an item of the response's output."""

    def __init__(
        self, state: AppState, body: ResponsesRequest, sample: Sample, tools: Mapping[str, OfferedTool]
    ) -> None:
        """``tools``: by the names that the model calls."""
        self._sample = sample
        self._tools = tools
        self._tokenizer = state.tokenizer
        self._sequence = itertools.count()
        self._begun = False
        self._ids: dict[int, str] = {}  # of items, by the index of their blocks
        self._head = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "model": state.model_name,
        }
        self._settings = _settings(body, sample.params)
        self._with_ids = body.return_token_ids
        self._tokens_as_ids = body.return_tokens_as_token_ids

    def whole(self, batch: Batch) -> dict[str, Any]:
        for _, delta in batch:
            self._sample.feed(delta)
        return self._ended()

    def events(self, batch: Batch) -> Iterable[bytes]:
        if not self._begun:
            self._begun = True
            for name in ("created", "in_progress"):
                yield self._encoded({"type": f"response.{name}", "response": self._response("in_progress", [])})
        for _, delta in batch:
            for event in self._sample.feed(delta):
                for change in self._changes(event):
                    yield self._encoded(change)

    def end(self) -> Iterable[bytes]:
        response = self._ended()
        name = "completed" if response["status"] == "completed" else "incomplete"
        yield self._encoded({"type": f"response.{name}", "response": response})

    def fail(self, error: Exception) -> bytes:
        """The last event of a stream that fails midway, with the output so far."""
        self._sample.break_off()
        status, body = describe(error)
        code = "server_error" if status >= 500 else "invalid_prompt"
        response = self._response("failed", self._output())
        response["error"] = {"code": code, "message": body["error"]["message"]}
        return self._encoded({"type": "response.failed", "response": response})

    def _encoded(self, change: dict[str, Any]) -> bytes:
        return typed_event({"type": change["type"], "sequence_number": next(self._sequence), **change})

    # -- items ---------------------------------------------------------------------------------------------------------

    def _changes(self, event: BlockEvent) -> Iterator[dict[str, Any]]:
        block = event.block
        where: dict[str, Any] = {"item_id": self._id(block), "output_index": block.index}
        match event, block.kind:
            case BlockStart(), kind:
                yield self._about_item("added", block)
                if kind != "call":
                    yield self._about_part("added", block, where)
            case BlockDelta(text=text), "call":
                if not self._is_custom(block):  # whose input is sent at once: the model writes it as JSON
                    yield {"type": "response.function_call_arguments.delta", **where, "delta": text}
            case BlockDelta(text=text, logprobs=rows), kind:
                name = _TEXT_KIND[kind]
                change = {"type": f"response.{name}.delta", **where, "content_index": 0, "delta": text}
                yield change | self._rows(block, rows)
            case BlockStop(), "call" if self._is_custom(block):
                input = custom_input(block.text)
                yield {"type": "response.custom_tool_call_input.delta", **where, "delta": input}
                yield {"type": "response.custom_tool_call_input.done", **where, "input": input}
                yield self._about_item("done", block)
            case BlockStop(), "call":
                done = {"type": "response.function_call_arguments.done", **where}
                yield {**done, "name": self._called(block)["name"], "arguments": block.text}
                yield self._about_item("done", block)
            case BlockStop(), kind:
                name = _TEXT_KIND[kind]
                done = {"type": f"response.{name}.done", **where, "content_index": 0, "text": block.text}
                yield done | self._rows(block, block.logprobs)
                yield self._about_part("done", block, where)
                yield self._about_item("done", block)

    def _about_item(self, what: str, block: Block) -> dict[str, Any]:
        item = self._item(block, ended=what == "done")
        return {"type": f"response.output_item.{what}", "output_index": block.index, "item": item}

    def _about_part(self, what: str, block: Block, where: dict[str, Any]) -> dict[str, Any]:
        part = self._part(block, ended=what == "done")
        return {"type": f"response.content_part.{what}", **where, "content_index": 0, "part": part}

    def _item(self, block: Block, *, ended: bool = True) -> dict[str, Any]:
        """The item as it ended, or as it began: empty."""
        status = "completed" if block.complete else "incomplete"
        head: dict[str, Any] = {"id": self._id(block), "status": status if ended else "in_progress"}
        if block.kind == "call":
            head |= {"call_id": block.call_id, **self._called(block)}
            if self._is_custom(block):
                return {**head, "type": "custom_tool_call", "input": custom_input(block.text) if ended else ""}
            return {**head, "type": "function_call", "arguments": block.text if ended else ""}
        content: list[Any] = [self._part(block)] if ended else []
        if block.kind == "text":
            return {**head, "type": "message", "role": "assistant", "content": content}
        return {**head, "type": "reasoning", "summary": [], "content": content, "encrypted_content": None}

    def _is_custom(self, block: Block) -> bool:
        return block.name in self._tools and self._tools[block.name].custom

    def _called(self, block: Block) -> dict[str, str]:
        """The tool's name as the client defined it, with its namespace."""
        offered = self._tools.get(block.name)
        if offered is None:
            return {"name": block.name}
        return {"name": offered.name} | ({"namespace": offered.namespace} if offered.namespace else {})

    def _part(self, block: Block, *, ended: bool = True) -> dict[str, Any]:
        part: dict[str, Any] = {"type": _TEXT_KIND[block.kind], "text": block.text if ended else ""}
        if block.kind == "text":
            part |= {"annotations": [], **self._rows(block, block.logprobs if ended else ())}
        return part

    def _rows(self, block: Block, rows: Sequence[TokenLogprob]) -> dict[str, Any]:
        if block.kind != "text":
            return {}
        alternatives = self._sample.params.logprobs
        as_ids = self._tokens_as_ids
        return {"logprobs": [describe_logprob(self._tokenizer, row, alternatives, as_ids=as_ids) for row in rows]}

    def _id(self, block: Block) -> str:
        return self._ids.setdefault(
            block.index, f"{'ctc' if self._is_custom(block) else _ID_PREFIX[block.kind]}_{uuid.uuid4().hex}"
        )

    def _output(self) -> list[dict[str, Any]]:
        return [self._item(block) for block in self._sample.blocks]

    # -- the response around them --------------------------------------------------------------------------------------

    def _ended(self) -> dict[str, Any]:
        reason = self._sample.finish_reason
        response = self._response(_STATUS.get(reason or "", "completed"), self._output())
        if response["status"] == "completed":
            response["completed_at"] = int(time.time())
        elif reason == "length":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        counted = usage([self._sample.output], 1)
        response["usage"] = {
            "input_tokens": counted["prompt_tokens"],
            "input_tokens_details": counted["prompt_tokens_details"],
            "output_tokens": counted["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._sample.reasoning_tokens},
            "total_tokens": counted["total_tokens"],
        }
        if self._with_ids:
            output = self._sample.output
            response |= {"prompt_token_ids": output.prompt, "token_ids": output.token_ids}
        return response

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        """Without the fields that are known only at the end."""
        return {
            **self._head,
            "status": status,
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "output": output,
            "usage": None,
            **self._settings,
        }


def _settings(body: ResponsesRequest, params: SamplingParams) -> dict[str, Any]:
    """The request's settings, given back, with the sampling in effect; null for features this server does not have."""
    text, reasoning, options = body.text, body.reasoning, body.prompt_cache_options
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls,
        "prompt_cache_key": body.prompt_cache_key,
        "prompt_cache_options": None if options is None else {"mode": options.mode, "ttl": options.ttl},
        "reasoning": {
            "effort": None if reasoning is None else reasoning.effort,
            "summary": None if reasoning is None else reasoning.summary,
        },
        "safety_identifier": body.safety_identifier,
        "store": False,
        "temperature": params.temperature,
        "text": {
            "format": {"type": "text"} if text is None or text.format is None else text.format,
            "verbosity": None if text is None else text.verbosity,
        },
        "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
        "tools": [{"strict": False, "parameters": None, **tool} for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": params.top_p,
        "truncation": "disabled",
        "user": body.user,
        **dict.fromkeys(_ABSENT),
        "background": False,
    }


_ABSENT = (
    *("access_programs", "conversation", "image", "input_transformations", "moderation", "previous_response_id"),
    *("prompt", "prompt_cache_diagnostics", "prompt_cache_retention", "service_tier", "tool_usage"),
)
