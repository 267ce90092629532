"""Encodes text piece by piece: a state's tokens never change, so each piece is encoded alone.

Text that a program appends is not trusted: ``<|im_end|>`` in a user's question must not end the user's turn. Only the
chat template's own text and `special` text may name special tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from .turns import TurnTemplate

if TYPE_CHECKING:
    from ...runtime.chat.tools.format_types import ReasoningFormat, ToolFormat
    from ...runtime.tokenizer.tokenizer import Tokenizer

TAIL = 8  # tokens before a piece that decide the text of its first one (a leading space)
# Between two words: every tokenizer tested begins a token at the space, so encoding the halves changes nothing.
_SAFE_CUT = re.compile(r"(?<=\w) (?=\w)")
_LAST_WORDS = 400  # characters to search for such a space


class Run(NamedTuple):
    """Text that may name special tokens (``special``) or may not."""

    text: str
    special: bool = False


class Codec:
    """One model's tokenizer, as the language uses it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.backend.get_added_tokens_decoder().values()
        self.special = frozenset(token.content for token in added if token.special)
        named = sorted(self.special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, named))) if named else None
        self._opening: list[int] = tokenizer.opening.tolist()
        # The prompt after which a text is scored by itself.
        self.neutral: list[int] = self._opening or [tokenizer.eos_id if tokenizer.eos_id is not None else 0]

    @cached_property
    def turns(self) -> TurnTemplate | None:
        """The chat template, if the model has one. Shared by all runs: it memoizes renderings."""
        template = self.tokenizer.chat_template
        return None if template is None else TurnTemplate(template)

    @cached_property
    def _formats(self) -> tuple[ToolFormat | None, ReasoningFormat | None]:
        from ...runtime.chat.tools.detect import detect
        from ...runtime.chat.tools.formats import tool_format
        from ...runtime.chat.tools.reasoning_formats import reasoning_format

        template = self.tokenizer.chat_template
        if template is None:
            return None, None
        found = detect(template.source, self.special)
        calls = tool_format(found.tools) if found.tools and template.writes_tools else None
        return calls, reasoning_format(found.reasoning) if found.reasoning else None

    @property
    def calls(self) -> ToolFormat | None:
        """How the model writes tool calls, detected from its chat template; None: not detected."""
        return self._formats[0]

    @property
    def thoughts(self) -> ReasoningFormat | None:
        """How the model marks its reasoning, detected the same way."""
        return self._formats[1]

    def encode(self, runs: Sequence[Run], *, opening: bool = False) -> list[int]:
        """The ids of ``runs`` as one text. ``opening``: it begins the prompt."""
        runs = [run for run in runs if run.text]
        if not runs:
            return []
        encode = self.tokenizer.encode_first if opening else self.tokenizer.encode_more
        # A template writes its own <bos>; a text that begins with no special token gets the tokenizer's.
        ids = [] if not opening or self._begins_special(runs[0]) else list(self._opening)
        if self._is_plain(runs):
            return [*ids, *encode("".join(run.text for run in runs), parse_special=True).tolist()]
        for run in runs:
            ids += encode(run.text, parse_special=run.special).tolist()
            encode = self.tokenizer.encode_more
        return ids

    def text_of(self, ids: Sequence[int], tail: Sequence[int] = ()) -> str:
        """The text of ``ids`` after the tokens ``tail``, as a client is shown it."""
        if not tail or self.tokenizer.byte_level:
            return self.tokenizer.decode(ids)
        before = self.tokenizer.decode(tail)
        return self.tokenizer.decode([*tail, *ids])[len(before) :]

    def kept(self, ids: Sequence[int], text: str, tail: Sequence[int] = ()) -> tuple[list[int], str]:
        """The tokens of an answer that a stop string cut to ``text``, and the text after the last complete one."""
        count, whole = len(ids), self.text_of(ids, tail)
        while count and not text.startswith(whole):
            count -= 1
            whole = self.text_of(ids[:count], tail)
        return list(ids[:count]), text[len(whole) :] if count else text

    def _is_plain(self, runs: Sequence[Run]) -> bool:
        """Whether the text as a whole names no special tokens except those in special runs."""
        if self._special is None or all(run.special for run in runs):
            return True
        named = len(self._special.findall("".join(run.text for run in runs)))
        return named == sum(len(self._special.findall(run.text)) for run in runs if run.special)

    def _begins_special(self, run: Run) -> bool:
        return run.special and self._special is not None and self._special.match(run.text) is not None


def safe_cut(text: str) -> int:
    """Length of the longest prefix of ``text`` that can be encoded alone without changing later tokens; may be 0."""
    if text.endswith("\n"):
        return len(text)
    return max((found.start() for found in _SAFE_CUT.finditer(text, max(0, len(text) - _LAST_WORDS))), default=0)
