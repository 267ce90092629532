"""Finds text near the front of a prompt that changes with every request, so that nothing after it can be reused."""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

from .conversation import ChatTurn, Conversation, TextPart

MAX_FOUND = 8
_MAX_SHOWN = 120  # characters
_LOOKED_AT = 65_536  # characters of one part

# Claude Code's first system block: an accounting line for Anthropic, with a hash of the request.
BILLING_HEADER = re.compile(r"\s*x-anthropic-billing-header:[^\n]*\n?")
_KINDS = (
    ("billing header", BILLING_HEADER),
    ("timestamp", re.compile(r"\b\d{4}-\d\d-\d\d[T ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?Z?")),
    ("time", re.compile(r"\b\d\d:\d\d:\d\d\b")),
    ("UUID", re.compile(r"\b[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b")),
    ("hash or random id", re.compile(r"\b(?=[0-9a-f]{0,15}\d)(?=[0-9a-f]{0,15}[a-f])[0-9a-f]{16,}\b")),
    ("Unix time", re.compile(r"\b1[6-9]\d{8}(?:\d{3})?\b")),
)


class Volatile(msgspec.Struct, frozen=True):
    """``path``: of the part that contains it. ``kind``: what it looks like."""

    path: str
    kind: str
    text: str


def without_billing_header(text: str) -> str:
    """A system text as the model is given it."""
    return BILLING_HEADER.sub("", text, count=1) if BILLING_HEADER.match(text) else text


def volatile_parts(conversation: Conversation) -> list[Volatile]:
    """Text that probably changes with every request, in tools, system turns and the first turn after them."""
    found: list[Volatile] = []
    for path, text in _front(conversation):
        seen: list[tuple[int, int]] = []
        for kind, pattern in _KINDS:
            for match in pattern.finditer(text, 0, _LOOKED_AT):
                if any(start < match.end() and match.start() < end for start, end in seen):
                    continue
                seen.append(match.span())
                found.append(Volatile(path, kind, match[0].strip()[:_MAX_SHOWN]))
                if len(found) == MAX_FOUND:
                    return found
    return found


def part_at(conversation: Conversation, prompt: str, position: int) -> str | None:
    """The path of the part that ``position``, in characters of ``prompt``, is in; None before the first part."""
    best, path = -1, None
    for name, text in [*_tools(conversation), *_texts(conversation.turns)]:
        start = prompt.find(text.strip()[:_MAX_SHOWN])
        if text.strip() and best < start <= position:
            best, path = start, name
    return path


def _front(conversation: Conversation) -> Iterator[tuple[str, str]]:
    for offered in conversation.tools:
        yield offered.schema_path.rpartition(".")[0], offered.tool.description
    turns = conversation.turns
    first = next((i for i, turn in enumerate(turns) if turn.role not in ("system", "developer")), len(turns))
    yield from _texts(turns[: first + 1])


def _tools(conversation: Conversation) -> Iterator[tuple[str, str]]:
    for offered in conversation.tools:
        yield offered.schema_path.rpartition(".")[0], offered.tool.name


def _texts(turns: list[ChatTurn]) -> Iterator[tuple[str, str]]:
    for turn in turns:
        for part in turn.parts:
            if isinstance(part, TextPart):
                yield part.path, part.text
