"""An answer as blocks of text, thinking and calls, in the order in which the model wrote them.

`BlockReader` turns the parser's events into the start, the deltas and the stop of each block, one block at a time. Each
dialect renders these events for a stream and the finished blocks for a whole answer, so both say the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

import msgspec

from .tools.events import ArgumentsDelta, CallEnd, CallStart, ContentDelta, Event, ReasoningDelta

if TYPE_CHECKING:  # the language reads blocks too, and imports no NumPy before its first request
    from ..logprobs import TokenLogprob
    from .tools.parser import StreamParser

BlockKind = Literal["text", "thinking", "call"]


class Block(msgspec.Struct, eq=False):
    """``index`` counts the answer's blocks, ``call_index`` its calls. ``text`` is a call's arguments, as JSON text."""

    index: int
    kind: BlockKind
    call_index: int = 0
    call_id: str = ""
    name: str = ""
    complete: bool = False  # the model ended it; False while it is written, or if it was cut off
    _pieces: list[str] = []
    logprobs: list[TokenLogprob] = []  # of the tokens that begin in the text, if they were asked for

    @property
    def text(self) -> str:
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    def append(self, text: str, logprobs: Sequence[TokenLogprob]) -> None:
        self._pieces.append(text)
        if logprobs:
            self.logprobs += logprobs


class BlockStart(msgspec.Struct, frozen=True, gc=False):
    block: Block


class BlockDelta(msgspec.Struct, frozen=True, gc=False):
    block: Block
    text: str
    logprobs: Sequence[TokenLogprob]


class BlockStop(msgspec.Struct, frozen=True, gc=False):
    block: Block


BlockEvent: TypeAlias = BlockStart | BlockDelta | BlockStop


class BlockReader:
    """`read` the parser's events, then `finish`; `take` what they add. A block ends where the next begins."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self._open: Block | None = None  # the last one, while it is written
        self._new: list[BlockEvent] = []

    def take(self) -> list[BlockEvent]:
        """The events since the last call."""
        new, self._new = self._new, []
        return new

    def read(self, event: Event, logprobs: Sequence[TokenLogprob] = ()) -> None:
        """``logprobs``: of the tokens that begin in ``event.source``."""
        match event:
            case ContentDelta(text=text) if text:
                self._text("text", text, logprobs)
            case ReasoningDelta(text=text) if text:
                self._text("thinking", text, logprobs)
            case CallStart(index=index, id=id, name=name):
                self._start("call", index, id, name)
            case ArgumentsDelta(text=text) if text and self._open is not None:
                self._delta(self._open, text, logprobs)
            case CallEnd(complete=complete):
                self._stop(complete)

    def finish(self, complete: bool, logprobs: Sequence[TokenLogprob] = ()) -> None:
        """The output has ended. Not ``complete``: in the middle of what the model was writing. ``logprobs``: of the
        tokens after all text, such as those of a stop string."""
        if logprobs and self._open is not None and self._open.kind == "text":
            self._delta(self._open, "", logprobs)
        self._stop(complete)

    def _text(self, kind: BlockKind, text: str, logprobs: Sequence[TokenLogprob]) -> None:
        block = self._open
        if block is None or block.kind != kind:
            block = self._start(kind)
        self._delta(block, text, logprobs)

    def _start(self, kind: BlockKind, call_index: int = 0, call_id: str = "", name: str = "") -> Block:
        self._stop(True)
        block = self._open = Block(len(self.blocks), kind, call_index, call_id, name)
        self.blocks.append(block)
        self._new.append(BlockStart(block))
        return block

    def _delta(self, block: Block, text: str, logprobs: Sequence[TokenLogprob]) -> None:
        block.append(text, logprobs)
        self._new.append(BlockDelta(block, text, logprobs))

    def _stop(self, complete: bool) -> None:
        block, self._open = self._open, None
        if block is not None:
            block.complete = complete
            self._new.append(BlockStop(block))


def read_blocks(parser: StreamParser, text: str) -> list[Block]:
    """The blocks of a whole answer."""
    reader = BlockReader()
    for event in (*parser.feed(text), *parser.finish()):
        reader.read(event)
    reader.finish(True)
    return reader.blocks


def text_of(blocks: Iterable[Block], kind: BlockKind) -> str:
    """The texts of all blocks of a kind, joined."""
    return "".join(block.text for block in blocks if block.kind == kind)
