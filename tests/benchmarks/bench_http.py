"""What a token and a request cost outside the model: CPU seconds of each process of a server with the null executor.

    python tests/benchmarks/bench_http.py [--only streams,short,long,burst] [--rate 12000] [--tokenizer words|bytes]

streams   256 streams of ``POST /v1/completions`` at once, a step every 21.3 ms as on a GPU: ``--rate`` asks for more.
          CPU of each process a token, the gaps between a stream's chunks, how long ``GET /health`` takes meanwhile, and
          how late the HTTP process's event loop was, by its own metric (an idle one is a millisecond late, for timers
          are in milliseconds: what is more is a loop that was busy with something else).
short     whole completions, prompts of 2,500 token ids, answers of 96 tokens, 64 at once, a step every 8 ms.
long      the same with prompts of 33,000 ids.
burst     prompts of 2,500 ids, answers of one token, 64 at once, steps as fast as they go: requests/s is what the
          processes together can take in.

A process that shall keep up with 12,000 tokens/s may spend 83 µs a token. CPU seconds, not rates, because the load
generator and four processes share whatever cores there are. ``--branchwise DIR`` measures another checkout: DIR holds
a folder (or link) named ``branchwise``.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROLES = ("http", "tokenizer", "scheduler", "detokenizer")
STREAMS = 256
STEP_SECONDS = {"short": 0.008, "long": 0.008, "burst": 0.0}
TICK = os.sysconf("SC_CLK_TCK")

LAUNCH = """
import json, sys
import msgspec
from branchwise.runtime.config import ServerConfig
from branchwise.runtime.server.server import run_server

config = msgspec.json.decode(sys.argv[1], type=ServerConfig)
sys.exit(run_server(config, lambda info: print(json.dumps(info), flush=True)))
"""


class Server:
    """A running server with the null executor: its port, and the CPU its processes have used."""

    def __init__(self, process: subprocess.Popen[str], info: dict[str, Any]) -> None:
        self.port: int = info["port"]
        self._pids = {"http": process.pid, **info["pids"]}

    def cpu(self) -> dict[str, float]:
        """Seconds of each process, user and system together."""
        return {role: _cpu(self._pids[role]) for role in ROLES}


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


@contextmanager
def server(folder: Path | None, step_seconds: float, checkout: Path | None, **engine: Any) -> Iterator[Server]:
    """``folder``: of a tokenizer, for the null executor; None: the shipped model."""
    config: dict[str, Any] = {"engine": engine, "port": 0}
    if folder is not None:
        engine |= {"model": str(folder), "max_model_len": 65_536, "max_num_batched_tokens": 8192}
        config |= {"null_executor": True, "null_step_seconds": step_seconds}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if checkout is not None:
        environment["PYTHONPATH"] = str(checkout.resolve())
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, json.dumps(config)], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit("the server did not start")
        yield Server(process, json.loads(line))
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def loop_lag(port: int) -> dict[float, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        return cumulative(answer.read().decode())


def cumulative(metrics: str) -> dict[float, float]:
    """Observations so far of ``branchwise_event_loop_lag_seconds`` that are at most so many seconds.

    Empty where the server has no such metric: older checkouts have none.
    """
    start = 'branchwise_event_loop_lag_seconds_bucket{le="'
    found = (line.removeprefix(start).split('"} ') for line in metrics.splitlines() if line.startswith(start))
    return {float(bound): float(count) for bound, count in found}


def quantile(before: dict[float, float], after: dict[float, float], q: float) -> float:
    """Of what was observed between two looks at a histogram, as Prometheus has it: linear within a bucket.

    Beyond the last bound it is that bound.
    """
    counts = {bound: after[bound] - before[bound] for bound in sorted(after)}
    wanted = q * counts[max(counts)]
    low = seen = 0.0
    for bound, count in counts.items():
        if count >= wanted and bound != float("inf"):
            return low + (bound - low) * (wanted - seen) / (count - seen) if count > seen else low
        if bound != float("inf"):
            low, seen = bound, count
    return low


class Probe(threading.Thread):
    """Asks ``/health`` ten times a second on a connection of its own."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self._done = threading.Event()
        self._seconds: list[float] = []

    def run(self) -> None:
        while True:
            start = time.perf_counter()
            self._connection.request("GET", "/health")
            self._connection.getresponse().read()
            self._seconds.append(time.perf_counter() - start)
            if self._done.wait(0.1):
                return

    def stop(self) -> dict[str, float]:
        self._done.set()
        self.join()
        ordered = sorted(self._seconds)
        return {
            "p50": round(ordered[len(ordered) // 2] * 1e3, 2),
            "p99": round(ordered[len(ordered) * 99 // 100] * 1e3, 2),
            "max": round(ordered[-1] * 1e3, 2),
        }


def load(running: Server, what: str, clients: int, **options: int) -> dict[str, Any]:
    """Runs ``clients`` load generators together; their figures and the server's CPU."""
    arguments = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "http_load.py"), str(running.port), what, *arguments, "--seed", str(i + 1)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(clients)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise SystemExit("a load generator did not start")
        probe = Probe(running.port)
        probe.start()
        before, lag_before = running.cpu(), loop_lag(running.port)
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        results = [json.loads(process.communicate(timeout=300)[0]) for process in processes]
        after, lag_after = running.cpu(), loop_lag(running.port)
        health = probe.stop()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    seconds = max(result["seconds"] for result in results)
    requests = sum(result["requests"] for result in results)
    tokens = requests * options["max_tokens"]
    used = {role: after[role] - before[role] for role in ROLES}
    return {
        "seconds": seconds,
        "tokens": tokens,
        "requests": requests,
        "events": sum(result["events"] for result in results),
        "tokens_per_s": round(tokens / seconds),
        "requests_per_s": round(requests / seconds, 1),
        "us_per_token": {role: round(value / tokens * 1e6, 1) for role, value in used.items()},
        "ms_per_request": {role: round(value / requests * 1e3, 2) for role, value in used.items()},
        "health": health,
        "loop_lag": {f"p{q}": round(quantile(lag_before, lag_after, q / 100) * 1e3, 2) for q in (50, 99) if lag_after},
        **{name: _worst(results, name) for name in ("first", "gaps", "latency")},
    }


def _worst(results: list[dict[str, Any]], name: str) -> dict[str, float]:
    """Of several clients' percentiles, the largest of each."""
    return {key: max(result[name][key] for result in results) for key in results[0][name]}


def write_tokenizer(folder: Path, kind: str) -> Path:
    """``words``: every id a word of its own, as BranchBench's models have; ``bytes``: byte-level, as Llama 3's."""
    from tiny_model import write
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    write(folder)
    if kind == "bytes":
        words = ["<bos>", "<eos>", "<unk>"] + [f"Ġt{i}" for i in range(3, 8192)]
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def measure(part: str, folder: Path, checkout: Path | None, tokens: int, rate: float) -> dict[str, Any]:
    with server(folder, STEP_SECONDS.get(part, STREAMS / rate), checkout) as running:
        load(running, "requests", 1, connections=8, prompt_tokens=300, max_tokens=16, total=64)  # warm
        if part == "streams":
            return load(running, "streams", 2, connections=STREAMS // 2, prompt_tokens=300, max_tokens=tokens)
        size, answer, total = {"short": (2500, 96, 160), "long": (33_000, 96, 96), "burst": (2500, 1, 640)}[part]
        return load(running, "requests", 2, connections=32, prompt_tokens=size, max_tokens=answer, total=total)


def show(results: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The table, in Markdown."""
    yield (
        "| part | tokens/s | requests/s | "
        + " | ".join(ROLES)
        + " | latency p50, p99 ms | /health p50, p99, max ms | loop lag p50, p99 ms |"
    )
    yield "| --- | ---: | ---: |" + " ---: |" * (len(ROLES) + 3)
    for part, r in results.items():
        unit, per = ("µs/token", r["us_per_token"]) if part == "streams" else ("ms/request", r["ms_per_request"])
        lag = r["gaps"] if part == "streams" else r["latency"]
        name = f"{part} ({unit}; gaps)" if part == "streams" else f"{part} ({unit})"
        yield (
            f"| {name} | {r['tokens_per_s']:,} | {r['requests_per_s']:,} | "
            + " | ".join(f"{per[role]}" for role in ROLES)
            + f" | {lag['p50']}, {lag['p99']} | {r['health']['p50']}, {r['health']['p99']}, {r['health']['max']} | "
            + ", ".join(str(value) for value in r["loop_lag"].values())
            + " |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="streams,short,long,burst")
    parser.add_argument("--tokenizer", choices=["words", "bytes"], default="words")
    parser.add_argument("--tokens", type=int, default=300, help="of each stream")
    parser.add_argument("--rate", type=float, default=12_000, help="tokens/s asked for by the streams together")
    parser.add_argument("--branchwise", type=Path, help="a folder that holds another checkout named branchwise")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="branchwise-http-") as scratch:
        folder = write_tokenizer(Path(scratch) / "model", args.tokenizer)
        results = {
            part: measure(part, folder, args.branchwise, args.tokens, args.rate) for part in args.only.split(",")
        }
    print(json.dumps({"http": results}) if args.json else "\n".join(show(results)))


if __name__ == "__main__":
    main()
