"""The errors people meet. Anything else that escapes is a bug."""

from __future__ import annotations


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
