"""The whole server with a real, tiny model: what depends on logits."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from branchwise.runtime.config import EngineConfig, ServerConfig
from branchwise.runtime.tokenizer.tokenizer import Tokenizer

PROMPT = "The tree remembers every page it has seen"


@pytest.fixture(scope="module")
def model_server(checkpoint: Any, tmp_path_factory: pytest.TempPathFactory, run_server_process: Any) -> Iterator[Any]:
    folder: Path = checkpoint("llama-gqa")
    engine = EngineConfig(model=str(folder), kv_cache_tokens=4096, device="cpu", check_when_idle=True)
    with run_server_process(ServerConfig(engine=engine, port=0), tmp_path_factory.mktemp("run")) as running:
        yield running
        running.idle()


@pytest.fixture
def clean(model_server: Any) -> Iterator[Any]:
    model_server.empty_cache()
    yield model_server
    model_server.idle()


def complete(server: Any, **body: Any) -> dict[str, Any]:
    response = server.http.post("/v1/completions", json={"temperature": 0, **body})
    assert response.status_code == 200, response.text
    return response.json()


def generate(server: Any, *, sampling: dict[str, Any], **body: Any) -> Any:
    response = server.http.post("/generate", json={"sampling_params": {"temperature": 0, **sampling}, **body})
    assert response.status_code == 200, response.text
    return response.json()


def test_greedy_is_the_same_warm_and_cold(clean: Any) -> None:
    cold = complete(clean, prompt=PROMPT, max_tokens=24)
    warm = complete(clean, prompt=PROMPT, max_tokens=24)
    assert cold["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert warm["usage"]["prompt_tokens_details"]["cached_tokens"] == warm["usage"]["prompt_tokens"] - 1
    assert warm["choices"][0]["text"] == cold["choices"][0]["text"]


def test_a_seed_is_a_seed_whatever_else_runs(clean: Any) -> None:
    body = {"prompt": PROMPT, "max_tokens": 16, "temperature": 1.0, "seed": 11}
    alone = complete(clean, **body, n=3)
    texts = [choice["text"] for choice in alone["choices"]]
    assert len(set(texts)) == 3
    with ThreadPoolExecutor(8) as pool:
        noise = [pool.submit(complete, clean, prompt=f"noise {i}", max_tokens=20, temperature=1.0) for i in range(6)]
        crowded = pool.submit(complete, clean, **body, n=3).result()
        for one in noise:
            one.result()
    assert [choice["text"] for choice in crowded["choices"]] == texts
    second = complete(clean, **{**body, "seed": 12})["choices"][0]["text"]
    assert second == texts[1], "sample i is drawn with seed + i"


def test_completion_logprobs(clean: Any) -> None:
    choice = complete(clean, prompt=PROMPT, max_tokens=6, logprobs=3)["choices"][0]
    logprobs = choice["logprobs"]
    assert {len(values) for values in logprobs.values()} == {6}
    for text, value, top in zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert value < 0
        assert 3 <= len(top) <= 4
        assert value == max(top.values()) == top[text], "greedy takes the likeliest"
    assert logprobs["text_offset"][0] == 0


def test_echo_scores_the_prompt(clean: Any) -> None:
    body = {"prompt": PROMPT, "max_tokens": 4, "logprobs": 2, "echo": True}
    whole = complete(clean, **body)
    logprobs = whole["choices"][0]["logprobs"]
    tokens = whole["usage"]["prompt_tokens"] + 4
    assert {len(values) for values in logprobs.values()} == {tokens}
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert all(isinstance(value, float) and value <= 0 for value in logprobs["token_logprobs"][1:])
    # Scored again with the cache warm, and without generating: the same numbers.
    scored = complete(clean, **{**body, "max_tokens": 0})["choices"][0]["logprobs"]
    assert scored["token_logprobs"][1:] == pytest.approx(logprobs["token_logprobs"][1 : tokens - 4], abs=1e-4)
    response = clean.http.post("/v1/completions", json={**body, "temperature": 0, "stream": True})
    chunks = [json.loads(line[6:]) for line in response.text.split("\n\n") if line and "[DONE]" not in line]
    pieces = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [text for piece in pieces for text in piece["tokens"]] == logprobs["tokens"]
    assert [offset for piece in pieces for offset in piece["text_offset"]] == logprobs["text_offset"]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]


def test_a_text_scores_as_the_sum_of_its_choices(clean: Any) -> None:
    """The logprobs of a greedy continuation are the same whether it is generated or scored as a prompt."""
    made = generate(
        clean, text=PROMPT, sampling={"max_new_tokens": 8}, return_logprob=True, return_prompt_token_ids=True
    )
    ids = made["prompt_token_ids"] + made["output_ids"]
    scored = generate(
        clean, input_ids=ids, sampling={"max_new_tokens": 0}, return_logprob=True, logprob_start_len=len(ids) - 8
    )
    entries = scored["meta_info"]["input_token_logprobs"]
    assert [entry[1] for entry in entries] == made["output_ids"]
    made_logprobs = [entry[0] for entry in made["meta_info"]["output_token_logprobs"]]
    assert [entry[0] for entry in entries] == pytest.approx(made_logprobs, abs=1e-4)
    assert sum(made_logprobs) < 0


def test_generate_logprobs_have_sglang_shapes(clean: Any) -> None:
    answer = generate(
        clean,
        text=PROMPT,
        sampling={"max_new_tokens": 5},
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=2,
        return_text_in_logprobs=True,
    )
    meta = answer["meta_info"]
    assert len(meta["input_token_logprobs"]) == meta["prompt_tokens"]
    assert meta["input_token_logprobs"][0][0] is None
    assert meta["input_top_logprobs"][0] is None
    assert [entry[1] for entry in meta["output_token_logprobs"]] == answer["output_ids"]
    tokenizer = Tokenizer.load(clean.config.engine.model)
    for entry in meta["input_token_logprobs"] + meta["output_token_logprobs"]:
        assert entry[2] == tokenizer.token_text(entry[1])
    for chosen, top in zip(meta["output_token_logprobs"], meta["output_top_logprobs"], strict=True):
        assert top[0] == chosen
        assert top[0][0] >= top[1][0]
    plain = generate(clean, text=PROMPT, sampling={"max_new_tokens": 5}, return_logprob=True)["meta_info"]
    assert plain["input_token_logprobs"] == []
    assert plain["output_token_logprobs"][0][2] is None
    assert "output_top_logprobs" not in plain
    assert "output_token_logprobs" not in generate(clean, text=PROMPT, sampling={"max_new_tokens": 1})["meta_info"]


def test_logit_bias_and_stop_ids(clean: Any) -> None:
    forced = generate(clean, text=PROMPT, sampling={"max_new_tokens": 3, "logit_bias": {"70": 100}})
    assert forced["output_ids"] == [70, 70, 70]
    ids = generate(clean, text=PROMPT, sampling={"max_new_tokens": 8})["output_ids"]
    stopped = generate(clean, text=PROMPT, sampling={"max_new_tokens": 8, "stop_token_ids": [ids[3]]})
    assert stopped["output_ids"] == ids[: ids.index(ids[3]) + 1]


def test_a_pool_that_is_too_small_for_all_serves_all(clean: Any) -> None:
    """More work than pages: requests wait or are retracted, and come out as if alone."""
    prompts = [[5 + i, *range(10, 60)] for i in range(24)]
    alone = [
        complete(clean, prompt=prompt, max_tokens=150, ignore_eos=True)["choices"][0]["text"] for prompt in prompts[:3]
    ]
    many = complete(clean, prompt=prompts, max_tokens=150, ignore_eos=True)
    assert [choice["text"] for choice in many["choices"][:3]] == alone
    assert {choice["finish_reason"] for choice in many["choices"]} == {"length"}


def test_a_soak_of_everything_leaves_the_books_balanced(clean: Any) -> None:
    """Random requests, streams left half-way, aborts and bad ones, all at once; the server checks itself when idle."""
    random_ = random.Random(1)
    roots = [[random_.randrange(4, 300) for _ in range(random_.randrange(1, 90))] for _ in range(6)]

    def one(i: int) -> int:
        rng = random.Random(i)
        prompt = [*rng.choice(roots), *(rng.randrange(4, 300) for _ in range(rng.randrange(1, 20)))]
        body: dict[str, Any] = {
            "prompt": prompt,
            "max_tokens": rng.randrange(0, 30),
            "n": rng.choice([1, 1, 2, 3]),
            "seed": i,
        }
        match rng.randrange(5):
            case 0:  # left half-way
                with clean.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
                    for _, _line in zip(range(rng.randrange(6)), response.iter_lines(), strict=False):
                        pass
                return 0
            case 1:
                return clean.http.post("/v1/completions", json={**body, "prompt": [*prompt, -1]}).status_code - 400
            case 2:
                sampling = {"max_new_tokens": 30, "temperature": 1.0, "stop": ["e"]}
                answer = generate(clean, input_ids=prompt, rid=f"r{i % 7}", sampling=sampling)
                return 0 if "e" not in answer["text"] else 1
            case 3:
                return clean.http.post("/abort_request", json={"rid": f"r{i % 7}"}).status_code - 200
            case _:
                answer = complete(clean, **body, temperature=0.7)
                return 0 if answer["usage"]["completion_tokens"] <= body["n"] * body["max_tokens"] else 1

    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(one, range(200))) == {0}
    stats = clean.idle()
    assert stats["running"] == stats["waiting"] == 0
    assert clean.http.get("/cache/check").json() == {"check": "clean"}
    clean.empty_cache()
    assert clean.idle()["pages_free"] == clean.idle()["pages_total"]
