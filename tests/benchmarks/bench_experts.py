"""Mixtures of experts on a GPU: grouped products in CUDA graphs, checked and timed, and a decode step in the shape of
Qwen3-30B-A3B against the time that reading its weights and its KV takes.

    bench_experts.py [--parts check,decode] [--requests 64] [--context 1024] [--bandwidth 4.8e12]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from tiny_model import QWEN3_30B_A3B, write

from branchwise import Engine, SamplingParams
from branchwise.kernels.experts import Dispatch, GroupedLinear, MaskedLinear
from branchwise.kernels.linear import PlainLinear

EXPERTS, TOP_K, HIDDEN, INNER = 128, 8, 2048, 768


def check() -> None:
    """One graph for every routing: replays with other experts agree with products of all experts with all rows."""
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=generator)

    up, down = random(EXPERTS, INNER, HIDDEN) * 0.02, random(EXPERTS, HIDDEN, INNER) * 0.02
    grouped = GroupedLinear(up), GroupedLinear(down)
    masked = tuple(MaskedLinear([PlainLinear(one) for one in weight]) for weight in (up, down))
    print("| tokens | µs of two grouped products, in a graph | largest difference |")
    for tokens in (1, 8, 64, 512, 4096):
        x, weights = random(tokens, HIDDEN), torch.rand(tokens, TOP_K, device="cuda", generator=generator)
        ids = torch.zeros(tokens, TOP_K, dtype=torch.long, device="cuda")

        def layer(pair: tuple[GroupedLinear, GroupedLinear]) -> torch.Tensor:
            dispatch = Dispatch.of(ids, EXPERTS)  # noqa: B023
            return dispatch.gather(pair[1](pair[0](dispatch.scatter(x), dispatch).relu(), dispatch), weights)  # noqa: B023

        layer(grouped)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(grouped)
        worst = 0.0
        for narrow in (EXPERTS, TOP_K):  # all experts; all tokens to the same few
            scores = torch.rand(tokens, EXPERTS, device="cuda", generator=generator)
            scores[:, narrow:] = -1
            ids.copy_(scores.topk(TOP_K).indices)
            graph.replay()
            if tokens <= 512:
                exact = layer(masked)  # type: ignore[arg-type]
                worst = max(worst, ((out - exact).abs().max() / exact.abs().max()).item())
        assert worst < 0.02, f"{tokens} tokens: grouped and masked products differ by {worst}"
        ids.copy_(torch.rand(tokens, EXPERTS, device="cuda", generator=generator).topk(TOP_K).indices)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        start.record()
        for _ in range(20):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        print(f"| {tokens} | {1e3 * start.elapsed_time(end) / 20:.0f} | {worst:.4f} |", flush=True)


def decode(requests: int, context: int, bandwidth: float) -> None:
    steps, config = 128, QWEN3_30B_A3B
    params = SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True)
    prompts = [[(31 * i + 7 * j) % 100_000 + 3 for j in range(context)] for i in range(requests)]
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        with Engine(
            write(Path(folder), config), load_format="dummy", max_model_len=2 * context, max_num_seqs=requests,
            kv_cache_tokens=2 * requests * context, attention_backend="triton",
        ) as engine:  # fmt: skip
            print(f"ready in {time.monotonic() - begun:.1f} s", flush=True)
            engine.generate(prompts, params)  # fills the cache; captures
            begun = time.monotonic()
            engine.generate(prompts, SamplingParams(temperature=0, max_tokens=1))
            short = time.monotonic() - begun
            begun = time.monotonic()
            outputs = engine.generate(prompts, params)
            step = (time.monotonic() - begun - short) / (steps - 1)
            assert all(len(output.token_ids) == steps for output in outputs)
    layers, kv = config["num_hidden_layers"], config["num_key_value_heads"] * config["head_dim"]
    heads = config["num_attention_heads"] * config["head_dim"]
    layer = EXPERTS * 3 * HIDDEN * INNER + HIDDEN * (2 * heads + 2 * kv)
    read = 2 * (layers * layer + HIDDEN * config["vocab_size"]) + 2 * 2 * layers * kv * requests * (context + steps / 2)
    print(f"decode step {requests} × {context}: {1e3 * step:.2f} ms, {1e3 * read / bandwidth:.2f} ms to read it once")
    print(f"{step * bandwidth / read:.2f} × the roofline (bar 1.5)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="check,decode")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--bandwidth", type=float, default=4.8e12, help="bytes a second of the GPU's memory")
    args = parser.parse_args()
    if "check" in args.parts:
        check()
    if "decode" in args.parts:
        decode(args.requests, args.context, args.bandwidth)


if __name__ == "__main__":
    main()
