"""Errors about a chat in the words of a client who never wrote one: other routes' requests become chats too."""

from __future__ import annotations

import re
from collections.abc import Mapping

from .....errors import InvalidRequest

# A path to a field, as errors write it: not the middle of another word, nor what the client is quoted with. What is
# deeper than any source's path is left to follow it.
_PATH = re.compile(r"""(?<![\w'"`.\]-])[a-z]\w*(?:\.[a-z]\w*|\[\d+\]){0,7}""")
_INDEX = re.compile(r"\[(\d+)\]")


def renamed(error: InvalidRequest, sources: Mapping[str, str]) -> InvalidRequest:
    """``error`` about the fields its client sent, in its message too.

    ``sources``: for a path in the chat (``messages[2].content``), the client's (``input[5].output``). ``[]`` stands for
    any index: with ``{"tools[].function": "tools[]"}``, ``tools[3].function.name`` is ``tools[3].name``. What lies
    within a path goes with it, and of several that hold the longest counts; a path without a source stays as it is.
    """

    def theirs(text: str) -> str:
        return _PATH.sub(lambda found: _source(found.group(), sources), text)

    message = theirs(error.message)
    field = None if error.field is None else theirs(error.field)
    if (message, field) == (error.message, error.field):
        return error
    return InvalidRequest(message, field=field, status=error.status)


def _source(path: str, sources: Mapping[str, str]) -> str:
    end = len(path)
    while end > 0:
        ours = path[:end]
        theirs = sources.get(ours) or sources.get(_INDEX.sub("[]", ours))
        if theirs is not None:
            for index in _INDEX.findall(ours):
                theirs = theirs.replace("[]", f"[{index}]", 1)
            return theirs + path[end:]
        end = max(path.rfind(".", 0, end), path.rfind("[", 0, end))
    return path
