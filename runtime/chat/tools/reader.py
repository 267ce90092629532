"""Text that arrives in pieces, read as if it were whole.

What reads it is written as generators that ``yield`` where they need more text, so no reader can see how the text was
cut. Unread text never grows past the longest marker: every piece is scanned once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from typing import TypeAlias, TypeVar

T = TypeVar("T")
Wait: TypeAlias = Generator[None, None, T]  # yields for more text, returns a T
Show: TypeAlias = Callable[[str], None]

SPACE = re.compile(r"[ \t\r\n]+")  # JSON's
_SPACES = frozenset(["", " ", "\t", "\r", "\n"])


class Malformed(Exception):
    """The text stops following the format where the reader stands, or ends too early."""


class Markers:
    """Fixed strings to find in a text, the leftmost first.

    The first character of each must appear nowhere else in any of them, so two can never overlap, and where a text
    ends there is one place at most where one may have begun. Raises ValueError otherwise.
    """

    __slots__ = ("_firsts", "_longest", "_pattern", "all")

    def __init__(self, markers: Sequence[str]) -> None:
        self.all = tuple(dict.fromkeys(markers))
        self._firsts = "".join(sorted({marker[:1] for marker in self.all}))
        if not all(self.all) or any(first in marker[1:] for marker in self.all for first in self._firsts):
            raise ValueError(f"markers that may overlap: {self.all}")
        self._longest = max(map(len, self.all), default=0)
        self._pattern = re.compile("|".join(map(re.escape, self.all)) if self.all else "(?!)")

    def find(self, text: str, at: int) -> re.Match[str] | None:
        return self._pattern.search(text, at)

    def begun(self, text: str, at: int) -> int:
        """Where the end of ``text`` may be the beginning of a marker; its length if nowhere."""
        at = max(at, len(text) - self._longest + 1)
        start = -1
        for first in self._firsts:
            start = max(start, text.rfind(first, at))
        if start >= 0:
            tail = text[start:]
            for marker in self.all:
                if marker.startswith(tail):
                    return start
        return len(text)


class Reader:
    """The unread text, and what was read since the last `drain`: its source, character for character."""

    __slots__ = ("_taken", "at", "ended", "text")

    def __init__(self) -> None:
        self.text = ""
        self.at = 0  # everything before it has been read
        self.ended = False  # no more text will come
        self._taken: list[str] = []

    def push(self, text: str) -> None:
        self.text = self.text[self.at :] + text
        self.at = 0

    def take(self, end: int) -> str:
        """Reads up to ``end``, an index into `text`."""
        taken = self.text[self.at : end]
        self.at = end
        self._taken.append(taken)
        return taken

    def drain(self) -> str:
        """The source of everything read since the last call."""
        if len(self._taken) == 1:
            return self._taken.pop()
        taken = "".join(self._taken)
        self._taken.clear()
        return taken

    # The rest read on as text arrives. They are called for every few characters, so none builds on another.

    def peek(self) -> Wait[str]:
        """The next character, unread; "" at the end."""
        while self.at == len(self.text) and not self.ended:
            yield
        return self.text[self.at : self.at + 1]

    def ahead(self, options: Sequence[str]) -> Wait[str]:
        """Which of ``options`` comes next, unread; "" if none. None of them may begin with another."""
        longest = max(map(len, options), default=0)
        while True:
            text = self.text[self.at : self.at + longest]
            for option in options:
                if text.startswith(option):
                    return option
            if self.ended or not any(option.startswith(text) for option in options):
                return ""
            yield

    def literal(self, options: Sequence[str]) -> Wait[str]:
        """Reads one of ``options`` if it comes next, and returns it; reads nothing and returns "" otherwise."""
        found = yield from self.ahead(options)
        if found:
            self.take(self.at + len(found))
        return found

    def optional(self, character: str) -> Wait[bool]:
        """Reads ``character`` if it comes next."""
        while self.at == len(self.text) and not self.ended:
            yield
        if self.text[self.at : self.at + 1] != character:
            return False
        self.take(self.at + 1)
        return True

    def expect(self, character: str) -> Wait[None]:
        while self.at == len(self.text) and not self.ended:
            yield
        if self.text[self.at : self.at + 1] != character:
            raise Malformed
        self.take(self.at + 1)

    def stream(self, pattern: re.Pattern[str], show: Show) -> Wait[str]:
        """Reads while ``pattern``, one or more of a class of characters, matches. ``show`` gets it in pieces.

        Returns the character that follows, unread; "" at the end.
        """
        while True:
            match = pattern.match(self.text, self.at)
            if match:
                show(self.take(match.end()))
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            yield

    def run(self, pattern: re.Pattern[str]) -> Wait[str]:
        """What `stream` shows, whole."""
        pieces = ""
        while True:
            match = pattern.match(self.text, self.at)
            if match:
                pieces += self.take(match.end())
            if self.at < len(self.text) or self.ended:
                return pieces
            yield

    def space(self) -> Wait[str]:
        """Reads whitespace, returns the character that follows, unread; "" at the end."""
        while True:
            following = self.text[self.at : self.at + 1]
            if following in _SPACES:
                match = SPACE.match(self.text, self.at)
                if match:
                    self.take(match.end())
                following = self.text[self.at : self.at + 1]
            if following or self.ended:
                return following
            yield

    def until(self, markers: Markers, show: Show, *, drop_newline: bool = False) -> Wait[str]:
        """Reads up to a marker, which stays unread and is returned; "" at the end of the text.

        ``show`` gets the text in pieces. ``drop_newline``: one newline right before the marker is read, not shown.
        """
        while True:
            match = markers.find(self.text, self.at)
            if match:
                end = shown = match.start()
                held = drop_newline
            elif self.ended:
                end = shown = len(self.text)
                held = False
            else:
                end = shown = markers.begun(self.text, self.at)
                held = drop_newline
            if held and end > self.at and self.text[end - 1] == "\n":
                shown -= 1
            if shown > self.at:
                show(self.take(shown))
            if match:
                if end > shown:
                    self.take(end)
                return match.group()
            if self.ended:
                return ""
            yield
