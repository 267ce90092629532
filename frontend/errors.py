"""The error of every client and backend in this room."""

from __future__ import annotations

from ..runtime.errors import BranchwiseError, InvalidRequest


class BackendError(BranchwiseError):
    """A backend that cannot be reached, refuses a request, or lacks a capability that the call needs.

    ``status``: the HTTP status, 0 if there is none. ``reason``: the end of the message, in the backend's own words.
    ``invalid``: the reason as an `InvalidRequest`, if the server named a field of the request.
    """

    def __init__(
        self, message: str, *, status: int = 0, reason: str = "", invalid: InvalidRequest | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason or message
        self.invalid = invalid
