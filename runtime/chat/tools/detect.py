"""Which formats a checkpoint writes, read off its chat template and special tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from .format_types import ReasoningFormat
from .formats import TOOL_FORMATS
from .reasoning_formats import REASONING_FORMATS, reasoning_format

_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)  # Jinja's: it may mention formats that the template does not write


class Detected(NamedTuple):
    """Names of formats; None if no known format is recognised."""

    tools: str | None
    reasoning: str | None


def detect(template_text: str, special_tokens: Iterable[str] = ()) -> Detected:
    """The formats that the template writes for past calls and thinking. A marker alone is not enough: models share
    ``<tool_call>`` and write different payloads after it, so a format is named only if its payload is there too."""
    specials, template = frozenset(special_tokens), _COMMENT.sub("", template_text)
    return Detected(_tools(template, specials), _reasoning(template, specials))


def _tools(template: str, specials: frozenset[str]) -> str | None:
    # Special tokens decide alone only if there is no template: checkpoints with and without tools share tokenizers.
    both = "\n".join((template, *specials))
    text = template or both
    for format in TOOL_FORMATS.values():
        if all(re.search(sign, text) for sign in format.signs) and re.search(format.special_sign, both):
            return format.name
    return None


def _reasoning(template: str, specials: frozenset[str]) -> str | None:
    for format in REASONING_FORMATS.values():
        if all(sign in template for sign in (format.sign, format.end)):
            return format.name
        if not format.sign and {format.begin, format.end} <= specials:
            return format.name
    return None


def ends_in_reasoning(prompt: str, reasoning: ReasoningFormat | str | None) -> bool:
    """Whether a rendered prompt leaves reasoning open, so that the model's output begins inside it."""
    if reasoning is None:
        return False
    format = reasoning_format(reasoning) if isinstance(reasoning, str) else reasoning
    return prompt.rstrip().endswith(format.begin)
