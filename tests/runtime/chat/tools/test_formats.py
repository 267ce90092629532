"""Formats beyond the corpus, and the mistakes that models make in them: each output however it is cut."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from branchwise.runtime.chat.tools.definitions import Tool
from branchwise.runtime.chat.tools.formats import TOOL_FORMATS

from .cases import assemble, parse

A1 = '{"name": "f", "arguments": {"a": 1}}'
CALL = ("f", '{"a": 1}', True)
DS = '<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"a": 1}\n```<｜tool▁call▁end｜>'
DS31 = '<｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>'
KIMI = '<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"a": 1}<|tool_call_end|>'
GLM = "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>"
INVOKE = '<invoke name="f">\n<parameter name="a">1</parameter>\n</invoke>'
SEED = "<seed:tool_call>\n<function=f>\n<parameter=a>1</parameter>\n</function>\n</seed:tool_call>"

HARMONY = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>'

# One call f(a=1) in every format.
ONE_CALL = {
    "harmony": HARMONY,
    "minimax_m1": f"<tool_calls>\n{A1}\n</tool_calls>",
    "mistral": f"[TOOL_CALLS] [{A1}]",
    "mistral_named": '[TOOL_CALLS]f[ARGS]{"a": 1}',
    "deepseek_v3": f"<｜tool▁calls▁begin｜>{DS}<｜tool▁calls▁end｜>",
    "deepseek_v31": f"<｜tool▁calls▁begin｜>{DS31}<｜tool▁calls▁end｜>",
    "kimi_k2": f"<|tool_calls_section_begin|>{KIMI}<|tool_calls_section_end|>",
    "functiongemma": "<start_function_call>call:f{a: 1}<end_function_call>",
    "gemma4": "<|tool_call>call:f{a: 1}<tool_call|>",
    "glm45": GLM,
    "glm47": GLM.replace("\n", ""),
    "minimax_m2": f"<minimax:tool_call>\n{INVOKE}\n</minimax:tool_call>",
    "seed_oss": SEED,
    "qwen3_coder": "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
    "nemotron": f"<TOOLCALL>[{A1}]</TOOLCALL>",
    "apriel": f"<tool_calls>[{A1}]</tool_calls>",
    "hermes": f"<tool_call>\n{A1}\n</tool_call>",
    "xlam": f"[{A1}]",
    "gemma3": "```tool_code\n[f(a=1)]\n```",
    "pythonic": "[f(a=1)]",
    "llama3_json": '{"name": "f", "parameters": {"a": 1}}',
}

DSML = (
    '<｜DSML｜{0}>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="a" string="false">1</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜{0}>"
)
COHERE = '    {"tool_call_id": "0", "tool_name": "f", "parameters": {"a": 1}}'
COMMAND_R = '    {\n        "tool_name": "f",\n        "parameters": {"a": 1}\n    }'
ONE_CALL |= {
    "deepseek_v32": DSML.format("function_calls"),
    "deepseek_v4": DSML.format("tool_calls"),
    "cohere": f"<|START_ACTION|>[\n{COHERE}\n]<|END_ACTION|>",
    "command_r": f"Action:\n```json\n[\n{COMMAND_R}\n]\n```",
    "apertus": '<|tools_prefix|>[{"f": {"a": 1}}]<|tools_suffix|>',
    "lfm2": "<|tool_call_start|>[f(a=1)]<|tool_call_end|>",
    "granite": f"<|tool_call|>[{A1}]",
}

# Channels have a reasoning format of their own.
BESIDE_THINKING = [format for format in ONE_CALL if format != "harmony"]

# Name: format, text, content, calls.
OUTPUTS = {
    "R1: two calls": ("deepseek_v3", f"<｜tool▁calls▁begin｜>{DS}\n{DS}<｜tool▁calls▁end｜>", "", [CALL, CALL]),
    "R1: text before": ("deepseek_v3", f"So.\n<｜tool▁calls▁begin｜>{DS}<｜tool▁calls▁end｜>", "So.\n", [CALL]),
    "R1: no outer markers": ("deepseek_v3", DS, "", [CALL]),
    "R1: no fence": ("deepseek_v3", DS.replace("```json\n", "").replace("\n```", ""), "", [CALL]),
    "R1: cut": ("deepseek_v3", f"<｜tool▁calls▁begin｜>{DS[: DS.index('}')]}", "", [("f", '{"a": 1', False)]),
    "R1: a fence in a string": (
        "deepseek_v3",
        '<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"s": "```"}\n```<｜tool▁call▁end｜>',
        "",
        [("f", '{"s": "```"}', True)],
    ),
    "Kimi: two calls": (
        "kimi_k2",
        f"<|tool_calls_section_begin|>{KIMI}{KIMI.replace(':0', ':1')}<|tool_calls_section_end|>",
        "",
        [CALL, CALL],
    ),
    "Kimi: no index": ("kimi_k2", KIMI.replace("functions.f:0", "f"), "", [CALL]),
    "FunctionGemma: strings": (
        "functiongemma",
        'Yes.<start_function_call>call:f{s:<escape>a "b", {c}\n<escape>,a:-1.5}<end_function_call>',
        "Yes.",
        [("f", '{"s":"a \\"b\\", {c}\\n","a":-1.5}', True)],
    ),
    "FunctionGemma: nested": (
        "functiongemma",
        "<start_function_call>call:all{o:{x:[<escape>y<escape>,true],z:null}}<end_function_call>"
        "<start_function_call>call:f{}<end_function_call>",
        "",
        [("all", '{"o":{"x":["y",true],"z":null}}', True), ("f", "{}", True)],
    ),
    "FunctionGemma: cut": (
        "functiongemma",
        "<start_function_call>call:f{s:<escape>ab",
        "",
        [("f", '{"s":"ab', False)],
    ),
    "Gemma 3: prose around a fence": (
        "gemma3",
        "Let me.\n```tool_code\nf(a=1)\n```\nDone.",
        "Let me.\n\nDone.",
        [CALL],
    ),
    "Gemma 3: other code": ("gemma3", "```python\nf(a=1)\n```", "```python\nf(a=1)\n```", []),
    "Gemma 3: printed": ("gemma3", "```tool_code\nprint(f(a=1))\n```", "", [CALL]),
    "Gemma 3: printed, lines": ("gemma3", "```tool_code\nprint( f(a=1) )\nprint(f(a=1))\n```", "", [CALL, CALL]),
    "Gemma 3: Gemini's module": ("gemma3", "```tool_code\nprint(default_api.f(a=1))\n```", "", [CALL]),
    "Gemma 3: assigned": ("gemma3", "```tool_code\nx = f(a=1)\nf(a=1)\n```", "", [CALL, CALL]),
    "Gemma 3: text printed": ("gemma3", '```tool_code\nprint("f")\n```', '```tool_code\nprint("f")\n```', []),
    "Gemma 3: lines of calls": ("gemma3", "```tool_code\nf(a=1)\nf(a=1)\n```", "", [CALL, CALL]),
    "GLM: no newlines": ("glm45", GLM.replace("\n", ""), "", [CALL]),
    "GLM 4.7: newlines": ("glm47", GLM, "", [CALL]),
    "GLM: no arguments": ("glm45", "<tool_call>f\n</tool_call>", "", [("f", "{}", True)]),
    "GLM: strings stay as they are": (
        "glm45",
        '<tool_call>f\n<arg_key>s</arg_key>\n<arg_value>\n</arg_key> "x"\n</arg_value>\n</tool_call>',
        "",
        [("f", '{"s": "\\n</arg_key> \\"x\\"\\n"}', True)],
    ),
    "GLM: two calls": ("glm45", f"Hm.\n{GLM}\n{GLM}", "Hm.\n", [CALL, CALL]),
    "GLM: no call": ("glm45", "<tool_call>f is a tool</tool_call>", "<tool_call>f is a tool</tool_call>", []),
    "harmony: the recipient first": (
        "harmony",
        "<|channel|>commentary<|message|>Let me look.<|end|><|start|>assistant to=functions.f<|channel|>commentary json"
        '<|message|>{"a": 1}',
        "Let me look.",
        [CALL],
    ),
    "harmony: two calls": ("harmony", f"{HARMONY}<|start|>assistant{HARMONY}", "", [CALL, CALL]),
    "harmony: cut": ("harmony", HARMONY[: HARMONY.index("}")], "", [("f", '{"a": 1', False)]),
    "harmony: no arguments": ("harmony", HARMONY.replace('{"a": 1}', "{}"), "", [("f", "{}", True)]),
    "harmony: a tool of its own": (
        "harmony",
        "<|channel|>analysis to=python<|message|>print(1)<|call|>",
        "<|channel|>analysis to=python<|message|>print(1)",
        [],
    ),
    "harmony: an answer without a header": ("harmony", '{"x": 1}\n', '{"x": 1}\n', []),
    "harmony: an answer with one": ("harmony", "<|channel|>final<|message|>Hi,\n<you>.<|return|>", "Hi,\n<you>.", []),
    "harmony: cut in a header": ("harmony", "<|channel|>final<|message|>Hi.<|end|><|start|>assist", "Hi.", []),
    "MiniMax M1: two calls": ("minimax_m1", f"So.\n<tool_calls>\n{A1}\n{A1}\n</tool_calls>", "So.\n", [CALL, CALL]),
    "MiniMax: two calls": (
        "minimax_m2",
        f"<minimax:tool_call>\n{INVOKE}\n{INVOKE}\n</minimax:tool_call>",
        "",
        [CALL, CALL],
    ),
    "MiniMax: no outer marker": ("minimax_m2", INVOKE, "", [CALL]),
    "DSML: what the model declares": (
        "deepseek_v32",
        ONE_CALL["deepseek_v32"].replace(
            '<｜DSML｜parameter name="a" string="false">1',
            '<｜DSML｜parameter name="s" string="true">1</b></｜DSML｜parameter>'
            '<｜DSML｜parameter name="x" string="false">[2]</｜DSML｜parameter>'
            '<｜DSML｜parameter name="y" string="true">[3]</｜DSML｜parameter>'
            '<｜DSML｜parameter name="a" string="true">4',
        ),
        "",
        [("f", '{"s": "1</b>", "x": [2], "y": "[3]", "a": 4}', True)],
    ),
    "DSML: nothing declared": (
        "deepseek_v32",
        ONE_CALL["deepseek_v32"].replace(' string="false"', ""),
        "",
        [CALL],
    ),
    "DSML: no arguments": (
        "deepseek_v4",
        '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>',
        "",
        [("f", "{}", True)],
    ),
    "Cohere: two calls": (
        "cohere",
        f"<|START_ACTION|>[\n{COHERE},\n{COHERE.replace('0', '1')}\n]<|END_ACTION|>",
        "",
        [CALL, CALL],
    ),
    "Command R: a plan before": ("command_r", f"Plan.\n{ONE_CALL['command_r']}\n", "Plan.\n", [CALL]),
    "Command R: the same word in prose": ("command_r", "Action: none. ```json", "Action: none. ```json", []),
    "Apertus: two calls": (
        "apertus",
        'So.<|tools_prefix|>[{"f": {"a": 1}}, {"get-weather_2": {}}]<|tools_suffix|>',
        "So.",
        [CALL, ("get-weather_2", "{}", True)],
    ),
    "Apertus: an unknown tool": (
        "apertus",
        '<|tools_prefix|>[{"g": {}}]<|tools_suffix|>',
        '<|tools_prefix|>[{"g": {}}]<|tools_suffix|>',
        [],
    ),
    "Apertus: not an object": ("apertus", "<|tools_prefix|>[1]", "<|tools_prefix|>[1]", []),
    "LFM2: an answer after": (
        "lfm2",
        "<|tool_call_start|>[f(s='it', a=1), f()]<|tool_call_end|>Checking.",
        "Checking.",
        [("f", '{"s": "it", "a": 1}', True), ("f", "{}", True)],
    ),
    "LFM2: asked for JSON": (
        "lfm2",
        f"<|tool_call_start|>[{A1}, {A1}]<|tool_call_end|>Checking.",
        "Checking.",
        [CALL, CALL],
    ),
    "LFM2: one call in JSON": ("lfm2", f"<|tool_call_start|>{A1}<|tool_call_end|>", "", [CALL]),
    "Llama: a list of Python after a marker": ("llama3_json", "<|python_start|>[f(a=1)]<|python_end|>", "", [CALL]),
    "Granite: text after": ("granite", f"<|tool_call|>[{A1}]\nDone.", "\nDone.", [CALL]),
    "Nemotron: two calls": ("nemotron", f"<TOOLCALL>[{A1}, {A1}]</TOOLCALL>", "", [CALL, CALL]),
    "xLAM: a list and text": ("xlam", f"[{A1}, {A1}]\nDone.", "\nDone.", [CALL, CALL]),
    "xLAM: a list that is none": ("xlam", '[{"name": "Bob"}, [1, 2]]', '[{"name": "Bob"}, [1, 2]]', []),
    "Llama: a call as code": ("llama3_json", "<|python_tag|>f.call(a=1)", "", [CALL]),
    "Llama: calls as code": ("llama3_json", "<|python_tag|>f.call(a=1); f(a=1)", "", [CALL, CALL]),
    "Llama: a bare list": ("llama3_json", f"[{A1}, {A1}]", "", [CALL, CALL]),
    "Llama: after prose": ("llama3_json", f"I'll look.\n\n{A1}", "I'll look.\n\n", [CALL]),
    "Llama: a list after prose": ("llama3_json", f"I'll look: [{A1}] ", "I'll look: ", [CALL]),
    "Llama: brackets in prose": ("llama3_json", f"x[0] {{a}} [see] {A1}", "x[0] {a} [see] ", [CALL]),
    "Llama: a call inside a JSON answer": (
        "llama3_json",
        f'{{"answer": {{"calls": [{A1}]}}}}',
        f'{{"answer": {{"calls": [{A1}]}}}}',
        [],
    ),
    "Llama: a call inside a list": ("llama3_json", f"[1, [{A1}]]", f"[1, [{A1}]]", []),
    "Llama: one brace too many": ("llama3_json", f"{A1}}}", "", [CALL]),
    **{
        f"Llama: invalid arguments {arguments}": (
            "llama3_json",
            f'{{"name": "f", "parameters": {arguments}}}',
            f'{{"name": "f", "parameters": {arguments}}}',
            [],
        )
        for arguments in ('{"a": oslo}', '{"a" 1}', '{"a": 1, "s": }', '{"a": 1,}', "{a: 1}", "oslo", '{"a": 01}')
    },
    "Llama: invalid, then valid": (
        "llama3_json",
        f'{{"name": "f", "parameters": {{"a": x}}}}; {A1}',
        '{"name": "f", "parameters": {"a": x}}',
        [CALL],
    ),
    "a raw newline in a string": (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"s": "a\nb\t\x01c",\n"a": 1}}</tool_call>',
        "",
        [("f", '{"s": "a\\nb\\t\\u0001c",\n"a": 1}', True)],
    ),
    "a raw newline after a backslash": (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"s": "a\\\nb"}}</tool_call>',
        "",
        [("f", '{"s": "a\\nb"}', True)],
    ),
    "escapes that JSON lacks": (
        "mistral",
        r"""[TOOL_CALLS]f[ARGS]{"s": "it\'s \d+ C:\users\u00e9 \\d \ud83d\ude00"}""",
        "",
        [("f", r"""{"s": "it's \\d+ C:\\users\u00e9 \\d \ud83d\ude00"}""", True)],
    ),
    "a raw newline in arguments encoded twice": (
        "hermes",
        r'<tool_call>{"name": "f", "arguments": "{\"s\": \"a\nb\"}"}</tool_call>',
        "",
        [("f", r'{"s": "a\nb"}', True)],
    ),
    "arguments that are a string": (
        "hermes",
        '<tool_call>{"name": "f", "arguments": "Oslo \\"x\\"\n\\ud83d\\ude00"}</tool_call>',
        "",
        [("f", '"Oslo \\"x\\"\\n😀"', True)],
    ),
    "arguments that are a blank string": (
        "hermes",
        '<tool_call>{"name": "f", "arguments": " "}</tool_call>',
        "",
        [("f", "{}", True)],
    ),
    "arguments encoded twice, in Python's quotes": (
        "hermes",
        '<tool_call>{"name": "f", "arguments": "{\'a\': True}"}</tool_call>',
        "",
        [("f", '{"a": true}', True)],
    ),
    "arguments that are a constant": (
        "hermes",
        '<tool_call>{"name": "f", "arguments": True}</tool_call>',
        "",
        [("f", "true", True)],
    ),
    "arguments that are a bare word": (
        "hermes",
        '<tool_call>{"name": "f", "arguments": Oslo}</tool_call>',
        "",
        [("f", '"Oslo"', True)],
    ),
    "a bad sibling before": ("mistral", f'[TOOL_CALLS] [{{"nam": "f"}}, {A1}]', '[TOOL_CALLS] [{"nam": "f"}', [CALL]),
    "a bad sibling between": (
        "mistral",
        f'[TOOL_CALLS] [{A1}, {{"name": 5, "x": {{"y": "}}]"}}}}, {A1}]',
        ', {"name": 5, "x": {"y": "}]"}}',
        [CALL, CALL],
    ),
    "a started sibling that goes wrong": (
        "hermes",
        f'<tool_call>[{{"name": "f", "arguments": {{"a": x!}}}}, {A1}]</tool_call>',
        "",
        [("f", '{"a": "x!"}', True), CALL],
    ),
    "a started sibling whose brackets do not match": (
        "mistral",
        f'[TOOL_CALLS] [{{"name": "f", "arguments": {{"a": [1}}}}, {A1}]',
        "",
        [("f", '{"a": [1]}', True), CALL],
    ),
    "a bad sibling in one marker": (
        "hermes",
        f"<tool_call>\n{{}}\n{A1}\n</tool_call>",
        "<tool_call>\n{}",
        [CALL],
    ),
    "a bad sibling in its own marker": (
        "hermes",
        f"<tool_call>\n{{x}}\n</tool_call>\n<tool_call>\n{A1}\n</tool_call>",
        "<tool_call>\n{x}\n</tool_call>\n",
        [CALL],
    ),
    "a bad Python sibling": ("pythonic", "[f(1), f(a=1)]", "[f(1)", [CALL]),
    "a Python sibling that goes wrong": (
        "pythonic",
        "[f(a=g(1)), f(a=1)]",
        "",
        [("f", '{"a": "g(1)"}', True), CALL],
    ),
    "an unknown Python sibling": ("pythonic", "[g(a=1), f(a=1)]", "[g(a=1)", [CALL]),
    "a bad tagged sibling": (
        "qwen3_coder",
        "<tool_call>\n<function=f>hm</function>\n<function=f>\n<parameter=a>1</parameter></function></tool_call>",
        "hm</function>\n",
        [("f", "{}", False), CALL],
    ),
    "an extra brace": ("hermes", f"<tool_call>\n{A1}}}\n</tool_call>", "", [CALL]),
    "two extra braces and another call": (
        "hermes",
        f"<tool_call>\n{A1}}}\n}}\n</tool_call>\n<tool_call>\n{A1}}}]</tool_call>",
        "}\n}\n</tool_call>\n",
        [CALL, CALL],
    ),
    "an extra brace at the end": ("hermes", f"<tool_call>\n{A1}}}", "", [CALL]),
    "a brace and text": ("hermes", f"<tool_call>{A1}}} x", "} x", [CALL]),
    "values encoded as JSON": (
        "qwen3_coder",
        r'<function=all><parameter=o>"{\"x\": 1}"</parameter><parameter=l>"[1]"</parameter><parameter=i>"5"</parameter>'
        '<parameter=b>"true"</parameter><parameter=s>"5"</parameter><parameter=n>"x"</parameter></function>',
        "",
        [("all", r'{"o": {"x": 1}, "l": [1], "i": 5, "b": true, "s": "\"5\"", "n": "\"x\""}', True)],
    ),
}


def cuts(text: str) -> Iterator[list[str]]:
    yield [text]
    yield list(text)
    for i in range(1, len(text)):
        yield [text[:i], text[i:]]


def check(case, content: str, reasoning: str, calls: list) -> None:
    for pieces in cuts(case.text):
        events = case.stream(pieces)
        assert "".join(event.source for event in events) == case.text, pieces
        parsed = assemble(events)
        found = [(call.name, call.arguments, call.complete) for call in parsed.calls]
        assert (parsed.content, parsed.reasoning, found) == (content, reasoning, calls), pieces


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output(make_case, name: str) -> None:
    format, text, content, calls = OUTPUTS[name]
    check(make_case(name, text, format), content, "", calls)


def test_every_format_has_an_example() -> None:
    assert set(ONE_CALL) == set(TOOL_FORMATS)


@pytest.mark.parametrize("format", BESIDE_THINKING)
@pytest.mark.parametrize("opened", [False, True], ids=["", "opened by the prompt"])
@pytest.mark.parametrize("gap", ["", "\n", "\n\n"])
def test_a_call_in_reasoning_that_is_never_closed(make_case, format: str, opened: bool, gap: str) -> None:
    """The reasoning ended before the call: the model left its end marker out."""
    for text in (f"hm{gap}{ONE_CALL[format]}", f"hm{gap}{ONE_CALL[format]}\n"):
        options = {"reasoning_open": opened}
        case = make_case("", ("" if opened else "<think>\n") + text, format, options=options)
        parsed = assemble(case.stream([case.text]))
        assert [json.loads(call.arguments) for call in parsed.calls] == [{"a": 1}]
        check(case, "", "hm", [(call.name, call.arguments, True) for call in parsed.calls])


@pytest.mark.parametrize("format", BESIDE_THINKING)
def test_a_call_in_reasoning_that_is_closed(make_case, format: str) -> None:
    """The model only thinks about the call."""
    inner = f"hm\n{ONE_CALL[format]}\n\nor </thin"
    check(make_case("", f"<think>\n{inner}\n</think>\n\nYes.", format), "Yes.", inner, [])


def test_calls_in_and_after_reasoning(make_case) -> None:
    call = f"<tool_call>\n{A1}\n</tool_call>"
    check(make_case("", f"<think>\na{call}{call}\nb</think>\n{call}"), "", f"a{call}{call}\nb", [CALL])
    check(make_case("", f"<think>\na\n{call}\n{call}"), "", "a", [CALL, CALL])
    check(make_case("", f"<think>\na\n{call}\n<think>\nb\n</think>\nc"), "c", "ab", [CALL])
    marker = '<tool_call>{"name": "f", "arguments": {"s": "</think>"}}</tool_call>'
    check(make_case("", f"<think>\na\n{marker}"), "", "a", [("f", '{"s": "</think>"}', True)])
    check(make_case("", f"<think>\na\n{call} and so"), " and so", "a", [CALL])
    unknown = '<tool_call>{"name": "g", "arguments": {}}</tool_call>'
    check(make_case("", f"<think>\na\n{unknown}"), "", f"a\n{unknown}", [])


@pytest.mark.parametrize("text", ["</think>Yes.", "</think>\n\nYes.", "\n</think>\nYes."])
def test_an_end_of_reasoning_alone(make_case, text: str) -> None:
    check(make_case("", text), "Yes.", "", [])
    check(make_case("", f"<think>\nhm</think>\n{text}"), "Yes.", "hm", [])


def test_an_end_of_reasoning_alone_before_a_call(make_case) -> None:
    check(make_case("", f"</think>\n\n<tool_call>{A1}</tool_call>"), "", "", [CALL])


def test_ids_that_the_model_writes() -> None:
    (call,) = parse(KIMI, "kimi_k2").calls
    assert (call.id, call.name) == ("functions.f:0", "f")


# Arguments that are not JSON, and the value that is made of them.
REPAIRED = {
    '{"b": True, "a": None}': {"b": True, "a": None},
    '{"a": x}': {"a": "x"},
    '{"a": New York, "b": 12:30, c: 1}': {"a": "New York", "b": "12:30", "c": 1},
    '{"a": [1, 2,], "b": {"c": 1,},}': {"a": [1, 2], "b": {"c": 1}},
    '{"a": NaN, "b": -Infinity, "c": undefined}': {"a": None, "b": None, "c": None},
    '{"a": 0x10, "b": +1, "c": .5, "d": 1., "e": 1_000, "f": -0b11}': {
        "a": 16,
        "b": 1,
        "c": 0.5,
        "d": 1.0,
        "e": 1000,
        "f": -3,
    },
    '{"a": 017, "b": 10%, "c": -}': {"a": "017", "b": "10%", "c": "-"},
    '{"a": /* c */ 1, // d, "e"\n"b": 2 # f }\n}': {"a": 1, "b": 2},
    '/* "x" */ {"a": 1}': {"a": 1},
    """{"a": 'x', 'b': 'it's'}""": {"a": "x", "b": "it's"},
    '{"a": "say "hi" now", "b": "x"}': {"a": 'say "hi" now', "b": "x"},
    '{"a": "x" "b": 1\n"c": [1 2, "d" "e"]}': {"a": "x", "b": 1, "c": ["1 2", "d", "e"]},
    '{"a" 1, "b": , "c"}': {"a": 1, "b": None, "c": None},
    '{"a" = 1, b=2}': {"a": 1, "b": 2},
    '{,"a": 1,, "b":: 2]}': {"a": 1, "b": 2},
    '{"a": {"b": [1, (2, 3}': {"a": {"b": [1, [2, 3]]}},
    "{a: {b: [c, d]}}": {"a": {"b": ["c", "d"]}},
    '{"a": f(1, "x"), "b": a[0]}': {"a": 'f(1, "x")', "b": "a[0]"},
    '{"a": "C:\\new\\q", "b": "a\tb"}': {"a": "C:\new\\q", "b": "a\tb"},
    '{"a": "\ud83d"}': {"a": "\ud83d"},
    "Oslo": "Oslo",
    "0x10": 16,
    "[True, (None,), {}]": [True, [None], {}],
}


def whole(text: str) -> object:
    return json.loads(text, parse_constant=lambda constant: pytest.fail(constant))


@pytest.mark.parametrize("format", ["hermes", "mistral", "mistral_named", "deepseek_v3", "kimi_k2", "nemotron"])
@pytest.mark.parametrize("written", REPAIRED)
def test_arguments_are_repaired(make_case, written: str, format: str) -> None:
    text = ONE_CALL[format].replace('{"a": 1}', written)
    if format in ("mistral_named", "deepseek_v3", "kimi_k2") and not written.startswith("{"):
        return  # an object must follow the name
    for pieces in cuts(text):
        parsed = assemble(make_case("", text, format).stream(pieces))
        assert [(call.name, whole(call.arguments), call.complete) for call in parsed.calls] == [
            ("f", REPAIRED[written], True)
        ], pieces
        assert not parsed.content


@pytest.mark.parametrize("written", ["x", "g(1, [2])", "a + b", "NaN", "0x10", "-1_0", "{'a': (1,), 2: None}", "[1 2]"])
@pytest.mark.parametrize("format", ["pythonic", "gemma3", "llama3_json"])
def test_values_in_code_are_json(make_case, written: str, format: str) -> None:
    text = {"llama3_json": "<|python_tag|>f.call(a=1)"}.get(format, ONE_CALL[format]).replace(
        "a=1", f"s=1, a={written}"
    )
    for pieces in cuts(text):
        (call,) = assemble(make_case("", text, format).stream(pieces)).calls
        assert set(whole(call.arguments)) == {"s", "a"} and call.complete, pieces


PARTS = [
    *"{}[]():,\"'<#",
    "/*",
    "*/",
    "//",
    "\n",
    " ",
    "\\",
    "a",
    "True",
    "0x1",
    "-",
    '"k": ',
    '"v"',
    "'w'",
    "null",
    "1",
]


@given(parts=st.lists(st.sampled_from(PARTS), max_size=14), format=st.sampled_from(["hermes", "mistral", "pythonic"]))
@settings(max_examples=1500, deadline=None)
def test_whatever_the_arguments_they_are_json(parts: list[str], format: str) -> None:
    """Unless the output ends inside the call, and then they are the beginning of it."""
    text = ONE_CALL[format].replace('{"a": 1}', "{" + "".join(parts) + "}").replace("a=1", "a=" + "".join(parts) + ")")
    for call in parse(text + '\n"}\'")]}*/\n</tool_call>)]}\n<a', format, new_id=lambda: "").calls[:-1]:
        whole(call.arguments)
    for call in parse(text + "\nThat is all.", format, new_id=lambda: "").calls:
        assert not call.complete or whole(call.arguments) is not ...


def test_types_that_json_schema_lacks(make_case) -> None:
    types = {"n": "float", "i": "int", "b": "bool", "o": "dict", "l": "List", "s": "str"}
    tool = Tool("t", {"type": "object", "properties": {key: {"type": type} for key, type in types.items()}})
    values = {"n": "1.5", "i": "2", "b": "true", "o": '{"x": 1}', "l": "[1]", "s": "5"}
    text = "".join(f"<parameter={key}>{value}</parameter>" for key, value in values.items())
    (call,) = parse(f"<function=t>{text}</function>", "qwen3_coder", tools=[tool]).calls
    assert json.loads(call.arguments) == {"n": 1.5, "i": 2, "b": True, "o": {"x": 1}, "l": [1], "s": "5"}
