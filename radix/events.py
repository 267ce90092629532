"""Events for subscribers: which pages entered the tree and which left it.

KV-cache events for a router, lower memory tiers and live views subscribe here instead of hooking into the tree.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Literal, NamedTuple, Protocol

from .node import Int32, Namespace

logger = logging.getLogger(__name__)

LeaveReason = Literal["evicted", "pruned", "flushed", "covered"]
ROOT = -1  # ``parent`` of pages at the start of a prompt


class PagesEntered(NamedTuple):
    """Consecutive pages that can now be matched.

    They may still be unwritten: a page is published when it is scheduled, and the step being planned writes it.
    Events name pages, not nodes: nodes are split and extended, while a page has the same number, tokens and parent
    from the event with which it enters to the one with which it leaves.
    """

    namespace: Namespace
    parent: int  # the page that holds the preceding tokens, or `ROOT`; it entered earlier
    tokens: Int32  # [n]; the last page is partial if n is not a multiple of the page size
    pages: Int32  # [ceil(n / page_size)]


class PagesLeft(NamedTuple):
    """Consecutive pages that can no longer be matched. Pages that follow them have left before.

    Their contents stay intact on the device until the next planned step is launched, because only that step or a
    later one can write to them: a copy in that step, before its writes, still reads them.

    ``reason``: ``evicted`` for memory, ``pruned`` (one prompt) or ``flushed`` (everything) by request, or ``covered``:
    a partial page that is superseded by a page with the same tokens and more.
    """

    namespace: Namespace
    parent: int  # as in `PagesEntered`; it is still in the tree when this event happens
    tokens: Int32
    pages: Int32
    reason: LeaveReason


class TreeObserver(Protocol):
    """Receives events in order, after the operation that caused them, when the tree is consistent."""

    def pages_entered(self, event: PagesEntered) -> None:
        """Pages can now be matched."""
        ...

    def pages_left(self, event: PagesLeft) -> None:
        """Pages can no longer be matched."""
        ...


class Events:
    """Subscribers, and the events of the operation in progress. An event is only built while there are subscribers."""

    __slots__ = ("_delivering", "observers", "pending")

    def __init__(self) -> None:
        self.observers: list[TreeObserver] = []
        self.pending: deque[PagesEntered | PagesLeft] = deque()
        self._delivering = False

    def deliver(self) -> None:
        """Hands pending events to every observer, in order.

        An observer that raises is logged and unsubscribed: it has missed an event, and serving goes on without it.
        An observer may call the tree; the events of that call are delivered after the present ones.
        """
        if self._delivering:
            return
        self._delivering = True
        try:
            while self.pending:
                event = self.pending.popleft()
                for observer in list(self.observers):
                    try:
                        if isinstance(event, PagesEntered):
                            observer.pages_entered(event)
                        else:
                            observer.pages_left(event)
                    except Exception:
                        logger.exception("unsubscribed %r: it failed to handle an event of the radix tree", observer)
                        self.observers.remove(observer)
        finally:
            self._delivering = False
