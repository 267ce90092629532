"""Prometheus metrics ``branchwise_*``: totals of the scheduler's `Stats`, latencies measured in the HTTP process."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from ....messages import Finished, Stats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
WINDOW_SECONDS = 60.0

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0)
_SLOW = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

# (name, help, field of Stats)
_GAUGES = (
    ("requests_running", "Requests with a row of the page table", "running"),
    ("requests_waiting", "Requests waiting to be scheduled", "waiting"),
    ("kv_pages", "Pages of the KV pool", "pages_total"),
    ("kv_token_bytes", "Bytes of one token's keys and values, on one rank", "kv_token_bytes"),
    ("kv_pages_free", "Pages in use by nothing", "pages_free"),
    ("kv_pages_cached", "Pages in use by the tree only: evictable", "pages_cached"),
    ("kv_pages_pinned", "Pages that pins and cache breakpoints keep from eviction", "pages_pinned"),
    ("host_cache_pages", "Pages that the host tier has room for", "host_pages_total"),
    ("host_cache_pages_cached", "Pages in the host tier", "host_pages_cached"),
    ("disk_cache_pages", "Pages that the disk tier has room for", "disk_pages_total"),
    ("disk_cache_pages_cached", "Pages in the disk tier", "disk_pages_cached"),
    ("branches", "Branches that exist", "branches"),
    ("branches_holding", "Branches that hold pages", "branches_holding"),
)
_COUNTERS = (
    ("prompt_tokens", "Prompt tokens received", "prompt_tokens"),
    ("cached_tokens", "Prompt tokens reused from the tree", "cached_tokens"),
    ("host_cached_tokens", "Of the cached tokens, those that came from the host tier", "host_tokens"),
    ("disk_cached_tokens", "Of the cached tokens, those that came from the disk tier", "disk_tokens"),
    ("tier_failures", "Copies between memory tiers that did not arrive whole: misses", "tier_failures"),
    ("tier_late", "Waits for a copy between memory tiers that were given up: misses", "tier_late"),
    ("computed_tokens", "Prompt tokens that went through a forward pass", "computed_tokens"),
    ("generated_tokens", "Generated tokens", "generated_tokens"),
    ("jumped_tokens", "Generated tokens that a grammar forced: forward passes saved", "jumped_tokens"),
    ("attention_kv_bytes", "Bytes of keys and values to read if each request reads its own", "kv_bytes"),
    ("attention_kv_bytes_saved", "Bytes of these that reading shared prefixes once saved", "kv_bytes_saved"),
    ("evicted_pages", "Pages evicted from the tree", "evicted_pages"),
    ("retractions", "Requests sent back to waiting because pages ran out", "retractions"),
    ("branch_holds_lost", "Branches that lost their pages because pages ran out", "branch_holds_lost"),
    ("steps", "Scheduling steps", "steps"),
)


class Metrics:
    """One server's metrics in a registry of its own."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.registry = CollectorRegistry()
        self._clock = clock
        self._stats = Stats()
        self._stepped = 0.0  # when the number of steps last grew
        self._window: deque[tuple[float, int, int]] = deque([(clock(), 0, 0)])  # (when, cached, computed)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(f"branchwise_{name}_seconds", text, buckets)
            self.registry.register(made)
            return made

        self._first_token = histogram("time_to_first_token", "From the request's arrival to its first token", _SLOW)
        self._token = histogram(
            "inter_token_latency", "Between a request's tokens; the mean for a response that is not streamed", _FAST
        )
        self.observe_first_token, self.observe_token = self._first_token.observe, self._token.observe
        self._e2e = histogram("e2e_request_latency", "From the request's arrival to its end", _SLOW)
        self._queue = histogram("queue_time", "From arrival at the scheduler to the first scheduled chunk", _SLOW)
        # A quantile over these observations is a quantile over time: see `LoopLag`.
        self.observe_loop_lag = histogram(
            "event_loop_lag", "Lag of the HTTP process's event loop, observed 50 times a second", _FAST
        ).observe
        finished = Counter(
            "branchwise_requests", "Requests that ended, by reason", ["finish_reason"], registry=self.registry
        )
        self._ends = {reason: finished.labels(reason) for reason in ("stop", "length", "abort", "error")}
        self.registry.register(_StatsCollector(self))

    def observe_finish(self, finish: Finished, seconds: float) -> None:
        self._ends[finish.reason].inc()
        if finish.reason != "error":
            self._e2e.observe(seconds)
            self._queue.observe(finish.queue_seconds)

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Adds a gauge whose ``value`` is read when scraped."""
        Gauge(f"branchwise_{name}", text, registry=self.registry).set_function(value)

    def step_age(self, oldest_arrival: float | None) -> float:
        """Seconds since the last step, or since the oldest unfinished request arrived if that was later."""
        return 0.0 if oldest_arrival is None else max(0.0, self._clock() - max(self._stepped, oldest_arrival))

    def update(self, stats: Stats) -> None:
        if stats.steps != self._stats.steps:
            self._stepped = self._clock()
        self._stats = stats
        self._window.append((self._clock(), stats.cached_tokens, stats.computed_tokens))
        self._prune()

    @property
    def stats(self) -> Stats:
        return self._stats

    @property
    def hit_rate(self) -> float:
        """Cached over cached and computed prompt tokens of the last `WINDOW_SECONDS`; 0 when there were none."""
        self._prune()
        _, cached, computed = self._window[0]
        cached, computed = self._stats.cached_tokens - cached, self._stats.computed_tokens - computed
        return cached / (cached + computed) if cached + computed else 0.0

    def _prune(self) -> None:
        """Keeps the newest sample that is older than the window: the totals at its beginning."""
        start = self._clock() - WINDOW_SECONDS
        while len(self._window) > 1 and self._window[1][0] <= start:
            self._window.popleft()

    def figures(self) -> dict[str, Any]:
        """For the live page, JSON-able: totals so far, and ``[count, seconds]`` of the latencies between tokens."""
        fields = (*(field for _, _, field in _GAUGES), *(field for _, _, field in _COUNTERS))
        return {
            **{field: getattr(self._stats, field) for field in fields},
            "hit_rate": self.hit_rate,
            "first_token": self._first_token.totals,
            "inter_token": self._token.totals,
        }

    def render(self) -> bytes:
        return generate_latest(self.registry)


class Histogram(Collector):
    """``prometheus_client``'s for one thread: no locks, and n equal observations at the cost of one. Every token is
    observed; at 12,000 a second the library's took 2 % of a core."""

    def __init__(self, name: str, text: str, buckets: tuple[float, ...]) -> None:
        self._name = name
        self._text = text
        self._bounds = buckets
        self._counts = [0] * (len(buckets) + 1)  # [i]: above bound i - 1, not above bound i
        self._sum = 0.0
        self._created = time.time()

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    @property
    def totals(self) -> tuple[int, float]:
        """Number of observations, and their sum."""
        return sum(self._counts), self._sum

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._text)
        total = 0
        buckets = []
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            buckets.append((floatToGoString(bound), total))
        family.add_metric([], buckets, self._sum)
        family.add_sample(f"{self._name}_created", {}, self._created)
        yield family


class _StatsCollector(Collector):
    """Reads the newest `Stats` when scraped."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        stats = self._metrics.stats
        for name, text, field in _GAUGES:
            yield GaugeMetricFamily(f"branchwise_{name}", text, value=getattr(stats, field))
        for name, text, field in _COUNTERS:
            yield CounterMetricFamily(f"branchwise_{name}", text, value=getattr(stats, field))
        yield GaugeMetricFamily(
            "branchwise_kv_tokens", "Tokens that the KV pool holds", value=stats.pages_total * stats.page_size
        )
        in_use = stats.pages_total - stats.pages_free - stats.pages_cached
        usage = in_use / stats.pages_total if stats.pages_total else 0.0
        yield GaugeMetricFamily(
            "branchwise_kv_usage_ratio", "Share of the pool in use by requests, branches and pins", value=usage
        )
        yield GaugeMetricFamily(
            "branchwise_cache_hit_rate",
            "Cached over cached and computed prompt tokens, last 60 s",
            value=self._metrics.hit_rate,
        )
