"""A simulated fleet: a trace's arrivals, routers, and replicas with the real planner, on one virtual clock."""

from __future__ import annotations

import heapq
import math
import random
import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import LoadError
from ..fleet.choice import DEFAULT_WEIGHTS, Weights
from ..fleet.hashes import block_hashes
from ..fleet.router import FleetRouter, Sent
from .replica import ReplicaSettings, SimulatedReplica
from .traces import Arrival

Policy = Literal["round-robin", "sticky", "overlap", "branchwise"]
POLICIES: tuple[Policy, ...] = ("round-robin", "sticky", "overlap", "branchwise")
BALANCE_WINDOW = 300.0  # seconds


class FleetSettings(NamedTuple):
    """One run. ``event_lag``: seconds until routers receive a cache event. ``report_seconds``: between two load reports
    of a replica. ``speed``: divides the trace's arrival times."""

    replicas: int = 16
    policy: Policy = "branchwise"
    routers: int = 1
    event_lag: float = 0.0
    report_seconds: float = 1.0
    speed: float = 1.0
    replica: ReplicaSettings = ReplicaSettings()
    weights: Weights = DEFAULT_WEIGHTS


class FleetResult(NamedTuple):
    """The result of a run. Rates are fractions; times are seconds."""

    settings: FleetSettings
    requests: int
    prompt_tokens: int
    hit_rate: float  # of prompt tokens
    balance: float  # prompt tokens computed by the busiest replica, over the mean
    window_balance: float  # the same of the worst window of `BALANCE_WINDOW`
    first_token: npt.NDArray[np.float64]  # [requests] from arrival to first token
    seconds: float  # simulated
    wall_seconds: float  # that the simulation took

    def quantile(self, q: float) -> float:
        """Of the time to first token."""
        return float(np.quantile(self.first_token, q))


class _Lagged:
    """Delays cache events on their way to the routers."""

    def __init__(self, lag: float, router: FleetRouter) -> None:
        self._lag, self._index = lag, router.index
        self._waiting: deque[tuple[float, int, list[int], list[int]]] = deque()
        self.now = 0.0

    def feed(self, replica: int) -> Callable[[list[int], list[int]], None]:
        """The callback for a replica's cache events."""

        def changed(stored: list[int], removed: list[int]) -> None:
            if self._lag:
                self._waiting.append((self.now + self._lag, replica, stored, removed))
            else:
                self._apply(replica, stored, removed)

        return changed

    def deliver(self) -> None:
        """Applies the events that are due."""
        while self._waiting and self._waiting[0][0] <= self.now:
            self._apply(*self._waiting.popleft()[1:])

    def _apply(self, replica: int, stored: list[int], removed: list[int]) -> None:
        self._index.store(replica, stored)
        self._index.remove(replica, removed)


def simulate(arrivals: Sequence[Arrival], settings: FleetSettings) -> FleetResult:
    """Runs a trace to its end.

    Raises `LoadError` if a request of the trace does not fit a replica.
    """
    began = time.perf_counter()
    n, page = settings.replicas, settings.replica.page_size
    routers = [FleetRouter(page, n, settings.weights, seed) for seed in range(settings.routers)]
    for router in routers[1:]:
        router.index = routers[0].index  # each follows the same events, with the same lag
    follows = settings.policy in ("overlap", "branchwise")
    lagged = _Lagged(settings.event_lag, routers[0])
    replicas = [SimulatedReplica(settings.replica, lagged.feed(i) if follows else None) for i in range(n)]
    due: list[tuple[float, int]] = []  # (time, replica); stale if it differs from the replica's next_time
    sent: dict[int, tuple[FleetRouter, Sent]] = {}
    ttft = np.full(len(arrivals), np.nan)
    starts = np.array([each.seconds for each in arrivals]) / settings.speed
    windows: list[npt.NDArray[np.int64]] = []
    before, window_ends, reported = np.zeros(n, np.int64), BALANCE_WINDOW / settings.speed, 0.0
    hits, rng = 0, random.Random(0)

    def run_until(limit: float) -> None:
        nonlocal hits
        while due and due[0][0] <= limit:
            at, number = heapq.heappop(due)
            replica = replicas[number]
            if at != replica.next_time:
                continue
            lagged.now = at
            replica.run()
            if replica.next_time < math.inf:
                heapq.heappush(due, (replica.next_time, number))
            for id in replica.first_tokens:
                ttft[id] = at - starts[id]
                router, one = sent[id]
                router.started(one)
            for each in replica.ended:
                hits += each.hit_tokens
                router, one = sent.pop(each.id)
                router.ended(one)
            replica.first_tokens.clear()
            replica.ended.clear()

    for id, arrival in enumerate(arrivals):
        now = float(starts[id])
        while now >= window_ends:
            run_until(window_ends)
            computed = np.array([replica.computed_tokens for replica in replicas])
            windows.append(computed - before)
            before, window_ends = computed, window_ends + BALANCE_WINDOW / settings.speed
        run_until(now)
        lagged.now = now
        lagged.deliver()
        prompt = arrival.tokens()
        if len(prompt) + arrival.output_tokens > settings.replica.kv_cache_tokens:
            raise LoadError(
                f"request {id} of the trace has {len(prompt)} tokens and {arrival.output_tokens} to generate: more "
                f"than a replica's cache holds ({settings.replica.kv_cache_tokens})"
            )
        router = routers[rng.randrange(settings.routers)]
        if settings.routers > 1 and now - reported >= settings.report_seconds:
            reported = now
            for number, replica in enumerate(replicas):
                for each_router in routers:
                    each_router.report(number, replica.queued, replica.running)
        hashes = block_hashes(prompt, page) if follows else []
        number, cached = _choose(settings, router, now, id, arrival, hashes)
        sent[id] = router, router.sent(number, len(prompt), cached, hashes)
        replica = replicas[number]
        replica.add(now, id, prompt, arrival.output_tokens)
        heapq.heappush(due, (replica.next_time, number))
    run_until(math.inf)
    total = np.array([replica.computed_tokens for replica in replicas])
    prompt_tokens = sum(each.prompt_tokens for each in arrivals)
    return FleetResult(
        settings,
        len(arrivals),
        prompt_tokens,
        hits / prompt_tokens,
        float(total.max() / total.mean()),
        max((float(each.max() / each.mean()) for each in windows if each.sum()), default=1.0),
        ttft,
        float(lagged.now),
        time.perf_counter() - began,
    )


def _choose(
    settings: FleetSettings, router: FleetRouter, now: float, id: int, arrival: Arrival, hashes: list[int]
) -> tuple[int, int]:
    if settings.policy == "round-robin":
        return id % settings.replicas, 0
    if settings.policy == "sticky":
        return zlib.crc32(arrival.session.to_bytes(8, "little")) % settings.replicas, 0
    if settings.policy == "overlap":  # the longest cached prefix; the first replica of equals
        cached = router.cached(arrival.prompt_tokens, hashes)
        return int(cached.argmax()), int(cached.max())
    return router.choose(now, arrival.prompt_tokens, hashes)
