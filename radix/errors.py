"""What the radix room raises. Each of them is a caller's mistake or a bug, never a full pool in normal service."""

from __future__ import annotations


class RadixError(Exception):
    """Base of the errors of this room."""


class OutOfPages(RadixError):
    """More pages were asked of the allocator than are free. `RadixTree.reserve` answers None instead."""


class LeaseError(RadixError):
    """A lease that is not live here (released, or of another tree), or one that lacks the pages it would publish."""


class InvariantError(RadixError):
    """`RadixTree.check` found books that do not balance."""
