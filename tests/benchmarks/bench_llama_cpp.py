"""Branchwise and llama.cpp on a CPU: the same model, the same client, the same prompts, in turns (A B A B).

    bench_llama_cpp.py [--model qwen3-0.6b|tiny] [--llama-server PATH] [--work FOLDER] [--rounds 2]
        [--formats float32,int8:f32,q8_0|bfloat16:bf16] [--slots 8,1] [--threads 2] [--only decode,prefill,...]

The model has the shape of Qwen3-0.6B (596 M weights), or the sizes of `tiny_model.CONFIG` (5 M), and random weights. It
is written once into ``--work`` as safetensors in bfloat16 and as GGUF in F32; llama-quantize makes the others from
that. A token is a word ``t17`` in both tokenizers, so that a program can continue from the ids that a server
generated. One server runs at a time. Behind the seconds are the CPU seconds of all of a server's processes, for
machines that others use too; llama.cpp's threads spin where they wait for each other, so compare those with
``--threads 1``.

Needs llama-server and llama-quantize, in one folder, and the package ``gguf`` (``pip install gguf``).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from run import machine
from safetensors.torch import save_file
from tiny_model import CONFIG, write

from branchwise.frontend.bench.client import CompletionsClient, open_client
from branchwise.frontend.bench.workloads import GenerateTokens, RandomTokens

BUILD = """llama-server is not on the path: give --llama-server, or build it from its PyPI sources (11 CPU minutes):
    pip download --no-deps --no-binary :all: llama-cpp-python && tar xf llama_cpp_python-*.tar.gz
    cd llama_cpp_python-*/vendor/llama.cpp && cmake -B build -DGGML_NATIVE=ON -DLLAMA_BUILD_UI=OFF
    cmake --build build -j --target llama-server llama-quantize    # in build/bin"""
QWEN3_06B: dict[str, Any] = CONFIG | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "torch_dtype": "bfloat16",
}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
MODELS: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": QWEN3_06B,
    "tiny": QWEN3_06B | {key: CONFIG[key] for key in (*SIZES, "head_dim", "vocab_size")},
}
CONTEXT_TOKENS = 16384  # KV of either server
START_SECONDS = 120


async def no_sharing(generate: GenerateTokens, rng: RandomTokens) -> None:
    await asyncio.gather(*(generate(prompt, 64) for prompt in rng.many(4, 512)))


async def fewshot(generate: GenerateTokens, rng: RandomTokens) -> None:
    prefix = rng.tokens(1024)
    await asyncio.gather(*(generate(prefix + question, 16) for question in rng.many(8, 64)))


async def agents(generate: GenerateTokens, rng: RandomTokens) -> None:
    schema = rng.tokens(1024)

    async def agent(history: list[int]) -> None:
        for result in rng.many(4, 80):
            history = history + await generate(history, 32) + result

    await asyncio.gather(*(agent(schema + task) for task in rng.many(3, 64)))


async def tree_of_thought(generate: GenerateTokens, rng: RandomTokens) -> None:
    hints, judge, frontier = rng.many(4, 8), rng.tokens(16), [rng.tokens(768)]
    for _ in range(2):
        stems = [kept + hint for kept in frontier for hint in hints]
        thoughts = await asyncio.gather(*(generate(stem, 32) for stem in stems))
        grown = [stem + thought for stem, thought in zip(stems, thoughts, strict=True)]
        await asyncio.gather(*(generate(state + judge, 8) for state in grown))
        frontier = grown[:2]


async def chat(generate: GenerateTokens, rng: RandomTokens) -> None:
    system = rng.tokens(512)

    async def session(history: list[int]) -> None:
        for turn in rng.many(3, 96):
            history = history + turn
            history = history + await generate(history, 64)

    await asyncio.gather(*(session(system) for _ in range(3)))


async def best_of_n(generate: GenerateTokens, rng: RandomTokens) -> None:
    prompt = rng.tokens(1536)
    await asyncio.gather(*(generate(prompt, 32, seed=i, temperature=1.0) for i in range(8)))


async def decode(generate: GenerateTokens, rng: RandomTokens) -> None:
    await generate(rng.tokens(16), 128)


async def prefill(generate: GenerateTokens, rng: RandomTokens) -> None:
    await generate(rng.tokens(2048), 1)


PROGRAMS: dict[str, Callable[[GenerateTokens, RandomTokens], Awaitable[None]]] = {
    program.__name__: program
    for program in (no_sharing, fewshot, agents, tree_of_thought, chat, best_of_n, decode, prefill)
}


def write_safetensors(folder: Path, config: dict[str, Any]) -> None:
    """Ours: config, tokenizer and random bfloat16 weights of the usual standard deviation."""
    from branchwise.runtime.models.config import load_config
    from branchwise.runtime.models.weights import weight_specs

    write(folder, config)
    generator, tensors = torch.Generator().manual_seed(0), {}
    for spec in weight_specs(load_config(folder)):
        for source in spec.sources:
            value = torch.ones(source.shape)
            if spec.kind != "norm":
                value.uniform_(-0.035, 0.035, generator=generator)
            tensors[source.name] = value.to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors")


def write_gguf(folder: Path, path: Path, config: dict[str, Any]) -> None:
    """The same weights in float32, for llama.cpp."""
    import gguf
    from safetensors import safe_open

    layers = config["num_hidden_layers"]
    out = gguf.GGUFWriter(path, "qwen3")
    out.add_block_count(layers)
    out.add_context_length(config["max_position_embeddings"])
    out.add_embedding_length(config["hidden_size"])
    out.add_feed_forward_length(config["intermediate_size"])
    out.add_head_count(config["num_attention_heads"])
    out.add_head_count_kv(config["num_key_value_heads"])
    out.add_key_length(config["head_dim"])
    out.add_value_length(config["head_dim"])
    out.add_rope_freq_base(config["rope_theta"])
    out.add_layer_norm_rms_eps(config["rms_norm_eps"])
    out.add_file_type(gguf.LlamaFileType.ALL_F32)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("default")
    kinds, control = gguf.TokenType, ["<bos>", "<eos>", "<unk>"]
    out.add_token_list(control + [f"Ġt{i}" for i in range(len(control), config["vocab_size"])])  # Ġ: a space
    out.add_token_types([kinds.CONTROL] * len(control) + [kinds.NORMAL] * (config["vocab_size"] - len(control)))
    out.add_token_merges(["Ġ t"])
    out.add_bos_token_id(0)
    out.add_eos_token_id(1)
    out.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, layers)
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        for name in sorted(tensors.keys()):
            out.add_tensor(names.get_name(name, (".weight",)), tensors.get_tensor(name).float().numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def prepare(work: Path, quantize: Path, formats: list[str], config: dict[str, Any]) -> dict[str, Path]:
    """Model folder and GGUF files in ``work``, made if absent: by the format's name, ours as ``branchwise``."""
    folder, f32 = work / "qwen3-0.6b-random", work / "f32.gguf"
    if not (folder / "model.safetensors").exists():
        write_safetensors(folder, config)
    paths = {"branchwise": folder} | {each: work / f"{each}.gguf" for each in formats}
    if any(not path.exists() for path in paths.values()) and not f32.exists():
        write_gguf(folder, f32, config)
    for each in formats:
        if not paths[each].exists():
            quiet = {"check": True, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            subprocess.run([quantize, f32, paths[each], each.upper()], **quiet)  # type: ignore[call-overload]
    return paths


def ours(folder: Path, format: str) -> list[str]:
    quantization, dtype = ("int8", "float32") if format == "int8" else ("auto", format)
    options = ["--device", "cpu", "--dtype", dtype, "--quantization", quantization]
    options += ["--kv-cache-tokens", str(CONTEXT_TOKENS)]
    return [sys.executable, "-m", "branchwise", "serve", str(folder), *options, "--log-level", "warning"]


def theirs(server: Path, path: Path, slots: int, threads: int) -> list[str]:
    context = ["--ctx-size", str(CONTEXT_TOKENS), "--parallel", str(slots), "--kv-unified"]
    return [str(server), "--model", str(path), *context, "--threads", str(threads), "--no-webui"]


@contextmanager
def running(command: list[str], threads: int) -> Iterator[tuple[str, int, float]]:
    """(url, process id, seconds until it was ready) of a server on a free port; stopped at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    begun, url = time.monotonic(), f"http://127.0.0.1:{port}"
    nowhere = subprocess.DEVNULL
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    # With it, each process of a server compiles the sources of a checkout anew, 0.5 s in all. An installed package has
    # its bytecode, and a checkout has it from the first start on.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    process = subprocess.Popen([*command, "--port", str(port)], stdout=nowhere, stderr=nowhere, env=environment)
    try:
        while not _healthy(url):
            if process.poll() is not None or time.monotonic() - begun > START_SECONDS:
                raise SystemExit(f"did not start: {' '.join(command)}")
            time.sleep(0.02)
        yield url, process.pid, time.monotonic() - begun
    finally:
        process.terminate()
        process.wait(timeout=60)


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def cpu_seconds(pid: int) -> float:
    """Of a process and its descendants, so far."""
    parents, ticks = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        process = int(stat.parent.name)
        parents[process], ticks[process] = int(fields[1]), int(fields[11]) + int(fields[12])
    family = {pid}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(ticks[process] for process in family) / os.sysconf("SC_CLK_TCK")


async def measure(url: str, pid: int, names: list[str], seed: int, vocab: int) -> dict[str, tuple[float, float]]:
    """(seconds, CPU seconds) of each program; each has prompts of its own, so that none profits from another."""
    http = open_client(url, None)
    client = CompletionsClient(http, "qwen3-0.6b-random")
    await client.generate(RandomTokens("warm-up", vocab).tokens(64), 8)
    seconds = {}
    for name in names:
        measured, begun, used = client.reset(), time.perf_counter(), cpu_seconds(pid)
        await PROGRAMS[name](client.generate, RandomTokens(f"{name}/{seed}", vocab))
        seconds[name] = time.perf_counter() - begun, cpu_seconds(pid) - used
        if measured.failed:
            raise SystemExit(f"{name}: {measured.failed} requests failed: {'; '.join(measured.errors)}")
    if "decode" in seconds:  # ms a token
        seconds["decode"] = seconds["decode"][0] * 1000 / 128, seconds["decode"][1] * 1000 / 128
    return seconds


def table(results: dict[str, list[dict[str, tuple[float, float]]]], names: list[str]) -> Iterator[str]:
    """Rows of a Markdown table: medians, and medians of CPU time."""
    yield "| | " + " | ".join(results) + " |"
    yield "| --- |" + " ---: |" * len(results)
    for name in [*names, "ready"]:
        medians = ([statistics.median(run[name][i] for run in runs) for i in range(2)] for runs in results.values())
        cells = (f"{wall:.2f} ({cpu:.2f})" for wall, cpu in medians)
        yield f"| {name}{', ms a token' if name == 'decode' else ', s'} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-server", type=Path, help="default: the one on the path")
    parser.add_argument("--model", choices=MODELS, default="qwen3-0.6b")
    parser.add_argument("--work", type=Path, default=Path(__file__).resolve().parent.parent.parent / ".bench")
    parser.add_argument("--formats", default="float32,int8:f32,q8_0", help="ours, a colon, llama.cpp's")
    parser.add_argument("--slots", default="8,1", help="of llama-server: each is tried")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", default=",".join(PROGRAMS), help="comma-separated programs")
    args = parser.parse_args()
    found = args.llama_server or shutil.which("llama-server")
    if found is None:
        raise SystemExit(BUILD)
    server, names = Path(found), args.only.split(",")
    mine, gguf = (part.split(",") if part else [] for part in args.formats.split(":"))
    config = MODELS[args.model]
    work = args.work if config is QWEN3_06B else args.work / args.model
    work.mkdir(parents=True, exist_ok=True)
    paths = prepare(work, server.with_name("llama-quantize"), gguf, config)
    commands = {f"branchwise {each}": ours(paths["branchwise"], each) for each in mine}
    for each in gguf:
        for slots in map(int, args.slots.split(",")):
            commands[f"llama.cpp {each.upper()}, {slots} slots"] = theirs(server, paths[each], slots, args.threads)
    print(f"{machine()}, load {os.getloadavg()[0]:.1f}", flush=True)
    results: dict[str, list[dict[str, tuple[float, float]]]] = {label: [] for label in commands}
    for seed in range(args.rounds):
        for label, command in commands.items():
            with running(command, args.threads) as (url, pid, ready):
                started = ready, cpu_seconds(pid)
                run = asyncio.run(measure(url, pid, names, seed, config["vocab_size"])) | {"ready": started}
            results[label].append(run)
            print(label, json.dumps({name: [round(x, 2) for x in pair] for name, pair in run.items()}), flush=True)
    print("\n".join(table(results, names)))
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
