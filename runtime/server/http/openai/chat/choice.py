"""One sample as a choice of chat completions: a whole message, or the deltas of a stream."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .....chat.blocks import Block, BlockDelta, BlockEvent, BlockStart, BlockStop, text_of
from .....chat.conversation import OfferedTool
from .....chat.custom_tools import custom_input
from .....messages import Delta
from .....outputs import Output
from .....tokenizer.tokenizer import Tokenizer
from ...chat.sample import Sample
from ..logprobs import describe_logprob
from ..sent_ids import SentIds

_FIELDS: Mapping[str, str] = {"text": "content", "thinking": "reasoning_content"}


class ChatChoice:
    """Implements `chunks.Choice`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        sample: Sample,
        tools: Mapping[str, OfferedTool],
        *,
        token_ids: bool = False,
        tokens_as_ids: bool = False,
    ) -> None:
        """``tools``: by the names that the model calls. ``token_ids``: add the output's ids. ``tokens_as_ids``: name
        tokens by their ids in logprobs."""
        self.sample = sample
        self._ids = SentIds(sample.output) if token_ids else None
        self._tokens_as_ids = tokens_as_ids
        self._tools = tools
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
            **self._token_ids(),
        }

    def _token_ids(self) -> dict[str, Any]:
        """The new ones, if the request has return_token_ids."""
        return {} if self._ids is None else {"token_ids": self._ids.take()}

    def _message(self) -> dict[str, Any]:
        content, reasoning = text_of(self.sample.blocks, "text"), text_of(self.sample.blocks, "thinking")
        calls = [self._call(block) for block in self.sample.blocks if block.kind == "call"]
        message: dict[str, Any] = {"role": "assistant", "content": content if content or not calls else None}
        message["refusal"] = None
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        return message

    def _call(self, block: Block) -> dict[str, Any]:
        offered = self._tools.get(block.name)
        if offered is not None and offered.custom:
            custom = {"name": offered.name, "input": custom_input(block.text)}
            return {"id": block.call_id, "type": "custom", "custom": custom}
        function = {"name": block.name, "arguments": block.text}
        return {"id": block.call_id, "type": "function", "function": function}

    def _delta(self, event: BlockEvent) -> dict[str, Any] | None:
        block = event.block
        if block.kind != "call":
            return {_FIELDS[block.kind]: event.text} if isinstance(event, BlockDelta) and event.text else None
        offered = self._tools.get(block.name)
        custom = offered is not None and offered.custom
        match event:
            case BlockStart():
                call = self._call(Block(block.index, "call", name=block.name, call_id=block.call_id))
            case BlockDelta(text=text) if not custom:
                call = {"function": {"arguments": text}}
            case BlockStop() if custom:  # at once: what the model writes is JSON
                call = {"custom": {"input": custom_input(block.text)}}
            case _:
                return None
        return {"tool_calls": [{"index": block.call_index, **call}]}

    def pieces(self, index: int) -> Iterable[dict[str, Any]]:
        """The new output, as the choices of as many chunks. The last of all has the finish reason."""
        new, self._new = self._new, []
        deltas = [delta for event in new if (delta := self._delta(event)) is not None]
        if not self._begun:
            self._begun = True
            first_is_call = bool(new) and isinstance(new[0], BlockStart) and new[0].block.kind == "call"
            deltas.insert(0, {"role": "assistant", "content": None if first_is_call else "", "refusal": None})
        logprobs, reason = self._logprobs(), self.sample.finish_reason
        more = (logprobs is not None and logprobs["content"]) or (self._ids is not None and self._ids.pending)
        if not deltas and (reason is not None or more):
            deltas.append({})
        for i, delta in enumerate(deltas, 1):
            last = i == len(deltas)
            yield {
                "index": index,
                "delta": delta,
                "logprobs": logprobs if last else None,
                "finish_reason": reason if last else None,
                **(self._token_ids() if last else {}),
            }

    def _logprobs(self) -> dict[str, Any] | None:
        alternatives = self.sample.params.logprobs
        if alternatives is None:
            return None
        rows = self.sample.new_logprobs()
        as_ids = self._tokens_as_ids
        content = [describe_logprob(self._tokenizer, row, alternatives, as_ids=as_ids) for row in rows]
        return {"content": content, "refusal": None}
