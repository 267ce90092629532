"""End-of-sequence tokens: the union of all files of a model, since any one of them may be the only correct one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from ..errors import LoadError


class EosSource(NamedTuple):
    """A place that may name end tokens: an id, a list of ids, or None for none."""

    file: str  # for errors
    value: Any


def eos_ids(sources: Iterable[EosSource], vocab_size: int) -> tuple[int, ...]:
    """The distinct ids that the sources name, in order. Raises `LoadError` naming the file with an invalid id.

    Ids outside the vocabulary are left out: some checkpoints list -1, or ids of a larger tokenizer.
    """
    found: dict[int, None] = {}
    for file, value in sources:
        for token in value if isinstance(value, list) else [] if value is None else [value]:
            if isinstance(token, bool) or not isinstance(token, int):
                raise LoadError(f"{file}: eos_token_id must hold integers, got {token!r}")
            if 0 <= token < vocab_size:
                found[token] = None
    return tuple(found)
