"""The shipped model behind ``/v1/responses``, as the ``openai`` package sees it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from typing import Any

import openai
import pydantic
import pytest
from openai.types.responses import Response

from branchwise.runtime.config import EngineConfig, ServerConfig

PATH = "/v1/responses"
SUM = "What is 12 + 30?"
FACT = "Bruno lives in Milford. Bruno is 31 years old. How old is Bruno?"
WRITE = "Bruno is 31 years old. Write it as JSON."
PAINT = "I want you to paint the legoax: repeat = false, koayi = 695"
PAINTED = '{"koayi": 695, "repeat": false}'
TOOLS: list[Any] = [
    {
        "type": "function",
        "name": "paint_legoax",
        "description": "Paint the legoax.",
        "parameters": {
            "type": "object",
            "properties": {"koayi": {"type": "integer"}, "repeat": {"type": "boolean"}},
            "required": ["koayi", "repeat"],
        },
        "strict": False,
    },
    {
        "type": "function",
        "name": "heeprer",
        "description": "Move the train.",
        "parameters": {
            "type": "object",
            "properties": {"amount": {"type": "integer"}, "artist": {"type": "string"}},
            "required": ["artist"],
        },
        "strict": False,
    },
]
LOGPROBS: Any = ["message.output_text.logprobs"]


class Paint(pydantic.BaseModel):
    koayi: int
    repeat: bool


class Person(pydantic.BaseModel):
    name: str
    age: int


def respond(client: openai.OpenAI, input: Any, **more: Any) -> Any:
    more = {"temperature": 0, "max_output_tokens": 100, **more}
    return client.responses.create(model="branchwise", input=input, **more)


def test_a_response_has_every_field(client: openai.OpenAI) -> None:
    reply = respond(client, SUM, instructions="You are Twig.", metadata={"a": "b"}, store=True)
    assert isinstance(reply, Response)
    assert reply.output_text == "12 + 30 = 42"
    assert reply.id.startswith("resp_")
    assert (reply.object, reply.status, reply.model) == ("response", "completed", "branchwise")
    assert (reply.error, reply.incomplete_details, reply.instructions) == (None, None, "You are Twig.")
    assert reply.metadata == {"a": "b"}
    assert reply.completed_at is not None and reply.completed_at >= reply.created_at
    [item] = reply.output
    assert (item.type, item.role, item.status) == ("message", "assistant", "completed")
    [part] = item.content
    assert (part.type, part.annotations, part.logprobs) == ("output_text", [], [])
    usage = reply.usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    details = usage.input_tokens_details
    assert details.cached_tokens + details.cache_write_tokens == usage.input_tokens
    assert usage.output_tokens_details.reasoning_tokens == 0
    assert set(Response.model_fields) <= set(reply.model_dump(exclude_unset=True))
    assert reply.model_extra["store"] is False


def test_a_response_is_what_a_chat_says(shipped: Any, client: openai.OpenAI) -> None:
    """The same prompt, token for token, whichever way it is asked for."""
    system, user, thanks = "You are Twig.", FACT, "Thank you."
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": system}]},
        {"type": "message", "role": "user", "content": user},
        {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": "31."},
        {"role": "user", "content": [{"type": "input_text", "text": thanks}]},
    ]
    chat = client.chat.completions.create(
        model="branchwise",
        messages=[
            {"role": "system", "content": system},
            {"role": "user", "content": user},
            {"role": "assistant", "content": "31."},
            {"role": "user", "content": thanks},
        ],
        temperature=0,
        max_tokens=100,
    )
    for reply in (respond(client, items), respond(client, items[1:], instructions=system)):
        assert reply.usage.input_tokens == chat.usage.prompt_tokens
        assert reply.usage.input_tokens_details.cached_tokens == chat.usage.prompt_tokens - 1
        assert reply.output_text == chat.choices[0].message.content


def test_a_turn_reuses_all_turns_before_it(shipped: Any, client: openai.OpenAI) -> None:
    shipped.empty_cache()
    first = respond(client, FACT)
    shipped.idle()
    asked = [{"role": "user", "content": FACT}, *first.output, {"role": "user", "content": "And where does he live?"}]
    raw = client.responses.with_raw_response.create(
        model="branchwise", input=asked, temperature=0, extra_headers={"x-branchwise-cache": "1"}
    )
    second = raw.parse()
    cached = second.usage.input_tokens_details.cached_tokens
    assert cached >= first.usage.input_tokens + first.usage.output_tokens - 1
    assert raw.headers["x-branchwise-cache"].startswith(f"{cached};prompt={second.usage.input_tokens};reason=")


def test_the_cache_is_told_what_to_keep_and_for_whom(shipped: Any, client: openai.OpenAI) -> None:
    part = {"type": "input_text", "text": FACT}
    for kept in ({"prompt_cache_breakpoint": {"mode": "explicit"}}, {"cache_control": {"type": "ephemeral"}}):
        shipped.empty_cache()
        respond(client, [{"role": "user", "content": [{**part, **kept}]}], max_output_tokens=1)
        assert shipped.http.get("/cache/stats").json()["pins"]["count"] == 1
        assert shipped.http.post("/flush_cache").json()["unpinned"] == 1
    respond(client, FACT, max_output_tokens=1, prompt_cache_options={"ttl": "30m"})
    assert shipped.http.post("/flush_cache").json()["unpinned"] == 1
    for mine, other in (({"prompt_cache_key": "a"}, {"prompt_cache_key": "b"}), ({"cache_salt": "a"}, {})):
        first, again, others = (
            respond(client, FACT, extra_body=body).usage.input_tokens_details.cached_tokens
            for body in (mine, mine, other)
        )
        assert (first, others) == (0, 0)
        assert again > 20


# -- streams -----------------------------------------------------------------------------------------------------------


def test_token_ids_are_in_the_response_that_has_ended(shipped: Any) -> None:
    body: dict[str, Any] = {"input": "What is 12 + 30?", "temperature": 0, "max_output_tokens": 5}
    body |= {"return_token_ids": True, "return_tokens_as_token_ids": True, "include": LOGPROBS}
    whole = shipped.http.post("/v1/responses", json=body).json()
    prompt = {"messages": [{"role": "user", "content": body["input"]}]}
    assert whole["prompt_token_ids"] == shipped.http.post("/tokenize", json=prompt).json()["tokens"]
    [item] = whole["output"]
    assert [row["token"] for row in item["content"][0]["logprobs"]] == [f"token_id:{id}" for id in whole["token_ids"]]
    with shipped.http.stream("POST", "/v1/responses", json={**body, "stream": True}) as stream:
        events = [json.loads(line.removeprefix("data: ")) for line in stream.iter_lines() if line.startswith("data: ")]
    assert events[-1]["response"]["token_ids"] == whole["token_ids"]


def test_streams_add_up(client: openai.OpenAI) -> None:
    whole = respond(client, FACT)
    events = list(respond(client, FACT, stream=True, stream_options={"include_obfuscation": False}))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [events[0].type, events[1].type, events[-1].type] == [
        "response.created",
        "response.in_progress",
        "response.completed",
    ]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    assert len(deltas) > 2
    last = events[-1].response
    assert last.usage.output_tokens == whole.usage.output_tokens
    assert last.output[0].content == whole.output[0].content
    assert events[0].response.usage is None
    assert len({event.response.id for event in events if hasattr(event, "response")}) == 1


def test_the_wire_has_event_lines_and_no_done(shipped: Any) -> None:
    text = shipped.http.post(PATH, json={"input": SUM, "temperature": 0, "stream": True}).text
    assert "[DONE]" not in text
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"


def test_stream_helper(client: openai.OpenAI) -> None:
    with client.responses.stream(model="branchwise", input=SUM, temperature=0) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert snapshots[-1] == final.output_text == "12 + 30 = 42"
    tool = openai.pydantic_function_tool(Paint, name="paint_legoax", description="Paint the legoax.")
    function: Any = {"type": "function", **tool["function"]}
    with client.responses.stream(model="branchwise", input=PAINT, tools=[function], temperature=0) as stream:
        kinds = [event.type for event in stream]
        called = stream.get_final_response().output[0]
    assert kinds.count("response.function_call_arguments.done") == 1
    assert kinds.count("response.function_call_arguments.delta") >= 5
    assert called.type == "function_call"
    assert called.parsed_arguments == {"koayi": 695, "repeat": False}
    with client.responses.stream(model="branchwise", input=WRITE, text_format=Person, temperature=0) as stream:
        stream.until_done()
        assert stream.get_final_response().output_parsed == Person(name="Bruno", age=31)


# -- sampling and logprobs ---------------------------------------------------------------------------------------------


def test_lengths_stops_and_seeds(client: openai.OpenAI) -> None:
    cut = respond(client, SUM, max_output_tokens=2)
    assert (cut.output_text, cut.status, cut.incomplete_details.reason) == ("12", "incomplete", "max_output_tokens")
    assert cut.output[0].status == "incomplete"
    assert cut.completed_at is None
    events = list(respond(client, SUM, max_output_tokens=2, stream=True))
    assert events[-1].type == "response.incomplete"
    nothing = respond(client, SUM, max_output_tokens=0)
    assert (nothing.output, nothing.status) == ([], "incomplete")
    stopped = respond(client, SUM, extra_body={"stop": [" ="]})
    assert (stopped.output_text, stopped.status) == ("12 + 30", "completed")
    asked: dict[str, Any] = {"temperature": 1.0, "max_output_tokens": 20}
    seven, again, eight = (
        respond(client, "Tell me a story.", extra_body={"seed": seed}, **asked).output_text for seed in (7, 7, 8)
    )
    assert seven == again != eight
    narrow = respond(client, SUM, temperature=1.0, top_p=0.01, extra_body={"top_k": 1, "min_p": 0.1})
    assert narrow.output_text == "12 + 30 = 42"
    begun = [{"role": "user", "content": SUM}, {"role": "assistant", "content": "12 + 30"}]
    assert respond(client, begun, extra_body={"continue_final_message": True}).output_text == " = 42"


def test_logprobs(client: openai.OpenAI) -> None:
    reply = respond(client, SUM, include=LOGPROBS, top_logprobs=3)
    assert reply.top_logprobs == 3
    rows = reply.output[0].content[0].logprobs
    assert "".join(row.token for row in rows) == reply.output_text
    for row in rows:
        assert bytes(row.bytes).decode() == row.token
        assert len(row.top_logprobs) == 3
        assert (row.top_logprobs[0].token, row.top_logprobs[0].logprob) == (row.token, row.logprob), "greedy"
    events = list(respond(client, SUM, include=LOGPROBS, top_logprobs=3, stream=True))
    streamed = [row.token for event in events if event.type == "response.output_text.delta" for row in event.logprobs]
    assert streamed == [row.token for row in rows]
    bare = respond(client, SUM, include=LOGPROBS).output[0].content[0].logprobs
    assert all(row.top_logprobs == [] for row in bare)


# -- tools and structured output ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "name": "paint_legoax"}])
def test_the_model_calls_a_function(client: openai.OpenAI, choice: Any) -> None:
    reply = respond(client, PAINT, tools=TOOLS, tool_choice=choice)
    [call] = reply.output
    assert (call.type, call.name, call.arguments, call.status) == (
        "function_call",
        "paint_legoax",
        PAINTED,
        "completed",
    )
    assert call.call_id.startswith("call_")
    assert reply.output_text == ""
    assert reply.status == "completed"
    assert reply.tool_choice == choice or reply.tool_choice.name == "paint_legoax"
    events = list(respond(client, PAINT, tools=TOOLS, tool_choice=choice, stream=True))
    deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == PAINTED
    assert len(deltas) >= 5
    assert not any(event.type == "response.output_text.delta" for event in events)


def test_a_function_is_called_and_answered(shipped: Any, client: openai.OpenAI) -> None:
    reply = respond(client, PAINT, tools=TOOLS)
    shipped.idle()
    conversation: list[Any] = [{"role": "user", "content": PAINT}, *reply.output]
    result = {"type": "function_call_output", "call_id": reply.output[0].call_id, "output": '{"colour": "GW-725"}'}
    last = respond(client, [*conversation, result], tools=TOOLS)
    assert "GW-725" in last.output_text
    # The call was rendered as the very text the model wrote, so the model's own tokens are in the cache.
    cached = last.usage.input_tokens_details.cached_tokens
    assert cached >= reply.usage.input_tokens + reply.usage.output_tokens - 1
    parts = {**result, "output": [{"type": "input_text", "text": '{"colour": "GW-725"}'}]}
    assert respond(client, [*conversation, parts], tools=TOOLS).output_text == last.output_text


def test_named_none_and_one_at_a_time(client: openai.OpenAI) -> None:
    [named] = respond(client, SUM, tools=TOOLS, tool_choice={"type": "function", "name": "heeprer"}).output
    assert named.name == "heeprer"
    assert isinstance(json.loads(named.arguments)["artist"], str)
    assert [item.type for item in respond(client, PAINT, tools=TOOLS, tool_choice="none").output] == ["message"]
    both = f"{PAINT}. Please move the train: artist = jo, amount = 3"
    one = respond(client, both, tools=TOOLS, parallel_tool_calls=False, tool_choice="required")
    assert [item.type for item in one.output] == ["function_call"]


def test_parse(client: openai.OpenAI) -> None:
    reply = client.responses.parse(
        model="branchwise", input=WRITE, text_format=Person, temperature=0, max_output_tokens=100
    )
    assert reply.output_parsed == Person(name="Bruno", age=31)
    assert reply.text is not None and reply.text.format is not None
    assert reply.text.format.type == "json_schema"
    function: Any = {
        "type": "function",
        **openai.pydantic_function_tool(Paint, name="paint_legoax", description="Paint the legoax.")["function"],
    }
    called = client.responses.parse(model="branchwise", input=PAINT, tools=[function], temperature=0).output[0]
    assert called.type == "function_call"
    assert called.parsed_arguments == {"koayi": 695, "repeat": False}
    beside = client.responses.parse(
        model="branchwise", input=PAINT, tools=[function], text_format=Person, temperature=0
    ).output[0]
    assert beside.type == "function_call"


def test_constraints_in_every_dialect(client: openai.OpenAI) -> None:
    any_object = respond(client, WRITE, text={"format": {"type": "json_object"}})
    assert any_object.output_text.startswith("{")
    assert any_object.status == "incomplete" or json.loads(any_object.output_text)
    for body in (
        {"regex": "[a-c]{3}"},
        {"structured_outputs": {"regex": "[a-c]{3}"}},
        {"structured_outputs": {"regex": "[a-c]{3}"}},
        {"ebnf": "root ::= [a-c] [a-c] [a-c]"},
    ):
        text = respond(client, SUM, extra_body=body).output_text
        assert len(text) == 3 and set(text) <= set("abc"), (body, text)
    assert respond(client, SUM, extra_body={"structured_outputs": {"choice": ["yes", "no"]}}).output_text in (
        "yes",
        "no",
    )


# -- many, failing, not there ------------------------------------------------------------------------------------------


async def test_async_client_with_many_at_once(shipped: Any) -> None:
    async with openai.AsyncOpenAI(base_url=f"{shipped.url}/v1", api_key="none", max_retries=0) as client:

        async def one(i: int) -> str:
            asked: Any = {"model": "branchwise", "input": f"What is {i} + 30?", "temperature": 0}
            if i % 2:
                return (await client.responses.create(**asked)).output_text
            stream = await client.responses.create(**asked, stream=True)
            return "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])

        answers = await asyncio.gather(*(one(i) for i in range(11, 27)))
        assert sum(f"= {i + 30}" in answer for i, answer in enumerate(answers, 11)) >= 15
        parsed = await client.responses.parse(model="branchwise", input=WRITE, text_format=Person, temperature=0)
        assert parsed.output_parsed == Person(name="Bruno", age=31)
        async with client.responses.stream(model="branchwise", input=SUM, temperature=0) as helper:
            assert (await helper.get_final_response()).output_text == "12 + 30 = 42"


def test_errors_are_the_packages_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.responses.create(model="other", input=SUM)
    assert missing.value.code == "model_not_found"
    for field, fields in {
        "input[1].content[0].type": {
            "input": [{"role": "user", "content": "x"}, {"role": "user", "content": [{"type": "input_image"}]}]
        },
        "previous_response_id": {"previous_response_id": "resp_1"},
        "tools[0].type": {"tools": [{**TOOLS[0], "type": "functions"}]},
        "tools[1].name": {"tools": [TOOLS[0], {"type": "function", "name": "a b", "parameters": {}, "strict": False}]},
        "tools[0].parameters.type": {"tools": [{**TOOLS[0], "strict": True, "parameters": {"type": "array"}}]},
        "tool_choice": {"tools": TOOLS, "tool_choice": {"type": "function", "name": "g"}},
    }.items():
        with pytest.raises(openai.BadRequestError) as bad:
            respond(client, **{"input": SUM, **fields})
        assert bad.value.param == field
        assert field in bad.value.message
    # What only the engine finds out: a schema that cannot be compiled, a prompt that does not fit.
    schema = {"type": "json_schema", "name": "x", "schema": {"not": {}}}
    for field, fields in {
        "text.format": {"text": {"format": schema}},
        "tools[0].parameters": {"tools": [{**TOOLS[0], "strict": True, "parameters": {"type": "object", "not": {}}}]},
        "input": {"input": "word " * 60_000},
        "max_output_tokens": {"max_output_tokens": 1_000_000},
    }.items():
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError) as bad:
                respond(client, **{"input": SUM, "stream": stream, **fields})
            assert bad.value.param == field
            assert field in bad.value.message
            assert not {"messages", "response_format", "max_tokens"} & set(bad.value.message.split())


def test_nothing_is_stored(shipped: Any, client: openai.OpenAI) -> None:
    id = respond(client, SUM, store=True).id
    for ask in (
        lambda: client.responses.retrieve(id),
        lambda: client.responses.delete(id),
        lambda: client.responses.cancel(id),
        lambda: client.responses.input_items.list(id),
    ):
        with pytest.raises(openai.NotFoundError, match="stores no responses"):
            ask()
    assert shipped.http.get(PATH).status_code == 405
    with pytest.raises(openai.NotFoundError, match="nothing compacts"):
        client.responses.compact(model="branchwise", input="Hello")


def test_input_tokens_are_those_of_the_response(client: openai.OpenAI) -> None:
    asked: Any = {"input": PAINT, "instructions": "Be brief.", "tools": TOOLS}
    counted = client.responses.input_tokens.count(model="branchwise", **asked)
    assert counted.object == "response.input_tokens"
    assert counted.input_tokens == respond(client, **asked).usage.input_tokens


def test_a_forced_call_leaves_the_format_aside(client: openai.OpenAI) -> None:
    """instructor's RESPONSES_TOOLS sends both with every request."""
    form: Any = {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": True}}
    for choice in ("required", {"type": "function", "name": "paint_legoax"}):
        [call] = respond(client, PAINT, tools=TOOLS, tool_choice=choice, text=form).output
        assert (call.type, call.name) == ("function_call", "paint_legoax")


def test_allowed_tools_restrict_calls_and_keep_the_prompt(client: openai.OpenAI) -> None:
    allowed: Any = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "heeprer"}]}
    reply = respond(client, PAINT, tools=TOOLS, tool_choice=allowed)
    assert {item.name for item in reply.output} == {"heeprer"}
    assert reply.usage.input_tokens == respond(client, PAINT, tools=TOOLS).usage.input_tokens


def test_tools_of_other_kinds_are_left_out_and_named_in_a_header(client: openai.OpenAI) -> None:
    """What Codex sends: a namespace, a tool that runs on OpenAI's servers, and custom tools."""
    painter, mover = TOOLS
    tools: Any = [
        {"type": "namespace", "name": "house", "description": "Paint.", "tools": [painter]},
        {"type": "web_search", "external_web_access": False},
        {"type": "custom", "name": "apply_patch", "description": "Patch."},
        mover,
    ]
    asked: Any = {"input": PAINT, "tools": tools, "temperature": 0, "max_output_tokens": 100, "model": "branchwise"}
    raw = client.responses.with_raw_response.create(**asked)
    assert raw.headers["x-branchwise-tools-left-out"] == "tools[1] web_search"
    named: Any = {"type": "function", "name": "paint_legoax", "namespace": "house"}
    [call] = client.responses.create(**asked, tool_choice=named).output
    assert call.type == "function_call"
    assert (call.name, call.namespace, call.arguments) == ("paint_legoax", "house", PAINTED)
    [patch] = client.responses.create(**asked, tool_choice={"type": "custom", "name": "apply_patch"}).output
    assert patch.type == "custom_tool_call" and isinstance(patch.input, str)
    history: Any = [
        {"role": "user", "content": PAINT},
        call,
        {"type": "function_call_output", "call_id": call.call_id, "output": '{"colour": "GW-725"}'},
        patch,
        {"type": "custom_tool_call_output", "call_id": patch.call_id, "output": "ok"},
    ]
    assert client.responses.create(**{**asked, "input": history}).status in ("completed", "incomplete")


def test_the_schema_has_the_route(shipped: Any) -> None:
    paths = shipped.http.get("/openapi.json").json()["paths"]
    assert "requestBody" in paths[PATH]["post"]
    below = [path for path in paths if path.startswith(f"{PATH}/")]
    assert below == [f"{PATH}/input_tokens"], "routes that only refuse are hidden"


def test_an_aborted_response_is_cancelled(shipped: Any) -> None:
    body = {"input": "Tell me a story.", "stream": True, "ignore_eos": True, "max_output_tokens": 3000}
    with shipped.http.stream("POST", PATH, json=body) as response:
        lines = response.iter_lines()
        next(lines)
        shipped.http.post("/abort_request", json={"abort_all": True}).raise_for_status()
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert (events[-1]["type"], events[-1]["response"]["status"]) == ("response.incomplete", "cancelled")


def test_a_stream_that_fails_midway_says_so(start_server: Any) -> None:
    server = start_server()
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        model = server.http.get("/v1/models").json()["data"][0]["id"]
        stream = client.responses.create(model=model, input="go on", max_output_tokens=25_000, stream=True)
        events = [next(stream) for _ in range(6)]
        os.kill(server.pids["scheduler"], signal.SIGKILL)
        events += list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last = events[-1]
    assert last.type == "response.failed"
    assert last.response.status == "failed"
    assert last.response.error.code == "server_error"
    assert "scheduler" in last.response.error.message
    told = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert last.response.output[0].status == "incomplete"
    assert last.response.output_text == told
    assert server.process.wait(60) == 1


def test_thinking_is_an_item_of_its_own(start_server: Any) -> None:
    """Whole and streamed, counted alike. The shipped model does not think, but can be made to write as if it did."""
    engine = EngineConfig(kv_cache_tokens=4096, check_when_idle=True)
    server = start_server(ServerConfig(engine=engine, port=0, reasoning_parser="think"))
    asked: Any = {"include": LOGPROBS, "extra_body": {"regex": "<think>(hm ){20}</think>It is 4[0-9]\\."}}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        whole = respond(client, SUM, **asked)
        events = list(respond(client, SUM, stream=True, **asked))
        asked["extra_body"]["separate_reasoning"] = False
        together = respond(client, SUM, **asked)
        back = [{"role": "user", "content": SUM}, *whole.output, {"role": "user", "content": "Sure?"}]
        assert respond(client, back, max_output_tokens=2).usage.input_tokens > whole.usage.input_tokens
    thought, said = whole.output
    assert (thought.type, thought.summary, thought.status) == ("reasoning", [], "completed")
    assert thought.content[0].text == "hm " * 20
    assert whole.output_text.startswith("It is 4")
    assert "".join(row.token for row in said.content[0].logprobs) == whole.output_text
    counted = whole.usage.output_tokens_details.reasoning_tokens
    assert 20 <= counted < whole.usage.output_tokens - 5
    deltas = [event.delta for event in events if event.type == "response.reasoning_text.delta"]
    assert "".join(deltas) == "hm " * 20
    assert len(deltas) >= 5
    last = events[-1].response
    assert last.usage.output_tokens_details.reasoning_tokens == counted
    assert [item.type for item in last.output] == ["reasoning", "message"]
    assert last.output_text == whole.output_text
    assert together.output_text == f"<think>{'hm ' * 20}</think>{whole.output_text}"
    assert server.stop() == 0
