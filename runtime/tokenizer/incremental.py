"""Tokens to text, one token at a time: what is new, held back until it can no longer change.

The pieces of a stream joined are `Tokenizer.decode` of all its tokens, whatever the pieces. Two ways there:

- A byte-level vocabulary (GPT-2's, so Llama 3's, Qwen's, Mistral's since Nemo) maps every token to bytes on its own,
  so an incremental UTF-8 decoder is exact and costs the token's bytes.
- Any other decoder (SentencePiece-like, with byte fallback) goes through `tokenizers.decoders.DecodeStream`, with
  two cares it lacks: a run of byte tokens is decoded whole (one bad byte turns the *whole run* into U+FFFD, which is
  where its "Invalid prefix" errors come from), and what it holds back is bounded and can be flushed. The bound has a
  price: in a run of more than `HOLD_LIMIT` byte tokens, characters shown before a bad byte arrives stay as they were.

A stream may be primed with the last tokens of the prompt. Their text is never emitted, but they say whether a leading
space is kept (SentencePiece drops it only at the start of a text).
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from tokenizers.decoders import DecodeStream

from .tokenizer import Tokenizer

HOLD_LIMIT = 16  # tokens a `WindowStream` holds back at most: some five characters in bytes, and cost stays linear
REPLACEMENT = "\ufffd"


class TextStream(Protocol):
    def push(self, token: int) -> str:
        """The text that is certain now and was not before ``token``."""
        ...

    def flush(self) -> str:
        """The rest, when no more tokens will come; incomplete characters become U+FFFD."""
        ...

    @property
    def settled(self) -> bool:
        """Whether nothing is held back: the text so far is exactly that of the tokens so far."""
        ...


def open_stream(tokenizer: Tokenizer, tail: Sequence[int], skip_special_tokens: bool) -> TextStream:
    """A stream of the kind the tokenizer's decoder needs, primed with ``tail``, the last tokens of the prompt."""
    kind = ByteLevelStream if tokenizer.byte_level else WindowStream
    return kind(tokenizer, tail, skip_special_tokens)


class ByteLevelStream:
    """Exact and linear: bytes of each token through an incremental UTF-8 decoder.

    A prompt may end inside a character. If the output completes it, the character is emitted; if not, the prompt's
    share of the broken character is not.
    """

    def __init__(self, tokenizer: Tokenizer, tail: Sequence[int], skip_special_tokens: bool) -> None:
        self._bytes_of = tokenizer.token_bytes
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._completing: bytes | None = None  # output bytes so far, while a character of the prompt is open
        self._decoder.decode(b"".join(self._bytes_of(token) for token in tail if token not in self._skipped))
        if self._decoder.getstate()[0]:
            self._completing = b""

    def push(self, token: int) -> str:
        if token in self._skipped:
            return ""
        data = self._bytes_of(token)
        text = self._decoder.decode(data)
        if self._completing is None:
            return text
        self._completing += data
        if not text:
            return ""
        if text[0] == REPLACEMENT:
            self._decoder.reset()
            text = self._decoder.decode(self._completing)
        self._completing = None
        return text

    def flush(self) -> str:
        rest = self._decoder.decode(b"", final=True)
        if self._completing is not None:
            rest = self._completing.decode("utf-8", "replace")
            self._completing = None
        return rest

    @property
    def settled(self) -> bool:
        return self._completing is None and not self._decoder.getstate()[0]


class WindowStream:
    """For every other decoder: `DecodeStream` over a short window of tokens.

    ``_settled`` are the tokens of the last emission, the window's left context, and ``_pending`` those since: the
    stream's own state, which it does not show, needed to flush and to recover.
    """

    def __init__(self, tokenizer: Tokenizer, tail: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._byte_tokens = tokenizer.byte_token_ids
        self._run: list[int] = []  # byte tokens whose run has not ended
        self._pending: list[int] = []
        settled = list(tail)
        while settled and (settled[-1] in tokenizer.byte_token_ids or self._decode(settled).endswith(REPLACEMENT)):
            settled.pop()
        self._settled = settled
        self._stream = self._open()

    def push(self, token: int) -> str:
        if token in self._skipped or token >= self._tokenizer.vocab_size:
            return ""
        self._run.append(token)
        until = len(self._run)
        if token in self._byte_tokens:
            if until < HOLD_LIMIT:
                return ""
            until = self._complete_bytes()
        ids, self._run = self._run[:until], self._run[until:]
        self._pending += ids
        if self._stream is None:
            return self._force()
        try:
            text: str | None = self._stream.step(self._tokenizer.backend, ids)
        except Exception as error:  # tokenizers raises plain Exception
            if "prefix" not in str(error).lower():
                raise
            return self._force()
        if text is None:
            return self._force() if len(self._pending) >= HOLD_LIMIT else ""
        self._settled, self._pending = self._pending, []
        return text

    def flush(self) -> str:
        self._pending += self._run
        self._run = []
        return self._force() if self._pending else ""

    @property
    def settled(self) -> bool:
        return not self._run and not self._pending

    def _complete_bytes(self) -> int:
        """How many of the run's bytes are whole characters: all but an unfinished last one, if it is valid so far."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            decoder.decode(b"".join(self._tokenizer.token_bytes(token) for token in self._run))
        except UnicodeDecodeError:  # the run is spoilt, and so is every byte of it
            return len(self._run)
        return len(self._run) - len(decoder.getstate()[0])

    def _force(self) -> str:
        """The text of what is pending, complete or not; the window starts anew after it."""
        before, text = self._decode(self._settled), self._decode(self._settled + self._pending)
        text = text[len(before) :] if text.startswith(before) else self._decode(self._pending)
        self._settled, self._pending = self._pending, []
        self._stream = self._open()
        return text

    def _open(self) -> DecodeStream | None:
        """None after text that ends in U+FFFD: a `DecodeStream` cannot be primed with it and would emit it again."""
        if self._decode(self._settled).endswith(REPLACEMENT):
            return None
        return DecodeStream(ids=self._settled, skip_special_tokens=self._skip)

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=self._skip)
