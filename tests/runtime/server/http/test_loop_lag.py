"""The lag of the event loop: what a stall is seen as, and what an idle loop is."""

from __future__ import annotations

import asyncio
import importlib.util
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import prometheus_client
import pytest
from prometheus_client import CollectorRegistry

from branchwise.runtime.server.http.plumbing import loop_lag
from branchwise.runtime.server.http.plumbing.loop_lag import INTERVAL, LoopLag
from branchwise.runtime.server.http.plumbing.metrics import Histogram


async def test_a_stall_counts_for_every_moment_in_it() -> None:
    seen: list[float] = []
    lag = LoopLag(seen.append)
    lag.start()
    await asyncio.sleep(INTERVAL / 2)
    started = time.monotonic()
    time.sleep(0.5)
    stall = time.monotonic() - started
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert len(seen) == pytest.approx(stall / INTERVAL, abs=2)
    assert seen[0] == pytest.approx(stall, abs=2 * INTERVAL)
    assert [a - b for a, b in pairwise(seen[:20])] == pytest.approx([INTERVAL] * 19)
    assert 0 <= seen[-1] < 2 * INTERVAL
    lag.stop()


async def test_every_moment_is_looked_at_once_and_none_after_the_end() -> None:
    seen: list[float] = []
    lag = LoopLag(seen.append)
    lag.start()
    started = time.monotonic()
    await asyncio.sleep(0.5)
    lag.stop()
    count = len(seen)
    assert count == pytest.approx((time.monotonic() - started) / INTERVAL, abs=2)
    assert all(value >= 0 for value in seen)
    await asyncio.sleep(3 * INTERVAL)
    assert len(seen) == count


async def test_a_process_that_was_stopped_for_long_does_not_catch_up_on_all_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loop_lag, "_MOST", 5)
    seen: list[float] = []
    lag = LoopLag(seen.append)
    lag.start()
    time.sleep(INTERVAL * 20)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    lag.stop()
    assert 5 <= len(seen) <= 7
    assert max(seen) == pytest.approx(5 * INTERVAL, abs=INTERVAL)


def test_the_benchmark_reads_quantiles_off_the_histogram() -> None:
    """To within the bucket they are in, and only of what was observed between its two looks."""
    spec = importlib.util.spec_from_file_location(
        "branchwise_bench_http", Path(__file__).parents[3] / "benchmarks" / "bench_http.py"
    )
    assert spec is not None and spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    bounds = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1)
    histogram = Histogram("branchwise_event_loop_lag_seconds", "How late", bounds)
    registry = CollectorRegistry()
    registry.register(histogram)

    def look() -> dict[float, float]:
        return bench.cumulative(prometheus_client.generate_latest(registry).decode())

    for _ in range(500):
        histogram.observe(0.04)  # before anybody looked
    before = look()
    values = np.random.default_rng(3).exponential(0.004, 20_000)
    for value in values:
        histogram.observe(value)
    after = look()
    for q in (0.05, 0.5, 0.9, 0.99):
        exact = float(np.quantile(values, q))
        low, high = max(b for b in (0.0, *bounds) if b <= exact), min(b for b in bounds if b >= exact)
        assert low <= bench.quantile(before, after, q) <= high
    assert bench.quantile(before, after, 0.5) == pytest.approx(np.quantile(values, 0.5), rel=0.1)
    histogram.observe(7.0, times=10**6)
    assert bench.quantile(after, look(), 0.5) == 0.1, "beyond the last bound all that is known is the bound"
    assert bench.cumulative("branchwise_steps_total 3.0\n") == {}
