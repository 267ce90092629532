"""The window of the hit rate, and what a scrape says."""

from __future__ import annotations

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from branchwise.runtime.messages import Finished, Stats
from branchwise.runtime.server.http.plumbing.metrics import Histogram, Metrics


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_hit_rate_forgets_after_a_minute() -> None:
    clock = Clock()
    metrics = Metrics(clock)
    assert metrics.hit_rate == 0
    clock.now += 1
    metrics.update(Stats(cached_tokens=0, computed_tokens=100))
    clock.now += 30
    metrics.update(Stats(cached_tokens=300, computed_tokens=100))
    assert metrics.hit_rate == pytest.approx(0.75)
    clock.now += 31  # the hundred computed tokens are more than a minute ago
    assert metrics.hit_rate == 1
    clock.now += 60
    assert metrics.hit_rate == 0


def test_the_window_stays_small() -> None:
    clock = Clock()
    metrics = Metrics(clock)
    for i in range(10_000):
        clock.now += 0.2
        metrics.update(Stats(computed_tokens=i))
    assert len(metrics._window) < 310


def test_a_histogram_says_what_the_library_would() -> None:
    buckets = (0.001, 0.0025, 0.5, 1.0, 10.0)
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    mine = Histogram("lag_seconds", "How late", buckets)
    ours.register(mine)
    reference = prometheus_client.Histogram("lag_seconds", "How late", buckets=buckets, registry=theirs)
    for value, times in ((0.0005, 1), (0.001, 3), (0.25, 2), (1.0, 1), (10.5, 4)):
        mine.observe(value, times)
        for _ in range(times):
            reference.observe(value)

    def lines(registry: CollectorRegistry) -> list[str]:
        return [
            line for line in generate_latest(registry).decode().splitlines() if "_created " not in line or "#" in line
        ]

    assert lines(ours) == lines(theirs)
    assert "lag_seconds_created" in generate_latest(ours).decode()


def test_scrape() -> None:
    metrics = Metrics()
    metrics.update(
        Stats(
            running=3,
            waiting=2,
            pages_total=10,
            page_size=16,
            kv_token_bytes=135168,
            pages_free=5,
            pages_cached=1,
            evicted_pages=7,
            kv_bytes=9,
            kv_bytes_saved=4,
        )
    )
    metrics.observe_first_token(0.3)
    metrics.observe_finish(Finished(1, "stop", queue_seconds=0.1), 0.5)
    metrics.observe_finish(Finished(2, "error"), 0.5)
    text = metrics.render().decode()
    for line in (
        "branchwise_requests_running 3.0",
        "branchwise_requests_waiting 2.0",
        "branchwise_kv_usage_ratio 0.4",
        "branchwise_kv_tokens 160.0",
        "branchwise_kv_token_bytes 135168.0",
        "branchwise_evicted_pages_total 7.0",
        "branchwise_attention_kv_bytes_total 9.0",
        "branchwise_attention_kv_bytes_saved_total 4.0",
        'branchwise_requests_total{finish_reason="stop"} 1.0',
        'branchwise_requests_total{finish_reason="error"} 1.0',
        'branchwise_requests_total{finish_reason="abort"} 0.0',
        'branchwise_time_to_first_token_seconds_bucket{le="0.25"} 0.0',
        'branchwise_time_to_first_token_seconds_bucket{le="0.5"} 1.0',
        "branchwise_e2e_request_latency_seconds_count 1.0",  # errors have no latency worth averaging
    ):
        assert line in text.splitlines()
