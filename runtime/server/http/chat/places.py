"""Which part of a text each token wrote."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from ....tokenizer.tokenizer import Tokenizer


class TokenPlaces:
    """Counts the tokens of consecutive parts of a text; a token belongs to the part that has its first byte.

    Tokens and text arrive separately and out of step: `add` the tokens, then pass each part to `through`. The counts
    do not depend on how either is cut. After bytes that are not UTF-8, a boundary may be off by a token or two.
    """

    __slots__ = ("_hidden", "_starts", "_text_end", "_tokenizer", "_tokens_end")

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._starts: deque[int] = deque()  # byte offsets of tokens not counted yet
        self._tokens_end = self._text_end = 0  # bytes

    def add(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            self._starts.append(self._tokens_end)
            if token not in self._hidden:
                self._tokens_end += len(self._tokenizer.token_bytes(token))

    def through(self, text: str) -> int:
        """How many tokens begin in ``text``, which follows the last part. Its tokens must have been added."""
        self._text_end += len(text.encode())
        count = 0
        while self._starts and self._starts[0] < self._text_end:
            self._starts.popleft()
            count += 1
        return count
