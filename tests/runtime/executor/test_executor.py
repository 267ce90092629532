"""The executor with hand-written plans, step by step, against transformers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from branchwise.kernels.processor import multiplies_int8
from branchwise.runtime.config import EngineConfig
from branchwise.runtime.errors import LoadError
from branchwise.runtime.executor.executor import ModelExecutor
from branchwise.runtime.sampling_params import SamplingParams
from branchwise.runtime.step import PENDING

PROMPT = np.random.default_rng(3).integers(2, 300, 40).tolist()
OTHER = np.random.default_rng(4).integers(2, 300, 40).tolist()
Drive = Callable[..., Any]
Oracle = Callable[..., torch.Tensor]


def continuation(oracle: Oracle, family: str, prompt: Sequence[int], length: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(length):
        tokens.append(int(oracle(family, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("family", ["llama-gqa", "gemma2"])
def test_greedy_tokens_fed_on_the_device(family: str, driver: Drive, make: SimpleNamespace, oracle: Oracle) -> None:
    """Two requests; every decode's token is PENDING, as when the host plans a step ahead."""
    drive = driver(family)
    first = drive.launch(
        [(4, PROMPT[:20], 0, True), (1, OTHER[:9], 0, True)],
        table=make.columns(4, [9, 3, 30, 7, 8]) + make.columns(1, [1, 31, 6, 5]),
        starts=[make.start(4, PROMPT[:20]), make.start(1, OTHER[:9])],
    )
    launched = [first]
    for i in range(11):
        chunks = [(4, [PENDING], 20 + i, True), (1, [PENDING], 9 + i, True)]
        launched.append(drive.launch(chunks, num_decodes=2))
    tokens = np.stack([step.result().tokens for step in launched])
    assert tokens.dtype == np.int32
    assert tokens[:, 0].tolist() == continuation(oracle, family, PROMPT[:20], 12)
    assert tokens[:, 1].tolist() == continuation(oracle, family, OTHER[:9], 12)


def test_chunk_that_does_not_sample_beside_a_decode(driver: Drive, make: SimpleNamespace, oracle: Oracle) -> None:
    drive = driver()
    drive.step(
        [(0, PROMPT[:8], 0, True)],
        table=make.columns(0, [4, 5]) + make.columns(2, [8, 9, 10, 11]),
        starts=[make.start(0, PROMPT[:8]), make.start(2, OTHER[:25])],
    )
    result = drive.step([(0, [PROMPT[8]], 8, True), (2, OTHER[:16], 0, False)], num_decodes=1)
    assert (result.kv_bytes, result.kv_bytes_saved) == ((9 + 16) * drive.executor.memory_plan.layout.token_bytes, 0)
    assert result.tokens.tolist() == [int(oracle("llama-gqa", PROMPT[:9])[-1].argmax())]
    result = drive.step([(2, OTHER[16:20], 16, False)])
    assert result.tokens.tolist() == []
    result = drive.step([(2, OTHER[20:25], 20, True)])
    assert result.tokens.tolist() == [int(oracle("llama-gqa", OTHER[:25])[-1].argmax())]


def test_several_samples_of_one_request(driver: Drive, make: SimpleNamespace, oracle: Oracle) -> None:
    """A draft's tokens are verified in one step. The row's last token is the sample of its last query token."""
    drive = driver()
    tokens = PROMPT[:12] + continuation(oracle, "llama-gqa", PROMPT[:12], 4)
    drive.step(
        [(1, PROMPT[:11], 0, False), (4, OTHER[:5], 0, False)],
        table=make.columns(1, [9, 3, 30]) + make.columns(4, [7]),
        starts=[make.start(1, PROMPT[:12]), make.start(4, OTHER[:6])],
    )
    result = drive.step(
        [(4, OTHER[5:6], 5, True), (1, tokens[11:15], 11, True)], num_decodes=1, samples=[0, 1, 2, 4]
    )  # query token 3 is not sampled
    expected = oracle("llama-gqa", tokens[:15]).argmax(-1).tolist()
    other = int(oracle("llama-gqa", OTHER[:6])[-1].argmax())
    assert result.tokens.tolist() == [other, expected[11], expected[12], expected[14]]
    result = drive.step([(1, [PENDING], 15, True), (4, [PENDING], 6, True)], num_decodes=2)
    grown = [continuation(oracle, "llama-gqa", t, 2)[1] for t in (tokens[:15], OTHER[:6])]
    assert result.tokens.tolist() == grown


def test_sampled_tokens_depend_on_their_position_alone(driver: Drive, make: SimpleNamespace) -> None:
    """Several samples in one step are the tokens that a step for each would have sampled."""
    params = SamplingParams(temperature=1.0, top_p=0.9)
    found = []
    for steps in ([[0, 1, 2]], [[0], [1], [2]]):
        drive = driver()
        drive.step(
            [(1, PROMPT[:9], 0, False)], table=make.columns(1, [9, 3]), starts=[make.start(1, PROMPT[:12], params)]
        )
        found.append([])
        for some in steps:
            chunk = PROMPT[9 + some[0] : 10 + some[-1]]
            samples = list(range(len(some)))
            found[-1] += drive.step([(1, chunk, 9 + some[0], True)], samples=samples).tokens.tolist()
    assert found[0] == found[1]


def test_copy_on_write_reuses_part_of_a_page(driver: Drive, make: SimpleNamespace, oracle: Oracle) -> None:
    """The second request shares 12 tokens with the first: a page and half of the next, which is copied."""
    drive = driver()
    drive.step([(0, PROMPT[:24], 0, True)], table=make.columns(0, [4, 5, 6]), starts=[make.start(0, PROMPT[:24])])
    branch = PROMPT[:12] + OTHER[:7]
    result = drive.step(
        [(1, branch[12:], 12, True)],
        table=make.columns(1, [4, 20, 21]),
        copies=[(5, 20)],
        starts=[make.start(1, branch)],
    )
    assert result.tokens.tolist() == [int(oracle("llama-gqa", branch)[-1].argmax())]
    grown = drive.step([(0, [PROMPT[24]], 24, True)], num_decodes=1, table=[(0, 3, 7)])  # the source is unharmed
    assert grown.tokens.tolist() == [int(oracle("llama-gqa", PROMPT[:25])[-1].argmax())]


def test_page_is_source_and_destination_of_copies_in_one_step(
    driver: Drive, make: SimpleNamespace, oracle: Oracle
) -> None:
    """Page 5 is copied away and overwritten in the same step: all sources are read first."""
    drive = driver()
    drive.step(
        [(0, PROMPT[:8], 0, True), (1, OTHER[:8], 0, True)],
        table=[(0, 0, 5), (1, 0, 6)],
        starts=[make.start(0, PROMPT[:8]), make.start(1, OTHER[:8])],
    )
    result = drive.step(
        [(2, [PROMPT[7]], 7, True), (3, [OTHER[7]], 7, True)],
        table=[(2, 0, 9), (3, 0, 5)],
        copies=[(5, 9), (6, 5)],
        starts=[make.start(2, PROMPT[:8]), make.start(3, OTHER[:8])],
    )
    expected = [int(oracle("llama-gqa", tokens[:8])[-1].argmax()) for tokens in (PROMPT, OTHER)]
    assert result.tokens.tolist() == expected


def test_row_and_pages_pass_to_another_request(driver: Drive, make: SimpleNamespace, oracle: Oracle) -> None:
    drive = driver()
    penalised = SamplingParams(temperature=0.0, repetition_penalty=5.0)
    pages = make.columns(3, [1, 2, 3])
    drive.step([(3, PROMPT[:20], 0, True)], table=pages, starts=[make.start(3, PROMPT[:20], penalised)])
    result = drive.step([(3, OTHER[:10], 0, True)], starts=[make.start(3, OTHER[:10])])
    assert result.tokens.tolist() == [int(oracle("llama-gqa", OTHER[:10])[-1].argmax())]


@pytest.mark.parametrize("chunks", [[40], [1, 8, 31], [13, 13, 13, 1]])
@pytest.mark.parametrize("wanted", [0, 1, 9, 39])
def test_prompt_logprobs(chunks: list[int], wanted: int, driver: Drive, make: SimpleNamespace, oracle: Oracle) -> None:
    """The results of consecutive chunks join to the logprobs of the prompt from the requested position on."""
    params = SamplingParams(temperature=0.0, prompt_logprobs=3, prompt_logprob_start=wanted)
    drive = driver("qwen3")
    at, pieces = 0, []
    for i, size in enumerate(chunks):
        result = drive.step(
            [(2, PROMPT[at : at + size], at, at + size == 40)],
            table=make.columns(2, [7, 1, 12, 3, 8]) if i == 0 else [],
            starts=[make.start(2, PROMPT, params)] if i == 0 else [],
            prompt_logprobs=[(0, 3, wanted)],
        )
        pieces += list(result.prompt_logprobs.values())
        at += size
    logprobs = torch.log_softmax(oracle("qwen3", PROMPT), dim=-1)
    position = max(wanted, 1)
    for first, rows in pieces:
        assert first == position
        assert rows.top_ids.shape == rows.top.shape == (len(rows.chosen), 3)
        for chosen, rank, ids, top in zip(rows.chosen, rows.ranks, rows.top_ids, rows.top, strict=True):
            expected = logprobs[position - 1]
            assert abs(chosen - expected[PROMPT[position]].item()) < 1e-4
            assert rank == 1 + expected.argsort(descending=True).tolist().index(PROMPT[position])
            assert ids.tolist() == expected.topk(3).indices.tolist()
            np.testing.assert_allclose(top, expected.topk(3).values, atol=1e-4)
            position += 1
    assert position == 40


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3"])
def test_half_precision_is_close(family: str, dtype: str, driver: Drive, make: SimpleNamespace, oracle: Oracle) -> None:
    params = SamplingParams(temperature=0.0, prompt_logprobs=0)
    result = driver(family, dtype=dtype).step(
        [(0, PROMPT, 0, True)],
        table=make.columns(0, [1, 2, 3, 4, 5]),
        starts=[make.start(0, PROMPT, params)],
        prompt_logprobs=[(0, 0, 0)],
    )
    targets = torch.tensor(PROMPT[1:])[:, None]
    expected = torch.log_softmax(oracle(family, PROMPT), dim=-1)[:-1].gather(1, targets)[:, 0]
    error = np.abs(result.prompt_logprobs[0][1].chosen - expected.numpy())
    assert error.max() < {"bfloat16": 0.3, "float16": 0.05}[dtype]


def test_long_prompts_logprobs_come_in_slices(driver: Drive, make: SimpleNamespace, oracle: Oracle) -> None:
    tokens = np.random.default_rng(5).integers(2, 300, 300).tolist()
    params = SamplingParams(temperature=0.0, prompt_logprobs=0)
    result = driver("qwen3", kv_cache_tokens=320).step(
        [(0, tokens, 0, True)],
        table=make.columns(0, range(38)),
        starts=[make.start(0, tokens, params)],
        prompt_logprobs=[(0, 0, 0)],
    )
    first, rows = result.prompt_logprobs[0]
    assert first == 1
    assert rows.top.shape == (299, 0)
    expected = torch.log_softmax(oracle("qwen3", tokens), dim=-1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])
    np.testing.assert_allclose(rows.chosen, expected[:, 0], atol=1e-4)


def test_a_resumed_request_has_prompt_logprobs_of_its_prompt_alone(driver: Drive, make: SimpleNamespace) -> None:
    params = SamplingParams(temperature=0.0, prompt_logprobs=0)
    result = driver().step(
        [(0, PROMPT[:20], 0, True)],
        table=make.columns(0, [1, 2, 3]),
        starts=[make.start(0, PROMPT[:20], params, prompt_len=12)],
        prompt_logprobs=[(0, 0, 0)],
    )
    assert len(result.prompt_logprobs[0][1].chosen) == 11


def test_load_reports_the_model(driver: Drive) -> None:
    executor = driver("gemma3").executor
    assert executor.vocab_size == executor.model_config.vocab_size
    assert (executor.num_pages, executor.page_size, executor.max_model_len) == (32, 8, 512)
    assert executor.eos_ids == (1,)
    assert executor.device == torch.device("cpu")


def test_dummy_weights_are_the_same_for_the_same_seed(
    driver: Drive, make: SimpleNamespace, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text((checkpoint("llama-mqa") / "config.json").read_text())

    def tokens(seed: int) -> list[int]:
        config = EngineConfig(
            model=str(tmp_path), load_format="dummy", device="cpu", seed=seed, page_size=8, kv_cache_tokens=256
        )
        drive = type(driver())(ModelExecutor.load(config))
        result = drive.step(
            [(0, PROMPT[:20], 0, True), (1, OTHER[:20], 0, True)],
            table=make.columns(0, [1, 2, 3]) + make.columns(1, [4, 5, 6]),
            starts=[make.start(0, PROMPT[:20]), make.start(1, OTHER[:20])],
        )
        found: list[int] = result.tokens.tolist()
        return found

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


@pytest.mark.parametrize(
    "quantization",
    ["auto", pytest.param("int8", marks=pytest.mark.skipif(not multiplies_int8(), reason="the processor has no VNNI"))],
)
def test_weights_laid_out_before_or_in_a_step_give_the_same_tokens(
    quantization: str, driver: Drive, make: SimpleNamespace, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint("llama-gqa"), tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = EngineConfig(
        model=str(folder), device="cpu", dtype="float32", quantization=quantization, page_size=8, kv_cache_tokens=256
    )

    def tokens(before: int) -> list[int]:
        executor = ModelExecutor.load(config)
        left = 4 * executor.model_config.num_layers + 2  # the embedding and the output layer
        assert all(executor.prepare_next() for _ in range(before * left // 2))
        step = type(driver())(executor).step
        found = step(
            [(0, PROMPT[:20], 0, True)], table=make.columns(0, [1, 2, 3]), starts=[make.start(0, PROMPT[:20])]
        ).tokens.tolist()
        assert all(executor.prepare_next() for _ in range(left - before * left // 2))  # laid out by the step
        assert not executor.prepare_next()
        return list(found)

    assert tokens(0) == tokens(1) == tokens(2)


@pytest.mark.parametrize(("family", "by"), [("llama-gqa", "idle"), ("llama-gqa", "step"), ("llama-mqa", "step")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_that_are_laid_out_are_in_no_file(
    family: str,
    by: str,
    dtype: str,
    driver: Drive,
    make: SimpleNamespace,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(checkpoint(family), tmp_path / "model"))
    file = folder / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    config = EngineConfig(model=str(folder), device="cpu", dtype=dtype, page_size=8, kv_cache_tokens=256)

    def tokens(executor: ModelExecutor) -> list[int]:
        step = type(driver())(executor).step
        table, start = make.columns(0, [1, 2, 3]), make.start(0, PROMPT[:20])
        return list(step([(0, PROMPT[:20], 0, True)], table=table, starts=[start]).tokens.tolist())

    expected = tokens(ModelExecutor.load(config))
    executor = ModelExecutor.load(config)
    if by == "step":  # a server that is never idle
        assert tokens(executor) == expected
    while by == "idle" and executor.prepare_next():
        pass
    with file.open("r+b") as opened:  # in place: mapped memory would change with it
        opened.write(bytes(file.stat().st_size))
    assert tokens(executor) == expected


def test_progress_counts_every_byte(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("branchwise.kernels.linear.COPY_BYTES", 0)  # copies are made after loading
    seen: list[tuple[int, int]] = []
    config = EngineConfig(model=str(checkpoint("llama-mha")), device="cpu", kv_cache_tokens=64)
    executor = ModelExecutor.load(config, lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (executor.memory_plan.weight_bytes,) * 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_model_len": 513}, "--max-model-len 513: the model's own limit is 512"),
        ({"device": "tpu"}, "--device tpu"),
        ({"device": "cuda:99"}, "--device cuda:99"),
        (
            {"tensor_parallel_size": 3},
            "--tensor-parallel-size 3: 4 attention heads and 2 KV heads cannot be divided by it",
        ),
        ({"kv_cache_tokens": 2**50}, "--kv-cache-tokens"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], says: str, driver: Drive) -> None:
    with pytest.raises(LoadError, match=says) as caught:
        driver(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("tokens", "length"), [(64, 100), (112, 100)])
def test_a_pool_smaller_than_one_context_warns(
    tokens: int, length: int, checkpoint: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    config = EngineConfig(
        model=str(checkpoint("llama-gqa")), device="cpu", page_size=16, kv_cache_tokens=tokens, max_model_len=length
    )
    executor = ModelExecutor.load(config)
    executor.close()
    said = f"the KV pool holds {tokens} tokens, less than one context of {length}" in caplog.text
    assert said == (tokens < length)
