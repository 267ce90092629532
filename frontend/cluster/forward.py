"""The messages between a gateway and a replica."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

import msgspec

from ...runtime.fleet.view import RoutingHint
from .. import client

Headers = list[tuple[bytes, bytes]]
JSON_HEADERS: Headers = [(b"content-type", b"application/json")]
SESSION_HEADER, REPLICA_HEADER = client.SESSION_HEADER.encode(), client.REPLICA_HEADER.encode()
# Of one connection, not of the message (RFC 9110, 7.6.1).
HOP_BY_HOP = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"}
)


class ForwardedRequest(msgspec.Struct, array_like=True):
    """``target``: path and query, as the client wrote them."""

    method: str
    target: str
    headers: Headers
    body: bytes


class Head(msgspec.Struct, array_like=True):
    """Status and headers of an answer. The body follows in pieces."""

    status: int
    headers: Headers


class ReplicaGone(Exception):
    """The replica ended or cannot be reached; it may have processed a part of the request. ``replica``: its name."""

    def __init__(self, problem: str, replica: str | None = None) -> None:
        super().__init__(problem)
        self.replica = replica


class NoReplica(Exception):
    """No replica can take the request now."""


class Dispatch(Protocol):
    """Chooses a replica and forwards a request to it."""

    def __call__(self, request: ForwardedRequest, hint: RoutingHint) -> AsyncGenerator[Head | bytes]:
        """One `Head`, then the body. Raises `ReplicaGone` or `NoReplica`. The caller closes it, which aborts a request
        that has not ended."""
        ...
