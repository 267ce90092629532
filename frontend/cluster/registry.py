"""The request routers of this process, for the gateways in it.

A module of its own: Ray Serve copies the module of a request router by value, so a variable there would be another one.
"""

from __future__ import annotations

import weakref
from typing import Protocol

from ...runtime.fleet.view import FleetView


class LiveRouter(Protocol):
    """The part of a request router that gateways use."""

    view: FleetView[str]
    names: tuple[str, ...]  # of the replicas that it knows

    def started(self, key: str) -> None:
        """The request with this ``RoutingHint.key`` has its first output. Thread-safe."""
        ...

    def ended(self, key: str) -> None:
        """The request has ended, however: it no longer counts as load. Thread-safe."""
        ...


_routers: weakref.WeakSet[LiveRouter] = weakref.WeakSet()


def register(router: LiveRouter) -> None:
    """Adds a request router."""
    _routers.add(router)


def members() -> list[str]:
    """Names of the replicas known to this process."""
    return [name for router in list(_routers) for name in router.names]


def block_size() -> int:
    """Of the replicas, or 16 while none is known."""
    return next((router.view.router.block_size for router in list(_routers) if len(router.view.router)), 16)


def started(key: str) -> None:
    """Reports a request's first output to all request routers."""
    for router in list(_routers):
        router.started(key)


def ended(key: str) -> None:
    """Reports the end of a request to all request routers."""
    for router in list(_routers):
        router.ended(key)
