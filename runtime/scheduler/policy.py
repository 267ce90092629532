"""In which order waiting requests are tried for admission.

``hrrn`` is the highest-response-ratio rule: (waited + work) / work, where work is the tokens the tree does not hold
and waiting is measured in tokens the engine has computed since the request came. Cache hits go first because their
work is small; nobody starves because every ratio grows without bound. A service clock instead of wall time keeps
the order deterministic.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from ..config import SchedulePolicy
from .request import Request


def admission_order(policy: SchedulePolicy, waiting: Collection[Request], clock: int) -> list[Request]:
    """``waiting`` (in arrival order) sorted for admission; ties keep arrival order.

    Retracted requests come before others (of their priority): what they hold in the tree is a hit while it lasts.
    """
    requests = list(waiting)
    if len(requests) <= 1:
        return requests
    fresh = np.array([r.retractions == 0 for r in requests])
    keys: tuple[np.ndarray, ...]
    if policy == "fcfs":
        keys = (fresh,)
    elif policy == "priority":
        keys = (fresh, np.array([-r.priority for r in requests]))
    elif policy == "lpm":
        keys = (np.array([-r.hit_estimate for r in requests]), fresh)
    else:
        work = np.array([r.num_tokens - r.hit_estimate for r in requests]).clip(min=1)
        waited = clock - np.array([r.arrival_clock for r in requests])
        keys = (work, -(waited + work) / work, fresh)
    return [requests[i] for i in np.lexsort(keys).tolist()]
