"""Skipping steps in which nothing can change, for a simulation: decodes of the same requests, one token each."""

from __future__ import annotations

import numpy as np

from .rows import DECODE, PREFILL
from .scheduler import Scheduler


def uneventful_steps(scheduler: Scheduler) -> int:
    """How many of the next steps only add one token to every running request, if no input comes: none ends,
    publishes a page or needs another, and nothing waits. 0 if the next step may do more."""
    rows = scheduler.ledger.rows
    if scheduler.ledger.waiting or not len(rows) or (rows.phase == PREFILL).any():
        return 0
    active = rows.active()
    if rows.blocked[active].any() or rows.constrained[active].any():
        return 0
    page = scheduler.ledger.page_size
    computed = rows.computed[active]
    to_publishing = (active - computed - 1) % scheduler.ledger.publish_every
    has_room = rows.pages[active] * page - computed
    to_end = rows.limit[active] - rows.length[active] - 1
    return max(0, int(np.minimum(np.minimum(to_publishing, has_room), to_end).min()))


def skip_steps(scheduler: Scheduler, steps: int) -> None:
    """Advances every running request by ``steps`` tokens, at most `uneventful_steps`, with no step in flight. The
    tokens are all 0."""
    ledger = scheduler.ledger
    rows = ledger.rows.in_order(DECODE)
    for row in rows.tolist():
        request = ledger.rows.request(row)
        for _ in range(steps):
            request.append(0)
    ledger.rows.computed[rows] += steps
    ledger.rows.length[rows] += steps
    ledger.rows.last_token[rows] = 0
    ledger.clock += steps * len(rows)
