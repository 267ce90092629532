"""The shipped model behind ``/v1/completions``, as the ``openai`` package and evaluation harnesses see it."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

TEXTS = ["Bruno lives in Milford.", "Clara works as a judge.", "Tom had a red ball. Tom"]


def complete(client: openai.OpenAI, prompt: Any, **more: Any) -> Any:
    return client.completions.create(**{"model": "branchwise", "prompt": prompt, "temperature": 0, **more})


def generate(shipped: Any, **body: Any) -> Any:
    answer = shipped.http.post("/generate", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.fixture(scope="module")
def ids(shipped: Any) -> list[list[int]]:
    """`TEXTS` as token ids."""
    return [shipped.http.post("/tokenize", json={"prompt": text}).json()["tokens"] for text in TEXTS]


def gathered(stream: Any, choices: int) -> tuple[list[dict[str, Any]], list[Any]]:
    """What the choices of a stream add up to, and its chunks."""
    found: list[dict[str, Any]] = [
        {"text": "", "finish_reason": None, "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for _ in range(choices)
    ]
    chunks = list(stream)
    for chunk in chunks:
        for choice in chunk.choices:
            one = found[choice.index]
            assert one["finish_reason"] is None, "nothing follows the finish reason"
            one["text"] += choice.text
            one["finish_reason"] = choice.finish_reason
            if choice.logprobs is not None:
                for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                    one[name] += getattr(choice.logprobs, name)
    return found, chunks


# -- echo and logprobs, as evaluation harnesses ask --------------------------------------------------------------------


@pytest.mark.parametrize("most", [0, 1])
def test_echo_with_logprobs_describes_the_prompt(client: openai.OpenAI, ids: list[list[int]], most: int) -> None:
    """The prompt's own logprobs, of text and of ids, and of batches."""
    replies = [
        complete(client, prompt, max_tokens=most, echo=True, logprobs=2) for prompt in (TEXTS, ids, TEXTS[0], ids[0])
    ]
    for reply in replies:
        for i, choice in enumerate(reply.choices):
            rows = choice.logprobs
            assert len(rows.tokens) == len(rows.token_logprobs) == len(rows.text_offset) == len(ids[i]) + most
            assert (rows.token_logprobs[0], rows.top_logprobs[0]) == (None, None)
            assert all(value <= 0 for value in rows.token_logprobs[1:])
            for chosen, top in zip(rows.token_logprobs[1:], rows.top_logprobs[1:], strict=True):
                assert chosen in top.values()
            assert "".join(rows.tokens) == choice.text
            for at, token in zip(rows.text_offset, rows.tokens, strict=True):
                assert choice.text.startswith(token, at)
            assert choice.text.startswith(TEXTS[i])
        assert reply.usage.completion_tokens == len(reply.choices) * most
    assert [choice.logprobs for choice in replies[0].choices] == [choice.logprobs for choice in replies[1].choices]
    assert replies[2].choices[0].logprobs == replies[3].choices[0].logprobs


@pytest.mark.parametrize("top", [0, 1, 3])
def test_the_numbers_are_those_of_generate(shipped: Any, client: openai.OpenAI, ids: list[list[int]], top: int) -> None:
    for text, tokens in zip(TEXTS, ids, strict=True):
        rows = complete(client, text, max_tokens=4, echo=True, logprobs=top, extra_body={"ignore_eos": True}).choices[0]
        sampling = {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True}
        asked = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": top}
        native = generate(shipped, input_ids=tokens, sampling_params=sampling, return_text_in_logprobs=True, **asked)
        meta = native["meta_info"]
        assert rows.text == text + native["text"]
        expected = meta["input_token_logprobs"] + meta["output_token_logprobs"]
        assert rows.logprobs.tokens == [name for _, _, name in expected]
        assert rows.logprobs.token_logprobs[1:] == pytest.approx([value for value, _, _ in expected[1:]], abs=1e-4)
        if top:
            best = meta["input_top_logprobs"][1:] + meta["output_top_logprobs"]
            for ours, (chosen, _, name), alternatives in zip(
                rows.logprobs.top_logprobs[1:], expected[1:], best, strict=True
            ):
                theirs = {text: value for value, _, text in alternatives} | {name: chosen}
                assert ours == pytest.approx(theirs, abs=1e-4)
        else:
            chosen_only = [{name: value} for value, _, name in expected[1:]]
            assert rows.logprobs.top_logprobs[1:] == [pytest.approx(one, abs=1e-4) for one in chosen_only]


def test_a_harness_finds_the_likelier_ending(shipped: Any, client: openai.OpenAI) -> None:
    """What lm-evaluation-harness does with the answer: it asks for one token more and cuts it off."""
    context = "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<|im_start|>assistant\n12 + 30 = "
    scores = []
    for ending in ("42", "17", "banana"):
        [begin, whole] = [
            shipped.http.post("/tokenize", json={"prompt": text}).json()["tokens"] for text in (context, ending)
        ]
        prompt = begin + whole
        reply = complete(client, [prompt], max_tokens=1, logprobs=1, echo=True, seed=1234)
        rows = reply.choices[0].logprobs
        values = rows.token_logprobs[len(begin) : -1]
        tops = rows.top_logprobs[len(begin) : -1]
        assert len(values) == len(whole)
        greedy = all(value == max(top.values()) for value, top in zip(values, tops, strict=True))
        assert greedy == (ending == "42")
        asked = {"return_logprob": True, "logprob_start_len": len(begin)}
        native = generate(shipped, input_ids=prompt, sampling_params={"max_new_tokens": 0}, **asked)
        theirs = [value for value, _, _ in native["meta_info"]["input_token_logprobs"]]
        assert sum(values) == pytest.approx(sum(theirs), abs=1e-3)
        scores.append(sum(values))
    assert scores[0] > max(scores[1:])


def test_offsets_count_special_tokens_that_are_spelled_out(client: openai.OpenAI) -> None:
    prompt = "<|im_start|>user\nHi<|im_end|>\n"
    for skip in (True, False):
        body = {"skip_special_tokens": skip}
        choice = complete(client, prompt, max_tokens=2, echo=True, logprobs=0, extra_body=body).choices[0]
        assert choice.text.startswith(prompt)
        rows = choice.logprobs
        shown = [(at, token) for at, token in zip(rows.text_offset, rows.tokens, strict=True) if at < len(prompt)]
        assert "".join(token for _, token in shown) == prompt
        assert all(prompt[at:].startswith(token) for at, token in shown)


# -- batches, samples, streams -----------------------------------------------------------------------------------------


def test_choices_come_prompt_by_prompt_and_sample_by_sample(client: openai.OpenAI, ids: list[list[int]]) -> None:
    asked: dict[str, Any] = {"max_tokens": 8, "temperature": 1.0, "seed": 11}
    alone = [complete(client, [prompt], n=3, **asked).choices for prompt in ids]
    texts = [choice.text for choices in alone for choice in choices]
    assert len(set(texts)) > 3
    for prompt in (ids, TEXTS):
        together = complete(client, prompt, n=3, **asked)
        assert [choice.index for choice in together.choices] == list(range(9))
        assert [choice.text for choice in together.choices] == texts
        assert together.usage.prompt_tokens == sum(map(len, ids)), "a prompt counts once"
    # Sample j has seed + j.
    assert [complete(client, ids[0], **{**asked, "seed": 11 + j}).choices[0].text for j in range(3)] == texts[:3]


@pytest.mark.parametrize("logprobs", [None, 0, 2])
@pytest.mark.parametrize("most", [0, 1, 6])
@pytest.mark.parametrize("echo", [True, False])
def test_a_stream_of_several_prompts_adds_up(
    client: openai.OpenAI, ids: list[list[int]], logprobs: int | None, most: int, echo: bool
) -> None:
    asked: dict[str, Any] = {"max_tokens": most, "echo": echo, "logprobs": logprobs, "n": 2, "seed": 5}
    for prompt in (TEXTS, ids):
        whole = complete(client, prompt, **asked)
        options = {"include_usage": True, "continuous_usage_stats": True}
        found, chunks = gathered(complete(client, prompt, stream=True, stream_options=options, **asked), 6)
        for one, choice in zip(found, whole.choices, strict=True):
            assert (one["text"], one["finish_reason"]) == (choice.text, choice.finish_reason)
            if logprobs is not None:
                rows = choice.logprobs
                assert (one["tokens"], one["text_offset"]) == (rows.tokens, rows.text_offset)
                assert one["token_logprobs"] == pytest.approx(rows.token_logprobs, abs=1e-4)
        assert len({chunk.id for chunk in chunks}) == 1
        counts = [chunk.usage.completion_tokens for chunk in chunks]
        assert counts == sorted(counts)
        assert chunks[-1].choices == []
        usage = chunks[-1].usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (
            whole.usage.prompt_tokens,
            whole.usage.completion_tokens,
        )


def test_usage_comes_when_it_is_asked_for(client: openai.OpenAI) -> None:
    none = list(complete(client, TEXTS[0], max_tokens=3, stream=True))
    assert all(chunk.usage is None for chunk in none) and none[-1].choices
    last = list(complete(client, TEXTS[0], max_tokens=3, stream=True, stream_options={"include_usage": True}))
    assert [chunk.usage is None for chunk in last] == [True] * (len(last) - 1) + [False]
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, TEXTS[0], stream_options={"include_usage": True})
    assert refused.value.param == "stream_options"


@pytest.mark.parametrize(
    ("field", "value"),
    [("suffix", "the end"), ("best_of", 3), ("logprobs", 21), ("n", 0), ("prompt", []), ("prompt", [[]])],
)
def test_what_is_not_done_is_refused_by_name(client: openai.OpenAI, field: str, value: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, **{"prompt": TEXTS[0], field: value})
    assert (refused.value.param or "").startswith(field)
    assert field in refused.value.message


def test_an_answer_has_the_id_that_the_client_shows(client: openai.OpenAI) -> None:
    assert (complete(client, "Hello", max_tokens=1)._request_id or "").startswith("req_")
    kept = complete(client, "Hello", max_tokens=1, extra_headers={"X-Request-Id": "trace-7"})
    assert kept._request_id == "trace-7"


def test_models(shipped: Any, client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("branchwise", "model", "branchwise")
    assert client.models.retrieve(model.id) == model
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("nobody/knows")
    assert missing.value.code == "model_not_found"


async def test_the_async_client_streams_and_waits(shipped: Any) -> None:
    async with openai.AsyncOpenAI(base_url=f"{shipped.url}/v1", api_key="none", max_retries=0) as client:
        asked: Any = {"model": "branchwise", "prompt": TEXTS, "max_tokens": 5, "temperature": 0, "logprobs": 1}
        whole = await client.completions.create(**asked)
        texts = ["", "", ""]
        async for chunk in await client.completions.create(**asked, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
        assert texts == [choice.text for choice in whole.choices]
        assert [model.id async for model in client.models.list()] == ["branchwise"]
        with pytest.raises(openai.BadRequestError):
            await client.completions.create(**{**asked, "temperature": -1})


def test_token_ids_beside_the_text(shipped: Any) -> None:
    body = {"prompt": "hello", "max_tokens": 4, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    answer = shipped.http.post("/v1/completions", json={**body, "logprobs": 1, "return_tokens_as_token_ids": True})
    [choice] = answer.json()["choices"]
    assert len(choice["token_ids"]) == 4
    assert choice["prompt_token_ids"] == shipped.http.post("/tokenize", json={"prompt": "hello"}).json()["tokens"]
    assert choice["logprobs"]["tokens"] == [f"token_id:{id}" for id in choice["token_ids"]]
    with shipped.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
        lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line and line != "data: [DONE]"]
    choices = [json.loads(line)["choices"][0] for line in lines]
    assert [one["prompt_token_ids"] for one in choices] == [choice["prompt_token_ids"]] + [None] * (len(choices) - 1)
    assert [id for one in choices for id in one["token_ids"]] == choice["token_ids"]
    plain = shipped.http.post("/v1/completions", json={"prompt": "hello", "max_tokens": 1}).json()["choices"][0]
    assert "token_ids" not in plain
