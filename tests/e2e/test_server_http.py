"""What a server says to well-meant requests, through all of its processes (without a model: tokens are made up)."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest


def events(response: httpx.Response) -> list[Any]:
    """The payloads of a whole event stream; it must end with [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.fixture
def clean(server: Any) -> Iterator[Any]:
    """The server with an empty cache; afterwards nothing may be left in flight."""
    server.empty_cache()
    yield server
    server.idle()


def complete(server: Any, **body: Any) -> dict[str, Any]:
    response = server.http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def generate(server: Any, **body: Any) -> Any:
    response = server.http.post("/generate", json=body)
    assert response.status_code == 200, response.text
    return response.json()


# -- /v1/completions ---------------------------------------------------------------------------------------------------


def test_completion_has_openai_fields(clean: Any) -> None:
    answer = complete(clean, prompt="The tree remembers", max_tokens=7, model=clean.info["model"])
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert answer["model"] == clean.info["model"]
    assert abs(answer["created"] - time.time()) < 60
    [choice] = answer["choices"]
    assert choice["index"] == 0
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    usage = answer["usage"]
    assert usage["completion_tokens"] == 7
    assert usage["total_tokens"] == usage["prompt_tokens"] + 7
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0, "cache_write_tokens": usage["prompt_tokens"]}


def test_text_and_its_ids_give_the_same(clean: Any) -> None:
    ids = generate(
        clean, text="The tree remembers", return_prompt_token_ids=True, sampling_params={"max_new_tokens": 0}
    )
    by_text = complete(clean, prompt="The tree remembers", max_tokens=9)
    by_ids = complete(clean, prompt=ids["prompt_token_ids"], max_tokens=9)
    assert by_text["choices"][0]["text"] == by_ids["choices"][0]["text"]
    assert by_text["usage"]["prompt_tokens"] == by_ids["usage"]["prompt_tokens"] == len(ids["prompt_token_ids"])


@pytest.mark.parametrize("prompt", [["one page", "two pages"], [[5, 6, 7], [8, 9]]])
def test_lists_of_prompts_and_n(clean: Any, prompt: Any) -> None:
    answer = complete(clean, prompt=prompt, n=3, max_tokens=4)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    alone = [complete(clean, prompt=one, max_tokens=4)["usage"]["prompt_tokens"] for one in prompt]
    assert answer["usage"]["prompt_tokens"] == sum(alone)
    assert answer["usage"]["completion_tokens"] == 6 * 4


def test_stream_joins_to_the_whole(clean: Any) -> None:
    body = {"prompt": ["The tree", "A page"], "max_tokens": 40, "n": 2}
    whole = complete(clean, **body)
    response = clean.http.post(
        "/v1/completions", json={**body, "stream": True, "stream_options": {"include_usage": True}}
    )
    chunks = events(response)
    texts = ["", "", "", ""]
    reasons: list[Any] = [None] * 4
    for chunk in chunks[:-1]:
        assert chunk["usage"] is None
        for choice in chunk["choices"]:
            assert reasons[choice["index"]] is None, "nothing may follow the finish reason"
            texts[choice["index"]] += choice["text"]
            reasons[choice["index"]] = choice["finish_reason"]
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert reasons == ["length"] * 4
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_stop_strings_end_the_text_before_them(clean: Any) -> None:
    whole = complete(clean, prompt="stop here", max_tokens=60)["choices"][0]["text"]
    stop = whole[20:24]
    at = whole.index(stop)
    cut = complete(clean, prompt="stop here", max_tokens=60, stop=[stop])["choices"][0]
    assert cut["text"] == whole[:at]
    assert cut["finish_reason"] == "stop"
    kept = complete(clean, prompt="stop here", max_tokens=60, stop=stop, include_stop_str_in_output=True)
    assert kept["choices"][0]["text"] == whole[:at] + stop
    streamed = events(
        clean.http.post("/v1/completions", json={"prompt": "stop here", "max_tokens": 60, "stop": stop, "stream": True})
    )
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == whole[:at]
    matched = generate(clean, text="stop here", sampling_params={"max_new_tokens": 60, "stop": [stop]})
    assert matched["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}


def test_stop_token(clean: Any) -> None:
    ids = generate(clean, text="stop id", sampling_params={"max_new_tokens": 10})["output_ids"]
    cut = generate(clean, text="stop id", sampling_params={"max_new_tokens": 10, "stop_token_ids": [ids[4]]})
    assert cut["meta_info"]["finish_reason"] == {"type": "stop", "matched": ids[4]}
    assert cut["output_ids"] == ids[: ids.index(ids[4]) + 1]


def test_echo_repeats_the_prompt(clean: Any) -> None:
    answer = complete(clean, prompt="Say after me:", max_tokens=3, echo=True)["choices"][0]["text"]
    plain = complete(clean, prompt="Say after me:", max_tokens=3)["choices"][0]["text"]
    assert answer == "Say after me:" + plain
    streamed = events(
        clean.http.post(
            "/v1/completions", json={"prompt": "Say after me:", "max_tokens": 3, "echo": True, "stream": True}
        )
    )
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == answer
    nothing = complete(clean, prompt="Say after me:", max_tokens=0, echo=True)["choices"][0]
    assert (nothing["text"], nothing["finish_reason"]) == ("Say after me:", "length")


def test_nulls_mean_the_default(clean: Any) -> None:
    nulls = dict.fromkeys(
        ("stop", "seed", "n", "temperature", "top_p", "logprobs", "echo", "stream", "suffix", "best_of", "logit_bias")
    )
    assert complete(clean, prompt="x", max_tokens=None, **nulls)["usage"]["completion_tokens"] == 16


# -- /generate ---------------------------------------------------------------------------------------------------------


def test_generate_has_sglang_fields(clean: Any) -> None:
    answer = generate(clean, text="The tree remembers", rid="mine", sampling_params={"max_new_tokens": 5})
    assert set(answer) == {"text", "output_ids", "meta_info"}
    meta = answer["meta_info"]
    assert meta["id"] == "mine"
    assert meta["finish_reason"] == {"type": "length", "length": 5}
    assert len(answer["output_ids"]) == meta["completion_tokens"] == 5
    assert meta["cached_tokens"] == 0
    written = meta["prompt_tokens"]
    assert meta["cache"] == {"hit_tokens": 0, "reason": "cold", "write_tokens": written, "pinned_tokens": 0}
    assert meta["forward_passes_saved"] == 0
    assert meta["e2e_latency"] > 0


def test_generate_batches(clean: Any) -> None:
    answers = generate(
        clean,
        text=["one", "two", "three"],
        rid=["a", "b", "c"],
        sampling_params=[{"max_new_tokens": length} for length in (1, 2, 3)],
    )
    assert [answer["meta_info"]["id"] for answer in answers] == ["a", "b", "c"]
    assert [answer["meta_info"]["completion_tokens"] for answer in answers] == [1, 2, 3]
    assert len(generate(clean, text=["one"], sampling_params={"max_new_tokens": 1})) == 1
    assert len(generate(clean, text="one", sampling_params={"max_new_tokens": 1, "n": 2})) == 2
    by_ids = generate(clean, input_ids=[[1, 2], [3]], sampling_params={"max_new_tokens": 1})
    assert [answer["meta_info"]["prompt_tokens"] for answer in by_ids] == [2, 1]


def test_generate_streams_the_text_so_far(clean: Any) -> None:
    body = {"text": ["one", "two"], "sampling_params": {"max_new_tokens": 30}}
    whole = generate(clean, **body)
    last: dict[int, Any] = {}
    for event in events(clean.http.post("/generate", json={**body, "stream": True})):
        before = last.get(event["index"])
        if before is not None:
            assert event["text"].startswith(before["text"])
            assert event["output_ids"][: len(before["output_ids"])] == before["output_ids"]
            assert before["meta_info"]["finish_reason"] is None
        last[event["index"]] = event
    assert [last[i]["text"] for i in range(2)] == [answer["text"] for answer in whole]
    assert [last[i]["output_ids"] for i in range(2)] == [answer["output_ids"] for answer in whole]


def test_zero_tokens_caches_the_prompt(clean: Any) -> None:
    first = generate(clean, input_ids=list(range(40)), sampling_params={"max_new_tokens": 0})
    assert first["text"] == ""
    assert first["meta_info"]["completion_tokens"] == 0
    assert first["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
    second = generate(clean, input_ids=[*range(40), 50, 51], sampling_params={"max_new_tokens": 1})
    assert second["meta_info"]["cached_tokens"] == 40


def test_null_max_new_tokens_fills_the_context(clean: Any) -> None:
    prompt = [5] * (clean.info["max_model_len"] - 40)
    answer = generate(clean, input_ids=prompt, sampling_params={"max_new_tokens": None})
    assert answer["meta_info"]["completion_tokens"] == 40


# -- the cache, as clients see it --------------------------------------------------------------------------------------


def test_cached_tokens_and_why(clean: Any) -> None:
    prompt = [7, *range(100)]
    sampling = {"max_new_tokens": 1}
    assert generate(clean, input_ids=prompt, sampling_params=sampling)["meta_info"]["cache"]["reason"] == "cold"
    again = generate(clean, input_ids=prompt, sampling_params=sampling)["meta_info"]
    assert again["cached_tokens"] == again["cache"]["hit_tokens"] == 100
    assert again["cache"]["reason"] == "hit"
    branched = generate(clean, input_ids=[*prompt[:37], 200, 201, 202], sampling_params=sampling)["meta_info"]
    hit = {"hit_tokens": 37, "reason": "diverged", "diverged_at": 37}
    assert branched["cache"] == {**hit, "write_tokens": 3, "pinned_tokens": 0}
    usage = complete(clean, prompt=prompt, max_tokens=1)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 100


@pytest.mark.parametrize("field", ["cache_salt", "extra_key"])
def test_salts_divide_the_cache(clean: Any, field: str) -> None:
    """In pairs: the same salt hits, a different one does not, and none is a third."""
    prompt, sampling = list(range(60)), {"max_new_tokens": 1}

    def cached(**salt: str) -> int:
        return generate(clean, input_ids=prompt, sampling_params=sampling, **salt)["meta_info"]["cached_tokens"]

    assert cached(**{field: "a"}) == 0
    assert cached(**{field: "a"}) == 59
    assert cached(**{field: "b"}) == 0
    assert cached() == 0
    assert cached() == 59
    assert complete(clean, prompt=prompt, max_tokens=1, cache_salt="a")["usage"]["prompt_tokens_details"] == {
        "cached_tokens": 59,
        "cache_write_tokens": 1,
    }


def test_samples_of_one_prompt_compute_it_once(clean: Any) -> None:
    before = clean.idle()
    answer = complete(clean, prompt=[3, *range(200)], n=8, max_tokens=2)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0, "one of them computed it"
    after = clean.idle()
    # Within one step whole pages are shared; the 9 tokens after the last whole page are computed by each.
    assert after["computed_tokens"] - before["computed_tokens"] <= 201 + 7 * (201 % 16)


def test_tree_and_flush(clean: Any) -> None:
    generate(clean, text="The tree remembers every page", sampling_params={"max_new_tokens": 1})
    dump = clean.http.get("/cache/tree").json()
    [namespace] = [one for one in dump["namespaces"] if one["children"]]
    assert "The tree" in namespace["children"][0]["text"]
    assert dump["totals"]["cached"] >= 1
    text = clean.http.get("/cache/tree", params={"format": "text"})
    assert text.headers["content-type"].startswith("text/plain")
    assert "The tree" in text.text
    assert clean.http.post("/flush_cache").json()["evicted_pages"] >= 1
    assert clean.http.get("/cache/tree").json()["totals"]["cached"] == 0


# -- the other routes --------------------------------------------------------------------------------------------------


def test_models(server: Any) -> None:
    [card] = server.http.get("/v1/models").json()["data"]
    assert card["id"] == server.info["model"]
    assert server.http.get(f"/v1/models/{card['id']}").json() == card
    missing = server.http.get("/v1/models/nope/nope")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


def test_health_and_info(server: Any) -> None:
    health = server.http.get("/health")
    assert (health.status_code, health.json()) == (200, {"status": "ready"})
    info = server.http.get("/get_server_info").json()
    assert info["engine"]["page_size"] == 16
    assert info["config"]["null_executor"] is True
    assert server.http.get("/server_info").json()["model"] == info["model"]
    assert "/generate" in server.http.get("/openapi.json").json()["paths"]


def test_metrics_count_what_happened(clean: Any) -> None:
    before = clean.metrics()
    complete(clean, prompt=[9, *range(50)], max_tokens=5)
    complete(clean, prompt=[9, *range(50)], max_tokens=5)
    clean.idle()
    after = clean.metrics()

    def grew(name: str) -> float:
        return after[name] - before[name]

    assert grew("prompt_tokens_total") == 102
    assert grew("cached_tokens_total") == 50
    assert grew("computed_tokens_total") == 52
    assert grew("generated_tokens_total") == 10
    assert grew('requests_total{finish_reason="length"}') == 2
    assert grew("time_to_first_token_seconds_count") == 2
    assert grew("e2e_request_latency_seconds_count") == 2
    assert grew("queue_time_seconds_count") == 2
    assert grew("inter_token_latency_seconds_count") == 8
    assert 0 < after["cache_hit_rate"] < 1
    assert after["requests_running"] == 0


def test_the_loops_lag_is_measured(server: Any) -> None:
    """50 moments a second; a process that was stopped for 0.6 s was late for thirty of them."""

    def late(more_than: str) -> float:
        now = server.metrics()
        return now["event_loop_lag_seconds_count"] - now[f'event_loop_lag_seconds_bucket{{le="{more_than}"}}']

    started, before = time.monotonic(), server.metrics()["event_loop_lag_seconds_count"]
    time.sleep(0.5)
    moments = server.metrics()["event_loop_lag_seconds_count"] - before
    assert moments <= 50 * (time.monotonic() - started) + 2
    summed, stalled = server.metrics()["event_loop_lag_seconds_sum"], late("0.25")
    os.kill(server.process.pid, signal.SIGSTOP)
    time.sleep(0.6)
    os.kill(server.process.pid, signal.SIGCONT)
    server.until(lambda: late("0.25") - stalled >= 15)
    assert server.metrics()["event_loop_lag_seconds_sum"] - summed > 4


def test_abort_by_exact_label(clean: Any) -> None:
    """ "batch_1" must not take "batch_10" along."""
    long = {"max_new_tokens": 20000}
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(generate, clean, text="one", rid="batch_1", sampling_params=long)
        ten = pool.submit(generate, clean, text="ten", rid="batch_10", sampling_params=long)
        clean.until(lambda: clean.in_flight() == 2)
        assert clean.http.post("/abort_request", json={"rid": "batch_1"}).json() == {"aborted": 1}
        answer = one.result(60)
        assert answer["meta_info"]["finish_reason"]["type"] == "abort"
        assert len(answer["output_ids"]) == answer["meta_info"]["completion_tokens"] < 20000
        assert not ten.done()
        assert clean.http.post("/abort_request", json={"rid": "batch_1"}).json() == {"aborted": 0}
        assert clean.http.post("/abort_request", json={"abort_all": True}).json() == {"aborted": 1}
        assert ten.result(60)["meta_info"]["finish_reason"]["type"] == "abort"


def test_a_full_queue_is_a_503(clean: Any) -> None:
    """The fixture's server takes 300 requests."""
    more = {"prompt": ["x", "y"], "n": 100, "max_tokens": 1}
    with ThreadPoolExecutor(1) as pool:
        with clean.stopped("detokenizer"):
            many = pool.submit(generate, clean, text="x", sampling_params={"n": 128, "max_new_tokens": 10})
            clean.until(lambda: clean.in_flight() == 128)
            refused = clean.http.post("/v1/completions", json=more)
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "overloaded"
        assert len(many.result(60)) == 128
    clean.idle()
    assert len(complete(clean, **more)["choices"]) == 200


def test_a_key_with_its_share_of_the_queue_is_a_429_and_others_are_served(start_server: Any) -> None:
    server = start_server(api_key="a", extra_api_keys=("b",), max_queued_per_key=40, null_step_seconds=0.001)
    with ThreadPoolExecutor(1) as pool:
        long = {"text": "x", "rid": "many", "sampling_params": {"n": 40, "max_new_tokens": 20_000}}
        many = pool.submit(server.http.post, "/generate", json=long)
        server.until(lambda: server.in_flight() == 40)
        bodies = {
            "/v1/completions": {"prompt": "x", "max_tokens": 1},
            "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
            "/generate": {"text": "x", "sampling_params": {"max_new_tokens": 1}, "stream": True},
        }
        for path, body in bodies.items():
            refused = server.http.post(path, json=body)
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "1"
            error = refused.json()["error"]
            assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
            assert "limit of 40 (--max-queued-per-key)" in error["message"]
            assert server.http.post(path, json=body, headers={"Authorization": "Bearer b"}).status_code == 200
        server.http.post("/abort_request", json={"rid": "many"})
        assert many.result(60).status_code == 200
    server.idle()
    assert all(server.http.post(path, json=body).status_code == 200 for path, body in bodies.items())
    assert server.stop() == 0


# -- clients we did not write ------------------------------------------------------------------------------------------


def test_openai_client(clean: Any) -> None:
    with openai.OpenAI(base_url=f"{clean.url}/v1", api_key="none", max_retries=0) as client:
        model = client.models.list().data[0].id
        answer = client.completions.create(model=model, prompt="The tree", max_tokens=12, temperature=0)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 12
        assert answer.usage.prompt_tokens_details is not None
        stream = client.completions.create(
            model=model, prompt="The tree", max_tokens=12, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == answer.choices[0].text
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.prompt_tokens_details is not None
        assert chunks[-1].usage.prompt_tokens_details.cached_tokens == answer.usage.prompt_tokens - 1
        with pytest.raises(openai.NotFoundError) as missing:
            client.completions.create(model="other", prompt="x")
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as bad:
            client.completions.create(model=model, prompt="x", temperature=-1)
        assert bad.value.param == "temperature"


async def test_async_openai_client_in_parallel(clean: Any) -> None:
    async with openai.AsyncOpenAI(base_url=f"{clean.url}/v1", api_key="none", max_retries=0) as client:

        async def one(i: int) -> str:
            stream = await client.completions.create(
                model=clean.info["model"], prompt=[i, 5], max_tokens=20, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        texts = await asyncio.gather(*(one(i) for i in range(32)))
        assert len(set(texts)) == 1, "made-up tokens depend on the position alone"


# -- what /v1/completions also does ------------------------------------------------------------------------------------


def test_suffix_is_refused_by_name(clean: Any) -> None:
    answer = clean.http.post("/v1/completions", json={"prompt": "x", "suffix": "y"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "suffix"


def test_the_cache_header_and_running_usage(clean: Any) -> None:
    asked = {"x-branchwise-cache": "1"}
    body = {"prompt": [[1, 2, 3, 4], [1, 2, 9, 9]], "max_tokens": 3}
    clean.http.post("/v1/completions", json={"prompt": [1, 2, 3, 4], "max_tokens": 1})
    clean.idle()
    header = clean.http.post("/v1/completions", json=body, headers=asked).headers["x-branchwise-cache"]
    assert header == "3;prompt=4;reason=hit, 2;prompt=4;reason=diverged;at=2"
    assert "x-branchwise-cache" not in clean.http.post("/v1/completions", json=body).headers
    options = {"include_usage": True, "continuous_usage_stats": True}
    streamed = events(
        clean.http.post("/v1/completions", json={**body, "stream": True, "stream_options": options}, headers=asked)
    )
    counts = [event["usage"]["completion_tokens"] for event in streamed]
    assert counts == sorted(counts)
    assert counts[-1] == 6
