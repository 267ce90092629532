"""Tool loops, best of n and search."""

from __future__ import annotations

import asyncio
import enum
import json
from pathlib import Path
from typing import Literal

import pytest
from tokenizers import Tokenizer as Backend

import branchwise as bw
from branchwise.frontend.lang.codec import Codec
from branchwise.frontend.lang.tool_schema import fitted, schema_of
from branchwise.frontend.lang.tools import ExecutedCall, parse_calls
from branchwise.runtime.chat.openai_tools import openai_tools
from branchwise.runtime.tokenizer.tokenizer import Tokenizer


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


def codec_of(template: str, tokenizer: Tokenizer) -> Codec:
    backend = Backend.from_str(tokenizer.backend.to_str())
    return Codec(Tokenizer(backend, {"python_token": "<|python_tag|>"}, template))


def test_calls_are_parsed_and_broken_ones_say_so(tokenizer):
    codec = Codec(tokenizer)

    def parsed(text: str) -> list[ExecutedCall]:
        return parse_calls(text, codec, [])

    text = "Let me see.\n" + call("add", a=1) + "\n" + call("paint", colour="red")
    assert [(one.name, one.arguments) for one in parsed(text)] == [("add", {"a": 1}), ("paint", {"colour": "red"})]
    assert parsed("no call") == []
    for broken in ("{", "[]", '{"arguments": {}}'):
        (one,) = parsed(f"<tool_call>{broken}</tool_call>")
        assert one.error.startswith("not a tool call")
    (cut,) = parsed('<tool_call>{"name": "x", "arguments": {"a": 1')
    assert cut.error == 'the arguments are not complete JSON: {"a": 1'
    (number,) = parsed('<tool_call>{"name": "x", "arguments": 3}</tool_call>')
    assert number.name == "x" and "arguments" in number.error


TEMPLATES = Path(__file__).resolve().parents[2] / "runtime" / "chat" / "templates"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ((TEMPLATES / "llama3.jinja").read_text(), '{"name": "add", "parameters": {"a": 2, "b": 3}}'),
        ((TEMPLATES / "qwen3.jinja").read_text(), "<think>\n" + call("sub") + "</think>\n\n" + call("add", a=2, b=3)),
        ((TEMPLATES / "qwen3.jinja").read_text(), call("sub") + "\n</think>\n\n" + call("add", a=2, b=3)),
        (
            "{{ tools }}<tool_call><function=x><parameter=y>",
            "<tool_call>\n<function=add>\n<parameter=a>\n2\n</parameter>\n<parameter=b>\n3\n</parameter>\n</function>\n"
            "</tool_call>",
        ),
        ("{{ tools }}[func_name1(params_name1=value)]", "[add(a=2, b=3)]"),
    ],
    ids=["llama 3", "qwen 3", "qwen 3, its thoughts begun by the prompt", "qwen 3 coder", "pythonic"],
)
def test_calls_are_read_as_the_models_template_writes_them(tokenizer, template, text):
    (one,) = parse_calls(text, codec_of(template, tokenizer), [openai_tools([schema_of(add)])[0].tool])
    assert (one.name, dict(one.arguments), one.error) == ("add", {"a": 2, "b": 3}, None)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ messages[0].content }}", "no place for tools in its chat template"),
        ("{{ tools }}{{ messages[0].content }}", "how this model writes tool calls cannot be detected"),
    ],
)
def test_tools_are_not_dropped_silently(null_engine, tokenizer, template, problem):
    null_engine.tokenizer = Tokenizer(tokenizer.backend, {}, template)

    @bw.function
    def agent(s):
        s += bw.user("?")
        bw.tool_loop(s, [add])

    with pytest.raises(bw.ProgramError, match=problem) as caught:
        agent.run(backend=null_engine)
    assert caught.value.site.startswith(__file__)


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


def test_arguments_are_what_the_function_asks_for():
    def tint(colour: Colour | None = None, level: Literal[1, 2] = 1) -> None: ...

    properties = schema_of(tint)["function"]["parameters"]["properties"]
    assert properties == {
        "colour": {"type": "string", "enum": ["red", "blue"]},
        "level": {"type": "integer", "enum": [1, 2]},
    }
    assert fitted(tint, {"colour": "blue", "level": 2}) == {"colour": Colour.BLUE, "level": 2}
    with pytest.raises(ValueError, match=r"'level' must be one of \[1, 2\], got 3"):
        fitted(tint, {"level": 3})


def test_two_tools_of_one_name_are_an_error(script):
    @bw.function
    def agent(s):
        s += bw.user("?")
        bw.tool_loop(s, [add, add])

    with pytest.raises(ValueError, match="the same name, 'add'"):
        agent.run(backend=script("never").backend)


class Script:
    """A chat-only backend that says one line after the other, and keeps the conversations it was shown."""

    def __init__(self, echo, lines: list[str]) -> None:
        self.lines = list(lines)
        self.seen: list[list[tuple[str, str]]] = []
        self.backend = echo(lambda prompt: "")
        self.backend.generate = self.generate

    async def generate(self, handle, ask, on_delta=None):
        from branchwise.frontend.lang.backend import Completion

        self.seen.append([(one.role, one.content) for one in handle.turns])
        return [Completion(self.lines.pop(0), {})]


@pytest.fixture
def script(echo, monkeypatch):
    def make(*lines: str) -> Script:
        return Script(echo, list(lines))

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
