"""The figures of a workload, as JSON-serializable dicts and as a table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .client import Measured

if TYPE_CHECKING:
    from rich.table import Table

WARM = 0.001  # of the prompt tokens; below it two of our requests may have been sent in another order than counted


def percentiles(values: list[float]) -> dict[str, float] | None:
    """p50, p90, p99 (nearest rank above) and mean, rounded to 0.1 ms; None if there are no values."""
    if not values:
        return None
    ordered = sorted(values)

    def pick(q: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(q * len(ordered)))], 4)

    return {"p50": pick(0.5), "p90": pick(0.9), "p99": pick(0.99), "mean": round(statistics.fmean(values), 4)}


def figures(measured: Measured, seconds: float) -> dict[str, Any]:
    """The figures of one workload that took ``seconds`` of wall time."""
    done = len(measured.latency)
    ideal = measured.ideal()
    return {
        "makespan": round(seconds, 3),
        "requests": done,
        "failed": measured.failed,
        "requests_per_s": round(done / seconds, 2),
        "output_tokens_per_s": round(measured.output_tokens / seconds, 1),
        "prompt_tokens": measured.prompt_tokens,
        "output_tokens": measured.output_tokens,
        "cached_tokens": measured.cached_tokens,
        "cached_share": round(share(measured.cached_tokens, measured.prompt_tokens), 4),
        "ideal_cached_share": round(ideal.cached_share, 4),
        "latency": percentiles(measured.latency),
        "ttft": percentiles(measured.ttft),
        "itl": percentiles(measured.itl),
    }


def warm(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The workloads whose prompts the server had cached before this run: more than a run of its own can reuse."""
    return [name for name, found in results.items() if found["cached_share"] > found["ideal_cached_share"] + WARM]


def share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    streamed = any(result["ttft"] for result in results.values())
    drawn = Table(box=SIMPLE_HEAD, caption_justify="left", padding=(0, 1, 0, 0), pad_edge=False)
    drawn.caption = (
        "tok/s: output tokens; prompt: tokens sent; cached: share of them the server says it reused; "
        "ideal: the share if every distinct token is computed once; p50, p99: of latency"
    )
    if streamed:
        drawn.caption += "; TTFT, ITL: median time to the first token and between tokens"
    drawn.add_column("workload", no_wrap=True)
    columns = ["time s", "req/s", "tok/s", "prompt", "cached", "ideal", "p50 s", "p99 s"]
    for name in columns + (["TTFT s", "ITL s"] if streamed else []) + ["failed"]:
        drawn.add_column(name, justify="right", no_wrap=True)
    for name, result in results.items():
        row = [
            name,
            f"{result['makespan']:.2f}",
            f"{result['requests_per_s']:.2f}",
            f"{result['output_tokens_per_s']:,.1f}",
            f"{result['prompt_tokens']:,}",
            f"{result['cached_share']:.2%}",
            f"{result['ideal_cached_share']:.2%}",
            _seconds(result["latency"], "p50"),
            _seconds(result["latency"], "p99"),
        ]
        if streamed:
            row += [_seconds(result["ttft"], "p50"), _seconds(result["itl"], "p50")]
        drawn.add_row(*row, f"[bold red]{result['failed']}[/]" if result["failed"] else "0")
    return drawn


def _seconds(values: Mapping[str, float] | None, which: str) -> str:
    return "–" if values is None else f"{values[which]:.3f}"
