"""Constraints whose text holds added tokens that are written like special ones and are not: Qwen's, R1's, Gemma's."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from branchwise import Engine, SamplingParams
from branchwise.runtime.chat.conversation import OfferedTool
from branchwise.runtime.chat.tools.definitions import Tool
from branchwise.runtime.chat.tools.reasoning_formats import reasoning_format
from branchwise.runtime.constraint import Constraint
from branchwise.runtime.grammar.llg import GrammarBackend
from branchwise.runtime.grammar.matcher import Grammar, compute_masks
from branchwise.runtime.server.http.chat.output_grammar import OutputGrammar, calls_for
from branchwise.runtime.tokenizer.tokenizer import Tokenizer

X = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"], "additionalProperties": False}
CALL = r'<tool_call>\n\{"name": "f", "arguments": \{"x": ?[12]\}\}\n</tool_call>'


@pytest.fixture(scope="module")
def added() -> ModuleType:
    spec = importlib.util.spec_from_file_location("branchwise_added_tokens", Path(__file__).parent / "added_tokens.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def engine(added: ModuleType, checkpoints: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Random weights, and the added tokens of Qwen 3."""
    folder = checkpoints.build("llama-gqa", tmp_path_factory.mktemp("qwen") / "model", vocab_size=420)
    added.add(folder, added.QWEN, added.THINKING)
    with Engine(folder, kv_cache_tokens=4096, check_when_idle=True) as made:
        yield made


def bias(engine: Engine, **weights: float) -> dict[int, float]:
    ids = {text: engine.tokenizer.backend.token_to_id(text) for text in weights}
    return {id: weights[text] for text, id in ids.items() if id is not None}


THINK = {"<think>": 50.0, "</think>": 100.0}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        ({"regex": "<think>[ab]{2}"}, "<think>[ab]{2}"),
        ({"regex": "([ab]|<tool_call>|</think>){6}"}, "([ab]|<tool_call>|</think>){6}"),
        ({"choices": ("<tool_call>", "<think></think>", "a<b>")}, "<tool_call>|<think></think>|a<b>"),
        ({"json_schema": {"const": "<tool_response>ok</tool_response>"}}, '"<tool_response>ok</tool_response>"'),
        ({"json_schema": {"type": "string", "pattern": "^(<think>|<b>){3}$"}}, '"(<think>|<b>){3}"'),
        ({"ebnf": 'root ::= "<tool_call>" [ab]+ "</tool_call>"'}, "<tool_call>[ab]+</tool_call>"),
        ({"ebnf": 'start: "<|file_sep|>" /[a-c]{3}/ "<|fim_prefix|>"'}, r"<\|file_sep\|>[a-c]{3}<\|fim_prefix\|>"),
        ({"choices": ("e\u0301te\u0301 no\u0308",)}, "e\u0301te\u0301 no\u0308"),  # the normalizer composes it
    ],
)
def test_text_that_holds_added_tokens_is_matched(
    engine: Engine, constraint: dict[str, Any], pattern: str, temperature: float
) -> None:
    params = SamplingParams(**constraint, max_tokens=80, temperature=temperature, seed=3, n=4)
    for output in engine.generate("x", params).outputs:
        text = engine.tokenizer.decode(output.token_ids, skip_special_tokens=False).removesuffix("<|end|>")
        assert output.finish_reason == "stop" or re.search(r"\]\+", pattern)
        assert output.finish_reason == "length" or re.fullmatch(pattern, text), text


@pytest.mark.parametrize("marker", ["<tool_call>", "<think>", "</think>", "<|fim_prefix|>"])
def test_a_marker_can_be_sampled_as_one_token_and_in_pieces(engine: Engine, marker: str) -> None:
    id = engine.tokenizer.backend.token_to_id(marker)
    wanted = SamplingParams(regex=f"(a|{re.escape(marker)}){{4}}", temperature=0, max_tokens=60, logit_bias={id: 100})
    assert engine.generate("x", wanted).token_ids[:4] == [id] * 4
    pieces = {**dict.fromkeys(engine.tokenizer.encode("<", add_special_tokens=False).tolist(), 100.0), id: -100.0}
    spelled = engine.generate("x", SamplingParams(regex=f"(a|{re.escape(marker)})b", logit_bias=pieces, temperature=0))
    assert spelled.text == f"{marker}b" and id not in spelled.token_ids


def test_special_tokens_match_no_text(engine: Engine) -> None:
    special = engine.tokenizer.backend.token_to_id("<|vision_pad|>")
    params = SamplingParams(regex=r"<\|vision_pad\|>[ab]", temperature=0, logit_bias={special: 100}, max_tokens=40)
    output = engine.generate("x", params)
    assert special not in output.token_ids and re.fullmatch(r"<\|vision_pad\|>[ab]", output.text)


def offered(strict: bool) -> list[OfferedTool]:
    return [OfferedTool(Tool("f", X, strict=strict), {}, "tools[0].parameters")]


@pytest.mark.parametrize("thinks", [False, True])
@pytest.mark.parametrize("parallel", [True, False])
def test_a_forced_call(engine: Engine, parallel: bool, thinks: bool) -> None:
    thoughts = reasoning_format("think") if thinks else None
    calls = calls_for("hermes", offered(strict=False), enforced=True, parallel=parallel)
    grammar = OutputGrammar(calls, True, thoughts, {})
    params = SamplingParams(temperature=0, max_tokens=120, logit_bias=bias(engine, **(THINK if thinks else {})))
    text = engine.generate("x", grammar.applied(params, "assistant\n")).text
    assert re.match((r"<think></think>\n{0,2}" if thinks else "") + CALL, text), text


def test_a_strict_tool_with_auto(engine: Engine) -> None:
    calls = calls_for("hermes", offered(strict=True), enforced=False, parallel=False)
    grammar = OutputGrammar(calls, False, None, {})
    params = SamplingParams(temperature=0, max_tokens=60, logit_bias=bias(engine, **{"<tool_call>": 100.0}))
    output = engine.generate("x", grammar.applied(params, "assistant\n"))
    assert re.fullmatch(CALL, output.text) and output.finish_reason == "stop", output.text
    free = engine.generate("x", grammar.applied(SamplingParams(max_tokens=20, seed=1), "assistant\n"))
    assert "<tool_call>" not in free.text


def test_a_schema_after_thinking(engine: Engine) -> None:
    asked = SamplingParams(json_schema=X, temperature=0, max_tokens=60, logit_bias=bias(engine, **THINK))
    grammar = OutputGrammar(None, False, reasoning_format("think"), {})
    for prompt, begins in (("assistant\n", "<think></think>"), ("assistant\n<think>\n", "</think>")):
        output = engine.generate("x", grammar.applied(asked, prompt))
        assert output.finish_reason == "stop" and output.text.startswith(begins), output.text
        assert json.loads(output.text.removeprefix(begins))["x"] in (1, 2)


def test_tokens_that_the_model_has_no_row_for_are_spelled(added: ModuleType, engine: Engine) -> None:
    """A tokenizer may have more tokens than the model has embeddings."""
    tokenizer = engine.tokenizer
    rows = tokenizer.backend.token_to_id("<think>")
    backend = GrammarBackend(tokenizer, rows, (1,))
    for kind, text in (("choices", '["a<think>b</think>"]'), ("regex", "(<think>|</think>)[ab]")):
        matcher = Grammar(backend, backend.compile(Constraint(kind, text))).matcher()
        said: list[int] = []
        while not matcher.ended:
            matcher.compute_mask()
            if matcher.ended:
                break
            bits = np.unpackbits(matcher.mask.view(np.uint8), bitorder="little")[:rows]
            said.append(int(np.flatnonzero(bits)[0]))
            matcher.advance(said[-1])
        assert matcher.finished and max(said) < rows
        spelled = b"".join(map(tokenizer.token_bytes, said)).decode()
        assert re.fullmatch("a<think>b</think>|</?think>[ab]", spelled)


@pytest.mark.parametrize("text", ["<b>ab</b> <table>", "a <b>", " a", "ab\u00e9<b>\U0001f333"])
def test_markup_of_a_sentencepiece_tokenizer(added: ModuleType, tmp_path: Path, text: str) -> None:
    """Gemma's HTML tags are added tokens, and not special."""
    tokenizer = Tokenizer.load(added.sentencepiece(tmp_path / "gemma", added.HTML))
    backend = GrammarBackend(tokenizer, tokenizer.vocab_size, (1,))
    grammar = Grammar(backend, backend.compile(Constraint("choices", json.dumps([text]))))
    together = [grammar.matcher() for _ in range(5)]
    said: list[int] = []
    while not together[0].finished:
        for matcher in together:
            matcher.compute_mask()
        said += together[0].jump(1, frozenset())
        for matcher in together[1:]:
            matcher.advance(said[-1])
        blank = [matcher for matcher in together if matcher.needs_mask]
        if blank:
            compute_masks(blank)  # in threads, which tokenize too
        assert not any(matcher.error for matcher in together)
    assert b"".join(tokenizer.token_bytes(id) for id in said).decode() == text
    assert {tokenizer.backend.token_to_id(tag) for tag in re.findall("</?[a-z]+>", text)} <= set(said)
