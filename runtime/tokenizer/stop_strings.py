"""Finds stop strings in text that arrives in pieces, and holds back text that may be the beginning of one."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Passes text through until a stop string is complete.

    The first stop string to *complete* wins, the longest if several complete at the same character: so the result
    does not depend on how the text was cut into pieces. Each stop string is a Knuth-Morris-Pratt automaton, so cost is
    linear in the text whatever the strings; while no stop string has begun, ``str.find`` searches for first characters.
    """

    __slots__ = ("_automata", "_beginnings", "_held", "_include_stop", "matched")

    def __init__(self, stops: Sequence[str], include_stop: bool) -> None:
        self._automata = [_Automaton(stop) for stop in stops]
        self._beginnings = frozenset(stop[0] for stop in stops)
        self._include_stop = include_stop
        self._held = ""
        self.matched: str | None = None  # the stop string, once one is complete

    def push(self, text: str) -> str:
        """The text that can be emitted now; after a match, always ""."""
        if self.matched is not None:
            return ""
        if not self._held and self._beginnings.isdisjoint(text):
            return text
        end, best = len(text), -1
        for automaton in self._automata:
            found = automaton.push(text, end)
            if found >= 0 and (found < end or best < len(automaton.stop)):
                end, best, self.matched = found, len(automaton.stop), automaton.stop
        buffer = self._held + text
        if self.matched is not None:
            until = len(self._held) + end
            self._held = ""
            return buffer[: until if self._include_stop else until - best]
        keep = max((automaton.state for automaton in self._automata), default=0)
        until = len(buffer) - keep
        self._held = buffer[until:]
        return buffer[:until]

    def flush(self) -> str:
        """The text held back, at the end of the text."""
        held, self._held = self._held, ""
        return held


class _Automaton:
    """Knuth-Morris-Pratt: ``state`` is the length of the longest prefix of ``stop`` that the text so far ends with."""

    __slots__ = ("_fallback", "state", "stop")

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.state = 0
        self._fallback = [0] * len(stop)  # [i]: longest proper prefix of stop that is a suffix of stop[: i + 1]
        length = 0
        for i in range(1, len(stop)):
            while length and stop[i] != stop[length]:
                length = self._fallback[length - 1]
            length += stop[i] == stop[length]
            self._fallback[i] = length

    def push(self, text: str, end: int) -> int:
        """Index in ``text[:end]`` just past the first completed stop string, or -1."""
        stop, state, i = self.stop, self.state, 0
        while i < end:
            if not state:
                i = text.find(stop[0], i, end)
                if i < 0:
                    break
                state = 1
            else:
                while state and text[i] != stop[state]:
                    state = self._fallback[state - 1]
                state += text[i] == stop[state]
            i += 1
            if state == len(stop):
                self.state = state
                return i
        self.state = state
        return -1
