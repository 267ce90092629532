"""Text that arrives in pieces, read as if it were whole.

Readers are generators that ``yield`` where they need more text, so their result does not depend on how the text was
cut. Unread text never grows past the longest marker: every piece is scanned once.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TypeAlias, TypeVar

T = TypeVar("T")
Wait: TypeAlias = Generator[None, None, T]  # yields for more text, returns a T
Show: TypeAlias = Callable[[str], None]

SPACE = re.compile(r"[ \t\r\n]+")  # JSON's
_SPACES = frozenset(["", " ", "\t", "\r", "\n"])


class Malformed(Exception):
    """The text departs from the format at the reader's position, or ends too early.

    ``opened``: the brackets that are open there, as far as the raising reader knows. ``missing``: what makes a whole
    JSON text of the value that was shown in part.
    """

    def __init__(self, opened: str = "", missing: str = "") -> None:
        super().__init__(opened, missing)
        self.opened, self.missing = opened, missing


class Markers:
    """Fixed strings to find in a text, the leftmost first.

    ``markers`` maps each to the number of newlines right before it that belong to it; a list means none. Raises
    ValueError if one contains another: in a text that arrives in pieces, which of the two it is could not be decided.
    """

    __slots__ = ("_firsts", "_longest", "_pattern", "all", "most_newlines", "newlines")

    def __init__(self, markers: Mapping[str, int] | Sequence[str]) -> None:
        self.newlines = dict(markers) if isinstance(markers, Mapping) else dict.fromkeys(markers, 0)
        self.all = tuple(self.newlines)
        if "" in self.newlines or any(one in other for one, other in itertools.permutations(self.all, 2)):
            raise ValueError(f"markers that contain one another: {self.all}")
        self.most_newlines = max(self.newlines.values(), default=0)
        self._longest = max(map(len, self.all), default=0)
        self._pattern = re.compile("|".join(map(re.escape, self.all)) if self.all else "(?!)")
        self._firsts = re.compile("|".join(sorted({re.escape(marker[0]) for marker in self.all})) or "(?!)")

    def find(self, text: str, at: int) -> re.Match[str] | None:
        return self._pattern.search(text, at)

    def begun(self, text: str, at: int) -> int:
        """Where the end of ``text`` may be the beginning of a marker; its length if nowhere."""
        for first in self._firsts.finditer(text, max(at, len(text) - self._longest + 1)):
            start = first.start()
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

    # Generators from here on. They run for every few characters, so none calls another: each call costs a frame.

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

    def until(self, markers: Markers, show: Show) -> Wait[str]:
        """Reads up to a marker, which stays unread and is returned; "" at the end of the text.

        ``show`` gets the text in pieces, without the newlines that belong to the marker.
        """
        while True:
            text = self.text
            match = markers.find(text, self.at)
            if match:
                end, newlines = match.start(), markers.newlines[match.group()]
            elif self.ended:
                end, newlines = len(text), 0
            else:
                end, newlines = markers.begun(text, self.at), markers.most_newlines
            shown = end
            if newlines:
                first = max(self.at, end - newlines)
                while shown > first and text[shown - 1] == "\n":
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
