"""Tool loops, best of n and search."""

from __future__ import annotations

import asyncio
import json
from typing import Literal

import pytest

import branchwise as bw
from branchwise.frontend.lang.tools import parse_calls, schema_of


def call(name: str, **arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def add(a: int, b: int = 1) -> int:
    """Add two numbers.

    Not part of what the model is told.
    """
    return a + b


async def paint(colour: Literal["red", "blue"], tags: list[str] | None = None) -> dict:
    await asyncio.sleep(0)
    return {"painted": colour, "tags": tags}


def breaks(x: str) -> str:
    raise RuntimeError("broken " + x)


def test_a_function_becomes_a_schema():
    assert schema_of(add) == {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
                "required": ["a"],
            },
        },
    }
    properties = schema_of(paint)["function"]["parameters"]["properties"]
    assert properties["colour"] == {"type": "string", "enum": ["red", "blue"]}
    assert properties["tags"] == {"type": "array", "items": {"type": "string"}}
    with pytest.raises(TypeError, match="'x' needs a type hint"):
        schema_of(lambda x: x)


def test_calls_are_parsed_and_broken_ones_say_so():
    text = "Let me see.\n" + call("add", a=1) + "\n" + call("paint", colour="red")
    assert [(one.name, one.arguments) for one in parse_calls(text)] == [("add", {"a": 1}), ("paint", {"colour": "red"})]
    assert parse_calls("no call") == []
    (quoted,) = parse_calls('<tool_call>{"name": "add", "arguments": "{\\"a\\": 2}"}')
    assert quoted.arguments == {"a": 2}
    for broken in ("{", "[]", '{"name": "x", "arguments": 3}', '{"arguments": {}}'):
        (one,) = parse_calls(f"<tool_call>{broken}</tool_call>")
        assert one.error and one.error.startswith("not a tool call")


class Script:
    """A chat-only backend that says one line after the other, and keeps the conversations it was shown."""

    def __init__(self, echo, lines: list[str]) -> None:
        self.lines = list(lines)
        self.seen: list[list[tuple[str, str]]] = []
        self.backend = echo(lambda prompt: "")
        self.backend.generate = self.generate

    async def generate(self, handle, ask, on_delta=None):
        from branchwise.frontend.lang.backend import Completion

        self.seen.append([(one.role, one.content) for one in handle.tokens()])
        return [Completion(self.lines.pop(0), {})]


@pytest.fixture
def script(echo, monkeypatch):
    def make(*lines: str) -> Script:
        made = Script(echo, list(lines))

        async def extend(handle, piece):
            handle.extend([piece])

        made.backend.extend = extend
        return made

    return make


def test_a_tool_loop_feeds_results_and_errors_back(script):
    told = script(
        call("add", a=2, b=3) + call("paint", colour="red"),
        call("add", a="two"),
        call("add") + call("sub", a=1) + call("paint", colour="green") + call("add", a=1, c=2),
        call("breaks", x="glass"),
        "It is 5.",
    )

    @bw.function
    def agent(s):
        s += bw.user("What is 2 + 3?")
        return bw.tool_loop(s, [add, paint, breaks], max_steps=8)

    state = agent.run(backend=told.backend)
    assert state["answer"] == "It is 5."
    results = [json.loads(content) for role, content in told.seen[-1] if role == "tool"]
    assert results == [
        5,
        {"painted": "red", "tags": None},
        {"error": "argument 'a' must be of type integer, got 'two'"},
        {"error": "argument 'a' is missing"},
        {"error": "no tool is called 'sub'; there are add, paint, breaks"},
        {"error": "argument 'colour' must be one of ['red', 'blue'], got 'green'"},
        {"error": "add has no argument 'c'"},
        {"error": "RuntimeError: broken glass"},
    ]
    assert [one.result for one in state.ret_value[:2]] == [5, {"painted": "red", "tags": None}]


def test_a_tool_loop_ends(script):
    told = script(*[call("add", a=1)] * 3)

    @bw.function
    def agent(s):
        s += bw.user("?")
        bw.tool_loop(s, [add], max_steps=3)

    with pytest.raises(bw.ProgramError, match="still calls tools after 3 steps") as caught:
        agent.run(backend=told.backend)
    assert caught.value.site.startswith(__file__)


def get_weather(city: str) -> dict:
    """Get the weather."""
    return {"temperature": 21, "code": "KX-4417"}


def test_the_shipped_model_calls_a_tool(engine, tokenizer):
    @bw.function
    def agent(s):
        s += bw.user("Please get the weather. The city is Zemol.")
        return bw.tool_loop(s, [get_weather], max_tokens=60)

    state = agent.run(temperature=0)
    assert [(one.name, dict(one.arguments)) for one in state.ret_value] == [("get_weather", {"city": "Zemol"})]
    assert "21" in state["answer"] and "KX-4417" in state["answer"]
    # The whole conversation reads as the model's own template writes it.
    messages = [{"role": one["role"], "content": one["content"]} for one in state.messages()]
    assert state.text() == tokenizer.apply_chat_template(
        messages, add_generation_prompt=False, tools=[schema_of(get_weather)]
    )


def test_tools_come_before_the_first_turn_is_read(engine):
    @bw.function
    def agent(s):
        s += bw.user("Hello!") + bw.assistant(bw.gen("a", max_tokens=8))
        s += bw.user("Please get the weather. The city is Zemol.")
        bw.tool_loop(s, [get_weather])

    with pytest.raises(bw.ProgramError, match="tools must be given before"):
        agent.run(temperature=0)


async def test_a_tool_loop_is_awaited_in_async_programs(script):
    told = script(call("add", a=4), "5")

    @bw.function
    async def agent(s):
        s += bw.user("?")
        return await bw.tool_loop(s, [add])

    state = await agent.arun(backend=told.backend)
    assert [one.result for one in state.ret_value] == [5] and await state["answer"] == "5"


def test_best_of_keeps_the_best_token_for_token(echo):
    words = iter(["a", "bbb", "cc"])
    backend = echo(lambda prompt: next(words, "end"))

    @bw.function
    def program(s):
        s += "x"
        scores = bw.best_of(s, 3, score=lambda branch: len(branch["best"]))
        s += "!" + bw.gen("end")
        return scores

    state = program.run(backend=backend)
    assert state.ret_value == [1, 3, 2]
    assert state["best"] == "bbb" and state.text() == "xbbb!end"


def test_best_of_by_logprob_and_with_a_judge_that_appends(engine):
    @bw.function
    def program(s):
        s += bw.user("Who is Mira?")
        with s.assistant():
            first = bw.best_of(s, 4, name="who", max_tokens=20, temperature=1.5)

        def judge(branch):
            branch += bw.assistant_end() + bw.user("Are you sure?") + bw.assistant(bw.select("sure", ["Yes", "No"]))
            return branch["sure"] == "Yes"

        s += bw.user("Who is Tobin?")
        with s.assistant():
            bw.best_of(s, 2, bw.gen("tobin", max_tokens=20), score=judge)
        return first

    state = program.run(seed=4)
    assert len(state.ret_value) == 4 and max(state.ret_value) <= 0
    assert [one["role"] for one in state.messages()] == ["user", "assistant"] * 2
    assert state.messages()[1]["content"] == state["who"]
    assert "Are you sure?" not in state.text()


def test_search_finds_the_best_path(echo):
    """Each step appends a digit that depends on how often the prompt was asked; the score is the number they make."""
    asked: dict[str, int] = {}

    def digit(prompt: str) -> str:
        asked[prompt] = asked.get(prompt, 0) + 1
        return str(asked[prompt] * (1 if prompt.endswith(("1", ":")) else 2) % 10)

    def propose(s):
        s += bw.gen("digit")

    def score(s):
        number = int(s.text().removeprefix("N:"))
        return None if number % 10 == 0 else number

    @bw.function
    def program(s):
        s += "N:"
        kept = bw.search(s, propose, score, beam=2, depth=3, branches=3)
        return [one.text() for one in kept], s.text()

    found, untouched = program.run(backend=echo(digit, prefill=False)).ret_value
    assert found == ["N:366", "N:364"]
    assert untouched == "N:"


async def test_search_with_async_callbacks_stops_where_done(echo):
    async def propose(s):
        s += bw.gen("a")

    async def score(s):
        return float(len(await s.text()))

    async def done(s):
        return len(await s.text()) >= 3

    @bw.function
    async def program(s):
        s += "x"
        kept = await bw.search(s, propose, score, beam=1, depth=9, branches=2, done=done)
        return await kept[0].text()

    backend = echo(lambda prompt: "y", prefill=False)
    assert (await program.arun(backend=backend)).ret_value == "xyy"
    assert len(backend.asked) == 4
