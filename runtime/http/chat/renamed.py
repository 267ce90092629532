"""Errors in a client's words, for routes that ask for chats under names of their own."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ...errors import InvalidRequest

_INDEX = re.compile(r"\[(\d+)\]")
_EDGE = re.compile(r"(?=[.\[])|$")


def renamed(error: InvalidRequest, sources: Mapping[str, str]) -> InvalidRequest:
    """``error`` about the field the client sent, in its message too.

    ``sources``: the client's path for each of ours, and so for all that is inside them. ``[]`` stands for any index:
    with ``{"tools[].function": "tools[]"}``, ``tools[3].function.name`` is ``tools[3].name``. The longest of our paths
    counts; a field that none fits keeps its name.
    """
    field = error.field
    if field is None:
        return error
    source = _source(field, sources)
    # The field alone: not as a part of a longer path, and not as a word of another.
    alone = re.compile(rf"(?<![\w.\]]){re.escape(field)}(?![\w\[]|\.\w)")
    return InvalidRequest(alone.sub(lambda _: source, error.message), field=source, status=error.status)


def _source(field: str, sources: Mapping[str, str]) -> str:
    for end in sorted({edge.start() for edge in _EDGE.finditer(field)}, reverse=True):
        ours = field[:end]
        theirs = sources.get(ours) or sources.get(_INDEX.sub("[]", ours))
        if theirs is not None:
            for index in _INDEX.findall(ours):
                theirs = theirs.replace("[]", f"[{index}]", 1)
            return theirs + field[end:]
    return field
