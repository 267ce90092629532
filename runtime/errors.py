"""The errors people meet. Anything else that escapes is a bug."""

from __future__ import annotations

import reprlib
from typing import Any

MAX_SHOWN = 60  # characters of a value that was sent, in an error

_repr = reprlib.Repr()  # looks at a few elements only: a value may have millions
_repr.maxstring = _repr.maxlong = _repr.maxother = MAX_SHOWN


class BranchwiseError(Exception):
    """Base of every error this package raises on purpose."""


class InvalidRequest(BranchwiseError, ValueError):
    """A request that cannot be served as asked: names the field, the limit, and the HTTP status it becomes.

    ``code``: a word for programs, where the status alone does not say enough.
    """

    def __init__(self, message: str, *, field: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.status = status
        self.code = code


class Overloaded(BranchwiseError):
    """The waiting queue is full; HTTP answers 503 with ``Retry-After``."""


class TimedOut(BranchwiseError):
    """The request took longer than the server lets one take; HTTP answers 504."""


class LoadError(BranchwiseError):
    """A model or a setting that cannot be loaded: one line that says what and what to do. The CLI exits 2."""


class EngineDead(BranchwiseError):
    """The engine failed or stopped while the request was in flight. Not the request's fault."""


def bad(field: str, problem: str) -> InvalidRequest:
    """What is wrong with a field, named by the path to it."""
    return InvalidRequest(f"{field} {problem}", field=field)


def shown(value: Any) -> str:
    """A value that was sent, as an error quotes it."""
    return _repr.repr(value)[:MAX_SHOWN]
