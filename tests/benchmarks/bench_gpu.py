"""What `make bench-gpu` measures: BranchBench against our server on one GPU, in the shape of Llama-3.1-8B.

    bench_gpu.py [--workloads all] [--profile no_sharing,tree_of_thought] [--ablation] [--port 8000] [-- SERVER FLAGS]

``--ablation`` runs the workloads once more without tree attention, everything else equal. Flags after ``--`` go to the
server.

Random weights (``--load-format dummy``): answers mean nothing, times do. A second run of the profiled workloads records
the steps of one second in their middle: how long the device was idle, and which kernels took its time. Figures and
traces go to .bench/.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tiny_model import LLAMA_8B, LLAMA_70B, write

OUT = Path(__file__).resolve().parent.parent.parent / ".bench"
START_SECONDS = 600  # FlashInfer compiles its kernels the first time
PROFILE_AFTER, PROFILE_FOR = 0.5, 1.0  # seconds into the workload's makespan (a share of it), and length

# Makespans in seconds on one H200, the same load from the same client, each server with its defaults. READY: from the
# command to the first answer, with the kernels compiled before where a server keeps them.
PEER_NAMES = ("vLLM 0.24.0", "vLLM 0.33.0", "SGLang 0.5.15", "SGLang 0.5.23")
PEERS = {
    "no_sharing": (11.69, 11.74, 11.94, 11.83),
    "fewshot": (3.40, 3.58, 2.82, 2.79),
    "agents": (12.12, 12.58, 11.34, 11.48),
    "tree_of_thought": (4.74, 4.86, 4.78, 4.92),
    "chat": (8.67, 8.90, 8.26, 8.36),
    "best_of_n": (15.45, 15.85, 17.53, 17.25),
    "long_document": (17.27, 18.01, 18.49, 18.47),
}
READY = (90, 64, 104, 56)


@contextmanager
def server(folder: Path, port: int, log: Path, flags: list[str]) -> Iterator[tuple[str, float]]:
    """Our server; yields its address and how long it took from the command to the first answer."""
    command = [sys.executable, "-m", "branchwise", "serve", str(folder), "--load-format", "dummy"]
    command += ["--port", str(port), "--profile", str(OUT / "traces"), *flags]
    begun = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        while not _answers(url):
            if process.poll() is not None or time.monotonic() - begun > START_SECONDS:
                raise SystemExit(f"the server did not start:\n{log.read_text()[-4000:]}")
            time.sleep(0.1)
        yield url, time.monotonic() - begun
    finally:
        process.terminate()
        process.wait(timeout=60)


def _answers(url: str) -> bool:
    body = {"model": "", "prompt": [1000, 1001], "max_tokens": 1}
    try:
        body["model"] = json.load(urllib.request.urlopen(f"{url}/v1/models", timeout=2))["data"][0]["id"]
        return bool(_post(f"{url}/v1/completions", body))
    except (urllib.error.URLError, OSError):
        return False


def _post(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    data = json.dumps(body or {}).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return dict(json.load(response))


def run(url: str, workloads: str, out: Path, seed: int = 0) -> dict[str, Any]:
    command = [sys.executable, "-m", "branchwise", "bench", url, "--workloads", workloads, "--vocab", "100000"]
    command += ["--seed", str(seed)]
    subprocess.run([*command, "--out", str(out)], check=True, env=os.environ | {"COLUMNS": "140"})
    return dict(json.loads(out.read_text()))


def profile(url: str, workload: str, makespan: float) -> dict[str, Any]:
    """Runs the workload once more, with prompts that are not cached, and records a second of it."""
    found: dict[str, Any] = {}

    def record() -> None:
        time.sleep(makespan * PROFILE_AFTER)
        _post(f"{url}/start_profile")
        time.sleep(PROFILE_FOR)
        found.update(_post(f"{url}/stop_profile")["profile"])

    watcher = threading.Thread(target=record)
    watcher.start()
    run(url, workload, OUT / f"profiled-{workload}.json", seed=1)
    watcher.join()
    return found


def rows(ours: dict[str, Any], ready: float) -> Iterator[str]:
    """The table of docs/performance.md."""

    def row(name: str, seconds: float, peers: tuple[float, ...], note: str = "") -> str:
        return " | ".join(
            [f"| {name}", f"{seconds:.2f}{note}", *(f"{p:.4g}" for p in peers), f"{min(peers) / seconds:.2f}× |"]
        )

    yield " | ".join(["| workload", "Branchwise (s)", *PEER_NAMES, "the best of them ÷ ours |"])
    yield "| --- |" + " ---: |" * (len(PEER_NAMES) + 2)
    ratios = []
    for name, result in ours.items():
        failed = f" ({result['failed']} failed)" if result["failed"] else ""
        yield row(name, result["makespan"], PEERS[name], failed)
        ratios.append(min(PEERS[name]) / result["makespan"])
    yield row("ready to serve", ready, READY)
    yield f"geometric mean of {len(ratios)} ratios: {statistics.geometric_mean(ratios):.2f}×"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", default=",".join(PEERS))
    parser.add_argument("--profile", default="no_sharing,tree_of_thought", help="workloads to record, or nothing")
    parser.add_argument("--shape", choices=("8b", "70b"), default="8b", help="Llama 3.1's; the table's peers are 8b")
    parser.add_argument("--ablation", action="store_true", help="also with --attention-backend flashinfer")
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("flags", nargs="*", help="more flags for the server, after --")
    args = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="branchwise-bench-") as scratch:
        folder = write(Path(scratch) / f"llama-3.1-{args.shape}", {"8b": LLAMA_8B, "70b": LLAMA_70B}[args.shape])
        log = OUT / "server.log"
        with server(folder, args.port, log, args.flags) as (_, ready):
            pass
        if "compiling FlashInfer" in log.read_text():  # the first start on this machine: the table has the others
            print(f"ready after {ready:.1f} s, compiling", flush=True)
        with server(folder, args.port, log, args.flags) as (url, ready):
            print(f"ready after {ready:.1f} s", flush=True)
            ours = run(url, args.workloads, OUT / "branchbench-gpu.json")
            recorded = {
                name: profile(url, name, ours[name]["makespan"]) for name in args.profile.split(",") if name in ours
            }
        flat: dict[str, Any] = {}
        if args.ablation:
            flags = [*args.flags, "--attention-backend", "flashinfer"]
            with server(folder, args.port, OUT / "server-flat.log", flags) as (url, _):
                flat = run(url, args.workloads, OUT / "branchbench-gpu-flat.json")
    for line in log.read_text().splitlines():
        if "loaded in" in line or "tree attention:" in line:
            print(line)
    print("\n".join(rows(ours, ready)))
    if flat:
        print("\n".join(["", "| workload | tree (s) | flat (s) | flat ÷ tree |", "| --- | ---: | ---: | ---: |"]))
    for name, result in flat.items():
        tree, without = ours[name]["makespan"], result["makespan"]
        print(f"| {name} | {tree:.2f} | {without:.2f} | {without / tree:.2f} |")
    for name, found in recorded.items():
        print(
            f"\n{name}: {found['steps']} steps in {found['seconds']:.2f} s, "
            f"device idle {found['device_idle_share']:.1%}"
        )
        for kernel in found["kernels"][:8]:
            each = 1e3 * kernel["seconds"] / max(found["steps"], 1)
            print(f"  {each:7.3f} ms a step  {kernel['launches']:6}  {kernel['name'][:90]}")


if __name__ == "__main__":
    main()
