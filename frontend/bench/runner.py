"""Runs workloads against one server, one after another, and reports progress."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import BackendError
from .client import CompletionsClient, open_client, warm_up
from .report import figures
from .workloads import VOCAB_HIGH, WORKLOADS, RandomTokens

WARM_UP_REQUESTS, WARM_UP_PROMPT, WARM_UP_OUTPUT = 64, 300, 16


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """The workloads to run, and the server."""

    url: str
    model: str
    workloads: Sequence[str] = tuple(WORKLOADS)
    scale: float = 1.0
    seed: int = 0
    vocab: int = VOCAB_HIGH  # prompt token ids are below this
    stream: bool = False
    api_key: str | None = None


class Watcher(Protocol):
    """Receives the progress of a run, for progress bars."""

    def started(self, name: str, requests: int) -> None: ...
    def request_done(self) -> None: ...
    def finished(self, name: str, result: dict[str, Any], errors: list[str]) -> None: ...


async def run(bench: BenchConfig, watcher: Watcher) -> dict[str, dict[str, Any]]:
    """Warms the server up, then runs each workload; returns the figures by workload name.

    Raises `BackendError` if every request of the warm-up fails: the others would fail the same way.
    """
    results: dict[str, dict[str, Any]] = {}
    http = open_client(bench.url, bench.api_key)
    client = CompletionsClient(http, bench.model, stream=bench.stream, on_done=watcher.request_done)
    warm = RandomTokens(10_000 + bench.seed, bench.vocab)
    watcher.started("warm-up", WARM_UP_REQUESTS)
    measured = client.reset()
    await warm_up(client, warm.many(WARM_UP_REQUESTS, WARM_UP_PROMPT), WARM_UP_OUTPUT)
    if measured.failed == WARM_UP_REQUESTS:
        raise BackendError(f"every request of the warm-up failed: {'; '.join(measured.errors)}")
    watcher.finished("warm-up", {"failed": measured.failed}, measured.errors)
    for name in bench.workloads:
        workload = WORKLOADS[name]
        measured = client.reset()
        watcher.started(name, workload.requests(bench.scale))
        start = time.perf_counter()
        await workload.run(client.generate, RandomTokens(f"{name}/{bench.seed}", bench.vocab), bench.scale)
        seconds = time.perf_counter() - start
        results[name] = figures(measured, seconds)
        watcher.finished(name, results[name], measured.errors)
    return results
