"""The shipped model behind ``/v1/chat/completions``, as the ``openai`` package sees it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pydantic
import pytest

SUM: Any = [{"role": "user", "content": "What is 12 + 30?"}]
FACT: Any = [{"role": "user", "content": "Bruno lives in Milford. Bruno is 31 years old. How old is Bruno?"}]
WRITE: Any = [{"role": "user", "content": "Bruno is 31 years old. Write it as JSON."}]
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "paint_legoax",
            "description": "Paint the legoax.",
            "parameters": {
                "type": "object",
                "properties": {"koayi": {"type": "integer"}, "repeat": {"type": "boolean"}},
                "required": ["koayi", "repeat"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "heeprer",
            "description": "Move the train.",
            "parameters": {
                "type": "object",
                "properties": {"amount": {"type": "integer"}, "artist": {"type": "string"}},
                "required": ["artist"],
            },
        },
    },
]
PAINT: Any = [{"role": "user", "content": "I want you to paint the legoax: repeat = false, koayi = 695"}]
PAINTED = '{"koayi": 695, "repeat": false}'


class Paint(pydantic.BaseModel):
    koayi: int
    repeat: bool


class Person(pydantic.BaseModel):
    name: str
    age: int


def chat(client: openai.OpenAI, messages: list[Any], **more: Any) -> Any:
    more = {"temperature": 0, "max_completion_tokens": 100, **more}
    return client.chat.completions.create(model="branchwise", messages=messages, **more)


def test_an_answer_has_every_field(client: openai.OpenAI) -> None:
    reply = chat(client, [{"role": "system", "content": "You are Twig."}, *SUM])
    assert reply.object == "chat.completion"
    assert reply.id.startswith("chatcmpl-")
    assert reply.model == "branchwise"
    [choice] = reply.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    assert choice.message.role == "assistant"
    assert choice.message.content == "12 + 30 = 42"
    assert choice.message.refusal is None
    assert choice.message.tool_calls is None
    dumped = reply.model_dump(exclude_unset=True)
    assert dumped["system_fingerprint"] is None
    assert dumped["choices"][0]["message"]["refusal"] is None
    usage = dumped["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    details = usage["prompt_tokens_details"]
    assert details["cached_tokens"] + details["cache_write_tokens"] == usage["prompt_tokens"]


def test_the_prompt_is_the_templates_text(shipped: Any, client: openai.OpenAI) -> None:
    """The same tokens as the rendered text sent as a prompt, and no special token twice."""
    conversation = [
        {"role": "developer", "content": [{"type": "text", "text": "You are"}, {"type": "text", "text": "Twig."}]},
        *FACT,
        {"role": "assistant", "content": "31."},
        {"role": "user", "content": "Thank you."},
    ]
    text = (
        "<|im_start|>system\nYou are\nTwig.<|im_end|>\n<|im_start|>user\n" + FACT[0]["content"] + "<|im_end|>\n"
        "<|im_start|>assistant\n31.<|im_end|>\n<|im_start|>user\nThank you.<|im_end|>\n<|im_start|>assistant\n"
    )
    reply = chat(client, conversation)
    plain = client.completions.create(model="branchwise", prompt=text, temperature=0, max_tokens=100)
    assert reply.usage.prompt_tokens == plain.usage.prompt_tokens
    assert plain.usage.prompt_tokens_details.cached_tokens == plain.usage.prompt_tokens - 1
    assert reply.choices[0].message.content == plain.choices[0].text
    tokens = shipped.http.post("/tokenize", json={"messages": conversation}).json()
    assert tokens["count"] == len(tokens["tokens"]) == reply.usage.prompt_tokens
    assert shipped.http.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": text}


def test_a_turn_reuses_all_turns_before_it(shipped: Any, client: openai.OpenAI) -> None:
    shipped.empty_cache()
    first = chat(client, FACT)
    shipped.idle()
    said = first.choices[0].message.content
    asked = [*FACT, {"role": "assistant", "content": said}, {"role": "user", "content": "And where does Bruno live?"}]
    raw = client.chat.completions.with_raw_response.create(
        model="branchwise", messages=asked, temperature=0, extra_headers={"x-branchwise-cache": "1"}
    )
    second = raw.parse()
    assert "Milford" in second.choices[0].message.content
    details = second.usage.prompt_tokens_details
    # All of the first turn and its answer; not the token that ended it, nor what the template writes after it.
    assert details.cached_tokens >= first.usage.prompt_tokens + first.usage.completion_tokens - 1
    hit = raw.headers["x-branchwise-cache"]
    assert hit.startswith(f"{details.cached_tokens};prompt={second.usage.prompt_tokens};reason=")
    assert (
        "x-branchwise-cache"
        not in client.chat.completions.with_raw_response.create(model="branchwise", messages=asked).headers
    )


def test_streams_add_up(client: openai.OpenAI) -> None:
    whole = chat(client, FACT)
    chunks = list(chat(client, FACT, stream=True, stream_options={"include_usage": True}))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    first = chunks[0].choices[0].delta
    assert (first.role, first.content) == ("assistant", "")
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:-1])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    running = list(
        chat(client, FACT, stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True})
    )
    counts = [chunk.usage.completion_tokens for chunk in running]
    assert counts == sorted(counts)
    assert counts[-1] == whole.usage.completion_tokens
    assert {chunk.usage.prompt_tokens for chunk in running} == {whole.usage.prompt_tokens}


def test_samples_seeds_and_stops(client: openai.OpenAI) -> None:
    story = [{"role": "user", "content": "Tell me a story."}]
    asked: dict[str, Any] = {"temperature": 1.0, "max_completion_tokens": 20, "n": 4}
    one = chat(client, story, seed=7, **asked)
    again = chat(client, story, seed=7, **asked)
    texts = [choice.message.content for choice in one.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) > 1
    assert [choice.index for choice in one.choices] == [0, 1, 2, 3]
    streamed = ["", "", "", ""]
    for chunk in chat(client, story, seed=7, stream=True, **asked):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts
    stopped = chat(client, SUM, stop=[" ="]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == ("12 + 30", "stop")
    cut = chat(client, SUM, max_completion_tokens=2).choices[0]
    assert (cut.message.content, cut.finish_reason) == ("12", "length")
    older = client.chat.completions.create(model="branchwise", messages=SUM, max_tokens=2, temperature=0)
    assert older.choices[0].message.content == "12"
    on = chat(client, SUM, max_completion_tokens=20, extra_body={"ignore_eos": True}).choices[0]
    assert on.finish_reason == "length"


def test_logit_bias_and_penalties_reach_the_sampler(shipped: Any, client: openai.OpenAI) -> None:
    [token] = shipped.http.post("/tokenize", json={"prompt": "4"}).json()["tokens"]
    assert "4" not in chat(client, SUM, logit_bias={str(token): -100}).choices[0].message.content
    body = {"top_k": 1, "min_p": 0.1, "repetition_penalty": 1.0}
    same = chat(client, SUM, temperature=1.0, frequency_penalty=0, presence_penalty=0, extra_body=body)
    assert same.choices[0].message.content == "12 + 30 = 42"


def test_logprobs(client: openai.OpenAI) -> None:
    reply = chat(client, SUM, logprobs=True, top_logprobs=3).choices[0]
    rows = reply.logprobs.content
    assert "".join(row.token for row in rows) == reply.message.content
    for row in rows:
        assert bytes(row.bytes).decode() == row.token
        assert row.logprob <= 0
        assert len(row.top_logprobs) == 3
        assert (row.top_logprobs[0].token, row.top_logprobs[0].logprob) == (row.token, row.logprob), "greedy"
    streamed = [
        row
        for chunk in chat(client, SUM, logprobs=True, top_logprobs=3, stream=True)
        for row in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert [row.token for row in streamed] == [row.token for row in rows]
    bare = chat(client, SUM, logprobs=True).choices[0].logprobs.content
    assert all(row.top_logprobs == [] for row in bare)


def test_token_ids_beside_the_message(shipped: Any) -> None:
    """vLLM's fields: the ids of prompt and output once, whole or streamed, in place of texts in logprobs too."""
    body = {"messages": FACT, "temperature": 0, "max_tokens": 6, "n": 2, "return_token_ids": True, "logprobs": True}
    body |= {"top_logprobs": 1, "return_tokens_as_token_ids": True}
    answer = shipped.http.post("/v1/chat/completions", json=body).json()
    prompt = shipped.http.post("/tokenize", json={"messages": FACT}).json()["tokens"]
    assert answer["prompt_token_ids"] == prompt
    ids = [choice["token_ids"] for choice in answer["choices"]]
    assert len(ids[0]) == answer["usage"]["completion_tokens"] // 2
    named = [[row["token"] for row in choice["logprobs"]["content"]] for choice in answer["choices"]]
    assert named == [[f"token_id:{id}" for id in each][: len(rows)] for each, rows in zip(ids, named, strict=True)]
    assert answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"][0]["token"] == f"token_id:{ids[0][0]}"
    with shipped.http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as stream:
        lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
    chunks = [json.loads(line) for line in lines if line != "[DONE]"]
    assert [chunk["prompt_token_ids"] for chunk in chunks] == [prompt] + [None] * (len(chunks) - 1)
    streamed: list[list[int]] = [[], []]
    for chunk in chunks:
        streamed[chunk["choices"][0]["index"]] += chunk["choices"][0].get("token_ids", [])
    assert streamed == ids
    plain = shipped.http.post("/v1/chat/completions", json={"messages": FACT, "max_tokens": 1}).json()
    assert "prompt_token_ids" not in plain and "token_ids" not in plain["choices"][0]


def test_a_message_is_continued(client: openai.OpenAI) -> None:
    begun = [*SUM, {"role": "assistant", "content": "12 + 30"}]
    body = {"continue_final_message": True}
    assert chat(client, begun, extra_body=body).choices[0].message.content == " = 42"
    with pytest.raises(openai.BadRequestError, match="add_generation_prompt"):
        chat(client, begun, extra_body={**body, "add_generation_prompt": True})
    with pytest.raises(openai.BadRequestError, match="role assistant"):
        chat(client, SUM, extra_body=body)


# -- tools -------------------------------------------------------------------------------------------------------------


def call_of(message: Any) -> tuple[str, str]:
    [call] = message.tool_calls
    assert call.type == "function"
    assert call.id.startswith("call_")
    return call.function.name, call.function.arguments


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "paint_legoax"}}])
def test_the_model_calls_a_tool(client: openai.OpenAI, choice: Any) -> None:
    reply = chat(client, PAINT, tools=TOOLS, tool_choice=choice).choices[0]
    assert call_of(reply.message) == ("paint_legoax", PAINTED)
    assert reply.finish_reason == "tool_calls"
    assert reply.message.content is None


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_calls_are_streamed_as_they_are_written(client: openai.OpenAI, choice: Any) -> None:
    chunks = list(chat(client, PAINT, tools=TOOLS, tool_choice=choice, stream=True))
    pieces = [chunk.choices[0].delta.tool_calls[0] for chunk in chunks if chunk.choices[0].delta.tool_calls]
    assert pieces[0].function.name == "paint_legoax"
    assert pieces[0].function.arguments == ""
    assert pieces[0].id and pieces[0].type == "function"
    assert {piece.index for piece in pieces} == {0}
    assert all(piece.id is None and piece.function.name is None for piece in pieces[1:])
    assert "".join(piece.function.arguments for piece in pieces) == PAINTED
    assert len(pieces) > 5
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert not any(chunk.choices[0].delta.content for chunk in chunks)


def test_a_named_tool_is_called_whatever_was_said(client: openai.OpenAI) -> None:
    choice: Any = {"type": "function", "function": {"name": "heeprer"}}
    name, arguments = call_of(chat(client, SUM, tools=TOOLS, tool_choice=choice).choices[0].message)
    assert name == "heeprer"
    assert isinstance(json.loads(arguments)["artist"], str)
    for temperature in (0.0, 1.5):
        reply = chat(client, SUM, tools=TOOLS, tool_choice="required", temperature=temperature, seed=1, n=4)
        for one in reply.choices:
            for call in one.message.tool_calls:
                assert call.function.name in ("heeprer", "paint_legoax")
                if one.finish_reason == "tool_calls":
                    assert isinstance(json.loads(call.function.arguments), dict)


def test_no_tool_is_called(client: openai.OpenAI) -> None:
    reply = chat(client, PAINT, tools=TOOLS, tool_choice="none").choices[0]
    assert reply.message.tool_calls is None
    assert reply.finish_reason in ("stop", "length")


def test_a_conversation_with_calls_goes_on(shipped: Any, client: openai.OpenAI) -> None:
    reply = chat(client, PAINT, tools=TOOLS)
    message = reply.choices[0].message
    shipped.idle()
    answered = [
        *PAINT,
        message.model_dump(),
        {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": '{"colour": "GW-725"}'},
    ]
    last = chat(client, answered, tools=TOOLS)
    assert "GW-725" in last.choices[0].message.content
    # The call was rendered as the very text the model wrote, so the model's own tokens are in the cache.
    cached = last.usage.prompt_tokens_details.cached_tokens
    assert cached >= reply.usage.prompt_tokens + reply.usage.completion_tokens - 1


def test_one_call_at_a_time(client: openai.OpenAI) -> None:
    both = [{"role": "user", "content": PAINT[0]["content"] + ". Please move the train: artist = jo, amount = 3"}]
    reply = chat(client, both, tools=TOOLS, parallel_tool_calls=False, tool_choice="required").choices[0]
    assert len(reply.message.tool_calls) == 1


# -- structured output and the package's helpers -----------------------------------------------------------------------


def test_parse(client: openai.OpenAI) -> None:
    reply = client.chat.completions.parse(
        model="branchwise", messages=WRITE, response_format=Person, temperature=0, max_tokens=100
    )
    assert reply.choices[0].message.parsed == Person(name="Bruno", age=31)
    tool = openai.pydantic_function_tool(Paint, name="paint_legoax", description="Paint the legoax.")
    called = client.chat.completions.parse(
        model="branchwise", messages=PAINT, tools=[tool], temperature=0, max_tokens=100
    )
    [call] = called.choices[0].message.tool_calls
    assert call.function.parsed_arguments == Paint(koayi=695, repeat=False)


def test_a_strict_tool_beside_an_answer_with_a_schema(client: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(Paint, name="paint_legoax", description="Paint the legoax.")
    called = client.chat.completions.parse(
        model="branchwise", messages=PAINT, tools=[tool], response_format=Person, temperature=0, max_tokens=100
    ).choices[0]
    assert called.message.tool_calls[0].function.parsed_arguments == Paint(koayi=695, repeat=False)
    said = chat(client, SUM, tools=[tool], tool_choice="none", response_format={"type": "json_object"}).choices[0]
    assert said.finish_reason == "length" or isinstance(json.loads(said.message.content), dict)


def test_stream_helper(client: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(Paint, name="paint_legoax", description="Paint the legoax.")
    with client.chat.completions.stream(model="branchwise", messages=PAINT, tools=[tool], temperature=0) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert kinds.count("tool_calls.function.arguments.done") == 1
    assert final.choices[0].message.tool_calls[0].function.parsed_arguments == Paint(koayi=695, repeat=False)
    with client.chat.completions.stream(model="branchwise", messages=SUM, temperature=0) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        assert "".join(deltas) == "12 + 30 = 42"
        assert stream.get_final_completion().choices[0].finish_reason == "stop"


async def test_async_client_with_many_at_once(shipped: Any) -> None:
    async with openai.AsyncOpenAI(base_url=f"{shipped.url}/v1", api_key="none", max_retries=0) as client:

        async def one(i: int) -> str:
            messages: Any = [{"role": "user", "content": f"What is {i} + 30?"}]
            if i % 2:
                reply = await client.chat.completions.create(model="branchwise", messages=messages, temperature=0)
                return reply.choices[0].message.content or ""
            stream = await client.chat.completions.create(
                model="branchwise", messages=messages, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        answers = await asyncio.gather(*(one(i) for i in range(11, 27)))
        right = sum(f"= {i + 30}" in answer for i, answer in enumerate(answers, 11))
        assert right >= 15
        parsed = await client.chat.completions.parse(
            model="branchwise", messages=WRITE, response_format=Person, temperature=0, max_tokens=100
        )
        assert parsed.choices[0].message.parsed == Person(name="Bruno", age=31)
        async with client.chat.completions.stream(model="branchwise", messages=SUM, temperature=0) as helper:
            assert (await helper.get_final_completion()).choices[0].message.content == "12 + 30 = 42"


def test_errors_are_the_packages_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=SUM)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        chat(client, [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}])
    assert bad.value.param == "messages[0].content[0].type"
    with pytest.raises(openai.BadRequestError) as deep:
        chat(client, SUM, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}})
    assert "response_format" in (deep.value.param or "")


def test_the_other_routes(shipped: Any) -> None:
    http = shipped.http
    info = http.get("/tokenizer_info").json()
    assert info["special_tokens"]["<|im_end|>"] == info["eos_token_id"]
    assert "im_start" in info["chat_template"]
    model = http.get("/get_model_info").json()
    assert model["is_generation"] is True
    assert model["has_chat_template"] is True
    assert set(http.get("/version").json()) == {"version"}
    tokens = http.post("/tokenize", json={"prompt": "What is 12?", "return_token_strs": True}).json()
    assert "".join(tokens["token_strs"]) == "What is 12?"
    assert tokens["max_model_len"] == shipped.info["max_model_len"]
    with_tools = http.post("/tokenize", json={"messages": PAINT, "tools": TOOLS}).json()
    assert with_tools["count"] > http.post("/tokenize", json={"messages": PAINT}).json()["count"] + 50
