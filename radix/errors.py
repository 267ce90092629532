"""Errors of this room. Each signals a caller's mistake or a bug, never a full pool in normal service."""

from __future__ import annotations


class RadixError(Exception):
    """Base class of the errors of this room."""


class OutOfPages(RadixError):
    """More pages were requested of the allocator than are free. `RadixTree.reserve` returns None instead."""


class LeaseError(RadixError):
    """A lease or hold that is not live in this tree, or a lease without the pages that it would publish."""


class InvariantError(RadixError):
    """The bookkeeping is inconsistent: found by `RadixTree.check`, or by freeing a page that is not in use."""
