"""What the steps of a recorded trace cost, on the device and on the host.

    python tests/benchmarks/trace_steps.py TRACE.json.gz ...

Reads traces of `/start_profile`. Kernels are assigned to steps by the launch that enqueued them: `ModelExecutor.launch`
names each step. Steps are grouped by the form in which they ran (``decode 128``, ``joint 512``, ``eager 2048``: query
tokens, rounded up to a power of two where nothing is padded). All times are milliseconds of one step; *idle* is the
time before a step in which no kernel ran.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
from bisect import bisect_right
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES, NAMES = ("cuda_runtime", "cuda_driver"), ("user_annotation", "cpu_op")
KINDS = (  # the first pattern that a kernel's name contains
    ("attend", "attend"),
    ("merge", "merge"),
    ("norm", "norm"),
    ("rope", "rope"),
    ("silu", "silu"),
    ("nvjet|gemm|cutlass.*sm90_xmma|splitK|cublas", "gemm"),
    ("flash|Prefill|PersistentVariable", "flashinfer"),
    ("sample|softmax|exp|reduce|scan|top_p|searchsorted", "sampling"),
    ("Memcpy|Memset", "copy"),
)


def kind(event: dict[str, Any]) -> str:
    name = event["name"]
    found = next((kind for pattern, kind in KINDS if re.search(pattern, name)), "other")
    if found == "attend":
        return f"attend {event['args'].get('block', [0])[0] // 32}w"
    return found


def label(name: str) -> str:
    """``step: joint 512, tree, 90 decodes, 6 chunks of 380 tokens`` -> ``joint 512``."""
    form, size = name.removeprefix("step: ").split(",")[0].split(" ")
    return f"{form} {size}" if form != "eager" else f"eager {1 << (int(size) - 1).bit_length()}"


class Step:
    """A step of a trace. Times in microseconds."""

    def __init__(self, launch: dict[str, Any]) -> None:
        self.name: str = launch["name"]
        self.begun, self.host = launch["ts"], launch["dur"]
        self.gaps = self.idle = self.first = self.last = 0.0
        self.kernels: Counter[str] = Counter()

    @property
    def span(self) -> float:
        """From its first kernel to the end of its last."""
        return self.last - self.first


def read(path: Path) -> tuple[list[Step], float, float]:
    """The steps, the microseconds in which no kernel ran, and those of the whole trace."""
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    kernels = sorted((e for e in events if e.get("cat") in DEVICE), key=lambda e: e["ts"])
    launches = (e for e in events if e.get("cat") in LAUNCHES and "correlation" in e.get("args", {}))
    launched = {e["args"]["correlation"]: e["ts"] for e in launches}
    named = [e for e in events if e.get("cat") in NAMES and e["name"].startswith("step: ")]
    steps = [Step(e) for e in sorted(named, key=lambda e: e["ts"])]
    if not kernels or not steps:
        raise SystemExit(f"{path.name}: {len(kernels)} kernels, {len(steps)} steps")
    begins = [step.begun for step in steps]
    reached, idle, previous = kernels[0]["ts"], 0.0, None
    for event in kernels:
        at = launched.get(event["args"].get("correlation"), event["ts"])
        step = steps[max(bisect_right(begins, at) - 1, 0)]
        start, end = event["ts"], event["ts"] + event["dur"]
        gap = max(0.0, start - reached)
        idle += gap
        if step is previous:
            step.gaps += gap
        else:
            step.idle += gap
        step.first = step.first or start
        step.last = max(step.last, end)
        step.kernels[kind(event)] += event["dur"]
        reached, previous = max(reached, end), step
    return [step for step in steps if step.kernels], idle, reached - kernels[0]["ts"]


def report(path: Path) -> None:
    steps, idle, whole = read(path)
    print(f"{path.name}: {len(steps)} steps in {whole / 1e3:.0f} ms, no kernel ran in {idle / whole:.1%} of it")
    groups: dict[str, list[Step]] = defaultdict(list)
    for step in steps:
        groups[label(step.name)].append(step)
    print(f"  {'form':<14}{'steps':>6}{'span':>8}{'gaps':>7}{'idle':>7}{'host':>7}  kernels")
    for name, members in sorted(groups.items(), key=lambda item: -sum(step.span for step in item[1])):
        n = len(members) * 1e3
        span, gaps, waited, host = (
            sum(getattr(step, field) for step in members) / n for field in ("span", "gaps", "idle", "host")
        )
        kernels = sum((step.kernels for step in members), Counter[str]())
        parts = ", ".join(f"{kind} {us / n:.2f}" for kind, us in kernels.most_common())
        print(f"  {name:<14}{len(members):>6}{span:>8.2f}{gaps:>7.2f}{waited:>7.2f}{host:>7.2f}  {parts}")
    longest = sorted(steps, key=lambda step: -step.idle)[:8]
    print("  longest idle before: " + "; ".join(f"{step.idle / 1e3:.1f} ms {step.name[6:]}" for step in longest))


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        report(Path(argument))
