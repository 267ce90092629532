"""The grammar of calls: what it allows is what the parser reads, judged by the engine that will enforce it."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest

from branchwise.runtime.chat.tools.channel_grammar import message_rules
from branchwise.runtime.chat.tools.definitions import Tool
from branchwise.runtime.chat.tools.formats import TOOL_FORMATS, markers
from branchwise.runtime.chat.tools.grammar import CallGrammar, call_grammar
from branchwise.runtime.chat.tools.reasoning_formats import REASONING_FORMATS, reasoning_format
from branchwise.runtime.config import EngineConfig, ServerConfig
from branchwise.runtime.errors import LoadError
from branchwise.runtime.sampling_params import SamplingParams
from branchwise.runtime.server.http.chat.output_grammar import OutputGrammar
from branchwise.runtime.server.startup import check_parsers

from .cases import parse

llguidance = pytest.importorskip("llguidance")

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer", "minimum": 1},
        "unit": {"type": "string", "enum": ["C", "F"]},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"tag": {"type": "boolean"}},
}
TOOLS = [Tool("weather", SCHEMA, strict=True), Tool("now", {"type": "object", "properties": {}})]
ARGUMENTS = {"city": 'Köln "x" <b>', "days": 3, "tags": [True]}


@cache
def tokenizer_of(names: tuple[str, ...]) -> Any:
    """Bytes as tokens, then ``names``."""
    tokens = [bytes([i]) for i in range(256)]
    tokens += [b"\xff" + name.encode() for name in names] + [b"\xff<eos>"]

    class Wrapper:
        eos_token_id = len(tokens) - 1
        bos_token_id = None

        def __init__(self) -> None:
            self.tokens = tokens
            self.special_token_ids = list(range(256, len(tokens)))

        def __call__(self, text: str) -> list[int]:
            return list(text.encode() if isinstance(text, str) else text)

    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(Wrapper()))


def accepts(grammar: str, text: str, specials: dict[str, int] | None = None) -> bool:
    """Whether the whole of ``text`` is in ``grammar``, over bytes as tokens and ``specials``."""
    names = tuple(sorted(specials or {}, key=lambda name: (specials or {})[name]))
    matcher = llguidance.LLMatcher(tokenizer_of(names), llguidance.LLMatcher.grammar_from_lark(grammar))
    assert not matcher.is_error(), matcher.get_error()
    ids: list[int] = []
    while text:
        name = next((name for name in names if text.startswith(name)), "")
        ids += [256 + names.index(name)] if name else list(text[0].encode())
        text = text[len(name) or 1 :]
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


def written(format: str, *calls: tuple[str, dict[str, Any]]) -> str:
    """As the checkpoints' templates write calls."""

    def xml(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value)

    def envelope(name: str, arguments: dict[str, Any], key: str = "arguments") -> str:
        return f'{{"name": "{name}", "{key}": {json.dumps(arguments, ensure_ascii=False)}}}'

    def keywords(arguments: dict[str, Any]) -> str:
        return ", ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in arguments.items())

    def tags(arguments: dict[str, Any], opening: str, closing: str) -> str:
        return "".join(f"{opening % key}{xml(value)}{closing}\n" for key, value in arguments.items())

    def quoted(value: Any, quote: str) -> str:
        return f"{quote}{value}{quote}" if isinstance(value, str) else json.dumps(value)

    def bare(arguments: dict[str, Any], quote: str) -> str:
        return ",".join(f"{key}:{quoted(value, quote)}" for key, value in arguments.items())

    def named(name: str, arguments: dict[str, Any]) -> str:
        return f'"tool_name": "{name}", "parameters": {json.dumps(arguments, ensure_ascii=False)}'

    def dsml(arguments: dict[str, Any]) -> str:
        declared = {key: "true" if isinstance(value, str) else "false" for key, value in arguments.items()}
        opening = '<｜DSML｜parameter name="%s" string="%s">'
        return "".join(
            f"{opening % (key, declared[key])}{xml(value)}</｜DSML｜parameter>\n" for key, value in arguments.items()
        )

    match format:
        case "hermes":
            return "\n".join(f"<tool_call>\n{envelope(*call)}\n</tool_call>" for call in calls)
        case "llama3_json":
            return "; ".join(envelope(*call, key="parameters") for call in calls)
        case "mistral":
            return f"[TOOL_CALLS] [{', '.join(envelope(*call) for call in calls)}]"
        case "nemotron":
            return f"<TOOLCALL>[{', '.join(envelope(*call) for call in calls)}]</TOOLCALL>"
        case "harmony":
            header = "<|channel|>commentary to=functions.%s <|constrain|>json<|message|>"
            return "<|call|><|start|>assistant".join(header % n + json.dumps(a, ensure_ascii=False) for n, a in calls)
        case "minimax_m1":
            lines = "\n".join(envelope(*call) for call in calls)
            return f"<tool_calls>\n{lines}\n</tool_calls>"
        case "apriel":
            return f"<tool_calls>[{', '.join(envelope(*call) for call in calls)}]</tool_calls>"
        case "xlam":
            return f"[{', '.join(envelope(*call) for call in calls)}]"
        case "mistral_named":
            return "".join(f"[TOOL_CALLS]{name}[ARGS]{json.dumps(a, ensure_ascii=False)}" for name, a in calls)
        case "pythonic":
            return f"[{', '.join(f'{name}({keywords(a)})' for name, a in calls)}]"
        case "gemma3":
            return f"```tool_code\n[{', '.join(f'{name}({keywords(a)})' for name, a in calls)}]\n```"
        case "deepseek_v31":
            inner = (f"{name}<｜tool▁sep｜>{json.dumps(a, ensure_ascii=False)}" for name, a in calls)
            body = "".join(f"<｜tool▁call▁begin｜>{call}<｜tool▁call▁end｜>" for call in inner)
            return f"<｜tool▁calls▁begin｜>{body}<｜tool▁calls▁end｜>"
        case "deepseek_v3":
            inner = (f"{name}\n```json\n{json.dumps(a, ensure_ascii=False)}\n```" for name, a in calls)
            body = "\n".join(f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{call}<｜tool▁call▁end｜>" for call in inner)
            return f"<｜tool▁calls▁begin｜>{body}<｜tool▁calls▁end｜>"
        case "kimi_k2":
            numbered = (
                (f"functions.{name}:{i}", json.dumps(a, ensure_ascii=False)) for i, (name, a) in enumerate(calls)
            )
            inner = (f"{id}<|tool_call_argument_begin|>{a}" for id, a in numbered)
            body = "".join(f"<|tool_call_begin|>{call}<|tool_call_end|>" for call in inner)
            return f"<|tool_calls_section_begin|>{body}<|tool_calls_section_end|>"
        case "functiongemma":
            inner = (f"call:{name}{{{bare(a, '<escape>')}}}" for name, a in calls)
            return "".join(f"<start_function_call>{call}<end_function_call>" for call in inner)
        case "gemma4":
            inner = (f"call:{name}{{{bare(a, GEMMA_QUOTE)}}}" for name, a in calls)
            return "".join(f"<|tool_call>{call}<tool_call|>" for call in inner)
        case "deepseek_v32" | "deepseek_v4":
            block = {"deepseek_v32": "function_calls", "deepseek_v4": "tool_calls"}[format]
            inner = (f'<｜DSML｜invoke name="{n}">\n{dsml(a)}</｜DSML｜invoke>\n' for n, a in calls)
            return f"<｜DSML｜{block}>\n{''.join(inner)}</｜DSML｜{block}>"
        case "cohere":
            lines = (f'    {{"tool_call_id": "{i}", {named(*call)}}}' for i, call in enumerate(calls))
            return "<|START_ACTION|>[\n" + ",\n".join(lines) + "\n]<|END_ACTION|>"
        case "command_r":
            blocks = (named(*call).replace(", ", ",\n        ", 1) for call in calls)
            body = ",\n".join(f"    {{\n        {block}\n    }}" for block in blocks)
            return f"Action:\n```json\n[\n{body}\n]\n```"
        case "apertus":
            inner = (f'{{"{name}": {json.dumps(a, ensure_ascii=False)}}}' for name, a in calls)
            return f"<|tools_prefix|>[{', '.join(inner)}]<|tools_suffix|>"
        case "lfm2":
            return f"<|tool_call_start|>[{', '.join(f'{name}({keywords(a)})' for name, a in calls)}]<|tool_call_end|>"
        case "granite":
            return f"<|tool_call|>[{', '.join(envelope(*call) for call in calls)}]"
        case "glm45":
            inner = (
                f"{name}\n{tags(a, '<arg_key>%s</arg_key>' + chr(10) + '<arg_value>', '</arg_value>')}"
                for name, a in calls
            )
            return "\n".join(f"<tool_call>{call}</tool_call>" for call in inner)
        case "glm47":
            inner = (
                name
                + "".join(f"<arg_key>{key}</arg_key><arg_value>{xml(value)}</arg_value>" for key, value in a.items())
                for name, a in calls
            )
            return "".join(f"<tool_call>{call}</tool_call>" for call in inner)
        case "minimax_m2":
            inner = (f'<invoke name="{n}">\n{tags(a, MINIMAX, "</parameter>")}</invoke>\n' for n, a in calls)
            return f"<minimax:tool_call>\n{''.join(inner)}</minimax:tool_call>"
    inner = (f"<function={name}>\n{tags(a, QWEN, PADDED_END)}</function>\n" for name, a in calls)
    outer = "seed:tool_call" if format == "seed_oss" else "tool_call"
    return "\n".join(f"<{outer}>\n{call}</{outer}>" for call in inner)


GEMMA_QUOTE, GLM = '<|"|>', "<arg_key>%s</arg_key>\n<arg_value>"
QWEN, MINIMAX, PADDED_END = "<parameter=%s>\n", '<parameter name="%s">', "\n</parameter>"


@pytest.fixture(params=sorted(TOOL_FORMATS))
def format(request: pytest.FixtureRequest) -> str:
    return request.param


def test_what_it_allows_is_what_is_parsed(format: str) -> None:
    grammar = call_grammar(format, TOOLS).lark()
    calls = [("weather", ARGUMENTS), ("now", {}), ("weather", {"city": "", "days": 1, "unit": "C"})]
    for count in (1, 2, 3):
        text = written(format, *calls[:count])
        assert accepts(grammar, text), text
        parsed = parse(text, format, tools=TOOLS)
        assert [(call.name, json.loads(call.arguments)) for call in parsed.calls] == calls[:count]
        assert not parsed.content and all(call.complete for call in parsed.calls)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("weather", {"city": "x"}),
        ("weather", {"city": "x", "days": 0}),
        ("weather", {"city": "x", "days": "soon"}),
        ("weather", {"city": "x", "days": 1, "unit": "K"}),
        ("weather", {"city": "x", "days": 1, "tags": [1]}),
        ("weather", {"city": "x", "days": 1, "other": 1}),
        ("then", {}),
    ],
)
def test_what_it_forbids(format: str, name: str, arguments: dict[str, Any]) -> None:
    text = written(format, (name, arguments))
    assert not accepts(call_grammar(format, TOOLS).lark(), text)


def test_an_answer_without_calls_is_forbidden(format: str) -> None:
    grammar = call_grammar(format, TOOLS).lark()
    assert not accepts(grammar, "") and not accepts(grammar, "Hello.")


def test_a_named_tool(format: str) -> None:
    grammar = call_grammar(format, TOOLS[1:]).lark()
    assert accepts(grammar, written(format, ("now", {})))
    assert not accepts(grammar, written(format, ("weather", ARGUMENTS)))
    with pytest.raises(ValueError, match="there are no tools"):
        call_grammar(format, [])


def test_one_call_only(format: str) -> None:
    grammar = call_grammar(format, TOOLS, parallel=False).lark()
    assert accepts(grammar, written(format, ("now", {})))
    assert not accepts(grammar, written(format, ("now", {}), ("now", {})))


def test_armed_by_a_trigger(format: str) -> None:
    grammar = call_grammar(format, TOOLS)
    text = written(format, ("weather", ARGUMENTS), ("now", {}))
    fired = [trigger for trigger in grammar.triggers if text.startswith(trigger)]
    assert len(fired) == 1
    assert accepts(grammar.lark(after=fired[0]), text[len(fired[0]) :])
    assert not accepts(grammar.lark(after=fired[0]), text)
    with pytest.raises(ValueError, match="no call begins with"):
        grammar.lark(after="Hello")


def test_markers_that_are_special_tokens() -> None:
    specials = {"[TOOL_CALLS]": 256, "[ARGS]": 257}
    grammar = call_grammar("mistral_named", TOOLS).lark(specials)
    assert "<[256]>" in grammar and "<[257]>" in grammar and "TOOL_CALLS" not in grammar
    text = written("mistral_named", ("weather", ARGUMENTS), ("now", {}))
    assert accepts(grammar, text, specials)
    plain = call_grammar("mistral_named", TOOLS).lark()
    assert accepts(plain, text) and not accepts(plain, text, specials), "a special token is not its text"


@pytest.mark.parametrize("arguments", [ARGUMENTS, {"city": "Köln"}])
def test_the_messages_of_harmony_in_special_tokens(arguments: dict[str, Any]) -> None:
    """As a checkpoint has it: markers are tokens of the grammar, never text."""
    harmony = TOOL_FORMATS["harmony"]
    assert harmony.channels is not None
    specials = {name: 256 + i for i, name in enumerate(sorted(markers(harmony, None)))}
    grammar = call_grammar(harmony, TOOLS, only_strict=True)
    rules = "\n".join(["start: body", *message_rules(grammar, harmony.channels, specials), ""])
    thought = "<|channel|>analysis<|message|><end> of <|what<|end|><|start|>assistant"
    call = written("harmony", ("weather", arguments))
    template = " to=functions.weather<|channel|>commentary json<|message|>" + json.dumps(arguments, ensure_ascii=False)
    for text in (call, template):
        for before in ("", thought, thought * 2):
            assert accepts(rules, before + text, specials) is (arguments == ARGUMENTS)
    assert accepts(rules, thought + "<|channel|>final<|message|>Yes: <b>rain</b>.", specials)


def test_only_strict_tools_are_held_to_their_schema() -> None:
    loose = [
        Tool("weather", SCHEMA),
        Tool("now", {"type": "object", "properties": {}, "additionalProperties": False}, strict=True),
    ]
    grammar = call_grammar("hermes", loose, only_strict=True).lark()
    assert accepts(grammar, written("hermes", ("weather", {"days": "soon"})))
    assert not accepts(grammar, written("hermes", ("now", {"x": 1})))


def test_tags_are_plain_data() -> None:
    grammar = call_grammar("hermes", TOOLS)
    assert isinstance(grammar, CallGrammar)
    tag = grammar.tags[0]
    assert (tag.begin, tag.end) == ('<tool_call>\n{"name": "weather", "arguments": ', "}\n</tool_call>")
    assert tag.schema is SCHEMA and grammar.triggers == ("<tool_call>",) and not grammar.at_start


def test_tools_of_a_request() -> None:
    tools = [Tool("now", {"type": "object", "properties": {}})]
    assert accepts(call_grammar("hermes", tools).lark(), '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>')


@pytest.mark.parametrize("special", [False, True])
def test_markers_around_an_answer(special: bool) -> None:
    """Cohere's, as text and as the special tokens that its checkpoints have, which no text matches."""
    thoughts = reasoning_format("cohere_command4")
    named = markers(TOOL_FORMATS["cohere"], thoughts) if special else set()
    specials = {name: 256 + i for i, name in enumerate(sorted(named))}
    opened = "<|CHATBOT_TOKEN|><|START_THINKING|>"

    def takes(calls: CallGrammar | None, text: str, schema: str | None = None) -> bool:
        asked = SamplingParams(json_schema=schema)
        constraint = OutputGrammar(calls, False, thoughts, specials).applied(asked, opened).constraint
        assert constraint is not None
        return accepts(constraint.text, f"one<|END_THINKING|>{text}", specials)

    for end in ("", "<|END_TEXT|>"):
        assert takes(None, f'<|START_TEXT|>{{"days": 1}}{end}', '{"type": "object"}')
        assert not takes(None, f"<|START_TEXT|>one{end}", '{"type": "object"}')
    strict = call_grammar("cohere", TOOLS, only_strict=True)
    assert takes(strict, "<|START_TEXT|>Hello.<|END_TEXT|>")
    assert takes(strict, written("cohere", ("weather", ARGUMENTS), ("now", {})))
    assert not takes(strict, written("cohere", ("weather", {"city": 1})))


def test_a_special_token_inside_a_marker() -> None:
    """Gemma 4's thinking begins with a special token and a word."""
    specials = {"<|channel>": 256, "<channel|>": 257}
    grammar = OutputGrammar(None, False, reasoning_format("gemma4"), specials)
    constraint = grammar.applied(SamplingParams(json_schema='{"type": "object"}'), "<|turn>model\n").constraint
    assert constraint is not None
    assert accepts(constraint.text, '<|channel>thought\nhm <b><channel|>{"x": 1}', specials)
    assert accepts(constraint.text, '{"x": 1}', specials)
    assert not accepts(constraint.text, "<|channel>thought\nhm<channel|>one", specials)


def test_every_reasoning_format_beside_the_calls(format: str) -> None:
    """The grammar allows thinking, then a call or an answer, and the parser reads both; or a server refuses the pair at
    its start."""
    tools, call = TOOL_FORMATS[format], ("weather", {"city": "x", "days": 1})
    calls = call_grammar(tools, TOOLS, only_strict=True)
    for thoughts in REASONING_FORMATS.values():
        config = ServerConfig(engine=EngineConfig(model=""), tool_call_parser=format, reasoning_parser=thoughts.name)
        try:
            check_parsers(config)
        except LoadError as refused:
            assert (tools.channels != thoughts.channels) or "[" in tools.bare, refused
            continue
        thought = thoughts.begin + "hm" + thoughts.end + thoughts.after
        constraint = OutputGrammar(calls, False, thoughts, {}).applied(SamplingParams(), "").constraint
        assert constraint is not None
        for text, content in (
            (written(format, call), ""),
            (thoughts.answer + "Hello." + thoughts.answer_end, "Hello."),
        ):
            assert accepts(constraint.text, thought + text), (thoughts.name, text)
            parsed = parse(thought + text, tools, thoughts, TOOLS)
            assert (parsed.reasoning, parsed.content, len(parsed.calls)) == ("hm", content, not content)
