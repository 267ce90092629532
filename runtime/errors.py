"""The errors that callers handle. Any other exception that escapes is a bug."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

MAX_SHOWN = 60  # characters of a quoted value in an error message

_repr = reprlib.Repr()  # bounded: reads a few elements of a value that may hold millions
_repr.maxstring = _repr.maxlong = _repr.maxother = MAX_SHOWN

_OTHER = re.compile(r"\{(\d)\}")
_SEGMENT = re.compile(r"(?:^|\.)[^.\[]+|\[[^\]]*\]")
_INDEX = re.compile(r"\[(\d+)\]")
_MAX_SEGMENTS = 8  # of a path's beginning that `renamed` looks up


class BranchwiseError(Exception):
    """Base of every error this package raises on purpose."""


def why(error: Exception, path: Path | str) -> str:
    """What an error says, in one line. One of the system: without its number, and without ``path``, which the sentence
    around it names."""
    said = str(error)
    if isinstance(error, OSError) and error.strerror:
        other = error.filename is not None and str(error.filename) != str(path)
        said = f"{error.strerror}: {error.filename}" if other else error.strerror
    return " ".join(said.split())


class InvalidRequest(BranchwiseError, ValueError):
    """A request that cannot be served as sent. ``str(error)`` is ``path problem``.

    Below the dialects (HTTP routes, the CLI), paths are canonical: the fields of `SamplingParams`, ``prompt``,
    ``messages[2].content``. A dialect translates them once, last, with `renamed`.

    Args:
        path: The field at fault; None where none is (the whole body, the server's state).
        problem: The rest of the sentence. ``{0}``, ``{1}`` … stand for ``others``.
        others: Further fields that the sentence names.
        value: What was sent, where the problem is a value beyond a limit.
        limit: The limit it is beyond.
        status: The HTTP status this becomes.
        code: A word for programs, where the status alone does not say enough.
    """

    def __init__(
        self,
        path: str | None,
        problem: str,
        *,
        others: Sequence[str] = (),
        value: Any = None,
        limit: Any = None,
        status: int = 400,
        code: str | None = None,
    ) -> None:
        self.path = path
        self.problem = problem
        self.others = tuple(others)
        self.value = value
        self.limit = limit
        self.status = status
        self.code = code
        sentence = _OTHER.sub(self._other, problem) if others else problem
        self.message = f"{path} {sentence}" if path else sentence
        super().__init__(self.message)

    def _other(self, match: re.Match[str]) -> str:
        i = int(match[1])
        return self.others[i] if i < len(self.others) else match[0]

    def renamed(self, names: Mapping[str, str]) -> InvalidRequest:
        """The error in a dialect's names for our paths.

        ``names`` maps a path (``messages[2].content``) to the client's (``input[5].output``), and with it all paths
        below. ``[]`` stands for any index: with ``{"tools[].function": "tools[]"}``, ``tools[3].function.name`` becomes
        ``tools[3].name``. The longest rule that fits counts; a path without one stays as it is.
        """
        path = self.path and _renamed(self.path, names)
        others = tuple(_renamed(other, names) for other in self.others)
        if (path, others) == (self.path, self.others):
            return self
        facts = {"value": self.value, "limit": self.limit, "status": self.status, "code": self.code}
        return InvalidRequest(path, self.problem, others=others, **facts)


class Overloaded(BranchwiseError):
    """The waiting queue is full; HTTP answers 503 with ``Retry-After``."""


class TimedOut(BranchwiseError):
    """The request took longer than the server lets one take; HTTP answers 504."""


class LoadError(BranchwiseError):
    """A model or a setting that cannot be loaded: one line with the problem and its fix. The CLI exits 2."""


class HubUnreachable(LoadError):
    """A model that is not here cannot be downloaded now."""


class EngineDead(BranchwiseError):
    """The engine failed or stopped while the request was in flight. Not the request's fault."""


@contextmanager
def renaming(names: Mapping[str, str]) -> Iterator[None]:
    """While inside, every `InvalidRequest` is `renamed`: for calls with canonical paths, in code of a dialect."""
    try:
        yield
    except InvalidRequest as error:
        raise error.renamed(names) from error


def shown(value: Any) -> str:
    """A client's value as an error message quotes it: at most `MAX_SHOWN` characters."""
    return _repr.repr(value)[:MAX_SHOWN]


def _renamed(path: str, names: Mapping[str, str]) -> str:
    for end in reversed([found.end() for found in islice(_SEGMENT.finditer(path), _MAX_SEGMENTS)]):
        ours = path[:end]
        theirs = names.get(ours) or names.get(_INDEX.sub("[]", ours))
        if theirs is not None:
            for index in _INDEX.findall(ours):
                theirs = theirs.replace("[]", f"[{index}]", 1)
            return theirs + path[end:]
    return path
