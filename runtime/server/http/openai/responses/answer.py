"""One response as clients see it: whole, or as the events of a stream."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .....errors import InvalidRequest
from .....sampling_params import SamplingParams
from ...engine_client import Batch
from ...fields.usage import usage
from ...plumbing.errors import describe
from ...plumbing.sse import typed_event
from ...state import AppState
from ..chat.places import TokenPlaces
from ..chat.renamed import renamed
from ..chat.turn import Turn
from .logprobs import TextLogprobs
from .output import Change, OutputItems
from .request import ResponsesRequest

# What the model may have been stopped by, other than itself, and what is said of it.
_STATUS = {"length": "incomplete", "abort": "cancelled"}


class Answer:
    """What has come of one request. The whole response and the stream are made by the same steps."""

    def __init__(self, state: AppState, body: ResponsesRequest, turn: Turn) -> None:
        [self._choice] = turn.choices
        params = turn.prompt.params
        logprobs = None
        if params.logprobs is not None:
            places = TokenPlaces(state.tokenizer, skip_special_tokens=params.skip_special_tokens)
            logprobs = TextLogprobs(places, self._choice.described)
        self._items = OutputItems(logprobs)
        self._logprobs = logprobs
        self._sequence = itertools.count()
        self._begun = False
        self._head = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "model": state.model_name,
        }
        self._settings = _settings(body, params)

    def whole(self, batch: Batch) -> dict[str, Any]:
        for _ in self._changes(batch):
            pass
        return self._ended()

    def events(self, batch: Batch) -> Iterable[bytes]:
        if not self._begun:
            self._begun = True
            for name in ("created", "in_progress"):
                yield self._event({"type": f"response.{name}", "response": self._response("in_progress")})
        for change in self._changes(batch):
            yield self._event(change)

    def end(self) -> Iterable[bytes]:
        response = self._ended()
        name = "completed" if response["status"] == "completed" else "incomplete"
        yield self._event({"type": f"response.{name}", "response": response})

    def fail(self, error: Exception, sources: Mapping[str, str]) -> bytes:
        """The last event of a stream that fails midway, with what there was. ``sources``: as `renamed` has them."""
        self._items.break_off()
        if isinstance(error, InvalidRequest):
            error = renamed(error, sources)
        status, body = describe(error)
        code = "server_error" if status >= 500 else "invalid_prompt"
        response = {**self._response("failed"), "error": {"code": code, "message": body["error"]["message"]}}
        return self._event({"type": "response.failed", "response": response})

    def _changes(self, batch: Batch) -> Iterator[Change]:
        choice = self._choice
        for _, delta in batch:
            choice.feed(delta)
        if self._logprobs is not None:
            self._logprobs.add(choice.take_logprobs())
        yield from self._items.add(choice.take())
        if choice.finish_reason is not None:
            yield from self._items.finish(complete=choice.finish_reason not in _STATUS)

    def _event(self, change: Change) -> bytes:
        return typed_event({"type": change["type"], "sequence_number": next(self._sequence), **change})

    def _ended(self) -> dict[str, Any]:
        reason = self._choice.finish_reason
        response = self._response(_STATUS.get(reason or "", "completed"))
        if response["status"] == "completed":
            response["completed_at"] = int(time.time())
        elif reason == "length":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        counted = usage([self._choice.output], 1)
        response["usage"] = {
            "input_tokens": counted["prompt_tokens"],
            "input_tokens_details": counted["prompt_tokens_details"],
            "output_tokens": counted["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._choice.reasoning_tokens},
            "total_tokens": counted["total_tokens"],
        }
        return response

    def _response(self, status: str) -> dict[str, Any]:
        """Without what is known only in the end."""
        return {
            **self._head,
            "status": status,
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "output": self._items.shown(),
            "usage": None,
            **self._settings,
        }


def _settings(body: ResponsesRequest, params: SamplingParams) -> dict[str, Any]:
    """What was asked for, as it is given back, and how tokens are drawn; null for what this server does not have."""
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
        **dict.fromkeys(_NONE),
        "background": False,
    }


_NONE = (
    *("access_programs", "conversation", "image", "input_transformations", "moderation", "previous_response_id"),
    *("prompt", "prompt_cache_diagnostics", "prompt_cache_retention", "service_tier", "tool_usage"),
)
