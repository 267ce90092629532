"""A model's tokenizer in the form that llguidance takes: the bytes of each token, and which tokens are special.

llguidance can read a ``tokenizer.json`` itself, but takes every added token written ``<…>`` for special. Many are not:
``<tool_call>`` and ``<think>`` of Qwen 2.5 and 3, Gemma's HTML tags. Its masks would then allow such a token where the
text calls for it, and its matcher would reject it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..tokenizer.tokenizer import Tokenizer

_CACHED_TEXTS, _CACHED_LENGTH = 4096, 64  # texts that outputs of one grammar repeat, e.g. property names; characters


class Vocabulary:
    """The protocol of ``llguidance.TokenizerWrapper``: its attributes, and a call that tokenizes text.

    Args:
        size: the model's vocabulary. Ids that the tokenizer does not have are empty and never allowed; tokens that the
            model does not have are spelled by others.
        eos_ids: tokens that end an output. They count as special: no text of a grammar matches them.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, size: int, eos_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self.tokens = [tokenizer.token_bytes(id) for id in range(size)]
        special = tokenizer.special_ids.union(eos_ids)
        self.special_token_ids = sorted(id for id in special if id < size)
        self.eos_token_id = min(eos_ids, default=0)
        self._cached = lru_cache(_CACHED_TEXTS)(self._tokenize)

    def __call__(self, text: str) -> list[int]:
        """Tokens that spell exactly ``text``: the tokenizer's own, where it does not change the text.

        A normalizer may change it (NFC composes characters, others lowercase); llguidance does not check.
        """
        return list(self._cached(text)) if len(text) <= _CACHED_LENGTH else self._tokenize(text)

    def _tokenize(self, text: str) -> list[int]:
        data = text.encode()
        ids: list[int] = self._tokenizer.encode_more(text).tolist()
        known = max(ids, default=0) < len(self.tokens)
        return ids if known and b"".join([self.tokens[id] for id in ids]) == data else self._longest_match(data)

    def _longest_match(self, data: bytes) -> list[int]:
        """Tokens that spell ``data``, or as much of its beginning as tokens can: the longest first."""
        ids: list[int] = []
        start = 0
        while start < len(data):
            longest = min(len(data) - start, self._longest)
            ends = range(start + longest, start, -1)
            end = next((end for end in ends if data[start:end] in self._ids), start)
            if end == start:
                break
            ids.append(self._ids[data[start:end]])
            start = end
        return ids

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        """Ordinary tokens by their bytes; of equal ones, the first."""
        special = set(self.special_token_ids)
        pairs = [(token, id) for id, token in enumerate(self.tokens) if token and id not in special]
        return dict(reversed(pairs))

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._ids), default=0)
