"""Everything `make bench` measures, one after the other, on this machine: figures in .bench/, tables on the terminal.

    run.py [--only tree,planner,server,transformers] [--scale 0.05]

The tree alone, the planner alone, BranchBench against a server of our own, and `transformers` on the same prompts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
OUT = HERE.parent.parent / ".bench"
PARTS = ("tree", "planner", "server", "transformers")
VOCAB = 8000
START_SECONDS = 60


def branchwise(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "branchwise", *arguments]


def script(name: str, *arguments: str) -> list[str]:
    return [sys.executable, str(HERE / name), *arguments]


def machine() -> str:
    model = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    memory = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return f"{os.cpu_count()}-core {model}, {memory / 2**20:.0f} GiB, Python {platform.python_version()}"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """A server of the tiny model on a free port; stopped at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        branchwise("serve", str(folder), "--load-format", "dummy", "--port", str(port), "--log-level", "warning")
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the server did not start")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=60)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> Iterator[str]:
    """Rows of a Markdown table: how many times faster, against `transformers` both ways."""
    yield "| workload | branchwise | transformers, one by one | transformers, batched |"
    yield "| --- | ---: | ---: | ---: |"
    for name, ways in theirs.items():
        seconds = ours[name]["makespan"]
        cells = [f"{ways[way]['makespan']:.2f} s ({ways[way]['makespan'] / seconds:.1f}×)" for way in ways]
        yield f"| {name} | {seconds:.2f} s | {' | '.join(cells)} |"


def served(ours: dict[str, Any]) -> Iterator[str]:
    """Rows of a Markdown table: what BranchBench measured."""
    yield "| workload | requests | failed | seconds | output tok/s | prompt tokens | cached | ideal | p50 s | p99 s |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    for name, r in ours.items():
        latency = r["latency"] or {"p50": float("nan"), "p99": float("nan")}
        yield (
            f"| {name} | {r['requests']} | {r['failed']} | {r['makespan']:.2f} | {r['output_tokens_per_s']:,.0f} "
            f"| {r['prompt_tokens']:,} | {r['cached_share']:.2%} | {r['ideal_cached_share']:.2%} "
            f"| {latency['p50']:.2f} | {latency['p99']:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated, of: " + ", ".join(PARTS))
    parser.add_argument("--scale", type=float, default=0.05, help="of BranchBench")
    args = parser.parse_args()
    wanted = args.only.split(",")
    OUT.mkdir(exist_ok=True)
    print(machine(), flush=True)
    if "tree" in wanted:
        subprocess.run(script("bench_tree.py"), check=True)
    if "planner" in wanted:
        subprocess.run(script("bench_planner.py"), check=True)
    with tempfile.TemporaryDirectory(prefix="branchwise-bench-") as scratch:
        folder = Path(scratch) / "tiny"
        subprocess.run(script("tiny_model.py", str(folder)), check=True, stdout=subprocess.DEVNULL)
        common = ["--scale", str(args.scale), "--vocab", str(VOCAB), "--out"]
        if "server" in wanted:
            with server(folder) as url:
                subprocess.run(branchwise("bench", url, *common, str(OUT / "branchbench.json")), check=True)
        if "transformers" in wanted:
            subprocess.run(
                script("versus_transformers.py", str(folder), *common, str(OUT / "transformers.json")), check=True
            )
    _print_markdown()


def _print_markdown() -> None:
    """The tables of docs/performance.md, from whatever has been measured here so far."""
    ours, theirs = (
        json.loads(file.read_text()) if file.is_file() else None
        for file in (OUT / "branchbench.json", OUT / "transformers.json")
    )
    if ours is not None:
        print("\n".join(served(ours)))
    if ours is not None and theirs is not None:
        print()
        print("\n".join(compare(ours, {name: ways for name, ways in theirs.items() if name in ours})))


if __name__ == "__main__":
    main()
