"""Where the reuse of recent requests ended, for the live view: what a node's next request has to say about it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ...radix.node import Int32, Namespace
from .request import Request

KEPT = 512  # requests
AROUND = 32  # tokens on either side of a stop: those before identify the place, those after say what came


class Stop(NamedTuple):
    """``position``: reused tokens; ``before``: the last of them, int32 [≤ AROUND]; ``after``: what the request went on
    with, int32 [≤ AROUND]."""

    request: int
    namespace: Namespace
    position: int
    reason: str
    before: Int32
    after: Int32


class Stops:
    """The latest `KEPT` stops. Noting one is O(1), whether or not anybody looks."""

    def __init__(self) -> None:
        self._stops: deque[Stop] = deque(maxlen=KEPT)

    def note(self, request: Request) -> None:
        """The request has been matched, and `Request.cache` says how far."""
        if request.cache is None or request.no_cache:
            return
        at, tokens = request.cache.hit_tokens, request.prompt
        before, after = tokens[max(0, at - AROUND) : at].copy(), tokens[at : at + AROUND].copy()
        self._stops.append(Stop(request.id, request.namespace, at, request.cache.reason, before, after))

    def within(self, namespace: Namespace, path: Int32, start: int) -> Iterator[Stop]:
        """Stops after more than ``start`` tokens of ``path`` (a prefix of the tree), the latest first. Without those of
        requests that went on as ``path`` does: siblings may share the first tokens of a page."""
        for stop in reversed(self._stops):
            at = stop.position
            if stop.namespace != namespace or not start < at <= len(path):
                continue
            following = path[at : at + len(stop.after)]
            own = len(following) and np.array_equal(following, stop.after[: len(following)])
            if not own and np.array_equal(path[at - len(stop.before) : at], stop.before):
                yield stop
