"""OpenAI's legacy ``logprobs`` of ``/v1/completions``: parallel lists over tokens, with offsets into the text."""

from __future__ import annotations

from typing import Any

from ....logprobs import TokenLogprob
from ....tokenizer.tokenizer import Tokenizer


class LegacyLogprobs:
    """Builds the object of one sample piece by piece. ``text_offset`` counts characters from the text's beginning."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, *, tokens_as_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._as_ids = tokens_as_ids  # vLLM's token_id:123 instead of a token's text
        self._offset = 0

    def add(self, tokens: list[int], rows: list[TokenLogprob | None], echoed: str = "") -> dict[str, Any]:
        """``rows[i]`` is None for the first token of a prompt: its logprob is null.

        ``echoed``: the prompt as it is returned, if the tokens begin with the prompt's.
        """
        result: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, row in zip(tokens, rows, strict=True):
            result["tokens"].append(self._text(token))
            result["token_logprobs"].append(None if row is None else row.logprob)
            result["top_logprobs"].append(None if row is None else self._top(row))
            result["text_offset"].append(self._offset)
            if self._is_shown(token, echoed):
                self._offset += _characters(self._tokenizer.token_bytes(token))
        return result

    def _is_shown(self, token: int, echoed: str) -> bool:
        """Whether the token is part of the text. Special tokens are, where an echoed prompt spells them out."""
        if token not in self._tokenizer.special_ids:
            return True
        if self._offset < len(echoed):
            return echoed.startswith(self._tokenizer.token_text(token), self._offset)
        return not self._skip_special

    def _top(self, row: TokenLogprob) -> dict[str, float]:
        """The k likeliest tokens and the sampled one. Of two ids with one text, the likelier keeps it."""
        top: dict[str, float] = {}
        for token, logprob in row.top:
            top.setdefault(self._text(token), logprob)
        top.setdefault(self._text(row.token), row.logprob)
        return top

    def _text(self, token: int) -> str:
        if self._as_ids:
            return f"token_id:{token}"
        data = self._tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:  # part of a character: OpenAI's notation
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _characters(data: bytes) -> int:
    """The number of characters that begin in ``data``, of a UTF-8 text."""
    return sum(byte & 0xC0 != 0x80 for byte in data)
