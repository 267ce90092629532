"""The request routers of this process, for the gateways in it.

A module of its own: Ray Serve copies the module of a request router by value, so a variable there would be another one.
"""

from __future__ import annotations

import weakref
from typing import Protocol

from ...runtime.fleet.view import FleetView


class LiveRouter(Protocol):
    """What a gateway needs of a request router."""

    view: FleetView[str]
    names: tuple[str, ...]  # of the replicas that it knows

    def started(self, key: str) -> None:
        """The first output of the request with this ``RoutingHint.key`` has come. From any thread."""
        ...


_routers: weakref.WeakSet[LiveRouter] = weakref.WeakSet()


def register(router: LiveRouter) -> None:
    """A request router begins."""
    _routers.add(router)


def members() -> list[str]:
    """Names of the replicas that this process knows."""
    return [name for router in list(_routers) for name in router.names]


def block_size() -> int:
    """Of the replicas, or 16 while none is known."""
    return next((router.view.router.block_size for router in list(_routers) if len(router.view.router)), 16)


def started(key: str) -> None:
    """The first output of a request has come."""
    for router in list(_routers):
        router.started(key)
