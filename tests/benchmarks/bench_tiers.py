"""Memory tiers below the device.

    bench_tiers.py copies                     GB/s between an 8B's pool and host memory (needs a GPU)
    bench_tiers.py replay traces.jsonl.gz     reuse of a trace of agents, beside one LRU cache of the same size
    bench_tiers.py restart                    seconds that 100,000 tokens on a disk add to a start

``replay`` runs the real scheduler, tree and tier manager with a null executor over the weka trace (one session a line,
``hash_id_ranges`` of 64-token blocks), with the pages that Llama-3.1-8B has on one H200. Each page of 16 tokens is one
token here: prompts agree in whole blocks, so only the number of pages matters. ``--sessions`` takes the first of them.
A capacity is what is kept once: device and host hold different pages, and a disk repeats what is above it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import tempfile
import time
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from branchwise.radix.tree import RadixTree
from branchwise.runtime.config import EngineConfig
from branchwise.runtime.engine.core import EngineCore
from branchwise.runtime.executor.null import NullExecutor
from branchwise.runtime.messages import Generate
from branchwise.runtime.sampling_params import SamplingParams
from branchwise.runtime.scheduler.memory import LowerTiers
from branchwise.runtime.tiers.copies import Ended, HostCopies
from branchwise.runtime.tiers.disk import DiskTier
from branchwise.runtime.tiers.fingerprint import Fingerprint
from branchwise.runtime.tiers.folder import CacheFolder
from branchwise.runtime.tiers.manager import TierManager

PAGE = 16
DEVICE_TOKENS = 1_000_000  # of an 8B on one H200
BLOCK = 64
VOCABULARY = 1 << 24  # more than the trace has pages


def copies(pages: list[int]) -> None:
    import torch

    from branchwise.kernels.kv_pool import KVLayout, KVPool
    from branchwise.runtime.tiers.host import HostTier

    pool = KVPool.allocate(KVLayout(32, PAGE, 8, 128, torch.bfloat16), 8192, torch.device("cuda"))
    begun = time.perf_counter()
    tier = HostTier(pool, 4096)
    tier._pinning.use(tier.num_slots)
    while tier._pinning.pinned_bytes < tier.memory.nbytes:
        time.sleep(0.01)
    print(f"pinned {tier.memory.nbytes / 2**30:.1f} GiB in {time.perf_counter() - begun:.2f} s")
    print("pages   D2H GB/s   H2D GB/s   both GB/s")
    none = np.empty(0, np.int32)
    for n in pages:
        rng = np.random.default_rng(n)
        here, there = rng.permutation(8192)[:n].astype(np.int32), rng.permutation(4096)[:n].astype(np.int32)
        rates = []
        for store, load in ((True, False), (False, True), (True, True)):
            seconds = []
            for _ in range(5):
                torch.cuda.synchronize()
                started = time.perf_counter()
                if load:
                    tier.load(HostCopies(none, none, -1, [(1, there, (here + 1) % 8192)]))
                if store:
                    tier.store(HostCopies(here, there[::-1].copy(), -1))
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - started)
            rates.append((store + load) * n * tier.page_bytes / min(seconds) / 1e9)
        print(f"{n:5}   {rates[0]:8.1f}   {rates[1]:8.1f}   {rates[2]:9.1f}", flush=True)
    tier.close()


class NullHost:
    """A `HostCopier` that moves nothing: copies have ended when they are asked after."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots, self.page_bytes = num_slots, 1
        self.memory = np.zeros((1, 1), np.uint8)
        self._ended: list[Ended] = []
        self._calls = 0

    def store(self, copies: HostCopies) -> None:
        self._calls += 1

    def load(self, copies: HostCopies) -> None:
        self._ended += [Ended(id, len(slots), 0.0) for id, slots, _ in copies.loads]

    def stored(self) -> int:
        return self._calls

    def ended(self) -> list[Ended]:
        ended, self._ended = self._ended, []
        return ended


class NullDisk:
    """A `DiskTier` that keeps nothing but what the tree remembers."""

    parts = 1

    def __init__(self, records: int) -> None:
        self.folder = SimpleNamespace(max_records=records, path="nowhere")
        self._ended: list[Ended] = []

    def keeps(self, namespace: object) -> bool:
        return True

    def restore(self, tree: object) -> int:
        return 0

    def ended(self) -> list[Ended]:
        ended, self._ended = self._ended, []
        return ended

    def read(self, id: int, records: Any, memory: object, slots: object) -> None:
        self._ended.append(Ended(id, len(records), 0.0))

    def write(self, id: int, pages: object, records: Any, memory: object, slots: object) -> None:
        self._ended.append(Ended(id, len(records), 0.0))

    def delete(self, records: object) -> None:
        pass

    def close(self) -> None:
        pass


def arrivals(path: str, sessions: int | None, hours: float = 4.0) -> list[tuple[int, np.ndarray]]:
    """(session, block ids) of each request in order: sessions start at random over 8 hours (as `lru_sim.py` has it)."""
    chance, events = random.Random(1), []
    with gzip.open(path, "rt") as lines:
        for session, line in enumerate(lines):
            if sessions is not None and session >= sessions:
                break
            start = chance.uniform(0, 8 * 3600)
            for request in json.loads(line)["requests"]:
                if "hash_id_ranges" in request and request["t"] < hours * 3600:
                    ranges = [np.arange(a, b + 1, dtype=np.int32) for a, b in request["hash_id_ranges"]]
                    if ranges:
                        events.append((start + request["t"], session, np.concatenate(ranges)))
    events.sort(key=lambda event: event[0])
    return [(session, blocks) for _, session, blocks in events]


def lru(events: list[tuple[int, np.ndarray]], tokens: int) -> float:
    """Share of the tokens that one LRU cache of 512-token blocks would have."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = total = 0
    for session, blocks in events:
        ids = (session * 1_000_000 + blocks[7::8].astype(np.int64)).tolist()
        known = 0
        for id in ids:
            if id not in cache:
                break
            known += 1
        for id in reversed(ids):
            cache[id] = None
            cache.move_to_end(id)
        while len(cache) > tokens // 512:
            cache.popitem(last=False)
        hits, total = hits + known * 512, total + len(blocks) * BLOCK
    return hits / total


def first_blocks(events: list[tuple[int, np.ndarray]]) -> dict[int, int]:
    """Where the blocks of each session begin when those of all are numbered one after the other."""
    ends: dict[int, int] = {}
    for session, blocks in events:
        ends[session] = max(ends.get(session, 0), int(blocks.max()) + 1)
    starts = np.concatenate(([0], np.cumsum(list(ends.values()))))
    return dict(zip(ends, starts.tolist(), strict=False))


def replay(events: list[tuple[int, np.ndarray]], tokens: int, scale: float) -> tuple[float, dict[str, float], float]:
    """Share of the tokens that the tiers served: in all, by tier, and seconds."""
    device, pages = int(DEVICE_TOKENS * scale) // PAGE, tokens // PAGE
    host = min(max(0, pages - device), 2 * device)
    executor = NullExecutor(device, 1, VOCABULARY)
    config = EngineConfig(page_size=1, max_num_seqs=8, max_num_batched_tokens=1 << 14, overlap=False)
    disk: Any = NullDisk(pages) if pages > device + host else None
    core = EngineCore(config, executor, (), device, lower=LowerTiers(NullHost(host), disk) if host else None)
    if isinstance(core.scheduler.tiers, TierManager):
        core.scheduler.tiers.step_ended = lambda *_: None  # type: ignore[method-assign]  # a null executor is too fast
    reused = {"device": 0, "host": 0, "disk": 0}
    parts, starts = BLOCK // PAGE, first_blocks(events)
    total, begun = 0, time.perf_counter()
    for i, (session, blocks) in enumerate(events):
        pages = (starts[session] + blocks)[:, None] * parts + np.arange(parts, dtype=np.int32)
        data = pages.tobytes()
        core.add(Generate([i], SamplingParams(max_tokens=1), tokens=data, shorten=True))
        while core.has_work:
            output = core.step()
            for finished in output.finished if output else ():
                report = finished.cache
                if report is not None:
                    reused["host"] += report.host_tokens
                    reused["disk"] += report.disk_tokens
                    reused["device"] += report.hit_tokens - report.host_tokens - report.disk_tokens
        core.idle()
        total += pages.size
    core.check()
    shares = {tier: n / total for tier, n in reused.items()}
    return sum(shares.values()), shares, time.perf_counter() - begun


def restart(tokens: int) -> None:
    prints, payload = Fingerprint("model", "device", "layout", 4096), np.zeros(4096, np.uint8)
    rng, chain = np.random.default_rng(0), 625  # pages of one prompt
    with tempfile.TemporaryDirectory() as scratch:
        folder = CacheFolder(Path(scratch), prints, 1 << 20)
        for first in range(0, tokens // PAGE, chain):
            records = list(range(first, min(first + chain, tokens // PAGE)))
            ids = rng.integers(0, 100_000, (len(records), PAGE)).astype(np.int32)
            pages = [(("", ""), -1 if i == first else i - 1, row) for i, row in zip(records, ids, strict=True)]
            folder.write(pages, records, [payload] * len(records))
        folder.close()
        for _ in range(3):
            begun, used = time.perf_counter(), time.process_time()
            disk = DiskTier(CacheFolder(Path(scratch), prints, 1 << 20))
            found = disk.restore(RadixTree(1000, PAGE, host_slots=1000, disk_slots=1 << 20))
            print(
                f"{found} tokens: {time.perf_counter() - begun:.3f} s, {time.process_time() - used:.3f} s of processor"
            )
            disk.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    commands.add_parser("copies").add_argument("--pages", type=int, nargs="*", default=[8, 64, 512, 2048])
    commands.add_parser("restart").add_argument("--tokens", type=int, default=100_000)
    trace = commands.add_parser("replay")
    trace.add_argument("path")
    trace.add_argument("--sessions", type=int, default=None)
    trace.add_argument("--capacities", type=float, nargs="*", default=[1e6, 3e6, 10e6])
    args = parser.parse_args()
    if args.what != "replay":
        copies(args.pages) if args.what == "copies" else restart(args.tokens)
        return
    events = arrivals(args.path, args.sessions)
    scale = 1.0 if args.sessions is None else args.sessions / 710
    print(
        f"{len(events)} requests, {sum(len(b) for _, b in events) * BLOCK / 1e9:.2f} G tokens; capacities × {scale:.2f}"
    )
    print("capacity   LRU       tiers     device    host      disk      seconds")
    for capacity in args.capacities:
        tokens = int(capacity * scale)
        all_, shares, seconds = replay(events, tokens, scale)
        parts = "   ".join(f"{shares[tier]:6.1%} " for tier in ("device", "host", "disk"))
        print(
            f"{capacity / 1e6:5.0f}M     {lru(events, tokens):6.1%}    {all_:6.1%}    {parts}   {seconds:.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
