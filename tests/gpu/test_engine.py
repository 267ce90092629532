"""The whole engine on the device: captured steps, warm and cold, and traffic that forces every recovery."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from branchwise import Engine, SamplingParams
from branchwise.kernels.attention import tree_backend
from branchwise.kernels.attention.base import StepShape
from branchwise.kernels.attention.tree_costs import TreeCosts
from branchwise.runtime.config import EngineConfig
from branchwise.runtime.engine.core import EngineCore
from branchwise.runtime.executor.executor import ModelExecutor
from branchwise.runtime.logprobs import TokenLogprob
from branchwise.runtime.messages import Generate
from branchwise.runtime.step import StepPlan

RNG = np.random.default_rng(0)
ROUNDING = 0.2  # of a logprob in bfloat16 (torch on a CPU: 0.14); the best two of 320 tokens are 0.31 apart on average
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def load(folder: Path, **settings: object) -> ModelExecutor:
    config = {"device": "cuda", "dtype": "bfloat16", "kv_cache_tokens": 4096, "max_num_seqs": 16} | settings
    return ModelExecutor.load(EngineConfig(model=str(folder), **config))  # type: ignore[arg-type]


def test_replay_equals_eager_bit_for_bit(gpu_checkpoint: Callable[[str], Path]) -> None:
    """Every captured shape, over a pool of noise: the hidden states, and what the step writes to the pool."""
    executor = load(gpu_checkpoint("llama-gqa"), kv_cache_tokens=16 * 512)
    graphs, pool, table = executor._graphs, executor._pool.data, executor._table
    assert graphs is not None
    while executor.prepare_next():
        pass
    assert all(graphs._captured[shape] is not None for shape in graphs.shapes())
    pool.normal_()
    table.host[:-1] = RNG.permutation(executor.num_pages).reshape(16, -1)
    table.host[:-1, :2] = table.host[0, :2]  # shared, and not written by the steps; no other page is in two rows
    table.device.copy_(torch.from_numpy(table.host))
    with torch.inference_mode():
        for shape in graphs.shapes():
            found = []
            inputs, form = executor._stage(step_like(shape), shape, [])
            assert form == shape
            before = pool.clone()
            for run in ("eager", "replay"):
                pool.copy_(before)
                outputs = executor._hidden_outputs.zero_()
                if run == "eager":
                    outputs[: shape.num_outputs] = executor._hidden(inputs, pending=True)
                else:
                    graphs.replay(shape)
                found.append((outputs.clone(), pool.clone()))
            # Padding tokens all write to the last page, which nobody reads: which of them is last is not said.
            assert torch.equal(found[0][0], found[1][0]), shape
            assert torch.equal(found[0][1][:, :, :-1], found[1][1][:, :, :-1]), shape


def step_like(shape: StepShape) -> StepPlan:
    """A step that fills about three quarters of a shape."""
    decodes = min(9, shape.tokens // 4) if shape.joint else (shape.decodes * 3 + 3) // 4
    chunks = min(3, 16 - decodes, 3 if shape.joint else shape.requests)
    room = shape.num_tokens - shape.first_chunk(decodes)
    q_lens = np.array([1] * decodes + [max(1, room // 4)] * max(chunks, 0), np.int32)
    rows = np.arange(len(q_lens), dtype=np.int32)
    tokens = RNG.integers(2, 300, int(q_lens.sum())).astype(np.int32)
    none = np.empty(0, np.int32)
    kv_lens = q_lens + RNG.integers(32, 100, len(q_lens)).astype(np.int32)
    samples = (np.cumsum(q_lens) - 1).astype(np.int32)
    return StepPlan(0, rows, q_lens, kv_lens, tokens, decodes, samples, none, none, none, none.reshape(0, 2))


@pytest.mark.parametrize("backend", ["flashinfer", "triton", "tree"])
def test_greedy_warm_and_cold(
    backend: str, gpu_checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers warm and cold, alone and together: equal up to the rounding of bfloat16.

    A step's shape, and for the tree which requests share it, decide the order of sums. So logprobs may differ by a
    rounding error, and two answers may part where their best tokens are that close; after that they are not compared.
    """
    always = TreeCosts(flat=1.0, partial=0.0, tree_layer=-1e12)  # whatever is shared is read once
    monkeypatch.setattr(tree_backend, "_default_costs", lambda pool: always)
    if backend == "flashinfer":
        pytest.importorskip("flashinfer")
    shared = RNG.integers(2, 300, 150).tolist()
    prompts = [shared[: RNG.integers(1, 150)] + RNG.integers(2, 300, 20).tolist() for _ in range(48)]
    settings = {"device": "cuda", "dtype": "bfloat16", "max_num_seqs": 32, "attention_backend": backend}
    params = msgspec.structs.replace(GREEDY, logprobs=4)
    with Engine(str(gpu_checkpoint("qwen3")), kv_cache_tokens=16384, **settings) as engine:
        cold = engine.generate(prompts, params)
        warm = engine.generate(prompts, params)
        alone = [engine.generate(prompt, params) for prompt in prompts[:8]]
        engine.check()
    assert all(output.cached_tokens == output.prompt_tokens - 1 for output in warm)
    pairs = [*zip(cold, warm, strict=True), *zip(cold[:8], alone, strict=True)]
    errors = [worst_difference(one.logprobs, other.logprobs) for one, other in pairs]
    same = np.mean([one.token_ids == other.token_ids for one, other in pairs])
    print(f"{backend}: {same:.3f} of answers are equal; logprobs differ by {max(errors):.4f} at most")
    assert max(errors) < ROUNDING


def worst_difference(one: list[TokenLogprob], other: list[TokenLogprob]) -> float:
    """The largest difference of two answers' logprobs, up to and including the first token that differs."""
    worst = 0.0
    for mine, theirs in zip(one, other, strict=True):
        best, others = dict(mine.top), dict(theirs.top)
        common = best.keys() & others.keys()
        assert {mine.token, theirs.token} <= common, "a token that is far from the best in the other run"
        worst = max(worst, *(abs(best[token] - others[token]) for token in common))
        if mine.token != theirs.token:
            return max(worst, best[mine.token] - best[theirs.token])
    return worst


def test_seeds_give_the_same_text(gpu_checkpoint: Callable[[str], Path]) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=7, max_tokens=16, ignore_eos=True)
    with Engine(str(gpu_checkpoint("llama-gqa")), device="cuda", dtype="bfloat16", kv_cache_tokens=8192) as engine:
        prompt = RNG.integers(2, 300, 40).tolist()
        first = engine.generate(prompt, params).token_ids
        assert all(output.token_ids == first for output in engine.generate([prompt] * 5, params))


@pytest.mark.parametrize("graphs", [True, False])
def test_branching_traffic_in_a_tiny_pool(graphs: bool, gpu_checkpoint: Callable[[str], Path]) -> None:
    """2,500 requests each way, many of them aborted, in a pool that holds a fraction of what runs."""
    executor = load(gpu_checkpoint("llama-gqa"), kv_cache_tokens=768, max_num_seqs=24, cuda_graphs=graphs)
    config = EngineConfig(max_num_seqs=24, max_num_batched_tokens=512)
    core = EngineCore(config, executor, executor.eos_ids, executor.max_model_len, gpu=True)
    rng = np.random.default_rng(1)
    trunks = [rng.integers(2, 300, 120).astype("<i4") for _ in range(6)]
    total, submitted, live, ended = 2500, 0, set(), {}
    while submitted < total or live:
        while submitted < total and len(live) < 48:
            tail = rng.integers(2, 300, rng.integers(1, 40)).astype("<i4")
            prompt = np.concatenate([trunks[rng.integers(6)][: rng.integers(0, 120)], tail])
            params = SamplingParams(
                temperature=float(rng.choice([0.0, 1.0])), max_tokens=int(rng.choice([0, 1, 8, 30, 150])),
                ignore_eos=True, seed=submitted, top_k=int(rng.choice([0, 20])),
                logprobs=3 if rng.random() < 0.1 else None,
                repetition_penalty=1.1 if rng.random() < 0.1 else 1.0,
            )  # fmt: skip
            core.add(Generate([submitted], params, tokens=prompt.tobytes()))
            live.add(submitted)
            submitted += 1
        if rng.random() < 0.1 and live:
            core.abort(int(rng.choice(sorted(live))))
        output = core.step()
        for finished in output.finished if output else []:
            assert finished.id not in ended, "two terminal messages"
            ended[finished.id] = finished.reason
            live.discard(finished.id)
    while core.has_work:
        core.step()
    core.check()
    assert len(ended) == total
    assert set(ended.values()) <= {"length", "abort"}
    assert core.stats().retractions > 0, "the pool was meant to be too small"
    core.close()


def test_memory_stays_within_what_was_asked(gpu_checkpoint: Callable[[str], Path]) -> None:
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    executor = load(gpu_checkpoint("llama-gqa"), kv_cache_tokens=None, gpu_memory_utilization=0.5, max_num_seqs=4096)
    used = total - torch.cuda.mem_get_info()[0]
    assert used <= 0.5 * total + 64 * 2**20
    print(f"used {used / total:.3f} of the memory; asked 0.5; pool {executor.memory_plan.kv_bytes / total:.3f}")
    executor.close()


def test_engines_follow_one_another(gpu_checkpoint: Callable[[str], Path]) -> None:
    """Each takes most of the device, and gives it back."""
    prompt = RNG.integers(2, 300, 40).tolist()
    texts = []
    for _ in range(2):
        with Engine(str(gpu_checkpoint("llama-gqa")), device="cuda", dtype="bfloat16") as engine:
            texts.append(engine.generate(prompt, GREEDY).token_ids)
    assert texts[0] == texts[1]


def test_fewer_tokens_in_a_step_than_requests(gpu_checkpoint: Callable[[str], Path]) -> None:
    limits = {"kv_cache_tokens": 8192, "max_num_seqs": 64, "max_num_batched_tokens": 16}
    with Engine(str(gpu_checkpoint("llama-gqa")), device="cuda", dtype="bfloat16", **limits) as engine:
        prompts = [RNG.integers(2, 300, 40).tolist() for _ in range(80)]
        assert all(len(output.token_ids) == 24 for output in engine.generate(prompts, GREEDY))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
@pytest.mark.parametrize("backend", ["flashinfer", "triton"])
def test_a_second_device(backend: str, gpu_checkpoint: Callable[[str], Path]) -> None:
    if backend == "flashinfer":
        pytest.importorskip("flashinfer")
    prompts = [RNG.integers(2, 300, n).tolist() for n in (5, 40, 300)]
    settings = {"dtype": "bfloat16", "kv_cache_tokens": 4096, "attention_backend": backend}
    found = []
    for device in ("cuda:0", "cuda:1", "cuda:0"):  # the second captures after the process has captured on the first
        with Engine(str(gpu_checkpoint("llama-gqa")), device=device, **settings) as engine:
            found.append([output.token_ids for output in engine.generate(prompts, GREEDY)])
            assert torch.cuda.current_device() == 0  # the user's thread keeps its own
    assert found[0] == found[1] == found[2]
