"""Outputs with calls in tags, and in Python."""

from __future__ import annotations

from .cases import A1, A1_CALL, Case

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
