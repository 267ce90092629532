"""The order in which waiting requests are tried for admission.

``hrrn`` (highest response ratio next) sorts by (waited + work) / work. Work is the number of tokens that are not
cached; waiting time is the number of tokens that the engine has scheduled since the request arrived. Cache hits go
first because their work is small. Counting tokens instead of seconds keeps the order deterministic.

Under every policy a request that has waited for ``patience`` tokens is overdue and precedes all that are not: a steady
stream of requests that the policy prefers delays it by no more than that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import SchedulePolicy
from .waiting import Columns

Key = npt.NDArray[Any]

_FIRST = 64  # positions that are sorted at once; most steps try fewer


def admission_keys(policy: SchedulePolicy, waiting: Columns, clock: int, patience: int = 1 << 62) -> list[Key]:
    """What orders ``waiting`` for admission, ascending, the most significant key first, each [n]; ties keep the order
    of arrival. ``clock``: tokens scheduled.

    Overdue requests are first, by arrival. Then retracted requests precede others of the same priority: what they have
    computed is a hit until it is evicted.
    """
    waited = clock - waiting.arrived
    keys: list[Key]
    if policy == "fcfs":
        keys = [-waiting.retracted]
    elif policy == "priority":
        keys = [-waiting.priority, -waiting.retracted]
    elif policy == "lpm":
        keys = [-waiting.retracted, -waiting.hit]
    else:
        work = (waiting.tokens - waiting.hit).clip(min=1)
        keys = [-waiting.retracted, -(waited + work) / work, work]
    overdue = waited > patience
    return [~overdue, np.where(overdue, waiting.arrived, 0), *keys] if overdue.any() else keys


def in_order(keys: Sequence[Key]) -> Iterator[int]:
    """Positions 0 .. n - 1 ordered by ``keys``, the most significant first, and then by position.

    Sorts only as far as it is read, by quickselect (incremental sorting: Paredes and Navarro, ALENEX 2006): O(n) in
    NumPy for the first ones, O(n log n) for all.
    """
    return _in_order(keys, np.arange(len(keys[0])))


def _in_order(keys: Sequence[Key], left: npt.NDArray[np.int64]) -> Iterator[int]:
    count = _FIRST
    while keys and len(left) > 2 * count:
        key = keys[0][left]
        bound = np.partition(key, count)[count]
        yield from _sorted(keys, left[key < bound])
        yield from _in_order(keys[1:], left[key == bound])
        left = left[key > bound]
        count *= 4
    yield from _sorted(keys, left)


def _sorted(keys: Sequence[Key], positions: npt.NDArray[np.int64]) -> list[int]:
    if keys:
        positions = positions[np.lexsort([key[positions] for key in reversed(keys)])]
    found: list[int] = positions.tolist()
    return found
