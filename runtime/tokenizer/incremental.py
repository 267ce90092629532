"""Incremental decoding: tokens in one at a time, text out as soon as it can no longer change.

Whatever the pieces, joined they are `Tokenizer.decode` of all tokens. There are two ways:

- A byte-level vocabulary (GPT-2's, so Llama 3's, Qwen's, Mistral's since Nemo) maps every token to bytes on its own,
  so an incremental UTF-8 decoder is exact and costs the token's bytes.
- Any other decoder (SentencePiece-like, with byte fallback) is called on a short window of tokens: those whose text was
  emitted last, as context, and those since. A run of byte tokens is decoded whole, because one bad byte turns the whole
  run into U+FFFD. At most `HOLD_LIMIT` tokens are held back, so cost is linear. The bound has a price: in a longer run
  of byte tokens, characters emitted before a bad byte arrives stay as they were.

A stream starts from the last tokens of the prompt. Their text is not emitted, but it decides whether a leading space is
kept (SentencePiece drops it only at the start of a text), and it may end inside a character. The pieces then join to
the text of prompt and output less the text of the prompt, where the U+FFFD of an incomplete last character of the
prompt does not count if the output completes it.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from .tokenizer import Tokenizer

HOLD_LIMIT = 16  # tokens a `WindowStream` holds back at most: about five characters in byte tokens
REPLACEMENT = "\ufffd"


class TextStream(Protocol):
    def push(self, token: int) -> str:
        """The text that is certain now and was not before ``token``."""
        ...

    def flush(self) -> str:
        """The text held back, as if no more tokens came: incomplete characters become U+FFFD."""
        ...

    @property
    def settled(self) -> bool:
        """Whether nothing is held back: the text so far is exactly that of the tokens so far."""
        ...


def open_stream(
    tokenizer: Tokenizer, tail: Sequence[int], skip_special_tokens: bool, *, truncated: bool = False
) -> TextStream:
    """A stream of the kind the tokenizer's decoder needs.

    Args:
        tokenizer: the model's.
        tail: the last tokens of the prompt.
        skip_special_tokens: whether special tokens have no text.
        truncated: whether the prompt has other tokens before ``tail``.
    """
    if tokenizer.byte_level:
        return ByteLevelStream(tokenizer, tail, skip_special_tokens)
    return WindowStream(tokenizer, tail, skip_special_tokens, truncated)


class ByteLevelStream:
    """Exact and linear: the bytes of each token through an incremental UTF-8 decoder."""

    def __init__(self, tokenizer: Tokenizer, tail: Sequence[int], skip_special_tokens: bool) -> None:
        self._bytes_of = tokenizer.token_bytes
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.decode(b"".join(self._bytes_of(token) for token in tail if token not in self._skipped))
        self._in_prompt = bool(self._decoder.getstate()[0])  # whether the next character begins in the prompt

    def push(self, token: int) -> str:
        return "" if token in self._skipped else self._emit(self._decoder.decode(self._bytes_of(token)))

    def flush(self) -> str:
        return self._emit(self._decoder.decode(b"", final=True))

    @property
    def settled(self) -> bool:
        return not self._in_prompt and not self._decoder.getstate()[0]

    def _emit(self, text: str) -> str:
        if text and self._in_prompt:
            self._in_prompt = False
            return text.removeprefix(REPLACEMENT)  # never completed, so it belongs to the prompt's text
        return text


class WindowStream:
    """For every other decoder: decodes ``_context``, the tokens emitted last, with ``_pending``, those since."""

    def __init__(
        self, tokenizer: Tokenizer, tail: Sequence[int], skip_special_tokens: bool, truncated: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._byte_tokens = tokenizer.byte_token_ids
        self._context = list(tail)
        self._pending: list[int] = []
        if truncated:
            # The tail may begin inside a character, or have no text of its own.
            while self._context and self._is_continuation(self._context[0]):
                del self._context[0]
            self._context = [*tokenizer.anchor, *self._context]

    def push(self, token: int) -> str:
        if token in self._skipped or token >= self._tokenizer.vocab_size:
            return ""
        self._pending.append(token)
        full = len(self._pending) >= HOLD_LIMIT
        if token not in self._byte_tokens:
            return self._emit(len(self._pending), force=full)
        return self._emit(len(self._pending) - self._unfinished_bytes(), force=True) if full else ""

    def flush(self) -> str:
        return self._emit(len(self._pending), force=True) if self._pending else ""

    @property
    def settled(self) -> bool:
        return not self._pending

    def _emit(self, count: int, *, force: bool) -> str:
        """The text of the first ``count`` pending tokens. Unless ``force``, text that may still change is held back."""
        tokens = self._pending[:count]
        before, text = self._decode(self._context), self._decode(self._context + tokens)
        while before.endswith(REPLACEMENT) and not text.startswith(before):
            before = before[:-1]  # an incomplete character of the prompt, which these tokens complete
        # A bad byte may change characters of its run that were emitted: then the new tokens are decoded alone.
        text = text[len(before) :] if text.startswith(before) else self._decode(tokens)
        if not force and (not text or text.endswith(REPLACEMENT)):
            return ""
        self._context, self._pending = tokens, self._pending[count:]
        return text

    def _unfinished_bytes(self) -> int:
        """The number of byte tokens at the end that belong to a character which more bytes may complete."""
        run: list[bytes] = []
        for token in reversed(self._context + self._pending):
            if token not in self._byte_tokens:
                break
            run.append(self._tokenizer.token_bytes(token))
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            decoder.decode(b"".join(reversed(run)))
        except UnicodeDecodeError:  # one bad byte, and every byte of the run is U+FFFD
            return 0
        return len(decoder.getstate()[0])

    def _is_continuation(self, token: int) -> bool:
        return token in self._byte_tokens and 0x80 <= self._tokenizer.token_bytes(token)[0] < 0xC0

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=self._skip)
