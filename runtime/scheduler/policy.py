"""The order in which waiting requests are tried for admission.

``hrrn`` (highest response ratio next) sorts by (waited + work) / work. Work is the number of tokens that are not
cached; waiting time is the number of tokens that the engine has scheduled since the request arrived. Cache hits go
first because their work is small. Counting tokens instead of seconds keeps the order deterministic.

Under every policy a request that has waited for ``patience`` tokens is overdue and precedes all that are not: a steady
stream of requests that the policy prefers delays it by no more than that.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from ..config import SchedulePolicy
from .request import Request


def admission_order(
    policy: SchedulePolicy, waiting: Collection[Request], clock: int, patience: int = 1 << 62
) -> list[Request]:
    """Sorts ``waiting``, given in order of arrival, for admission; ties keep that order. ``clock``: tokens scheduled.

    Overdue requests are first, by arrival. Then retracted requests precede others of the same priority: what they have
    computed is a hit until it is evicted.
    """
    requests = list(waiting)
    if len(requests) <= 1:
        return requests
    arrived = np.array([r.arrival_clock for r in requests])
    overdue = clock - arrived > patience
    never_retracted = np.array([r.retractions == 0 for r in requests])
    keys: tuple[np.ndarray, ...]
    if policy == "fcfs":
        keys = (never_retracted,)
    elif policy == "priority":
        keys = (never_retracted, np.array([-r.priority for r in requests]))
    elif policy == "lpm":
        keys = (np.array([-r.hit_estimate for r in requests]), never_retracted)
    else:
        work = np.array([r.num_tokens - r.hit_estimate for r in requests]).clip(min=1)
        keys = (work, -(clock - arrived + work) / work, never_retracted)
    if overdue.any():
        keys = (*keys, np.where(overdue, arrived, 0), ~overdue)
    return [requests[i] for i in np.lexsort(keys).tolist()]
