"""Which tokens wrote which part of a text."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from ....tokenizer.tokenizer import Tokenizer


class TokenPlaces:
    """Tokens and their text arrive separately, neither in step with the other: a token belongs where its first byte is.

    `add` tokens, read the text with `through`: how either was cut into pieces makes no difference to the sums. Where
    bytes were no UTF-8, the text is longer than they were and a boundary after it may be off by a token or two.
    """

    __slots__ = ("_hidden", "_starts", "_text_end", "_tokenizer", "_tokens_end")

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._starts: deque[int] = deque()  # of the tokens that are not placed yet: bytes
        self._tokens_end = self._text_end = 0  # bytes

    def add(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            self._starts.append(self._tokens_end)
            if token not in self._hidden:
                self._tokens_end += len(self._tokenizer.token_bytes(token))

    def through(self, text: str) -> int:
        """How many tokens begin in ``text``, which goes on where the last one ended. All must have been added."""
        self._text_end += len(text.encode())
        count = 0
        while self._starts and self._starts[0] < self._text_end:
            self._starts.popleft()
            count += 1
        return count
