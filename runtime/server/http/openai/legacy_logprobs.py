"""OpenAI's legacy ``logprobs`` of ``/v1/completions``: parallel lists over tokens, with offsets into the text."""

from __future__ import annotations

from typing import Any

from ....logprobs import TokenLogprob
from ....tokenizer.tokenizer import Tokenizer


class TokenTexts(dict[int, tuple[str, int]]):
    """(text as logprobs name it, number of characters that begin in it) by token id. Filled as ids are looked up: an
    evaluation's prompts repeat the same ids thousands of times."""

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool = False) -> None:
        """``as_ids``: vLLM's token_id:123 instead of a token's text."""
        super().__init__()
        self.tokenizer = tokenizer
        self._as_ids = as_ids

    def __missing__(self, token: int) -> tuple[str, int]:
        data = self.tokenizer.token_bytes(token)
        found = self[token] = f"token_id:{token}" if self._as_ids else _text(data), _characters(data)
        return found


class LegacyLogprobs:
    """Builds the object of one sample piece by piece. ``text_offset`` counts characters from the text's beginning."""

    def __init__(self, texts: TokenTexts, skip_special_tokens: bool) -> None:
        """``texts`` may be shared between samples."""
        self._texts = texts
        self._special = texts.tokenizer.special_ids
        self._skip_special = skip_special_tokens
        self._offset = 0

    def add(self, tokens: list[int], rows: list[TokenLogprob | None], echoed: str = "") -> dict[str, Any]:
        """``rows[i]`` is None for the first token of a prompt: its logprob is null.

        ``echoed``: the prompt as it is returned, if the tokens begin with the prompt's.
        """
        texts, offset = self._texts, self._offset
        names: list[str] = []
        offsets: list[int] = []
        for token in tokens:
            name, characters = texts[token]
            names.append(name)
            offsets.append(offset)
            if token not in self._special or self._is_shown(token, offset, echoed):
                offset += characters
        self._offset = offset
        return {
            "tokens": names,
            "token_logprobs": [None if row is None else row.logprob for row in rows],
            "top_logprobs": [None if row is None else self._top(row) for row in rows],
            "text_offset": offsets,
        }

    def _is_shown(self, token: int, offset: int, echoed: str) -> bool:
        """Whether a special token is part of the text. It is, where an echoed prompt spells it out."""
        if offset < len(echoed):
            return echoed.startswith(self._texts.tokenizer.token_text(token), offset)
        return not self._skip_special

    def _top(self, row: TokenLogprob) -> dict[str, float]:
        """The k likeliest tokens and the sampled one. Of two ids with one text, the likelier keeps it."""
        top: dict[str, float] = {}
        for token, logprob in row.top:
            top.setdefault(self._texts[token][0], logprob)
        top.setdefault(self._texts[row.token][0], row.logprob)
        return top


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:  # part of a character: OpenAI's notation
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _characters(data: bytes) -> int:
    """The number of characters that begin in ``data``, of a UTF-8 text."""
    return sum(byte & 0xC0 != 0x80 for byte in data)
