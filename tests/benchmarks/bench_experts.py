"""Mixtures of experts on a GPU: checked and timed in CUDA graphs, and decode steps of whole models in the shape of
Qwen3-30B-A3B against the time that reading its weights and its KV takes.

    bench_experts.py [--parts check,layer,decode] [--formats plain,channel,block,mxfp4] [--requests 64]
        [--context 1024] [--quantization auto] [--sweep]

check: every format against products in float32. layer: µs of each kernel of one layer's mixture, for other tiles too
(`--sweep`). decode: milliseconds of a step, and its kernels by their time.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tiny_model import QWEN3_30B_A3B, write

from branchwise import Engine, SamplingParams
from branchwise.kernels import ops, triton_ops
from branchwise.kernels.experts import ExpertWeight
from branchwise.kernels.ops import Routing
from branchwise.kernels.quantize import dequantize_weight, quantize_weight
from branchwise.kernels.triton_experts import Tile, TritonExperts, combine, pick_tile, products
from branchwise.kernels.triton_routing import Alignment

EXPERTS, TOP_K, HIDDEN, INNER = 128, 8, 2048, 768
ROUTING = Routing(TOP_K, normalize=True)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.02


def weight(format: str, outputs: int, inputs: int, count: int = EXPERTS) -> ExpertWeight:
    rows = count * outputs
    if format == "mxfp4":
        scales = torch.full((rows, inputs // 32), 120, dtype=torch.uint8, device="cuda")
        return ExpertWeight(
            torch.randint(256, (rows, inputs // 2), device="cuda").to(torch.uint8), scales, random(rows)
        )
    plain = random(rows, inputs)
    if format == "plain":
        return ExpertWeight(plain)
    values, scale = quantize_weight(plain, torch.float8_e4m3fn)
    if format == "block":
        scale = (0.5 + torch.rand(rows // 128, inputs // 128, device="cuda")) * 1e-4
    return ExpertWeight(values, scale)


def captured(run: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph, out


def microseconds(run: Callable[[], object], repeats: int = 20) -> float:
    """Of one call in a CUDA graph of ``repeats``."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            run()
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return 1e3 * start.elapsed_time(end) / repeats


def check(formats: list[str]) -> None:
    """One graph for every routing: replays with other experts agree with float32 products of the same weights."""
    torch.manual_seed(0)
    print("| format | tokens | largest difference |")
    for format, hidden, inner, activation in (
        ("plain", HIDDEN, INNER, "silu"),
        ("channel", HIDDEN, INNER, "silu"),
        ("block", HIDDEN, INNER, "silu"),
        ("mxfp4", 2880, 2880, "swigluoai"),
    ):
        if format not in formats:
            continue
        count = 16
        gate_up, down = weight(format, 2 * inner, hidden, count), weight(format, hidden, inner, count)
        experts = TritonExperts(gate_up, down, count, activation)  # type: ignore[arg-type]
        dense = [
            (w.values.float() if w.scale is None else dequantize_weight(w.values, w.scale, torch.float32)).unflatten(
                0, (count, -1)
            )
            for w in (gate_up, down)
        ]
        biases = [0.0 if w.bias is None else w.bias.float().unflatten(0, (count, -1)) for w in (gate_up, down)]
        for tokens in (1, 8, 300, 2304):  # of more than 2,048, MXFP4 is dequantized whole
            x, logits = (
                torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16),
                torch.randn(tokens, count, device="cuda"),
            )
            graph, out = captured(lambda: experts(x, *triton_ops.route(logits, None, ROUTING)))  # noqa: B023
            worst = 0.0
            for narrow in (count, TOP_K):  # all experts; all tokens to the same few
                logits.copy_(torch.randn(tokens, count, device="cuda"))
                logits[:, narrow:] = -99
                graph.replay()
                weights, ids = ops.route(logits, None, ROUTING)
                spread = torch.zeros(tokens, count, device="cuda").scatter_(1, ids.long(), weights)
                each = torch.einsum("th,eoh->teo", x.float(), dense[0]) + biases[0]
                inner_values = ops.gate_mul(each.flatten(0, 1), activation).unflatten(0, (tokens, count))  # type: ignore[arg-type]
                exact = (
                    (torch.einsum("tei,eoi->teo", inner_values, dense[1]) + biases[1]).mul_(spread[:, :, None]).sum(1)
                )
                worst = max(worst, ((out - exact).abs().max() / exact.abs().max()).item())
            assert worst < 0.02, f"{format}, {tokens} tokens: {worst}"
            print(f"| {format} | {tokens} | {worst:.4f} |", flush=True)


def tiles(tile: Tile, sweep: bool) -> Iterator[Tile]:
    yield tile
    if sweep:
        for outputs, inputs, warps, stages in (
            (64, 64, 4, 6), (64, 128, 4, 3), (64, 128, 4, 5), (64, 256, 4, 3), (128, 64, 4, 4), (128, 128, 8, 3),
            (32, 128, 4, 4), (32, 256, 4, 3),
        ):  # fmt: skip
            yield Tile(outputs, tile.rows, inputs, warps, stages)


def layer(format: str, tokens: int, sweep: bool, shape: tuple[int, int, int, int, str]) -> None:
    """``shape``: experts, experts of a token, hidden size, size of an expert, activation."""
    count, top_k, hidden, inner, activation = shape
    # Several layers' weights, more than the cache of the GPU has room for.
    pairs = [(weight(format, 2 * inner, hidden, count), weight(format, hidden, inner, count)) for _ in range(2)]
    x, logits = (
        torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16),
        torch.randn(tokens, count, device="cuda"),
    )
    weights, ids = triton_ops.route(logits, None, Routing(top_k, normalize=True))
    size = sum(part.nbytes for pair in pairs[:1] for w in pair for part in w if part is not None)
    hit = len(ids.unique()) / count
    tile = pick_tile(ids.numel() / count, format == "plain")
    experts = [TritonExperts(*pair, count, activation) for pair in pairs]  # type: ignore[arg-type]
    whole = microseconds(lambda: [e(x, weights, ids) for e in experts]) / 2
    routing = microseconds(lambda: triton_ops.route(logits, None, Routing(top_k, normalize=True)))
    aligning = microseconds(lambda: Alignment(ids, count, tile.rows))
    alignment = Alignment(ids, count, tile.rows)
    out, router = torch.empty_like(x), random(count, hidden)
    y = torch.empty(ids.numel(), hidden, device="cuda", dtype=torch.bfloat16)
    summing = microseconds(lambda: combine(y, alignment, weights, out))
    print(
        f"{format} {tokens} tokens: layer {whole:.0f} µs (reading {1e6 * hit * size / 4.8e12:.0f}), route {routing:.1f}"
        f", align {aligning:.1f}, combine {summing:.1f}, router GEMM "
        f"{microseconds(lambda: F.linear(x, router)):.1f}",
        flush=True,
    )
    inner_x = torch.randn(ids.numel(), inner, device="cuda", dtype=torch.bfloat16)
    for name, given, part, outputs, act in (("gate_up", x, 0, inner, activation), ("down", inner_x, 1, hidden, "")):

        def took(tile: Tile, given=given, part=part, outputs=outputs, act=act) -> float:  # type: ignore[no-untyped-def]
            run = lambda: [products(given, e.weights[part], alignment, outputs, act, tile) for e in experts]  # noqa: E731
            try:
                return microseconds(run, 10) / 2
            except Exception as error:  # a tile that does not fit
                print(f"  {name} {tuple(tile)}: {type(error).__name__}")  # noqa: B023
                return float("inf")

        times = [(took(one), tuple(one)) for one in tiles(tile, sweep)]
        best = ", ".join(f"{time_us:.0f} {one}" for time_us, one in sorted(times)[:5])
        print(f"  {name}: used {times[0][0]:.0f} µs {times[0][1]}; best {best}", flush=True)


def profiled(engine: Engine, prompts: list[list[int]], steps: int = 16) -> None:
    """The kernels of a decode step by their time, from a short run whose prompts are cached."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recording:
        engine.generate(prompts, SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True))
    rows = sorted(recording.key_averages(), key=lambda row: -row.self_device_time_total)
    print(f"kernels of a step, µs ({sum(row.self_device_time_total for row in rows) / steps:.0f} in all):")
    for row in rows[:16]:
        print(f"  {row.self_device_time_total / steps:8.1f}  {row.count / steps:6.1f} ×  {row.key[:90]}", flush=True)


def decode(requests: int, context: int, bandwidth: float, quantization: str) -> None:
    steps, config = 128, QWEN3_30B_A3B
    prompts = [[(31 * i + 7 * j) % 100_000 + 3 for j in range(context)] for i in range(requests)]
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        with Engine(
            write(Path(folder), config), load_format="dummy", max_model_len=2 * context, max_num_seqs=requests,
            kv_cache_tokens=2 * requests * context, attention_backend="triton",
            quantization=quantization,  # type: ignore[arg-type]
        ) as engine:  # fmt: skip
            print(f"ready in {time.monotonic() - begun:.1f} s", flush=True)
            seconds = {}
            for count in (steps, 16, steps):  # the first fills the cache and captures
                params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
                begun = time.monotonic()
                outputs = engine.generate(prompts, params)
                seconds[count] = time.monotonic() - begun
                assert all(len(output.token_ids) == count for output in outputs)
            step = (seconds[steps] - seconds[16]) / (steps - 16)
            profiled(engine, prompts)
    layers, kv = config["num_hidden_layers"], config["num_key_value_heads"] * config["head_dim"]
    heads = config["num_attention_heads"] * config["head_dim"]
    layer = EXPERTS * 3 * HIDDEN * INNER + HIDDEN * (2 * heads + 2 * kv)
    size = 1 if quantization == "fp8" else 2
    read = (
        layers * layer * size
        + 2 * HIDDEN * config["vocab_size"]
        + 2 * 2 * layers * kv * requests * (context + steps / 2)
    )
    print(f"decode step {requests} × {context}: {1e3 * step:.2f} ms, {1e3 * read / bandwidth:.2f} ms to read it once")
    print(f"{step * bandwidth / read:.2f} × the roofline (bar 1.5)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="check,layer,decode")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--quantization", default="auto", choices=("auto", "fp8"))
    parser.add_argument("--formats", default="plain,channel,block,mxfp4")
    parser.add_argument("--sweep", action="store_true", help="try tiles around the one that is used")
    parser.add_argument("--bandwidth", type=float, default=4.8e12, help="bytes a second of the GPU's memory")
    args = parser.parse_args()
    if "check" in args.parts:
        check(args.formats.split(","))
    if "layer" in args.parts:
        qwen3, gpt_oss = (EXPERTS, TOP_K, HIDDEN, INNER, "silu"), (32, 4, 2880, 2880, "swigluoai")
        for format, shape in (("plain", qwen3), ("channel", qwen3), ("mxfp4", gpt_oss)):
            for tokens in (1, 64, 4096) if format in args.formats.split(",") else ():
                layer(format, tokens, args.sweep and tokens == 64, shape)
    if "decode" in args.parts:
        decode(args.requests, args.context, args.bandwidth, args.quantization)


if __name__ == "__main__":
    main()
