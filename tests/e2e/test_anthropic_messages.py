"""The shipped model behind ``/v1/messages``, as the ``anthropic`` package sees it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from typing import Any

import anthropic
import pydantic
import pytest

from branchwise.runtime.config import EngineConfig, ServerConfig

SUM: Any = [{"role": "user", "content": "What is 12 + 30?"}]
FACT: Any = [{"role": "user", "content": "Bruno lives in Milford. Bruno is 31 years old. How old is Bruno?"}]
WRITE: Any = [{"role": "user", "content": "Bruno is 31 years old. Write it as JSON."}]
PAINT: Any = [{"role": "user", "content": "I want you to paint the legoax: repeat = false, koayi = 695"}]
PAINT_TOOL: Any = {
    "name": "paint_legoax",
    "description": "Paint the legoax.",
    "input_schema": {
        "type": "object",
        "properties": {"koayi": {"type": "integer"}, "repeat": {"type": "boolean"}},
        "required": ["koayi", "repeat"],
    },
}
TRAIN_TOOL: Any = {
    "name": "heeprer",
    "description": "Move the train.",
    "input_schema": {
        "type": "object",
        "properties": {"amount": {"type": "integer"}, "artist": {"type": "string"}},
        "required": ["artist"],
    },
}
TOOLS: Any = [PAINT_TOOL, TRAIN_TOOL]
PAINTED = {"koayi": 695, "repeat": False}
PERSON: Any = {
    "type": "json_schema",
    "schema": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
}
MARK: Any = {"cache_control": {"type": "ephemeral"}}


class Person(pydantic.BaseModel):
    name: str
    age: int


@pytest.fixture(scope="module")
def shipped(run_server_process: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    engine = EngineConfig(kv_cache_tokens=40_000, check_when_idle=True)
    with run_server_process(ServerConfig(engine=engine, port=0), tmp_path_factory.mktemp("shipped")) as server:
        yield server
        server.empty_cache()  # what breakpoints keep is not idle


@pytest.fixture(scope="module")
def client(shipped: Any) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=shipped.url, api_key="none", max_retries=0) as client:
        yield client


def asked(messages: Any, temperature: float = 0, seed: int | None = None, **more: Any) -> dict[str, Any]:
    """The package knows neither a temperature nor a seed."""
    body = {"temperature": temperature, "seed": seed, **more.pop("extra_body", {})}
    return {"model": "branchwise", "max_tokens": 100, "messages": messages, "extra_body": body, **more}


def ask(client: anthropic.Anthropic, messages: Any, **more: Any) -> anthropic.types.Message:
    message = client.messages.create(**asked(messages, **more))
    assert isinstance(message, anthropic.types.Message)
    return message


def text_of(message: Any) -> str:
    [block] = message.content
    assert block.type == "text"
    return block.text


def use_of(message: Any) -> Any:
    [block] = message.content
    assert block.type == "tool_use"
    return block


def prompt_tokens(usage: Any) -> int:
    return usage.input_tokens + usage.cache_creation_input_tokens + usage.cache_read_input_tokens


def test_models(client: anthropic.Anthropic) -> None:
    [model] = client.models.list()
    assert (model.id, model.type, model.display_name) == ("branchwise", "model", "branchwise")
    assert model.created_at.tzinfo is not None
    assert client.models.retrieve("branchwise") == model


def test_an_answer_has_every_field(client: anthropic.Anthropic) -> None:
    message = ask(client, SUM, system="You are Twig.")
    assert message.id.startswith("msg_")
    assert (message.type, message.role, message.model) == ("message", "assistant", "branchwise")
    assert text_of(message) == "12 + 30 = 42"
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert message.usage.service_tier == "standard"
    assert message.usage.output_tokens == 9
    assert message.usage.output_tokens_details is not None
    assert message.usage.output_tokens_details.thinking_tokens == 0
    assert message._request_id is not None
    assert message._request_id.startswith("req_")


def test_max_tokens_beyond_the_context_is_what_the_context_leaves(shipped: Any) -> None:
    """Anthropic's clients send 16,384 or 32,000 whatever the model is."""
    body = {"messages": SUM, "max_tokens": 32_000, "temperature": 0}
    answer = shipped.http.post("/v1/messages", json=body).json()
    assert (answer["stop_reason"], answer["content"][0]["text"]) == ("end_turn", "12 + 30 = 42")
    assert shipped.http.post("/v1/messages", json={**body, "max_tokens": 2**64}).json()["content"] == answer["content"]
    full = {"role": "user", "content": "word " * 60_000}
    refused = shipped.http.post("/v1/messages", json={**body, "messages": [full]})
    assert refused.status_code == 400 and refused.json()["error"]["message"].startswith("messages")


def test_claude_codes_billing_header_does_not_end_reuse(client: anthropic.Anthropic) -> None:
    """It is the first system block and has another hash in every request."""
    system = [{"type": "text", "text": "You are Twig, who answers briefly and says what is so."}]
    usages = []
    for digest in ("0f3a9", "77b1c"):
        header = {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1.197; cch={digest};"}
        usages.append(ask(client, SUM, system=[header, *system]).usage)
    assert prompt_tokens(usages[0]) == prompt_tokens(usages[1]) == prompt_tokens(ask(client, SUM, system=system).usage)
    assert usages[1].cache_read_input_tokens >= prompt_tokens(usages[1]) - 1


def test_tools_that_run_on_anthropics_servers_are_left_out(shipped: Any) -> None:
    search = {"type": "web_search_20250305", "name": "web_search", "max_uses": 3}
    body = {"messages": PAINT, "max_tokens": 100, "temperature": 0, "tools": [search, PAINT_TOOL]}
    for stream in (False, True):
        answer = shipped.http.post("/v1/messages", json={**body, "stream": stream})
        assert answer.headers["x-branchwise-tools-left-out"] == "tools[0] web_search_20250305"
        assert "paint_legoax" in answer.text
    shown = {**PAINT_TOOL, "input_examples": [PAINTED], "defer_loading": True}
    counts = [
        shipped.http.post("/v1/messages/count_tokens", json={"messages": PAINT, "tools": [tool]}).json()
        for tool in (PAINT_TOOL, shown)
    ]
    assert counts[1]["input_tokens"] > counts[0]["input_tokens"], "the example is in the description"


def test_the_prompt_is_that_of_the_chat_route(shipped: Any, client: anthropic.Anthropic) -> None:
    """Token for token: the cache of one serves the other, and counting says how many there are."""
    blocks: Any = [{"type": "text", "text": "You are"}, {"type": "text", "text": "Twig."}]
    turns: Any = [*FACT, {"role": "assistant", "content": "31."}, {"role": "user", "content": "Thank you."}]
    shipped.empty_cache()
    message = ask(client, turns, system=blocks, tools=TOOLS)
    tools = [
        {
            "type": "function",
            "function": {
                key: tool[name] for key, name in zip(("name", "description", "parameters"), tool, strict=True)
            },
        }
        for tool in TOOLS
    ]
    body = {"messages": [{"role": "system", "content": blocks}, *turns], "tools": tools}
    reply = shipped.http.post(
        "/v1/chat/completions", json={**body, "temperature": 0, "max_completion_tokens": 100}
    ).json()
    total = reply["usage"]["prompt_tokens"]
    assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == total - 1
    assert reply["choices"][0]["message"]["content"] == text_of(message)
    assert prompt_tokens(message.usage) == total
    counted = client.messages.count_tokens(model="branchwise", messages=turns, system=blocks, tools=TOOLS)
    assert counted.input_tokens == total == shipped.http.post("/tokenize", json=body).json()["count"]
    hidden: Any = {"type": "none"}
    fewer = client.messages.count_tokens(
        model="branchwise", messages=turns, system=blocks, tools=TOOLS, tool_choice=hidden
    )
    assert fewer.input_tokens == prompt_tokens(ask(client, turns, system=blocks, tools=TOOLS, tool_choice=hidden).usage)
    assert fewer.input_tokens < total


def test_streams_add_up(client: anthropic.Anthropic) -> None:
    whole = ask(client, FACT)
    with client.messages.stream(**asked(FACT)) as stream:
        assert "".join(stream.text_stream) == text_of(whole)
        final = stream.get_final_message()
    assert text_of(final) == text_of(whole)
    assert final.stop_reason == whole.stop_reason
    assert final.usage == ask(client, FACT).usage, "both of them find all but the last token in the cache"
    events = list(client.messages.create(**asked(FACT), stream=True))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert len(kinds) > 6


def test_stops_and_bounds(client: anthropic.Anthropic) -> None:
    stopped = ask(client, SUM, stop_sequences=["7", " ="])
    assert (text_of(stopped), stopped.stop_reason, stopped.stop_sequence) == ("12 + 30", "stop_sequence", " =")
    cut = ask(client, SUM, max_tokens=2)
    assert (text_of(cut), cut.stop_reason) == ("12", "max_tokens")
    warmed = ask(client, FACT, max_tokens=0)
    assert (warmed.content, warmed.stop_reason, warmed.usage.output_tokens) == ([], "max_tokens", 0)
    story: Any = [{"role": "user", "content": "Tell me a story."}]
    one = text_of(ask(client, story, temperature=1, seed=7, max_tokens=20))
    assert one == text_of(ask(client, story, temperature=1, seed=7, max_tokens=20))
    assert one != text_of(ask(client, story, temperature=1, seed=8, max_tokens=20))
    same = ask(client, SUM, temperature=1, extra_body={"top_k": 1, "top_p": 0.9, "min_p": 0.1})
    assert text_of(same) == "12 + 30 = 42"


def test_the_last_message_is_gone_on_with(client: anthropic.Anthropic) -> None:
    begun = [*SUM, {"role": "assistant", "content": "12 + 30"}]
    assert text_of(ask(client, begun)) == " = 42"
    assert text_of(ask(client, [*SUM, {"role": "assistant", "content": ""}])) == "12 + 30 = 42"


def test_what_this_model_does_not_have_changes_nothing(client: anthropic.Anthropic) -> None:
    for thinking in ({"type": "adaptive"}, {"type": "disabled"}, {"type": "enabled", "budget_tokens": 50}):
        assert text_of(ask(client, SUM, thinking=thinking)) == "12 + 30 = 42"
    more: Any = {"metadata": {"user_id": "me"}, "service_tier": "auto", "output_config": {"effort": "low"}}
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "one,two"}
    assert text_of(ask(client, SUM, extra_headers=headers, **more)) == "12 + 30 = 42"
    beta = client.beta.messages.create(**asked(SUM), betas=["context-management-2025-06-27"])
    assert text_of(beta) == "12 + 30 = 42"


async def test_async_client_with_many_at_once(shipped: Any) -> None:
    async with anthropic.AsyncAnthropic(base_url=shipped.url, api_key="none", max_retries=0) as client:

        async def one(i: int) -> str:
            messages: Any = [{"role": "user", "content": f"What is {i} + 30?"}]
            if i % 2:
                return text_of(await client.messages.create(**asked(messages)))
            async with client.messages.stream(**asked(messages)) as stream:
                return "".join([piece async for piece in stream.text_stream])

        answers = await asyncio.gather(*(one(i) for i in range(11, 27)))
        assert sum(f"= {i + 30}" in answer for i, answer in enumerate(answers, 11)) >= 15
        counted = await client.messages.count_tokens(model="branchwise", messages=SUM)
        assert counted.input_tokens == prompt_tokens((await client.messages.create(**asked(SUM))).usage)


# -- tools -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", [{"type": "auto"}, {"type": "any"}, {"type": "tool", "name": "paint_legoax"}])
def test_the_model_uses_a_tool(client: anthropic.Anthropic, choice: Any) -> None:
    message = ask(client, PAINT, tools=TOOLS, tool_choice=choice)
    use = use_of(message)
    assert (use.name, use.input) == ("paint_legoax", PAINTED)
    assert use.id.startswith("toolu_")
    assert message.stop_reason == "tool_use"
    with client.messages.stream(**asked(PAINT, tools=TOOLS, tool_choice=choice)) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    assert "".join(pieces) == '{"koayi": 695, "repeat": false}'
    assert len(pieces) > 3  # those that the grammar left no choice about come together
    assert (use_of(final).input, final.stop_reason) == (PAINTED, "tool_use")


def test_a_conversation_with_tools_goes_on(shipped: Any, client: anthropic.Anthropic) -> None:
    """The input is written as the model wrote it, so its own tokens are found in the cache."""
    first = ask(client, PAINT, tools=TOOLS)
    shipped.idle()
    result: Any = {"type": "tool_result", "tool_use_id": use_of(first).id, "content": '{"colour": "GW-725"}'}
    turns = [*PAINT, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    last = ask(client, turns, tools=TOOLS)
    assert "GW-725" in text_of(last)
    assert last.usage.cache_read_input_tokens is not None
    assert last.usage.cache_read_input_tokens >= prompt_tokens(first.usage) + first.usage.output_tokens - 1


def test_the_packages_tool_runner_sends_whole_conversations(shipped: Any, client: anthropic.Anthropic) -> None:
    """It asks for a conversation that the server holds first: told that there is none, it sends all the messages."""
    painted: list[dict[str, Any]] = []

    @anthropic.beta_tool(name="paint_legoax", description="Paint the legoax.", input_schema=PAINT_TOOL["input_schema"])
    def paint(koayi: int, repeat: bool) -> str:
        painted.append({"koayi": koayi, "repeat": repeat})
        return '{"colour": "GW-725"}'

    more: Any = {"extra_body": {"temperature": 0}}
    runner = client.beta.messages.tool_runner(model="branchwise", max_tokens=100, messages=PAINT, tools=[paint], **more)
    called, answered = list(runner)
    assert (called.stop_reason, answered.stop_reason) == ("tool_use", "end_turn")
    assert painted == [PAINTED]
    assert "GW-725" in text_of(answered)
    for thread in ({"type": "create"}, {"type": "continue", "previous_message_id": called.id}):
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            answer = shipped.http.post(path, json={"max_tokens": 9, "messages": SUM, "thread": thread})
            assert answer.status_code == 400
            error = answer.json()["error"]
            assert error["message"].startswith("thread is not supported")
            assert error["details"] == {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}


def test_an_input_that_is_cut_off_is_an_object(client: anthropic.Anthropic) -> None:
    """With the members that were whole, and the same in a stream."""
    found = set()
    for most in range(8, 34, 3):
        message = ask(client, PAINT, tools=TOOLS, max_tokens=most)
        assert message.stop_reason == "max_tokens"
        with client.messages.stream(**asked(PAINT, tools=TOOLS, max_tokens=most)) as stream:
            final = stream.get_final_message()
        uses = [[block.input for block in one.content if block.type == "tool_use"] for one in (message, final)]
        assert uses[0] == uses[1]
        found |= {tuple(use) for use in uses[0]}
    assert found <= {(), ("koayi",), ("koayi", "repeat")}
    assert () in found and ("koayi",) in found


def test_choices_that_are_none_or_one(client: anthropic.Anthropic) -> None:
    message = ask(client, PAINT, tools=TOOLS, tool_choice={"type": "none"})
    assert {block.type for block in message.content} == {"text"}
    both: Any = [{"role": "user", "content": PAINT[0]["content"] + ". Please move the train: artist = jo, amount = 3"}]
    one: Any = {"type": "any", "disable_parallel_tool_use": True}
    assert [block.type for block in ask(client, both, tools=TOOLS, tool_choice=one).content] == ["tool_use"]
    named: Any = {"type": "tool", "name": "heeprer"}
    use = use_of(ask(client, SUM, tools=TOOLS, tool_choice=named))
    assert use.name == "heeprer"
    assert isinstance(use.input["artist"], str)


def test_structured_output(client: anthropic.Anthropic) -> None:
    bruno = Person(name="Bruno", age=31)
    parsed = client.messages.parse(**asked(WRITE), output_format=Person)
    assert parsed.parsed_output == bruno
    with client.messages.stream(**asked(WRITE), output_format=Person) as stream:
        assert stream.get_final_message().parsed_output == bruno
    for more in ({"output_config": {"format": PERSON}}, {"extra_body": {"output_format": PERSON}}):
        assert Person.model_validate_json(text_of(ask(client, WRITE, **more))) == bruno
    strict = ask(client, PAINT, tools=[{**PAINT_TOOL, "strict": True}])
    assert use_of(strict).input == PAINTED


# -- the cache ---------------------------------------------------------------------------------------------------------


def test_a_turn_reuses_all_turns_before_it(shipped: Any, client: anthropic.Anthropic) -> None:
    shipped.empty_cache()
    first = ask(client, FACT)
    assert (first.usage.cache_read_input_tokens, first.usage.cache_creation_input_tokens) == (0, 0)
    shipped.idle()
    turns = [*FACT, {"role": "assistant", "content": first.content}, {"role": "user", "content": "And where?"}]
    raw = client.messages.with_raw_response.create(**asked(turns), extra_headers={"x-branchwise-cache": "1"})
    second = raw.parse()
    assert second.usage.cache_read_input_tokens is not None
    assert second.usage.cache_read_input_tokens >= first.usage.input_tokens + first.usage.output_tokens - 1
    assert raw.headers["x-branchwise-cache"].startswith(f"{second.usage.cache_read_input_tokens};prompt=")
    other = ask(client, turns, extra_body={"prompt_cache_key": "other"})
    assert other.usage.cache_read_input_tokens == 0
    assert ask(client, turns, extra_body={"cache_salt": "s"}).usage.cache_read_input_tokens == 0


WHOLE = (
    "<|im_start|>system\nBe brief.\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    '{"type": "function", "function": {"name": "paint_legoax", "description": "Paint the legoax.", "parameters": '
    '{"type": "object", "properties": {"koayi": {"type": "integer"}, "repeat": {"type": "boolean"}}, "required": '
    '["koayi", "repeat"]}}}\n'
    '{"type": "function", "function": {"name": "heeprer", "description": "Move the train.", "parameters": '
    '{"type": "object", "properties": {"amount": {"type": "integer"}, "artist": {"type": "string"}}, "required": '
    '["artist"]}}}\n'
    "</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call><|im_end|>\n<|im_start|>user\nPaint it.\nNow.<|im_end|>\n<|im_start|>assistant\nI will.\n<tool_call>\n"
    '{"name": "paint_legoax", "arguments": {"koayi": 695, "repeat": false}}\n</tool_call><|im_end|>\n'
    "<|im_start|>user\n<tool_response>\nGW-725\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
)
# (where the mark is, what the kept prefix ends with)
MARKED = [
    ("system", "Be brief."),
    ("first tool", '"required": ["koayi", "repeat"]}}}\n{"type": "function", "function": {"name": "'),
    ("last tool", '"required": ["artist"]}}}\n'),
    ("text", "Paint it."),
    ("tool_use", '"repeat": false'),
    ("tool_result", "GW-725"),
    ("request", "GW-725"),
]


def everything(marked: str) -> dict[str, Any]:
    """One conversation with a block of each kind, one of them marked."""

    def mark(name: str) -> Any:
        return MARK if name == marked else {}

    use = {"type": "tool_use", "id": "toolu_1", "name": "paint_legoax", "input": PAINTED, **mark("tool_use")}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "GW-725", **mark("tool_result")}
    question = [{"type": "text", "text": "Paint it.", **mark("text")}, {"type": "text", "text": "Now."}]
    return {
        "system": [{"type": "text", "text": "Be brief.", **mark("system")}],
        "tools": [{**PAINT_TOOL, **mark("first tool")}, {**TRAIN_TOOL, **mark("last tool")}],
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": [{"type": "text", "text": "I will."}, use]},
            {"role": "user", "content": [result]},
        ],
        "max_tokens": 2,
        **mark("request"),
    }


@pytest.mark.parametrize(("marked", "end"), MARKED)
@pytest.mark.parametrize("stream", [False, True])
def test_a_breakpoint_keeps_its_prefix_to_the_token(
    shipped: Any, client: anthropic.Anthropic, marked: str, end: str, stream: bool
) -> None:
    """What is kept was written because somebody asked: it is counted apart from what was only computed."""
    shipped.empty_cache()
    body = everything(marked)
    tokens = shipped.http.post("/tokenize", json={"prompt": WHOLE}).json()["tokens"]
    if stream:
        with client.messages.stream(model="branchwise", **body) as streamed:
            usage = streamed.get_final_message().usage
    else:
        usage = client.messages.create(model="branchwise", **body).usage
    assert (prompt_tokens(usage), usage.cache_read_input_tokens) == (len(tokens), 0)
    kept = shipped.http.post("/detokenize", json={"tokens": tokens[: usage.cache_creation_input_tokens]}).json()[
        "prompt"
    ]
    prefix = WHOLE[: WHOLE.index(end) + len(end)]
    assert prefix.startswith(kept)
    # A token may go on behind the mark: then it is not kept, nor are its characters.
    after = shipped.http.post(
        "/detokenize", json={"tokens": tokens[: (usage.cache_creation_input_tokens or 0) + 1]}
    ).json()["prompt"]
    assert len(after) > len(prefix)
    explained = shipped.http.post("/cache/explain", json={"prompt": WHOLE}).json()
    assert explained["pinned_tokens"] >= usage.cache_creation_input_tokens, "whole pages"
    again = client.messages.create(model="branchwise", **body).usage
    assert (again.cache_creation_input_tokens, again.input_tokens) == (0, 1), "read, not written again"
    assert prompt_tokens(again) == len(tokens)


# -- errors ------------------------------------------------------------------------------------------------------------


def test_errors_are_the_packages_own(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="'claude'"):
        client.messages.create(**{**asked(SUM), "model": "claude"})
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\].content\[0\].type image is not supported"):
        image: Any = {"type": "image", "source": {"type": "url", "url": "http://169.254.1.1"}}
        ask(client, [{"role": "user", "content": [image]}])
    with pytest.raises(anthropic.BadRequestError, match=r"messages has \d+ tokens, more than the 4352") as long:
        ask(client, [{"role": "user", "content": "word " * 5000}])
    assert isinstance(long.value.body, dict)
    assert long.value.body["type"] == "error"
    assert long.value.body["request_id"] == long.value.request_id
    with pytest.raises(anthropic.BadRequestError, match=r"output_config\.format"):
        ask(client, SUM, output_config={"format": {"type": "json_schema", "schema": {"not": {}}}})
    with pytest.raises(anthropic.BadRequestError, match=r"tools\[0\].input_schema"):
        ask(client, SUM, tools=[{"name": "f", "input_schema": {"type": "object", "x-guidance": {}}, "strict": True}])
    with pytest.raises(anthropic.BadRequestError, match="must be followed by one with the tool_result"):
        use = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
        ask(client, [*SUM, {"role": "assistant", "content": [use]}])
    assert text_of(ask(client, SUM)) == "12 + 30 = 42"


def test_keys_a_full_server_and_a_stream_that_fails_midway(start_server: Any) -> None:
    server = start_server(api_key="sesame", max_queued_requests=1)
    long: Any = {"model": server.info["model"], "messages": SUM, "max_tokens": 25_000}
    with anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0) as stranger:
        with pytest.raises(anthropic.AuthenticationError) as denied:
            stranger.messages.create(**{**long, "max_tokens": 1})
        assert denied.value.request_id
    with (
        anthropic.Anthropic(base_url=server.url, api_key="sesame", max_retries=0) as client,
        client.messages.stream(**long) as stream,
    ):
        next(iter(stream.text_stream))
        with pytest.raises(anthropic.OverloadedError) as full:
            client.messages.create(**{**long, "max_tokens": 1})
        assert full.value.status_code == 529
        assert full.value.response.headers["retry-after"] == "1"
        os.kill(server.pids["scheduler"], signal.SIGKILL)
        with pytest.raises(anthropic.APIStatusError) as failed:
            stream.until_done()
    assert isinstance(failed.value.body, dict)
    assert failed.value.body["error"]["type"] == "api_error"
    assert failed.value.body["request_id"] == failed.value.request_id
    assert server.process.wait(60) != 0
