"""Events for subscribers: which pages entered the tree and which left it.

KV-cache events for a router, lower memory tiers and live views subscribe here instead of hooking into the tree.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Literal, NamedTuple

from .node import Int32, Namespace

logger = logging.getLogger(__name__)

LeaveReason = Literal["evicted", "pruned", "flushed", "covered"]
ROOT = -1  # ``parent`` of pages at the start of a prompt


Copy = tuple[int, Int32]  # (tier, slots) of another copy of an event's pages, which entered earlier


class PagesEntered(NamedTuple):
    """Consecutive pages that can now be matched. ``copied``: a copy of them in another tier, if there is one.

    They may still be unwritten: a page is published when it is scheduled, and the step being planned writes it.
    Events name pages, not nodes: nodes are split and extended, while a page has the same number, tokens and parent
    from the event with which it enters to the one with which it leaves.
    """

    namespace: Namespace
    parent: int  # the page that holds the preceding tokens, or `ROOT`; it entered earlier
    tokens: Int32  # [n]; the last page is partial if n is not a multiple of the page size
    pages: Int32  # [ceil(n / page_size)]
    copied: Copy | None = None


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


class CopiesEntered(NamedTuple):
    """A lower tier has a copy of these consecutive pages now. Its bytes may still be under way (`structure.stores`)."""

    namespace: Namespace
    tier: int  # HOST or DISK
    before: tuple[int, int] | None  # (tier, slot) of a copy of the page before, which entered earlier; None: no page
    tokens: Int32  # [n]; the last page is partial if n is not a multiple of the page size
    slots: Int32  # [ceil(n / page_size)] of the tier
    copied: Copy | None = None  # as in `PagesEntered`


class CopiesLeft(NamedTuple):
    """A lower tier has no copy of these pages any more. On the host, pages that follow them may still be there."""

    tier: int
    tokens: Int32
    slots: Int32


Event = PagesEntered | PagesLeft | CopiesEntered | CopiesLeft
Observer = Callable[[Event], object]  # called after the operation that caused the event, when the tree is consistent


class Events:
    """Subscribers, and the events of the operation in progress. An event is only built while there are subscribers."""

    __slots__ = ("_delivering", "lower_tier_observers", "observers", "pending")

    def __init__(self) -> None:
        self.observers: list[Observer] = []
        self.lower_tier_observers: list[Observer] = []  # those of them that also get the events of copies
        self.pending: deque[Event] = deque()
        self._delivering = False

    def deliver(self) -> None:
        """Hands pending events to every observer, in order.

        An observer that raises is logged and unsubscribed, because it has missed an event; serving continues.
        An observer may call the tree; the events of that call are delivered after the present ones.
        """
        if self._delivering:
            return
        self._delivering = True
        try:
            while self.pending:
                event = self.pending.popleft()
                of_copies = isinstance(event, CopiesEntered | CopiesLeft)
                for observer in list(self.lower_tier_observers if of_copies else self.observers):
                    try:
                        observer(event)
                    except Exception:
                        logger.exception("unsubscribed %r: it failed to handle an event of the radix tree", observer)
                        self.unsubscribe(observer)
        finally:
            self._delivering = False

    def unsubscribe(self, observer: Observer) -> None:
        """Sends no further events to ``observer``."""
        self.observers = [each for each in self.observers if each != observer]
        self.lower_tier_observers = [each for each in self.lower_tier_observers if each != observer]
