"""Outputs of models, one for each way they go: what each must be read as is written beside it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from branchwise.runtime.chat.tools import Event, StreamParser, Tool


def tool(name: str, **properties: Any) -> Tool:
    return Tool(name, {"type": "object", "properties": properties})


TOOLS = [
    tool("f", a={"type": "integer"}, s={"type": "string"}),
    tool("get-weather_2", city={"type": "string"}),
    tool(
        "all",
        s={"type": "string"},
        i={"type": "integer"},
        n={"type": "number"},
        b={"type": "boolean"},
        o={"type": "object"},
        l={"type": "array"},
        maybe={"anyOf": [{"type": "string"}, {"type": "null"}]},
        either={"type": ["integer", "string"]},
        level={"enum": [1, 2, 3]},
        ref={"$ref": "#/properties/i"},
        any={},
    ),
]


@dataclass(frozen=True)
class Case:
    """``calls``: (name, arguments, complete)."""

    name: str
    text: str
    tools: str | None = "hermes"
    content: str = ""
    reasoning: str = ""
    calls: Sequence[tuple[str, str, bool]] = ()
    thoughts: str | None = "think"
    options: dict[str, Any] = field(default_factory=dict)

    def parser(self) -> StreamParser:
        ids = itertools.count()
        known = {"tools": TOOLS, "new_id": lambda: f"id{next(ids)}"} | self.options
        return StreamParser(self.tools, self.thoughts, **known)

    def stream(self, pieces: Sequence[str]) -> list[Event]:
        parser = self.parser()
        return [event for piece in pieces for event in parser.feed(piece)] + parser.finish()


A1 = '{"name": "f", "arguments": {"a": 1}}'
A1_CALL = ("f", '{"a": 1}', True)
NESTED = r'{"s": "}]{[\"</tool_call>\\", "o": {"l": [[], {"x": "\u00e9\ud83d\ude00 ü 🙂\n"}]}, "n": -1.50e+3}'

HERMES = [
    Case("nothing", ""),
    Case("text alone", " Hello,\nworld. \n", content=" Hello,\nworld. \n"),
    Case("whitespace alone", " \n\t ", content=" \n\t "),
    Case("one call", f"<tool_call>\n{A1}\n</tool_call>", calls=[A1_CALL]),
    Case("no whitespace", f"<tool_call>{A1}</tool_call>", calls=[A1_CALL]),
    Case("whitespace everywhere", f"\n <tool_call> \r\n\t{A1} \n </tool_call> \n", calls=[A1_CALL]),
    Case(
        "text before, between and after stays as it is",
        f" One. \n<tool_call>{A1}</tool_call>\n Two. <tool_call>\n{A1}\n</tool_call>\n\n Three. \n",
        content=" One. \n\n Two. \n\n Three. \n",
        calls=[A1_CALL, A1_CALL],
    ),
    Case(
        "parallel calls",
        f'<tool_call>\n{A1}\n</tool_call>\n<tool_call>\n{{"name": "get-weather_2", "arguments": {{}}}}\n</tool_call>',
        calls=[A1_CALL, ("get-weather_2", "{}", True)],
    ),
    Case("two calls in one marker", f"<tool_call>\n{A1}\n{A1}\n</tool_call>", calls=[A1_CALL, A1_CALL]),
    Case("a list in the marker", f"<tool_call>[{A1}, {A1}]</tool_call>", calls=[A1_CALL, A1_CALL]),
    Case(
        "nested brackets, quotes, escapes, unicode, the end marker in a string",
        f'<tool_call>\n{{"name": "all", "arguments": {NESTED}}}\n</tool_call>',
        calls=[("all", NESTED, True)],
    ),
    Case(
        "floats, key order and spaces as they are written",
        '<tool_call>{"name":"all","arguments":{ "n":1.0,"b" :true , "a":1e5 }}</tool_call>',
        calls=[("all", '{ "n":1.0,"b" :true , "a":1e5 }', True)],
    ),
    Case(
        "arguments before the name",
        '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>',
        calls=[A1_CALL],
    ),
    Case("parameters", '<tool_call>{"name": "f", "parameters": {"a": 1}}</tool_call>', calls=[A1_CALL]),
    Case(
        "other fields",
        '<tool_call>{"id": "x", "name": "f", "why": {"b": ["}"]}, "arguments": {"a": 1}, "n": 1, "s": "}"}</tool_call>',
        calls=[A1_CALL],
    ),
    Case("no arguments", '<tool_call>{"name": "f"}</tool_call>', calls=[("f", "{}", True)]),
    Case("empty arguments", '<tool_call>{"name": "f", "arguments": {}}</tool_call>', calls=[("f", "{}", True)]),
    Case("null arguments", '<tool_call>{"name": "f", "arguments": null}</tool_call>', calls=[("f", "{}", True)]),
    Case(
        "arguments of the empty string",
        '<tool_call>{"name": "f", "arguments": ""}</tool_call>',
        calls=[("f", "{}", True)],
    ),
    Case(
        "arguments in a list",
        '<tool_call>{"name": "f", "arguments": [1, "]"]}</tool_call>',
        calls=[("f", '[1, "]"]', True)],
    ),
    Case(
        "arguments encoded twice",
        r'<tool_call>{"name": "f", "arguments": "{\"s\": \"a\\n\u00e9\ud83d\ude00\"}"}</tool_call>',
        calls=[("f", '{"s": "a\\né😀"}', True)],
    ),
    Case(
        "half a surrogate pair",
        r'<tool_call>{"name": "f", "arguments": "{\"s\": \"\ud83d\"}"}</tool_call>',
        calls=[("f", '{"s": "\ufffd"}', True)],
    ),
    Case(
        "escapes in the name",
        r'<tool_call>{"n\u0061me": "\u0066", "arguments": {}}</tool_call>',
        calls=[("f", "{}", True)],
    ),
    Case("trailing comma", '<tool_call>{"name": "f", "arguments": {"a": 1},}</tool_call>', calls=[A1_CALL]),
    Case(
        "no closing brace",
        '<tool_call>{"name": "f", "arguments": {"a": 1}\n</tool_call> x',
        content=" x",
        calls=[A1_CALL],
    ),
    Case(
        "neither closing brace",
        '<tool_call>{"name": "f", "arguments": {"a": 1</tool_call> x',
        content=" x",
        calls=[("f", '{"a": 1}', False)],
    ),
    Case("one brace too many", f"<tool_call>{A1}}}</tool_call>", calls=[A1_CALL]),
    Case("no end marker", f"<tool_call>{A1}", calls=[A1_CALL]),
    Case("no end marker, text", f"<tool_call>{A1}\nDone.", content="\nDone.", calls=[A1_CALL]),
    Case("no end marker, another call", f"<tool_call>{A1}\n<tool_call>{A1}", calls=[A1_CALL, A1_CALL]),
    Case(
        "a bracket that does not fit",
        '<tool_call>{"name": "f", "arguments": {"a": [1}}',
        calls=[("f", '{"a": [1]}', True)],
    ),
    Case(
        "wrong JSON inside the brackets is repaired",
        '<tool_call>{"name": "f", "arguments": {"a" 1,, }}</tool_call>',
        calls=[("f", '{"a" :1 }', True)],
    ),
    Case("not JSON", "<tool_call>f(1)</tool_call> x", content="<tool_call>f(1)</tool_call> x"),
    Case("no name", '<tool_call>{"arguments": {}}</tool_call>', content='<tool_call>{"arguments": {}}</tool_call>'),
    Case("empty name", '<tool_call>{"name": ""}</tool_call>', content='<tool_call>{"name": ""}</tool_call>'),
    Case("the name is no string", '<tool_call>{"name": {"a": 1}}', content='<tool_call>{"name": {"a": 1}}'),
    Case("two begin markers", f"<tool_call>\n<tool_call>\n{A1}", content="<tool_call>\n", calls=[A1_CALL]),
    Case("a marker that is none", "a <tool_cal> <tool <<tool_call", content="a <tool_cal> <tool <<tool_call"),
    Case("an end marker alone", "a </tool_call> b", content="a </tool_call> b"),
    Case("a begin marker alone", "<tool_call>", content="<tool_call>"),
    Case("another format's call", "[TOOL_CALLS]f[ARGS]{}", content="[TOOL_CALLS]f[ARGS]{}"),
    Case("JSON without a marker", A1, content=A1),
    Case("cut in the marker", "Yes. <tool_ca", content="Yes. <tool_ca"),
    Case("cut in the name", '<tool_call>{"name": "ge', content='<tool_call>{"name": "ge'),
    Case("cut after the name", '<tool_call>{"name": "f", "argu', calls=[("f", "", False)]),
    Case("cut in a string", '<tool_call>{"name": "f", "arguments": {"s": "a\\', calls=[("f", '{"s": "a\\', False)]),
    Case("cut in an escape", '<tool_call>{"name": "f", "arguments": "{\\u00', calls=[("f", "{", False)]),
    Case("cut in null", '<tool_call>{"name": "f", "arguments": nul', calls=[("f", "", False)]),
    Case("cut before the last brace", '<tool_call>{"name": "f", "arguments": {"a": 1}', calls=[A1_CALL]),
    Case("cut in the end marker", f"<tool_call>{A1}\n</tool_", content="\n</tool_", calls=[A1_CALL]),
    Case(
        "an unknown tool is content, whole",
        'a <tool_call>{"name": "g", "arguments": {"s": "<tool_call>"}}\n</tool_call> b',
        content='a <tool_call>{"name": "g", "arguments": {"s": "<tool_call>"}}\n</tool_call> b',
    ),
    Case(
        "an unknown tool, arguments first",
        '<tool_call>{"arguments": {"a": 1}, "name": "g"}</tool_call>',
        content='<tool_call>{"arguments": {"a": 1}, "name": "g"}</tool_call>',
    ),
    Case(
        "an unknown tool, cut",
        '<tool_call>{"name": "g", "arguments": {"a',
        content='<tool_call>{"name": "g", "arguments": {"a',
    ),
    Case(
        "an unknown tool is a call if so wanted",
        '<tool_call>{"name": "g", "arguments": {}}</tool_call>',
        calls=[("g", "{}", True)],
        options={"unknown_tools": "call"},
    ),
    Case(
        "no list of tools", '<tool_call>{"name": "g"}</tool_call>', calls=[("g", "{}", True)], options={"tools": None}
    ),
    Case("no tools", f"<tool_call>{A1}</tool_call>", None, content=f"<tool_call>{A1}</tool_call>"),
    Case(
        "Python's quotes",
        "<tool_call>{'name': 'f', 'arguments': "
        "{'a': True, \"s\": 'it\\'s \"x\"', 'l': (1, 2,), 'n': None,}}</tool_call>",
        calls=[("f", '{"a": true, "s": "it\'s \\"x\\"", "l": [1, 2], "n": null}', True)],
    ),
    Case(
        "Python's quotes in the arguments alone",
        '<tool_call>{"name": "f", "arguments": { \'a\': 1}}</tool_call>',
        calls=[("f", '{ "a": 1}', True)],
    ),
]

REASONING = [
    Case("reasoning", "<think>\nHm.\n</think>\n\nYes.", reasoning="Hm.", content="Yes."),
    Case("reasoning without newlines", "<think>Hm.</think>Yes.", reasoning="Hm.", content="Yes."),
    Case("reasoning's own whitespace", "<think>\n\n a\n\n</think>\n\n\n b", reasoning="\n a\n", content="\n b"),
    Case("reasoning that is empty", "<think>\n\n</think>\n\nYes.", content="Yes."),
    Case("whitespace before reasoning", " \n<think>a</think>b", reasoning="a", content="b"),
    Case("unclosed reasoning", "<think>\nHm. So", reasoning="Hm. So"),
    Case("reasoning cut in its end", "<think>\nHm.\n</thi", reasoning="Hm.\n</thi"),
    Case(
        "opened by the prompt",
        "Hm.\n</think>\n\nYes.",
        reasoning="Hm.",
        content="Yes.",
        options={"reasoning_open": True},
    ),
    Case(
        "opened by the prompt and again",
        "<think>\nHm.</think>Yes.",
        reasoning="Hm.",
        content="Yes.",
        options={"reasoning_open": True},
    ),
    Case("opened by the prompt, unclosed", "Hm.\n", reasoning="Hm.\n", options={"reasoning_open": True}),
    Case("opened by the prompt, nothing", "", options={"reasoning_open": True}),
    Case("opened by the prompt, closed at once", "</think>Yes.", content="Yes.", options={"reasoning_open": True}),
    Case("a close that opens nothing", "a</think>b", content="a</think>b"),
    Case("reasoning's marker in the answer", "Use <think> tags.", content="Use <think> tags."),
    Case("a marker that is none", "<thinking>a", content="<thinking>a"),
    Case("reasoning off", "<think>a</think>", content="<think>a</think>", thoughts=None),
    Case("thinking twice", "<think>a</think>\n<think>b</think>c", reasoning="ab", content="c"),
    Case(
        "thinking, then calls",
        f"<think>\nHm.\n</think>\n\n<tool_call>\n{A1}\n</tool_call>",
        reasoning="Hm.",
        calls=[A1_CALL],
    ),
    Case(
        "thinking between calls",
        f"<tool_call>{A1}</tool_call>\n<think>b</think>\n<tool_call>{A1}</tool_call>",
        reasoning="b",
        calls=[A1_CALL, A1_CALL],
    ),
    Case(
        "a call inside reasoning is reasoning",
        f"<think>a <tool_call>{A1}</tool_call> b</think>c",
        reasoning=f"a <tool_call>{A1}</tool_call> b",
        content="c",
    ),
    Case(
        "no call inside reasoning",
        "<think>a <tool_call>x</tool_call>\n</think>c",
        reasoning="a <tool_call>x</tool_call>",
        content="c",
    ),
    Case(
        "reasoning's markers in arguments",
        '<tool_call>{"name": "f", "arguments": {"s": "<think></think>"}}</tool_call>',
        calls=[("f", '{"s": "<think></think>"}', True)],
    ),
    Case(
        "an answer in markers",
        "<|START_THINKING|>a<|END_THINKING|><|START_RESPONSE|> b\n c<|END_RESPONSE|>",
        None,
        " b\n c",
        "a",
        thoughts="cohere_command3",
    ),
    Case(
        "an answer in markers on lines",
        "<think>\na\n</think>\n\n<response>\nb\n</response>\n",
        None,
        "b",
        "a",
        thoughts="granite",
    ),
    Case("an answer in markers, cut", "<think>a</think><answer>\nb\n</ans", None, "b\n</ans", "a", thoughts="hunyuan"),
    Case("tags that no thinking came before", "<answer>b</answer>", None, "<answer>b</answer>", thoughts="hunyuan"),
    Case("an end that closes nothing", "<think>a</think>b\n</answer>c", None, "b\n</answer>c", "a", thoughts="hunyuan"),
    Case("an answer's marker in an answer", "a <response> b", None, "a <response> b", thoughts="granite"),
    Case(
        "an answer in markers without thinking",
        "<|START_TEXT|>b<|END_TEXT|>",
        None,
        "b",
        thoughts="cohere_command4",
    ),
    Case(
        "an answer in markers, then a call",
        '<|END_THINKING|><|START_TEXT|>b<|END_TEXT|><|START_ACTION|>[{"tool_name": "f", "parameters": {"a": 1}}]',
        "cohere",
        "b",
        calls=[A1_CALL],
        thoughts="cohere_command4",
        options={"reasoning_open": True},
    ),
    Case(
        "Apriel's reasoning",
        f"Here are my reasoning steps:\na\n[BEGIN FINAL RESPONSE]\nb\n<tool_calls>[{A1}]</tool_calls>\n"
        "[END FINAL RESPONSE]\n",
        "apriel",
        "b\n",
        "a",
        [A1_CALL],
        "apriel",
    ),
    Case(
        "Apertus calls while it thinks",
        '<|inner_prefix|>a<|tools_prefix|>[{"f": {"a": 1}}]<|tools_suffix|>',
        "apertus",
        "",
        "a",
        [A1_CALL],
        "apertus",
    ),
    Case("Gemma's channel", "<|channel>thought\na\n<channel|>b", None, "b", "a", thoughts="gemma4"),
    Case("Gemma's empty channel", "<|channel>thought\n<channel|>b", None, "b", thoughts="gemma4"),
    Case(
        "Mistral's reasoning",
        "[THINK]a[/THINK]b[TOOL_CALLS]f[ARGS]{}",
        "mistral",
        "b",
        "a",
        [("f", "{}", True)],
        "mistral",
    ),
]

LLAMA = [
    Case("bare", '{"name": "f", "parameters": {"a": 1}}', "llama3_json", calls=[A1_CALL]),
    Case("bare, whitespace", ' \n{"name": "f", "parameters": {"a": 1}}\n', "llama3_json", calls=[A1_CALL]),
    Case("bare, arguments first", '{"arguments": {"a": 1}, "name": "f"}', "llama3_json", calls=[A1_CALL]),
    Case(
        "bare, with a type", '{"type": "function", "name": "f", "parameters": {"a": 1}}', "llama3_json", calls=[A1_CALL]
    ),
    Case("with the tag", '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', "llama3_json", calls=[A1_CALL]),
    Case("text, then the tag", 'So: <|python_tag|>{"name": "f"}', "llama3_json", "So: ", calls=[("f", "{}", True)]),
    Case(
        "semicolons",
        '<|python_tag|>{"name": "f", "parameters": {"a": 1}}; {"name": "f", "parameters": {"a": 1}} ;{"name": "f"}',
        "llama3_json",
        calls=[A1_CALL, A1_CALL, ("f", "{}", True)],
    ),
    Case("bare, semicolon", f"{A1};{A1}", "llama3_json", calls=[A1_CALL, A1_CALL]),
    Case("bare, on lines", f"{A1}\n{A1}\n", "llama3_json", calls=[A1_CALL, A1_CALL]),
    Case("a semicolon and text", f"{A1}; then {A1}", "llama3_json", "; then ", calls=[A1_CALL, A1_CALL]),
    Case("a semicolon at the end", f"{A1};", "llama3_json", ";", calls=[A1_CALL]),
    Case("a JSON answer", '{"title": "f", "parameters": {}}', "llama3_json", '{"title": "f", "parameters": {}}'),
    Case("a JSON answer with a name", '{"name": "f", "age": 3}', "llama3_json", '{"name": "f", "age": 3}'),
    Case("a JSON answer that is only a name", '{"name": "f"}', "llama3_json", '{"name": "f"}'),
    Case(
        "a JSON answer like a call, of no tool",
        '{"name": "Bob", "parameters": {}}',
        "llama3_json",
        '{"name": "Bob", "parameters": {}}',
        options={"unknown_tools": "call"},
    ),
    Case("later in the answer", f"See: {A1}", "llama3_json", "See: ", calls=[A1_CALL]),
    Case(
        "code after the tag",
        '<|python_tag|>search.call(query="x")',
        "llama3_json",
        '<|python_tag|>search.call(query="x")',
    ),
    Case("Python's quotes", "{'name': 'f', 'parameters': {'a': 1}}", "llama3_json", calls=[A1_CALL]),
    Case("cut while it may be an answer", '{"name": "f", "para', "llama3_json", '{"name": "f", "para'),
    Case("cut in the arguments", '{"name": "f", "parameters": {"a', "llama3_json", '{"name": "f", "parameters": {"a'),
    Case(
        "with the tag, cut in the arguments",
        '<|python_tag|>{"name": "f", "parameters": {"a',
        "llama3_json",
        calls=[("f", '{"a', False)],
    ),
    Case("thinking, then bare", f"<think>a</think>\n{A1}", "llama3_json", "", "a", [A1_CALL]),
]

MISTRAL = [
    Case("list", f"[TOOL_CALLS] [{A1}, {A1}]", "mistral", calls=[A1_CALL, A1_CALL]),
    Case("list, no space", f"[TOOL_CALLS][{A1}]", "mistral", calls=[A1_CALL]),
    Case(
        "list with ids",
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "abcdefghi"}]',
        "mistral",
        calls=[A1_CALL],
    ),
    Case("object, no list", f"[TOOL_CALLS] {A1}", "mistral", calls=[A1_CALL]),
    Case("text around a list", f"a [TOOL_CALLS] [{A1}] b", "mistral", "a  b", calls=[A1_CALL]),
    Case("an empty list", "[TOOL_CALLS] []", "mistral", "[TOOL_CALLS] []"),
    Case("a list that goes wrong", f"[TOOL_CALLS] [{A1}, x]", "mistral", ", x]", calls=[A1_CALL]),
    Case("a list cut after a call", f"[TOOL_CALLS] [{A1}", "mistral", calls=[A1_CALL]),
    Case("a list cut in a call", f'[TOOL_CALLS] [{A1}, {{"na', "mistral", ', {"na', calls=[A1_CALL]),
    Case(
        "a list whose second is unknown",
        f'[TOOL_CALLS] [{A1}, {{"name": "g"}}]',
        "mistral",
        ', {"name": "g"}]',
        calls=[A1_CALL],
    ),
    Case("not a list", "[TOOL_CALLS] [1, 2]", "mistral", "[TOOL_CALLS] [1, 2]"),
    Case("named", '[TOOL_CALLS]f[ARGS]{"a": 1}', "mistral", calls=[A1_CALL]),
    Case(
        "named, twice",
        '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]get-weather_2[ARGS]{}',
        "mistral_named",
        calls=[A1_CALL, ("get-weather_2", "{}", True)],
    ),
    Case("named, with an id", '[TOOL_CALLS]f[CALL_ID]a1b2c3d4e[ARGS]{"a": 1}', "mistral", calls=[A1_CALL]),
    Case("named, its marker dropped", '[TOOL_CALLS]f{"a": 1}', "mistral", calls=[A1_CALL]),
    Case(
        "named, brackets in strings",
        '[TOOL_CALLS]f[ARGS]{"s": "[TOOL_CALLS]}"}',
        "mistral",
        calls=[("f", '{"s": "[TOOL_CALLS]}"}', True)],
    ),
    Case("named, unknown", '[TOOL_CALLS]g[ARGS]{"a": 1} x', "mistral", '[TOOL_CALLS]g[ARGS]{"a": 1} x'),
    Case("named, no arguments", "[TOOL_CALLS]f[ARGS]", "mistral", calls=[("f", "", False)]),
    Case("named, cut", "[TOOL_CALLS]f[AR", "mistral", "[TOOL_CALLS]f[AR"),
    Case("a name alone", "[TOOL_CALLS]f and so on", "mistral", "[TOOL_CALLS]f and so on"),
    Case("a marker that is none", "[TOOL_CALL] [TOOL_", "mistral", "[TOOL_CALL] [TOOL_"),
]

XML_CALL = "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"

XML = [
    Case("one call", XML_CALL, "qwen3_coder", calls=[A1_CALL]),
    Case(
        "parallel calls, text around",
        f"a\n{XML_CALL}\n{XML_CALL}\nb",
        "qwen3_coder",
        "a\n\nb",
        calls=[A1_CALL, A1_CALL],
    ),
    Case("no outer marker", "<function=f><parameter=a>1</parameter></function>", "qwen3_coder", calls=[A1_CALL]),
    Case("two functions in one marker", f"{XML_CALL[:-12]}{XML_CALL[12:]}", "qwen3_coder", calls=[A1_CALL, A1_CALL]),
    Case(
        "no parameters",
        "<tool_call>\n<function=f>\n</function>\n</tool_call>",
        "qwen3_coder",
        calls=[("f", "{}", True)],
    ),
    Case(
        "types from the schema",
        "<tool_call><function=all><parameter=s>1</parameter><parameter=i>-3</parameter><parameter=n>\n1.50\n</parameter>"
        "<parameter=b>True</parameter><parameter=o>{'a': None}</parameter><parameter=l>[1, {\"x\": []}]</parameter>"
        "<parameter=either>7</parameter><parameter=level>2</parameter><parameter=ref>4</parameter>"
        "<parameter=any>5</parameter><parameter=new>6</parameter></function></tool_call>",
        "qwen3_coder",
        calls=[
            (
                "all",
                '{"s": "1", "i": -3, "n": 1.50, "b": true, "o": {"a": null}, "l": [1, {"x": []}], '
                '"either": 7, "level": 2, "ref": 4, "any": "5", "new": "6"}',
                True,
            )
        ],
    ),
    Case(
        "values that are not of their type become strings",
        "<tool_call><function=all><parameter=i>three</parameter><parameter=o>{a</parameter><parameter=b>1</parameter>"
        "<parameter=l>[NaN]</parameter><parameter=n>null</parameter></function></tool_call>",
        "qwen3_coder",
        calls=[("all", '{"i": "three", "o": "{a", "b": "1", "l": [null], "n": null}', True)],
    ),
    Case(
        "a string or null",
        "<function=all><parameter=maybe>\nnull\n</parameter><parameter=maybe>nullable</parameter></function>",
        "qwen3_coder",
        calls=[("all", '{"maybe": null, "maybe": "nullable"}', True)],
    ),
    Case(
        "quotes, tags, blank lines and unicode in a string",
        '<function=f><parameter=s>\n\n "a\\b"\t<tool_call><b></parameter x>é🙂\n\n</parameter></function>',
        "qwen3_coder",
        calls=[("f", '{"s": "\\n \\"a\\\\b\\"\\t<tool_call><b></parameter x>é🙂\\n"}', True)],
    ),
    Case(
        "an empty string",
        "<function=f><parameter=s></parameter></function>",
        "qwen3_coder",
        calls=[("f", '{"s": ""}', True)],
    ),
    Case(
        "an empty line",
        "<function=f><parameter=s>\n</parameter></function>",
        "qwen3_coder",
        calls=[("f", '{"s": ""}', True)],
    ),
    Case(
        "no end of a parameter",
        "<tool_call><function=f><parameter=s>\nx\n<parameter=a>1\n</function></tool_call>",
        "qwen3_coder",
        calls=[("f", '{"s": "x", "a": 1}', True)],
    ),
    Case(
        "no end of the function",
        "<tool_call><function=f><parameter=a>1</parameter>\n</tool_call> x",
        "qwen3_coder",
        " x",
        calls=[A1_CALL],
    ),
    Case(
        "no end of the call",
        "<tool_call><function=f><parameter=a>1</parameter></function> x",
        "qwen3_coder",
        " x",
        calls=[A1_CALL],
    ),
    Case(
        "text in the function", "<function=f>hm</function>", "qwen3_coder", "hm</function>", calls=[("f", "{}", False)]
    ),
    Case(
        "text after a parameter",
        "<function=f><parameter=a>1</parameter>hm",
        "qwen3_coder",
        "hm",
        calls=[("f", '{"a": 1}', False)],
    ),
    Case("no function", "<tool_call>\nhm", "qwen3_coder", "<tool_call>\nhm"),
    Case("JSON instead", f"<tool_call>{A1}</tool_call>", "qwen3_coder", f"<tool_call>{A1}</tool_call>"),
    Case("a broken name", "<function=f <b>", "qwen3_coder", "<function=f <b>"),
    Case(
        "unknown",
        "<function=g><parameter=s><function=f></parameter></function>x",
        "qwen3_coder",
        "<function=g><parameter=s><function=f></parameter></function>x",
    ),
    Case(
        "unknown, marked",
        "<tool_call><function=g></function>\n</tool_call>",
        "qwen3_coder",
        "<tool_call><function=g></function>\n</tool_call>",
    ),
    Case("cut in a name", "<tool_call>\n<function=f", "qwen3_coder", "<tool_call>\n<function=f"),
    Case(
        "cut in a string",
        "<function=f><parameter=s>\nab\n</para",
        "qwen3_coder",
        calls=[("f", '{"s": "ab\\n</para', False)],
    ),
    Case("cut in a number", "<function=f><parameter=a>\n12", "qwen3_coder", calls=[("f", '{"a": ', False)]),
    Case(
        "cut after a parameter",
        "<function=f><parameter=a>1</parameter>\n",
        "qwen3_coder",
        calls=[("f", '{"a": 1', False)],
    ),
    Case("cut before the parameters", "<function=f>\n", "qwen3_coder", calls=[("f", "", False)]),
]

PYTHONIC = [
    Case("one call", "[f(a=1)]", "pythonic", calls=[A1_CALL]),
    Case(
        "parallel calls",
        " [ f(a=1) ,\n get-weather_2( city = 'x' , ), f()]\n",
        "pythonic",
        calls=[A1_CALL, ("get-weather_2", '{"city": "x"}', True), ("f", "{}", True)],
    ),
    Case("with markers", "a <|python_start|>[f(a=1)]<|python_end|>", "pythonic", "a ", calls=[A1_CALL]),
    Case(
        "literals",
        "[all(s='''a\n''b\"''', i=-1_000, n=[.5, 1., +2, 0x1F, 1e3], b=True, "
        "o={'a': (1,), \"b\": {}, 'c': [],}, l=None, any=null)]",
        "pythonic",
        calls=[
            (
                "all",
                '{"s": "a\\n\'\'b\\"", "i": -1000, "n": [0.5, 1.0, 2, 31, 1e3], "b": true, '
                '"o": {"a": [1], "b": {}, "c": []}, "l": null, "any": null}',
                True,
            )
        ],
    ),
    Case(
        "escapes",
        r"""[f(s="\x41\u00e9\ud83d\U0001F642\'\"\\\n\q)]", a='')]""",
        "pythonic",
        calls=[("f", '{"s": "Aé\\ud83d🙂\'\\"\\\\\\n\\\\q)]", "a": ""}', True)],
    ),
    Case("a list that is none", "[1, 2]", "pythonic", "[1, 2]"),
    Case("a link", "[see](f)", "pythonic", "[see](f)"),
    Case("an empty list", "[]", "pythonic", "[]"),
    Case("positional arguments", "[f(1)]", "pythonic", "[f(1)]"),
    Case("unknown", "[g(a=1)]", "pythonic", "[g(a=1)]"),
    Case(
        "unknown, marked",
        "<|python_start|>[g(a=1)]<|python_end|>",
        "pythonic",
        "<|python_start|>[g(a=1)]<|python_end|>",
    ),
    Case("later in the answer", "So [f(a=1)]", "pythonic", "So [f(a=1)]"),
    Case("text after", "[f(a=1)] x", "pythonic", " x", calls=[A1_CALL]),
    Case("an expression", "[f(a=g(1, ')'))]", "pythonic", calls=[("f", """{"a": "g(1, ')')"}""", True)]),
    Case("a name", "[f(a=1, s=x)]", "pythonic", calls=[("f", '{"a": 1, "s": "x"}', True)]),
    Case("a dict whose keys are numbers", "[f(a={1: 2})]", "pythonic", calls=[("f", '{"a": {"1": 2}}', True)]),
    Case("a second call that is none", "[f(a=1), 2]", "pythonic", ", 2]", calls=[A1_CALL]),
    Case("cut in a name", "[get-we", "pythonic", "[get-we"),
    Case("cut in a string", "[f(s='ab", "pythonic", calls=[("f", '{"s": "ab', False)]),
    Case("cut in a number", "[f(a=12", "pythonic", calls=[("f", '{"a": 12', False)]),
    Case("cut between calls", "[f(a=1)", "pythonic", calls=[A1_CALL]),
    Case("cut in a second call", "[f(a=1), f", "pythonic", ", f", calls=[A1_CALL]),
]

CORPUS = [
    (f"{group}: {case.name}", case)
    for group, cases in {
        "hermes": HERMES,
        "reasoning": REASONING,
        "llama": LLAMA,
        "mistral": MISTRAL,
        "xml": XML,
        "pythonic": PYTHONIC,
    }.items()
    for case in cases
]


@pytest.fixture(params=[case for _, case in CORPUS], ids=[name for name, _ in CORPUS])
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="session")
def corpus() -> list[Case]:
    return [case for _, case in CORPUS]


@pytest.fixture(scope="session")
def make_case() -> Callable[..., Case]:
    return Case
