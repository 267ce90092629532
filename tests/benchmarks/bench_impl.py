"""What it costs that transformers' layers compute a model instead of our decoder, paired, in one process.

Both engines have dummy weights of one shape; each round measures one, then the other. Decode: ``--requests`` requests
with ``--prompt`` tokens of context. Prefill: as many fresh prompts, with one token each.

    python tests/benchmarks/bench_impl.py --shape 100m          # on a CPU
    python tests/benchmarks/bench_impl.py --shape 8b            # on a GPU
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from tiny_model import CONFIG, LLAMA_8B, write

from branchwise import Engine, SamplingParams

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": CONFIG,
    "100m": CONFIG
    | {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
    | {"num_key_value_heads": 4, "vocab_size": 16384},
    "1b": LLAMA_8B | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64},
    "8b": LLAMA_8B,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="100m")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    config, rng = SHAPES[args.shape], np.random.default_rng(0)
    folder = write(Path(tempfile.mkdtemp()), config)
    settings: dict[str, Any] = {
        "load_format": "dummy",
        "device": args.device,
        "max_num_seqs": max(8, args.requests),
        "kv_cache_tokens": 2 * args.requests * (args.prompt + args.tokens + 16),
    }

    def prompts() -> list[list[int]]:
        return rng.integers(5, config["vocab_size"], (args.requests, args.prompt)).tolist()

    names = ("native", "transformers")
    engines = []
    for name in names:
        started = time.perf_counter()
        engines.append(Engine(str(folder), model_impl=name, **settings))
        print(f"{name} loaded in {time.perf_counter() - started:.1f} s", flush=True)
    one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    many = SamplingParams(temperature=0, max_tokens=1 + args.tokens, ignore_eos=True)
    seconds: dict[tuple[str, str], list[float]] = {(kind, name): [] for kind in ("prefill", "decode") for name in names}
    for turn in range(args.rounds + 1):  # the first one warms up
        batch = prompts()
        for name, engine in zip(names, engines, strict=True):
            started = time.perf_counter()
            engine.generate(batch, one)
            prefilled = time.perf_counter()
            engine.generate(batch, many)
            if turn:
                seconds["prefill", name].append(prefilled - started)
                seconds["decode", name].append((time.perf_counter() - prefilled) / (args.tokens + 1))
    print(f"\nLlama {args.shape}, {args.requests} requests of {args.prompt} tokens, median of {args.rounds} rounds, ms")
    print("|  | native | transformers | ratio (paired) |\n|---|---|---|---|")
    for kind in ("prefill", "decode"):
        ours, theirs = (seconds[kind, name] for name in names)
        ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
        print(f"| {kind} | {1e3 * statistics.median(ours):.2f} | {1e3 * statistics.median(theirs):.2f} | {ratio:.2f} |")
    for engine in engines:
        engine.close()


if __name__ == "__main__":
    main()
