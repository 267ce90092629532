"""The output of one response, item by item as the model writes it, and the events that tell a stream about it."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

from .....chat.tools import ArgumentsDelta, CallEnd, CallStart, ContentDelta, Event, ReasoningDelta
from .logprobs import Rows, TextLogprobs

Change = dict[str, Any]  # an event, but for its sequence number


class OutputItems:
    """`add` what the parser has found, then `finish`; both give the events, which must be taken.

    Items stand in the order in which the model wrote them. A message ends where a call or thinking begins. Whoever
    follows the events has, item for item, what `shown` gives in the end: there is no other way to either.
    """

    def __init__(self, logprobs: TextLogprobs | None) -> None:
        """``logprobs``: None: nobody asked for them."""
        self._items: list[_Item] = []
        self._open: _Item | None = None  # the last one, while it is written
        self._logprobs = logprobs

    def shown(self) -> list[dict[str, Any]]:
        return [item.shown() for item in self._items]

    def add(self, events: Iterable[Event]) -> Iterator[Change]:
        for event in events:
            rows = [] if self._logprobs is None else self._logprobs.through(event.source)
            match event:
                case ContentDelta(text=text):
                    if not isinstance(self._open, _Message):
                        yield from self._begin(_Message(len(self._items)))
                    yield from self._more(text, rows)
                case ReasoningDelta(text=text):
                    if not isinstance(self._open, _Reasoning):
                        yield from self._begin(_Reasoning(len(self._items)))
                    yield from self._more(text, rows)
                case CallStart(id=id, name=name):
                    yield from self._begin(_Call(len(self._items), id, name))
                case ArgumentsDelta(text=text) if text:
                    yield from self._more(text, rows)
                case CallEnd(complete=complete):
                    yield from self._end(complete)

    def finish(self, complete: bool) -> Iterator[Change]:
        """No more will come. Not ``complete``: the model was stopped in what it was writing."""
        rest = [] if self._logprobs is None else self._logprobs.rest()
        if rest and isinstance(self._open, _Message):
            yield from self._more("", rest)
        yield from self._end(complete)

    def break_off(self) -> None:
        """As `finish` when nobody is told any more."""
        for _ in self._end(False):
            pass

    def _begin(self, item: _Item) -> Iterator[Change]:
        yield from self._end(True)
        self._items.append(item)
        self._open = item
        yield from item.begin()

    def _more(self, text: str, rows: Rows) -> Iterator[Change]:
        if self._open is None:
            raise RuntimeError("text of no item")
        yield self._open.more(text, rows)

    def _end(self, complete: bool) -> Iterator[Change]:
        item, self._open = self._open, None
        if item is not None:
            item.status = "completed" if complete else "incomplete"
            yield from item.end()


class _Item:
    """One item: what is known of it from the start, and what has been written of its text."""

    prefix: ClassVar[str]

    def __init__(self, index: int) -> None:
        self.index = index
        self.id = f"{self.prefix}_{uuid.uuid4().hex}"
        self.status = "in_progress"
        self._texts: list[str] = []

    @property
    def text(self) -> str:
        if len(self._texts) > 1:
            self._texts = ["".join(self._texts)]
        return self._texts[0] if self._texts else ""

    def shown(self) -> dict[str, Any]:
        raise NotImplementedError

    def begin(self) -> Iterator[Change]:
        yield self._about_item("added")

    def more(self, text: str, rows: Rows) -> Change:
        raise NotImplementedError

    def end(self) -> Iterator[Change]:
        yield self._about_item("done")

    def _about_item(self, what: str) -> Change:
        return {"type": f"response.output_item.{what}", "output_index": self.index, "item": self.shown()}

    def _where(self) -> dict[str, Any]:
        return {"item_id": self.id, "output_index": self.index}


class _Text(_Item):
    """An item whose text is its one content part."""

    kind: ClassVar[str]  # of the part

    def begin(self) -> Iterator[Change]:
        yield from super().begin()
        yield {"type": "response.content_part.added", **self._where(), "part": self._part()}

    def more(self, text: str, rows: Rows) -> Change:
        self._texts.append(text)
        return {"type": f"response.{self.kind}.delta", **self._where(), "delta": text}

    def end(self) -> Iterator[Change]:
        yield {"type": f"response.{self.kind}.done", **self._where(), "text": self.text}
        yield {"type": "response.content_part.done", **self._where(), "part": self._part()}
        yield from super().end()

    def _part(self) -> dict[str, Any]:
        return {"type": self.kind, "text": self.text}

    def _parts(self) -> list[dict[str, Any]]:
        return [self._part()] if self._texts else []

    def _where(self) -> dict[str, Any]:
        return {**super()._where(), "content_index": 0}


class _Message(_Text):
    prefix, kind = "msg", "output_text"

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self._rows: Rows = []

    def shown(self) -> dict[str, Any]:
        head = {"id": self.id, "type": "message", "status": self.status, "role": "assistant"}
        return {**head, "content": self._parts()}

    def more(self, text: str, rows: Rows) -> Change:
        self._rows += rows
        return {**super().more(text, rows), "logprobs": rows}

    def end(self) -> Iterator[Change]:
        done, *others = super().end()
        yield {**done, "logprobs": self._rows}
        yield from others

    def _part(self) -> dict[str, Any]:
        return {**super()._part(), "annotations": [], "logprobs": list(self._rows)}


class _Reasoning(_Text):
    prefix, kind = "rs", "reasoning_text"

    def shown(self) -> dict[str, Any]:
        head = {"id": self.id, "type": "reasoning", "status": self.status, "summary": []}
        return {**head, "content": self._parts(), "encrypted_content": None}


class _Call(_Item):
    prefix = "fc"

    def __init__(self, index: int, call_id: str, name: str) -> None:
        super().__init__(index)
        self._call_id = call_id
        self._name = name

    def shown(self) -> dict[str, Any]:
        head = {"id": self.id, "type": "function_call", "status": self.status, "call_id": self._call_id}
        return {**head, "name": self._name, "arguments": self.text}

    def more(self, text: str, rows: Rows) -> Change:
        self._texts.append(text)
        return {"type": "response.function_call_arguments.delta", **self._where(), "delta": text}

    def end(self) -> Iterator[Change]:
        done = {"type": "response.function_call_arguments.done", **self._where()}
        yield {**done, "name": self._name, "arguments": self.text}
        yield from super().end()
