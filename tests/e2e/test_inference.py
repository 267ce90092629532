"""vLLM's ``/inference/v1/generate`` against the other routes of the same server."""

from __future__ import annotations

import json
from typing import Any

import pytest

FACT = "Bruno lives in Milford. Bruno is 31 years old."


@pytest.fixture
def ids(shipped: Any) -> list[int]:
    found: list[int] = shipped.http.post("/tokenize", json={"prompt": FACT}).json()["tokens"]
    return found


def generate(shipped: Any, ids: list[int], more: dict[str, Any] | None = None, **sampling: Any) -> Any:
    sampling = {"temperature": 0, "max_tokens": 6, "ignore_eos": True, **sampling}
    body = {"token_ids": ids, "sampling_params": sampling, **(more or {})}
    answer = shipped.http.post("/inference/v1/generate", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(shipped: Any, body: dict[str, Any]) -> list[Any]:
    with shipped.http.stream("POST", "/inference/v1/generate", json={**body, "stream": True}) as stream:
        lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_ids_and_logprobs_are_those_of_completions(shipped: Any, ids: list[int]) -> None:
    cold = generate(shipped, ids, logprobs=2, prompt_logprobs=1)  # computes what the next two find in the cache
    answer = generate(shipped, ids, {"return_token_ids": True}, logprobs=2, prompt_logprobs=1)
    body = {"prompt": ids, "temperature": 0, "max_tokens": 6, "ignore_eos": True, "return_token_ids": True}
    other = shipped.http.post("/v1/completions", json={**body, "logprobs": 2, "prompt_logprobs": 1}).json()
    [choice], [expected] = answer["choices"], other["choices"]
    assert choice["token_ids"] == expected["token_ids"]
    assert answer["prompt_token_ids"] == ids
    given, first = ([row["logprob"] for row in c["logprobs"]["content"]] for c in (choice, cold["choices"][0]))
    assert given == expected["logprobs"]["token_logprobs"]  # to the bit: the same steps after the same cached prefix
    assert given == pytest.approx(first, abs=1e-4)  # its prompt was computed in one step: other shapes round otherwise
    for row in choice["logprobs"]["content"]:
        assert row["top_logprobs"][0] == {name: row[name] for name in ("token_id", "logprob", "rank")}
        assert row["rank"] == 1 and len(row["top_logprobs"]) == 2
    rows = answer["prompt_logprobs"]
    assert rows[0] is None and all(str(id) in row for id, row in zip(ids[1:], rows[1:], strict=True))
    assert rows == expected["prompt_logprobs"]  # to the bit: both are remembered


def test_ranks_are_those_of_the_whole_vocabulary(shipped: Any, ids: list[int]) -> None:
    """Of tokens outside the alternatives too, computed or remembered: with enough alternatives a rank is a place among
    them."""
    shipped.empty_cache()
    computed, remembered = (generate(shipped, ids, prompt_logprobs=1)["prompt_logprobs"] for _ in range(2))
    assert computed == remembered
    ranked = generate(shipped, ids, prompt_logprobs=20)["prompt_logprobs"]
    ranks = [row[str(id)]["rank"] for id, row in zip(ids[1:], computed[1:], strict=True)]
    assert ranks == [row[str(id)]["rank"] for id, row in zip(ids[1:], ranked[1:], strict=True)]
    assert min(ranks) == 1 and max(ranks) > 20
    for id, row in zip(ids[1:], ranked[1:], strict=True):
        listed = sorted(row, key=lambda each: row[each]["rank"])
        assert row[str(id)]["rank"] == listed.index(str(id)) + 1 or row[str(id)]["rank"] > 20
    sampled = generate(shipped, ids, temperature=5, seed=3, logprobs=0, max_tokens=20)["choices"][0]
    assert max(row["rank"] for row in sampled["logprobs"]["content"]) > 20


def test_a_stream_has_the_same_ids(shipped: Any, ids: list[int]) -> None:
    sampling = {"temperature": 0, "max_tokens": 6, "ignore_eos": True, "n": 2}
    body = {"token_ids": ids, "sampling_params": sampling, "return_token_ids": True, "request_id": "mine"}
    whole = generate(shipped, ids, n=2)
    *chunks, last = events(shipped, body | {"stream_options": {"include_usage": True}})
    found: list[list[int]] = [[], []]
    for chunk in chunks:
        assert chunk["request_id"] == "mine"
        [choice] = chunk["choices"]
        found[choice["index"]] += choice["token_ids"]
    assert found == [choice["token_ids"] for choice in whole["choices"]]
    assert [chunk.get("prompt_token_ids") for chunk in chunks] == [ids] + [None] * (len(chunks) - 1)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 12


def test_text_comes_with_the_ids_where_it_is_asked_for(shipped: Any, ids: list[int]) -> None:
    [choice] = generate(shipped, ids, {"output_mode": "text"}, logprobs=0)["choices"]
    decoded = shipped.http.post("/detokenize", json={"tokens": choice["token_ids"]}).json()["prompt"]
    assert choice["text"] == decoded == "".join(row["token"] for row in choice["logprobs"]["content"])
    stop = decoded[2:4]
    [cut] = generate(shipped, ids, {"output_mode": "text"}, stop=[stop])["choices"]
    assert (cut["finish_reason"], cut["stop_reason"], cut["text"]) == ("stop", stop, decoded[: decoded.index(stop)])
    [ended] = generate(shipped, ids, stop_token_ids=choice["token_ids"][:1])["choices"]
    assert (ended["stop_reason"], ended["token_ids"]) == (choice["token_ids"][0], choice["token_ids"][:1])


def test_output_ids_sent_back_hit_to_the_last_token(shipped: Any, ids: list[int]) -> None:
    """All but the last output token have been computed; it was sampled."""
    shipped.empty_cache()
    [first] = generate(shipped, ids)["choices"]
    turn = ids + first["token_ids"] + ids[:3]
    usage = generate(shipped, turn)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == len(ids) + len(first["token_ids"]) - 1
