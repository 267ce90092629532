"""A model over several GPUs: the collectives, checked and timed in CUDA graphs, and a decode step against one GPU's.

    bench_ranks.py [--ranks 2] [--parts collectives,decode] [--layers 32] [--requests 64] [--context 2048]

With TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1 all ranks are on one GPU: the checks hold, the times mean nothing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_model import LLAMA_8B, write

from branchwise.runtime.parallel.devices import rank_devices, without_peer_access
from branchwise.runtime.parallel.group import TensorGroup

HIDDEN = 8192
ROWS = (1, 32, 64, 128, 256, 512, 2048, 8192, 12_000)  # the last does not fit the buffer at once


def in_graph(run: Callable[[], object], overlapping: bool) -> float:
    """Microseconds of a call, the best of several replays of a graph of 10."""
    calls, replays = (2, 2) if overlapping else (10, 8)
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end) / calls)
    return min(times)


def check(group: TensorGroup, device: torch.device) -> None:
    """Raises if a collective does not do what it says, for the dtypes and sizes that a model has."""
    for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.int64):
        for rows in (1, 3, 64, 1000):
            x = (torch.arange(rows * 256, device=device).view(rows, 256) % 97 + group.rank).to(dtype)
            everyone = [x - group.rank + rank for rank in range(group.size)]
            assert torch.equal(group.all_reduce(x.clone()).clone(), torch.stack(everyone).sum(0).to(dtype)), dtype
            assert torch.equal(group.all_gather(x), torch.stack(everyone)), dtype
            assert torch.equal(group.broadcast(x.clone()), everyone[0]), dtype


def rank_main(rank: int, size: int, store: str) -> None:
    overlapping = os.environ.get("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES") == "1"
    devices = rank_devices(0, size)
    device = torch.device("cuda", devices[rank])
    torch.cuda.set_device(device)
    groups: dict[str, TensorGroup] = {}
    if size > 1 and not without_peer_access(devices):
        from branchwise.runtime.parallel.symmetric import SymmetricGroup

        groups["symmetric"] = SymmetricGroup(dist.FileStore(f"{store}-symmetric", size), rank, size, device, "bench")
    if size == 1 or not overlapping:
        from branchwise.runtime.parallel.nccl import NcclGroup

        groups["NCCL"] = NcclGroup(dist.FileStore(f"{store}-nccl", size), rank, size, device)
    for group in groups.values():
        check(group, device)
    if rank == 0:
        print(f"collectives of {size} ranks are right: {', '.join(groups)}\nµs in a graph, bf16 [B, {HIDDEN}]")
        print("| B | " + " | ".join(f"{name} all-reduce | gather of [B, 64128]" for name in groups) + " |", flush=True)
    for rows in ROWS[:4] if overlapping else ROWS:
        x = torch.ones(rows, HIDDEN, dtype=torch.bfloat16, device=device)
        cells = []
        for group in groups.values():
            cells.append(f"{in_graph(lambda g=group, x=x: g.all_reduce(x), overlapping):.1f}")  # type: ignore[misc]
            part = torch.ones(min(rows, 256), 64_128, dtype=torch.bfloat16, device=device)
            cells.append(f"{in_graph(lambda g=group, x=part: g.all_gather(x), overlapping):.1f}")  # type: ignore[misc]
        if rank == 0:
            print(f"| {rows} | " + " | ".join(cells) + " |", flush=True)
    torch.cuda.synchronize()


def collectives(size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--store", f"{folder}/store", "--ranks", str(size), "--rank"]
        children = [subprocess.Popen([*command, str(rank)]) for rank in range(size)]
        codes = [child.wait() for child in children]
    if any(codes):
        raise SystemExit(f"collectives: exit codes {codes}")


def decode(args: argparse.Namespace) -> None:
    """Milliseconds of a decode step of ``requests`` with ``context`` tokens each, nothing shared."""
    from branchwise import Engine, SamplingParams

    requests, context, steps = args.requests, args.context, 128
    params = SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True)
    prompts = [[(31 * i + 7 * j) % 100_000 + 3 for j in range(context)] for i in range(requests)]
    times: dict[int, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = write(Path(folder), LLAMA_8B | {"num_hidden_layers": args.layers})
        settings: dict[str, Any] = {"load_format": "dummy", "max_model_len": 2 * context, "max_num_seqs": requests}
        for size in (1, args.ranks):
            begun = time.monotonic()
            with Engine(model, tensor_parallel_size=size, kv_cache_tokens=2 * requests * context, **settings) as engine:
                ready = time.monotonic() - begun
                engine.generate(prompts, params)  # fills the cache; captures
                begun = time.monotonic()
                engine.generate(prompts, SamplingParams(temperature=0, max_tokens=1))
                short = time.monotonic() - begun
                begun = time.monotonic()
                engine.generate(prompts, params)
                times[size] = (time.monotonic() - begun - short) / (steps - 1)
                print(f"{size} ranks: ready in {ready:.1f} s, {1e3 * times[size]:.2f} ms a decode step", flush=True)
    print(f"decode step {requests} × {context}: {times[args.ranks] / times[1]:.2f} × one rank's (bar 0.62)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--parts", default="collectives,decode")
    parser.add_argument("--layers", type=int, default=LLAMA_8B["num_hidden_layers"])
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        rank_main(args.rank, args.ranks, args.store)
        return
    if "collectives" in args.parts:
        collectives(args.ranks)
    if "decode" in args.parts:
        decode(args)


if __name__ == "__main__":
    main()
