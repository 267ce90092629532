"""``branchwise simulate``: a recorded trace on a simulated fleet."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from .console import check_writable, err, expected_failures, out


def simulate(
    trace: Annotated[
        Path, typer.Argument(metavar="TRACE", help="JSON lines in Mooncake's or Weka's format, also gzipped.")
    ],
    replicas: Annotated[str, typer.Option(metavar="N,N,…", help="Numbers of replicas.")] = "16",
    policies: Annotated[
        str, typer.Option(metavar="NAME,…", help="round-robin, sticky, overlap, branchwise, or all.")
    ] = "all",
    routers: Annotated[str, typer.Option(metavar="N,N,…", help="Numbers of routers, for branchwise.")] = "1",
    event_lag: Annotated[
        str, typer.Option(metavar="MS,MS,…", help="Milliseconds until routers know of a change, for branchwise.")
    ] = "0",
    speed: Annotated[
        float, typer.Option(min=0.0, help="Divides the trace's times. 0: replicas / 16, the same load on each.")
    ] = 0.0,
    kv_cache_tokens: Annotated[int, typer.Option(min=1, help="Tokens that one replica's cache holds.")] = 1_000_000,
    page_size: Annotated[int, typer.Option(min=0, help="Tokens of a page. 0: the trace's block, at most 256.")] = 0,
    max_num_batched_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one step.")] = 8192,
    step_times: Annotated[
        str,
        typer.Option(
            metavar="S,S,S",
            help="Seconds of a step: constant, for each prompt token, for each KV token that decodes read. "
            "`tests/benchmarks/fit_step_times.py` measures them.",
        ),
    ] = "0.005,45e-6,33e-9",
    max_requests: Annotated[int | None, typer.Option(min=1, help="Only the first so many.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Of the start times of sessions that have none.")] = 0,
    table: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the table here.", show_default=False)
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a plot (SVG).", show_default=False)] = None,
) -> None:
    """Replay a trace on a fleet of simulated replicas, without a model.

    Every replica is the real cache and the real scheduler; only the steps take computed time. Shows how much is reused
    under each way of routing, against one shared cache of the same total size, how even the load is, and the time to
    first token. Prompts are read from TRACE, nothing is sent anywhere.
    """
    with expected_failures():
        from ...runtime.errors import LoadError
        from ...runtime.simulation import bounds, report
        from ...runtime.simulation.fleet import POLICIES, FleetSettings
        from ...runtime.simulation.fleet import simulate as run
        from ...runtime.simulation.replica import ReplicaSettings
        from ...runtime.simulation.step_times import StepTimes
        from ...runtime.simulation.traces import read_trace

        names = POLICIES if policies == "all" else tuple(policies.split(","))
        if not set(names) <= set(POLICIES):
            raise LoadError(f"--policies: of {', '.join(POLICIES)}, got {policies!r}")
        chosen = [name for name in POLICIES if name in names]
        seconds = _numbers(step_times, "--step-times")
        if len(seconds) != 3 or not seconds[0]:
            raise LoadError(f"--step-times: three numbers, the first more than 0, got {step_times!r}")
        counts, router_counts = _counts(replicas, "--replicas"), _counts(routers, "--routers")
        lags = _numbers(event_lag, "--event-lag")
        for file in (table, plot):  # found out now, not after the first run
            if file is not None:
                check_writable(file)
        arrivals = read_trace(trace, seed=seed, max_requests=max_requests)
        size = page_size or min(256, arrivals[0].block_size)
        if kv_cache_tokens < size:
            raise LoadError(f"--kv-cache-tokens {kv_cache_tokens}: less than one page of {size} tokens")
        replica = ReplicaSettings(
            kv_cache_tokens=kv_cache_tokens,
            page_size=size,
            max_num_batched_tokens=max_num_batched_tokens,
            step_times=StepTimes(*seconds),
        )
        results, shared, offline = [], {}, {}
        for count in counts:
            shared[count] = bounds.shared_cache_hit_rate(arrivals, count * kv_cache_tokens, size)
            offline[count] = bounds.offline_hit_rate(arrivals, count * kv_cache_tokens)
            for policy in chosen if count > 1 else chosen[-1:]:
                ours = policy == "branchwise" and count > 1
                for number in router_counts if ours else (1,):
                    for lag in lags if ours else (0.0,):
                        settings = FleetSettings(
                            count, policy, number, lag / 1000, speed=speed or count / 16, replica=replica
                        )
                        with err.status(f"{count} replicas, {policy}: {len(arrivals)} requests"):
                            result = run(arrivals, settings)
                        results.append(result)
                        out.print(
                            f"{count} replicas, {policy}, {number} router(s), lag {lag:g} ms: hit rate "
                            f"{result.hit_rate:.1%}, {report.share_of(result.hit_rate, shared[count])} of one shared "
                            f"cache ({shared[count]:.1%}; offline bound {offline[count]:.1%}); simulated in "
                            f"{result.wall_seconds:.0f} s",
                            markup=False,
                            soft_wrap=True,
                        )
                        if table is not None:  # after each run: a long series that is ended leaves what it had
                            table.write_text(report.table(results, shared))
                        if plot is not None:
                            plot.write_text(report.plot(results, shared, offline))
        out.print(report.table(results, shared), markup=False, soft_wrap=True)


def _numbers(text: str, flag: str) -> list[float]:
    from ...runtime.errors import LoadError

    try:
        found = [float(each) for each in text.split(",")]
    except ValueError:
        raise LoadError(f"{flag}: numbers separated by commas, got {text!r}") from None
    if min(found) < 0 or not all(map(math.isfinite, found)):
        raise LoadError(f"{flag}: numbers of 0 or more, got {text!r}")
    return found


def _counts(text: str, flag: str) -> list[int]:
    from ...runtime.errors import LoadError

    found = _numbers(text, flag)
    if min(found) < 1 or not all(map(float.is_integer, found)):
        raise LoadError(f"{flag}: whole numbers of 1 or more, got {text!r}")
    return [int(each) for each in found]
