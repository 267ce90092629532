"""A model over two processes: the same tokens as one, and what happens when one of the two ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from branchwise import Engine, EngineDead, LoadError, SamplingParams
from branchwise.runtime.engine import loading
from branchwise.runtime.parallel.ranks import Ranks

TEXT = "A tree of tokens grows a branch for every question that is asked of one document."
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
SETTINGS: dict[str, Any] = {"device": "cpu", "kv_cache_tokens": 2048, "check_when_idle": True}


def rank_pids(engine: Engine) -> list[int]:
    executor: Any = engine._core.executor
    return list(executor.ranks.pids)


@pytest.fixture(scope="module")
def folder(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("llama-gqa")


@pytest.fixture(scope="module")
def one(folder: Path) -> Iterator[Engine]:
    with Engine(folder, **SETTINGS) as engine:
        yield engine


@pytest.fixture(scope="module")
def two(folder: Path) -> Iterator[Engine]:
    """With overlap, as on a GPU: the next step's tokens are only on rank 0 when it is launched."""
    with Engine(folder, tensor_parallel_size=2, overlap=True, **SETTINGS) as engine:
        yield engine


def both(one: Engine, two: Engine, prompts: Any, params: Any) -> list[list[list[int]]]:
    return [
        [choice.token_ids for output in engine.generate(prompts, params) for choice in output.outputs]
        for engine in (one, two)
    ]


def test_a_bug_of_a_rank_is_in_the_log_of_rank_zero(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its process has no format of its own: a log of JSON objects has nothing else in it."""
    with Engine(folder, tensor_parallel_size=2, **SETTINGS) as engine:
        executor: Any = engine._core.executor
        executor.ranks.send(b"\xffno plan")
        assert "rank 1 ended with code 1" in executor.ranks.failed.result(100)
    (record,) = [each for each in caplog.records if each.name.endswith("rank_worker")]
    assert record.levelname == "ERROR" and "rank 1: stopped by a bug" in record.getMessage()
    assert "Traceback" in record.getMessage() and "decode_plan" in record.getMessage()


def test_the_same_tokens_cold_and_warm(one: Engine, two: Engine) -> None:
    prompts = [TEXT * n + end for n in (1, 3) for end in ("", " a", " b")]
    for hit in (False, True):
        expected, found = both(one, two, prompts, GREEDY)
        assert found == expected
        assert (two.generate(prompts[-1], GREEDY).cached_tokens > 0) or not hit


def test_seeded_samples_with_penalties(one: Engine, two: Engine) -> None:
    settings: dict[str, Any] = {"temperature": 0.9, "seed": 5, "n": 3, "max_tokens": 30, "ignore_eos": True}
    params = [
        SamplingParams(**settings),
        SamplingParams(top_p=0.8, frequency_penalty=0.5, **settings),
        SamplingParams(top_k=20, repetition_penalty=1.2, logit_bias={7: 2.0}, **settings),
    ]
    expected, found = both(one, two, [TEXT] * 3, params)
    assert found == expected


def test_constrained_tokens(one: Engine, two: Engine) -> None:
    schema = '{"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}'
    params = [
        SamplingParams(json_schema=schema, temperature=0, max_tokens=60),
        SamplingParams(regex="[a-z]{20}", temperature=0.8, seed=3, max_tokens=40),
        GREEDY,
    ]
    expected, found = both(one, two, [TEXT] * 3, params)
    assert found == expected


def test_prompt_logprobs(one: Engine, two: Engine) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=2, prompt_logprobs=2)
    expected, found = (engine.generate(TEXT * 4, params).prompt_logprobs for engine in (one, two))
    assert list(found) == list(expected)
    for position, row in found.items():
        assert row.token == expected[position].token
        assert row.logprob == pytest.approx(expected[position].logprob, abs=1e-4)


def test_branches(one: Engine, two: Engine) -> None:
    found = []
    for engine in (one, two):
        with engine.branch(TEXT) as trunk:
            trunk.generate(GREEDY)
            forks = trunk.fork(3)
            for i, fork in enumerate(forks):
                fork.extend(f" {i}")
            found.append([fork.generate(GREEDY).token_ids for fork in forks])
    assert found[0] == found[1]


def test_retraction(folder: Path) -> None:
    """More work than pages: requests are retracted and computed again."""
    settings = {**SETTINGS, "kv_cache_tokens": 256, "max_num_seqs": 8}
    prompts = [f"{i} {TEXT}" for i in range(8)]
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    found, retractions = [], []
    for ranks in (1, 2):
        with Engine(folder, tensor_parallel_size=ranks, **settings) as engine:
            found.append([output.token_ids for output in engine.generate(prompts, params)])
            retractions.append(engine.stats().retractions)
    assert found[0] == found[1]
    assert retractions[0] == retractions[1] > 0


def test_dummy_weights_are_those_of_one_rank(folder: Path) -> None:
    found = []
    for ranks in (1, 2):
        with Engine(folder, load_format="dummy", tensor_parallel_size=ranks, **SETTINGS) as engine:
            found.append(engine.generate(TEXT, GREEDY).token_ids)
    assert found[0] == found[1]


@pytest.mark.parametrize(("quantization", "error"), [("int8", 0.12), ("fp8", 0.3)])
def test_quantized_weights(quantization: str, error: float, folder: Path, one: Engine) -> None:
    """Each rank quantizes its own slices, so tokens may differ from one rank's; the error must be that of the format
    (one rank: 0.08 and 0.21)."""
    params, prompt = SamplingParams(max_tokens=1, prompt_logprobs=0), [(7 * i) % 390 + 2 for i in range(120)]
    with Engine(folder, tensor_parallel_size=2, quantization=quantization, **SETTINGS) as two:
        found, exact = (engine.generate(prompt, params).prompt_logprobs for engine in (two, one))
    assert sum(abs(found[at].logprob - exact[at].logprob) for at in exact) / len(exact) < error


@pytest.mark.parametrize("family", ["llama-gqa", "qwen3-moe", "granite-swa"])
def test_layers_of_transformers(family: str, checkpoint: Callable[[str], Path]) -> None:
    """Dense, with experts, and with attention sinks."""
    found = []
    for ranks in (1, 2):
        settings = {**SETTINGS, "dtype": "float32", "tensor_parallel_size": ranks, "model_impl": "transformers"}
        with Engine(checkpoint(family), **settings) as engine:
            found += [engine.generate(TEXT, GREEDY).token_ids for _ in range(2)]  # cold and warm
            engine.check()
    assert found == found[:1] * 4


def test_the_memory_plan_has_every_rank(two: Engine) -> None:
    executor: Any = two._core.executor
    lines = executor.local.memory_plan.lines()
    assert [line.split()[:2] for line in lines[-2:]] == [["rank", "0"], ["rank", "1"]]
    assert all("free: weights" in line and "room for 128 pages" in line for line in lines[-2:])


def test_a_rank_that_is_killed_ends_every_request(folder: Path) -> None:
    engine = Engine(folder, tensor_parallel_size=2, **SETTINGS)
    [pid] = rank_pids(engine)
    failures: list[EngineDead] = []

    def client() -> None:
        with pytest.raises(EngineDead, match="rank 1 was killed by signal 9") as caught:
            engine.generate(TEXT, SamplingParams(max_tokens=400, ignore_eos=True))
        failures.append(caught.value)

    threads = [threading.Thread(target=client) for _ in range(3)]
    for thread in threads:
        thread.start()
    while engine.stats().generated_tokens < 20:
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    for thread in threads:
        thread.join(100)
    assert len(failures) == 3
    with pytest.raises(EngineDead, match="rank 1 was killed"):
        engine.generate(TEXT, GREEDY)
    engine.close()


def test_a_rank_that_is_killed_while_idle_is_noticed(folder: Path) -> None:
    engine = Engine(folder, tensor_parallel_size=2, **SETTINGS)
    os.kill(rank_pids(engine)[0], signal.SIGKILL)
    deadline = time.monotonic() + 100
    while engine._thread._dead is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(EngineDead, match="rank 1 was killed"):
        engine.generate(TEXT, GREEDY)
    engine.close()


def test_closing_ends_the_ranks(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    engine = Engine(folder, tensor_parallel_size=2, **SETTINGS)
    [pid] = rank_pids(engine)
    assert not list(tmp_path.iterdir())  # the ranks have met, and left nothing to be removed
    engine.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_rank_that_cannot_start_says_why(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here only rank 1 fails: it does not find the weights that rank 0 has opened before."""
    start = Ranks.start
    nowhere = str(folder / "nowhere")
    monkeypatch.setattr(
        Ranks, "start", lambda self, config: start(self, msgspec.structs.replace(config, model=nowhere))
    )
    with pytest.raises(LoadError, match=r"^rank 1: .*nowhere") as caught:
        Engine(folder, tensor_parallel_size=2, **SETTINGS)
    assert "\n" not in str(caught.value)


def test_a_rank_that_dies_while_starting(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "RANK_MODULE", "no_such_module")
    with pytest.raises(LoadError, match="rank 1 ended with code 1"):
        Engine(folder, tensor_parallel_size=2, **SETTINGS)


def test_a_start_that_fails_ends_the_ranks(folder: Path, threads_started: Callable[[], set[Any]]) -> None:
    with pytest.raises(LoadError, match="--max-model-len"):
        Engine(folder, tensor_parallel_size=2, max_model_len=10**6, **SETTINGS)
    deadline = time.monotonic() + 60
    while threads_started():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_ranks_that_cannot_connect_say_so_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from branchwise.runtime.parallel import connect, gloo

    monkeypatch.setattr(connect, "MEET_SECONDS", 0.2)
    monkeypatch.setattr(gloo, "MEET_SECONDS", 0.2)
    with pytest.raises(LoadError, match="the 2 ranks could not connect: ") as caught:
        connect.connect(tmp_path / "store", 0, 2, torch.device("cpu"))
    assert "\n" not in str(caught.value)
