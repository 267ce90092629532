"""Estimates of the value count and nesting depth of a JSON text from its bytes, before it is parsed.

Parsing a hostile body would block the event loop; these scans are vectorised and yield to the loop between slices.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

SLICE = 1 << 18  # bytes scanned between two yields to the event loop: about a millisecond
_QUOTE, _COMMA, _COLON, _BACKSLASH, _OPENING, _CLOSING = b'",:\\[]'

Bytes = npt.NDArray[np.uint8]


class Values(NamedTuple):
    """Upper bounds on the values that a parser makes of a text before it succeeds or fails.

    Object keys count too; lists and objects count twice, empty ones three times, which is what they cost to parse.
    """

    all: int
    large: int  # strings, lists and objects, the text itself included
    escapes: int  # backslashes


NONE = Values(0, 0, 0)


async def count_values(text: bytes, most: int) -> Values:
    """Counts exactly only if a rough count, which includes punctuation inside strings, exceeds ``most``.

    Yields to the event loop between slices.
    """
    found = NONE
    for part in _slices(text):
        found = _added(found, _rough(part))
        await asyncio.sleep(0)
    if found.all <= most:
        return found
    exact, outside = NONE._replace(escapes=found.escapes), _Outside()
    for part in _slices(text):
        exact = _added(exact, outside.count(part))
        await asyncio.sleep(0)
    return exact


async def deeper_than(text: bytes, most: int) -> bool:
    """`deeper_than_now`, but yields to the event loop between slices."""
    if len(text) <= SLICE:
        return deeper_than_now(text, most)
    outside = _Outside()
    for part in _slices(text):
        if outside.depth(part) > most:
            return True
        await asyncio.sleep(0)
    return False


def deeper_than_now(text: bytes, most: int) -> bool:
    """Whether lists and objects are nested more than ``most`` deep, as far as a parser would read the text."""
    if text.count(b"[") + text.count(b"{") <= most:
        return False
    outside = _Outside()
    return any(outside.depth(part) > most for part in _slices(text))


def _slices(text: bytes) -> Iterator[Bytes]:
    whole = np.frombuffer(text, np.uint8)
    return (whole[start : start + SLICE] for start in range(0, len(whole), SLICE))


def _added(a: Values, b: Values) -> Values:
    return Values(a.all + b.all, a.large + b.large, a.escapes + b.escapes)


def _rough(part: Bytes) -> Values:
    opening = _bracket(part, _OPENING)
    values = sum(int(np.count_nonzero(one)) for one in (part == _COMMA, part == _COLON, opening, opening))
    return Values(values, values, int(np.count_nonzero(part == _BACKSLASH)))


def _bracket(part: Bytes, which: int) -> npt.NDArray[np.bool_]:
    """Where a list or an object opens (or closes): the two brackets differ in one bit."""
    return (part & 0xDF) == which


class _Outside:
    """Scans one text slice by slice, skipping the insides of strings."""

    def __init__(self) -> None:
        self._inside = 0  # 1 if the last slice ended inside a string
        self._backslashes = 0  # at the end of the last slice, modulo 2
        self._depth = 0  # of lists and objects at the end of the last slice

    def count(self, part: Bytes) -> Values:
        """Everything but `Values.escapes`."""
        opening = _bracket(part, _OPENING)
        marks, strings = self._marks(part, opening | (part == _COMMA) | (part == _COLON))
        opened = int(np.count_nonzero(_bracket(marks, _OPENING)))
        return Values(len(marks) + opened, opened + strings, 0)

    def depth(self, part: Bytes) -> int:
        """The largest depth in this slice."""
        marks, _ = self._marks(part, _bracket(part, _OPENING) | _bracket(part, _CLOSING))
        if not len(marks):
            return self._depth
        depths = np.cumsum(np.where(_bracket(marks, _OPENING), 1, -1))
        deepest, self._depth = self._depth + int(depths.max()), self._depth + int(depths[-1])
        return deepest

    def _marks(self, part: Bytes, wanted: npt.NDArray[np.bool_]) -> tuple[Bytes, int]:
        """The ``wanted`` bytes outside strings, and how many strings begin."""
        quotes = part == _QUOTE
        self._drop_escaped(part, quotes)
        marks = part[quotes | wanted]
        quotes = marks == _QUOTE
        within = np.cumsum(quotes, dtype=np.uint8) + self._inside & 1
        if len(marks):
            self._inside = int(within[-1])
        return marks[(within == 0) & ~quotes], int(np.count_nonzero(within[quotes]))

    def _drop_escaped(self, part: Bytes, quotes: npt.NDArray[np.bool_]) -> None:
        """Clears quotes that an odd number of backslashes precedes: they neither begin nor end a string."""
        quotes[0] &= not self._backslashes
        places = np.flatnonzero(part == _BACKSLASH)
        if not len(places):
            self._backslashes = 0
            return
        begins = np.concatenate(([True], np.diff(places) > 1))
        begun = np.maximum.accumulate(np.where(begins, places, 0))
        # A run of backslashes at the end of the last slice continues at the first byte of this one.
        lengths = places - begun + 1 + np.where(begun == 0, self._backslashes, 0)
        odd = places[lengths & 1 == 1] + 1
        quotes[odd[odd < len(part)]] = False
        self._backslashes = int(lengths[-1]) & 1 if places[-1] == len(part) - 1 else 0
