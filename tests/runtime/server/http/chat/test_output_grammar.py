"""The grammar of a chat's whole output, walked with llguidance: what it takes and what not, for every format."""

from __future__ import annotations

import json
from typing import Any

import pytest

from branchwise.runtime.chat.conversation import OfferedTool
from branchwise.runtime.chat.template import ChatTemplate
from branchwise.runtime.chat.tools.definitions import Tool
from branchwise.runtime.chat.tools.reasoning_formats import reasoning_format
from branchwise.runtime.config import EngineConfig, ServerConfig
from branchwise.runtime.errors import InvalidRequest
from branchwise.runtime.grammar.llg import GrammarBackend
from branchwise.runtime.models.folder import SHIPPED
from branchwise.runtime.sampling_params import SamplingParams
from branchwise.runtime.server.http.chat.output_grammar import OutputGrammar, calls_for
from branchwise.runtime.server.http.chat.tool_use import Formats
from branchwise.runtime.tokenizer.tokenizer import Tokenizer

SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"], "additionalProperties": False}
TOOLS = [Tool("f", SCHEMA, strict=True), Tool("g", {"type": "object", "properties": {"y": {"type": "string"}}})]
CALLS = {  # a right call, and the same with a wrong argument
    "hermes": ('<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>', ('"x": 1', '"x": "a"')),
    "llama3_json": ('{"name": "f", "parameters": {"x": 1}}', ('"x": 1', '"x": "a"')),
    "mistral": ('[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}]', ('"x": 1', '"x": "a"')),
    "mistral_named": ('[TOOL_CALLS]f[ARGS]{"x": 1}', ('"x": 1', '"x": "a"')),
    "qwen3_coder": (
        "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>",
        ("\n1\n", "\na\n"),
    ),
    "pythonic": ("[f(x=1)]", ("x=1", 'x="a"')),
}
THINK = reasoning_format("think")
ASKED = "<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(SHIPPED)


@pytest.fixture(scope="module")
def takes(tokenizer: Tokenizer) -> Any:
    """Whether an output may be exactly this text."""
    backend = GrammarBackend(tokenizer, tokenizer.vocab_size, [2, 0])

    def walk(params: SamplingParams, text: str) -> bool:
        constraint = params.constraint
        assert constraint is not None
        matcher = backend.compile(constraint)
        ids = tokenizer.encode(text, add_special_tokens=False).tolist()
        return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())

    return walk


def offered(tools: list[Tool]) -> list[OfferedTool]:
    return [OfferedTool(tool, {}, f"tools[{i}].parameters") for i, tool in enumerate(tools)]


def applied(format: str, prompt: str = ASKED, params: SamplingParams | None = None, **how: Any) -> SamplingParams:
    thoughts = how.pop("thoughts", None)
    forced, named = how.pop("forced", False), how.pop("named", None)
    chosen = [tool for tool in offered(TOOLS) if named in (None, tool.tool.name)]
    calls = calls_for(format, chosen, **{"enforced": forced, "parallel": True, **how})
    return OutputGrammar(calls, forced, thoughts, {}).applied(params or SamplingParams(), prompt)


@pytest.mark.parametrize("format", CALLS)
def test_a_forced_call_and_nothing_else(takes: Any, format: str) -> None:
    call, (right, wrong) = CALLS[format]
    for params in (applied(format, forced=True), applied(format, forced=True, named="f", parallel=False)):
        assert takes(params, call)
        assert not takes(params, call.replace(right, wrong))
        assert not takes(params, "Hello.")
        assert not takes(params, "")
    assert not takes(applied(format, forced=True, named="g"), call)


@pytest.mark.parametrize("format", CALLS)
def test_a_strict_tool_leaves_the_answer_free(takes: Any, format: str) -> None:
    call, (right, wrong) = CALLS[format]
    params = applied(format)
    assert takes(params, call)
    assert not takes(params, call.replace(right, wrong))
    for text in ("Hello.", "", "a < b, {x} and [y]", "two\nlines"):
        assert takes(params, text)
    if format in ("hermes", "qwen3_coder", "mistral", "mistral_named"):
        assert takes(params, "Let me see. " + call)


@pytest.mark.parametrize("format", ["hermes", "llama3_json", "pythonic"])
def test_thinking_comes_before_calls(takes: Any, format: str) -> None:
    call, _ = CALLS[format]
    params = applied(format, forced=True, thoughts=THINK)
    assert takes(params, call)
    assert takes(params, f"<think>\nf or g?\n</think>\n\n{call}")
    assert not takes(params, "<think>\nf or g?\n</think>\n\nNeither.")
    opened = applied(format, ASKED + "<think>\n", forced=True, thoughts=THINK)
    assert takes(opened, f"f or g?\n</think>\n\n{call}")
    assert not takes(opened, call)
    closed = applied(format, ASKED + "<think>\n\n</think>\n\n", forced=True, thoughts=THINK)
    assert takes(closed, call)
    assert not takes(closed, f"<think>\n</think>\n\n{call}")


def test_an_answers_schema_holds_after_thinking_and_not_for_calls(takes: Any) -> None:
    asked = SamplingParams(json_schema=json.dumps(SCHEMA))
    grammar = OutputGrammar(None, False, THINK, {})
    params = grammar.applied(asked, ASKED)
    assert takes(params, '{"x": 1}')
    assert takes(params, '<think>one</think>\n\n{"x": 1}')
    assert not takes(params, '{"x": "a"}')
    assert not takes(params, "<think>one</think>\n\nOne.")
    assert grammar.applied(asked, ASKED + "<think>\n\n</think>\n\n") is asked, "nothing to add"
    chosen = grammar.applied(SamplingParams(choices=("yes", "no")), ASKED + "<think>\n")
    assert takes(chosen, "hm</think>\n\nyes")
    assert not takes(chosen, "yes")


@pytest.mark.parametrize("format", CALLS)
def test_a_strict_tool_beside_an_answer_with_a_schema(takes: Any, format: str) -> None:
    call, (right, wrong) = CALLS[format]
    both = applied(format, params=SamplingParams(json_schema=json.dumps(SCHEMA)))
    assert takes(both, call)
    assert takes(both, '{"x": 1}')
    assert not takes(both, "Hello.")
    assert not takes(both, call.replace(right, wrong))


def test_nothing_to_enforce_is_no_grammar() -> None:
    params = SamplingParams()
    assert calls_for("hermes", offered(TOOLS[1:]), enforced=False, parallel=True) is None
    assert OutputGrammar(None, False, THINK, {}).applied(params, ASKED) is params


def test_what_does_not_go_together() -> None:
    regex = SamplingParams(regex="a+")
    for forced in (False, True):
        with pytest.raises(InvalidRequest, match="cannot be combined") as refused:
            applied("hermes", params=regex, forced=forced)
        assert refused.value.path == "regex"


@pytest.mark.parametrize("format", CALLS)
def test_a_forced_call_leaves_no_answer_to_format(takes: Any, format: str) -> None:
    """Clients send both: instructor names a tool and the same schema as the answer's format."""
    asked = SamplingParams(json_schema=json.dumps(SCHEMA))
    params = applied(format, params=asked, forced=True)
    call, (right, wrong) = CALLS[format]
    assert takes(params, call)
    assert not takes(params, call.replace(right, wrong))
    assert not takes(params, '{"x": 1}') and params.json_schema is None
    assert params == applied(format, forced=True)


def test_a_schema_that_cannot_be_read_names_its_tool() -> None:
    tools = [*TOOLS, Tool("h", {"type": "object", "x-guidance": {}}, strict=True)]
    with pytest.raises(InvalidRequest) as refused:
        calls_for("hermes", offered(tools), enforced=False, parallel=True)
    assert refused.value.path == "tools[2].parameters"


@pytest.mark.parametrize(
    ("inner", "problem"),
    [
        ({"type": "array", "uniqueItems": True}, "uses uniqueItems at properties.ids.uniqueItems, which"),
        ({"type": "string", "pattern": "a(?!b)"}, "uses pattern at properties.ids.pattern, with look-around"),
        ({"type": "integer", "maximum": 2**53}, "uses maximum at properties.ids.maximum, with 9007199254740992"),
    ],
)
def test_what_a_tools_schema_cannot_have_is_named_by_tool_and_path(inner: dict[str, Any], problem: str) -> None:
    tool = Tool("find", {"type": "object", "properties": {"ids": inner}}, strict=True)
    with pytest.raises(InvalidRequest) as refused:
        calls_for("hermes", offered([*TOOLS, tool]), enforced=False, parallel=True)
    assert str(refused.value).startswith(f"tools[2].parameters of 'find' {problem}")


def test_an_answers_schema_that_cannot_be_read_is_an_error_about_it() -> None:
    asked = SamplingParams(json_schema='{"x-guidance": {}}')
    for calls in (None, calls_for("hermes", offered(TOOLS), enforced=False, parallel=True)):
        with pytest.raises(InvalidRequest, match="x-guidance") as refused:
            OutputGrammar(calls, False, THINK, {}).applied(asked, ASKED + "<think>\n")
        assert refused.value.path == "json_schema"


def test_markers_that_are_special_tokens(tokenizer: Tokenizer) -> None:
    """They are tokens of the grammar, never text."""
    special = {"[TOOL_CALLS]": 1}
    backend = GrammarBackend(tokenizer, tokenizer.vocab_size, [2, 0])
    calls = calls_for("mistral_named", offered(TOOLS), enforced=False, parallel=True)
    constraint = OutputGrammar(calls, False, None, special).applied(SamplingParams(), ASKED).constraint
    assert constraint is not None
    for first, rest, right in (([1], 'f[ARGS]{"x": 1}', True), ([1], 'f[ARGS]{"x": "a"}', False), ([], "Hi.", True)):
        ids = first + tokenizer.encode(rest, add_special_tokens=False).tolist()
        matcher = backend.compile(constraint)
        assert (matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()) is right


def test_the_channels_of_harmony(takes: Any) -> None:
    """Thinking and an answer, or a call, are messages of their own."""
    harmony = reasoning_format("harmony")
    thought = "<|channel|>analysis<|message|>one<|end|><|start|>assistant"
    asked = OutputGrammar(None, False, harmony, {}).applied(SamplingParams(json_schema=json.dumps(SCHEMA)), ASKED)
    answer = '<|channel|>final<|message|>{"x": 1}'
    assert takes(asked, answer) and takes(asked, thought + answer)
    assert not takes(asked, '{"x": 1}') and not takes(asked, answer.replace("1", '"a"'))
    forced = applied("harmony", forced=True, thoughts=harmony)
    call = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"x": 1}'
    assert takes(forced, call) and takes(forced, thought + call)
    assert not takes(forced, thought + answer) and not takes(forced, call.replace("1", '"a"'))


BEHIND = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"x": 1}'
BEFORE = ' to=functions.f<|channel|>commentary json<|message|>{"x": 1}'
ANALYSIS = "<|channel|>analysis<|message|>one < two<|end|><|start|>assistant"
PREAMBLE = "<|channel|>commentary<|message|>Let me see.<|end|><|start|>assistant"


@pytest.mark.parametrize("call", [BEHIND, BEFORE])
def test_a_strict_tool_among_the_messages_of_harmony(takes: Any, call: str) -> None:
    """A call may follow thinking and a preamble; its recipient may stand on either side of the channel."""
    harmony = reasoning_format("harmony")
    params = applied("harmony", thoughts=harmony)
    for before in ("", ANALYSIS, ANALYSIS + PREAMBLE, ANALYSIS + ANALYSIS):
        assert takes(params, before + call)
        assert not takes(params, before + call.replace("1", '"a"'))
        assert not takes(params, before + call.replace("functions.f", "functions.h"))
        assert takes(params, before + "<|channel|>final<|message|>Hello.\nTwo lines.")
    assert takes(params, call.replace("functions.f", "functions.g").replace('"x"', '"z"')), "g is not strict"
    opened = applied("harmony", ASKED + "<|channel|>analysis<|message|>", thoughts=harmony)
    assert takes(opened, "one<|end|><|start|>assistant" + call)
    assert not takes(opened, "one<|end|><|start|>assistant" + call.replace("1", '"a"'))
    both = applied("harmony", thoughts=harmony, params=SamplingParams(json_schema=json.dumps(SCHEMA)))
    for before in ("", ANALYSIS, ANALYSIS + PREAMBLE):
        assert takes(both, before + call)
        assert takes(both, before + '<|channel|>final<|message|>{"x": 1}')
        assert not takes(both, before + "<|channel|>final<|message|>Hello.")
        assert not takes(both, before + call.replace("1", '"a"'))


def test_special_tokens_that_are_parts_of_markers() -> None:
    class Tokens:
        special_ids = frozenset({1, 2, 3})
        token_text = staticmethod({1: "<|channel>", 2: "<channel|>", 3: "<eos>"}.__getitem__)

    template = ChatTemplate("{{ messages[0].content.split('<channel|>')[-1] }}", {})
    found = Formats.of(ServerConfig(engine=EngineConfig()), Tokens(), template)  # type: ignore[arg-type]
    assert (found.reasoning, found.special) == (reasoning_format("gemma4"), {"<|channel>": 1, "<channel|>": 2})
