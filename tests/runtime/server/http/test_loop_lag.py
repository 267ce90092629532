"""The lag of the event loop: what a stall is seen as, and what an idle loop is."""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import prometheus_client
import pytest
from prometheus_client import CollectorRegistry

from branchwise.runtime.server.http.plumbing import loop_lag
from branchwise.runtime.server.http.plumbing.loop_lag import INTERVAL, LoopLag
from branchwise.runtime.server.http.plumbing.metrics import Histogram

PassTime = Callable[[float], Awaitable[None]]


@pytest.fixture
async def pass_time(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Awaitable[None]]:
    """``await pass_time(seconds)``: the loop's clock moves on while nothing else runs."""
    loop = asyncio.get_running_loop()
    now = loop.time()
    monkeypatch.setattr(loop, "time", lambda: now)

    async def pass_by(seconds: float) -> None:
        nonlocal now
        now += seconds
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    return pass_by


async def test_a_stall_counts_for_every_moment_in_it(pass_time: PassTime) -> None:
    seen: list[float] = []
    lag = LoopLag(seen.append)
    lag.start()
    await pass_time(INTERVAL / 2)
    assert not seen
    await pass_time(25 * INTERVAL)
    assert seen == pytest.approx([INTERVAL * (i + 0.5) for i in reversed(range(25))])
    lag.stop()


async def test_every_moment_is_looked_at_once_and_none_after_the_end(pass_time: PassTime) -> None:
    seen: list[float] = []
    lag = LoopLag(seen.append)
    lag.start()
    for _ in range(25):
        await pass_time(INTERVAL * 1.001)
    assert len(seen) == 25 and all(0 <= value < INTERVAL for value in seen)
    lag.stop()
    await pass_time(3 * INTERVAL)
    assert len(seen) == 25


async def test_a_process_that_was_stopped_for_long_does_not_catch_up_on_all_of_it(
    monkeypatch: pytest.MonkeyPatch, pass_time: PassTime
) -> None:
    monkeypatch.setattr(loop_lag, "_MOST", 5)
    seen: list[float] = []
    lag = LoopLag(seen.append)
    lag.start()
    await pass_time(INTERVAL * 20.5)
    lag.stop()
    assert 5 <= len(seen) <= 6
    assert max(seen) == pytest.approx(5 * INTERVAL)


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
