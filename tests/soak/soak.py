"""A soak: hours of ordinary, hostile and leaving clients, and of processes that are killed and stopped.

    python tests/soak/soak.py --minutes 60 [--seed 0] [--flood 24]        or: make soak MINUTES=60

Two thirds of the time one long-lived server of each kind (the shipped model, and the null model with a tiny pool) is
loaded, and its memory and descriptors are followed; in the last third short-lived servers lose a process, have one
stopped, or are killed themselves. The report says how requests ended, pages lost, waits, and memory. The exit code is 1
if a bar is missed: a request without an end, a page lost, a process or directory left behind, memory that grows, or a
small request beside another key's flood with a p99 above two seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

from clients import Clients, Tally
from target import ADMIN, KEYS, Target

from branchwise.runtime.config import EngineConfig, ServerConfig

WAIT_BAR = 2.0  # seconds: p99 of small requests beside the flood of another key
GROWTH_BAR = 1.10  # median resident memory of the last third over that of the first, of each process
SLACK_MB = 10.0
DESCRIPTOR_BAR = 16
ROLES = ("tokenizer", "scheduler", "detokenizer")


def config(kind: str) -> ServerConfig:
    """A server with three keys. ``null``: a pool of 60 pages; ``model``: the shipped model."""
    null = kind == "null"
    engine = EngineConfig(
        kv_cache_tokens=960 if null else 16_384,
        max_num_seqs=24 if null else 32,
        max_model_len=640 if null else None,
        device="cpu",
        branch_ttl=20.0,
    )
    return ServerConfig(
        engine=engine,
        port=0,
        api_key=KEYS[0],
        extra_api_keys=KEYS[1:],
        admin_api_key=ADMIN,
        null_executor=null,
        null_step_seconds=0.01 if null else 0.0,
        log_level="warning",
        hang_timeout=30.0,
    )


class Soak:
    """Runs rounds and gathers their results."""

    def __init__(self, work: Path, flood: int, seed: int) -> None:
        self._work = work
        self._flood = flood
        self._random = random.Random(seed)
        self.ends: Counter[str] = Counter()
        self.faults: list[str] = []
        self.rows: list[str] = []  # of the report

    def steady(self, kind: str, seconds: float) -> None:
        """One server under load all the time."""
        target = Target(config(kind), self._work)
        samples: list[dict[str, tuple[float, int]]] = []
        tally = self._load(target, seconds, lambda: samples.append(target.usage()))
        self._finish(f"steady, {kind}", target, tally)
        waits = sorted(tally.waits.get("small", [0.0]))
        p50, p99 = statistics.median(waits), waits[int(0.99 * (len(waits) - 1))]
        self.rows.append(
            f"  small requests beside the flood: {len(waits)}, p50 {p50:.2f} s, p99 {p99:.2f} s, "
            f"worst {waits[-1]:.2f} s, load of the machine {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
        )
        if p99 > WAIT_BAR:
            self.faults.append(f"{kind}: small requests waited {p99:.2f} s (p99)")
        tenth = max(1, len(samples) // 10)
        early, late = samples[tenth : 4 * tenth], samples[-3 * tenth :]  # single samples have bodies of the moment
        for role in target.pids:
            (before, opened), (after, open_now) = _median(early, role), _median(late, role)
            self.rows.append(
                f"  {role:12s} {before:7.1f} -> {after:7.1f} MB, {opened:4.0f} -> {open_now:4.0f} descriptors"
            )
            if after > before * GROWTH_BAR + SLACK_MB:
                self.faults.append(f"{kind}: {role} grew from {before:.0f} to {after:.0f} MB")
            if open_now > opened + DESCRIPTOR_BAR:
                self.faults.append(f"{kind}: {role} has {open_now:.0f} descriptors after {opened:.0f}")

    def chaos(self, kind: str, seconds: float) -> None:
        """One server of which a process is stopped for a moment, and then one is killed, or the server itself."""
        target = Target(config(kind), self._work)
        role, victim = self._random.choice(ROLES), self._random.choice([*ROLES, "http"])
        killed = threading.Event()

        def disturb() -> None:
            time.sleep(0.3 * seconds)
            target.stop_process(role, 2.0)
            time.sleep(0.3 * seconds)
            tally.expect_failures = True
            target.kill_process(victim)
            killed.set()

        tally = Tally()
        thread = threading.Thread(target=disturb)
        thread.start()
        self._load(target, seconds, lambda: None, tally)
        thread.join()
        left = target.end(signal.SIGCONT) if killed.is_set() else target.end()
        self._collect(f"chaos, {kind}: {role} stopped, {victim} killed", tally, left)

    def _load(self, target: Target, seconds: float, sample: object, tally: Tally | None = None) -> Tally:
        tally = tally or Tally()
        clients = Clients(target.url, KEYS, tally, self._random.getrandbits(32))  # type: ignore[arg-type]
        loop = threading.Thread(target=lambda: asyncio.run(clients.run(self._flood)))
        loop.start()
        end = time.monotonic() + seconds
        while time.monotonic() < end and target.process.poll() is None:
            time.sleep(min(5.0, seconds / 20))
            sample()  # type: ignore[operator]
        tally.stop = True
        loop.join()
        return tally

    def _finish(self, what: str, target: Target, tally: Tally) -> None:
        lost = target.lost_pages()
        if lost:
            tally.faults.append(f"{lost} pages are lost")
        self._collect(what, tally, target.end())

    def _collect(self, what: str, tally: Tally, left: list[str]) -> None:
        self.ends += tally.ends
        faults = tally.faults + [f"left behind: {one}" for one in left]
        self.faults += [f"{what}: {fault}" for fault in faults]
        ends = ", ".join(f"{count} {end}" for end, count in sorted(tally.ends.items()))
        self.rows.append(f"{what}: {sum(tally.ends.values())} requests ({ends}); {len(faults)} faults")
        print(self.rows[-1], flush=True)


def _median(samples: list[dict[str, tuple[float, int]]], role: str) -> tuple[float, float]:
    """Of memory and of descriptors."""
    memory, descriptors = zip(*(sample[role] for sample in samples if role in sample), strict=True)
    return statistics.median(memory), statistics.median(descriptors)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--flood", type=int, default=24, help="clients of the key that floods")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chaos-seconds", type=float, default=30.0, help="of one short-lived server")
    args = parser.parse_args()
    seconds = 60 * args.minutes
    with tempfile.TemporaryDirectory(prefix="soak-", dir="/tmp") as work:
        soak = Soak(Path(work), args.flood, args.seed)
        for kind in ("null", "model"):
            soak.steady(kind, seconds / 3)
        end = time.monotonic() + seconds / 3
        while time.monotonic() < end:
            for kind in ("null", "model"):
                soak.chaos(kind, args.chaos_seconds)
    print("\n".join(["", *soak.rows, "", f"{sum(soak.ends.values())} requests: {dict(soak.ends)}"]))
    print(f"{len(soak.faults)} faults" + "".join(f"\n  {fault}" for fault in soak.faults[:50]))
    return 1 if soak.faults else 0


if __name__ == "__main__":
    sys.exit(main())
