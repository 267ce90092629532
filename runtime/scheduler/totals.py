"""The counters that the scheduler reports."""

from __future__ import annotations

from ..messages import Stats
from ..tiers.none import NoTiers
from .cache.pins import Pins
from .ledger import Ledger


def update_stats(totals: Stats, ledger: Ledger, waiting: int, pins: Pins, tiers: NoTiers) -> Stats:
    """Sets what is read from other objects; the rest of ``totals`` the scheduler counts itself."""
    tree = ledger.tree
    totals.running, totals.waiting = len(ledger.rows), waiting
    totals.pages_free = tree.allocator.free
    totals.pages_cached = tree.evictable
    totals.evicted_pages = tree.evicted_total
    totals.pins, totals.pages_pinned = len(pins), pins.pages
    totals.retractions = ledger.retractions
    tiers.count(totals)
    return totals
