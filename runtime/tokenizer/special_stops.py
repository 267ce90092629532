"""Stop strings that contain special tokens, for text from which special tokens are skipped."""

from __future__ import annotations

from collections.abc import Sequence

from .tokenizer import Tokenizer

_FIRST_MARK = 0xD800  # lone surrogates: one character each, and decoded text never holds them


class SpecialStops:
    """Writes each special token that a stop string contains as one character, its mark.

    `StopMatcher` gets ``stops``, and the text with a mark where such a token was skipped. Its output goes through
    `visible`.
    """

    __slots__ = ("_marks", "_originals", "marks", "stops")

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        texts: dict[str, int] = {}
        if any(tokenizer.special_in(stop) is not None for stop in stops):
            texts = {tokenizer.token_text(id): id for id in tokenizer.special_ids}
            texts = {text: texts[text] for text in texts if text and any(text in stop for stop in stops)}
        marks = {text: chr(_FIRST_MARK + i) for i, text in enumerate(sorted(texts, key=len, reverse=True))}
        self.marks = {texts[text]: mark for text, mark in marks.items()}  # token -> its mark in the text
        self._marks = str.maketrans(dict.fromkeys(marks.values(), ""))
        self._originals: dict[str, str] = {}
        for stop in stops:
            marked = stop
            for text, mark in marks.items():  # the longest first
                marked = marked.replace(text, mark)
            self._originals[marked] = stop
        self.stops = tuple(self._originals)

    def original(self, stop: str) -> str:
        """The stop string that became ``stop``."""
        return self._originals[stop]

    def visible(self, text: str, stop: str | None = None) -> str:
        """``text`` without marks; of ``stop``, with which it ends, the special tokens are spelled out."""
        if not self.marks:
            return text
        if stop is None:
            return text.translate(self._marks)
        return text.removesuffix(stop).translate(self._marks) + self._originals[stop]
