"""Outputs with the JSON calls of Llama and Mistral."""

from __future__ import annotations

from .cases import A1, A1_CALL, Case

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
