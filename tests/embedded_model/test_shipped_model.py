"""The model in the package is the one its card describes: held-out tasks through the engine, and the files beside it.

Small samples of what ``evaluate.py`` measures, greedy; thresholds leave room for another machine's rounding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import evaluate
import pytest
import torch
from safetensors.torch import load_file

from branchwise import Engine
from branchwise.kernels.processor import multiplies_int8
from branchwise.runtime.models.folder import SHIPPED
from corpus import arithmetic, dialogue, extraction, fewshot, puzzle, recall, tools
from corpus.conversation import Conversation, user
from corpus.draw import Draw

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def subject() -> Iterator[evaluate.Subject]:
    with Engine(device="cpu", kv_cache_tokens=32_768) as engine:
        yield evaluate.Subject(engine)


def test_few_shot_mapping_by_the_examples_alone(subject: evaluate.Subject) -> None:
    assert evaluate.measure(subject, "", evaluate.collect(fewshot.make, "fewshot*", 30, 112)).right >= 28


def test_tool_calls(subject: evaluate.Subject) -> None:
    asked = evaluate.collect(tools.make, "tools_call", 30, 121)
    answers = dict(zip(map(id, asked), subject.answers(asked), strict=True))
    assert sum(evaluate.called(answers[id(c)]) is not None for c in asked) >= 29, "valid JSON in the tags"
    assert sum(evaluate.calls(c, answers[id(c)]) for c in asked) >= 25, "the right tool with exact arguments"


def test_answers_from_a_tools_result(subject: evaluate.Subject) -> None:
    assert evaluate.measure(subject, "", evaluate.collect(tools.make, "tools_answer", 30, 122)).right >= 28


@pytest.mark.parametrize(("family", "least"), [("recall", 28), ("recall_persona", 28), ("recall_text", 26)])
def test_recall(subject: evaluate.Subject, family: str, least: int) -> None:
    assert evaluate.measure(subject, "", evaluate.collect(recall.make, family, 30, 131)).right >= least


def test_look_up_in_a_long_register(subject: evaluate.Subject) -> None:
    short, long = (evaluate.measure(subject, "", evaluate.lookups(subject, t, n, 3)) for t, n in ((1000, 8), (4000, 2)))
    assert short.right >= 7 and long.right >= 1


def test_extraction_and_sums(subject: evaluate.Subject) -> None:
    drawn = evaluate.collect(extraction.make, "extraction", 20, 161)
    assert evaluate.measure(subject, "", drawn, evaluate.same_json).right >= 18
    assert evaluate.measure(subject, "", evaluate.collect(arithmetic.make, "arithmetic_steps", 20, 172)).right >= 18


def test_a_newcomers_first_lines(subject: evaluate.Subject) -> None:
    asked = {"hello": "Hello!", "who are you?": "Twig", "who is Mira?": "baker", "What is 12 + 30?": "42"}
    said = subject.answers([Conversation("talk", [user(text), {"role": "assistant", "content": ""}]) for text in asked])
    assert [word for word, answer in zip(asked.values(), said, strict=True) if word not in answer] == []
    assert (
        evaluate.measure(subject, "", evaluate.collect(dialogue.make, "talk", 20, 181), evaluate.in_world).right >= 18
    )


def test_a_tree_search_solves_more_than_one_answer(subject: evaluate.Subject) -> None:
    draw = Draw(142, held_out=True)
    instances = [puzzle.instance(draw) for _ in range(3)]
    once, _ = evaluate.one_answer(subject, instances)
    tree, tokens = evaluate.tree_search(subject, instances)
    assert sum(tree) > sum(once) and tokens > 0


# -- the files ---


def test_the_folder_is_what_the_card_says() -> None:
    names = {path.name for path in SHIPPED.iterdir()}
    json_files = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert names == json_files | {"README.md", "model.safetensors"}
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 16_000_000
    weights = load_file(SHIPPED / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    count = sum(tensor.numel() for tensor in weights.values())
    assert f"{count:,} parameters" in (SHIPPED / "README.md").read_text()
    config = json.loads((SHIPPED / "config.json").read_text())
    template = json.loads((SHIPPED / "tokenizer_config.json").read_text())["chat_template"]
    assert config["max_position_embeddings"] >= 4096
    assert template == (evaluate.HERE / "corpus" / "chat_template.jinja").read_text()


def test_quoted_figures_are_the_measured_ones() -> None:
    """The rows of the card and of docs/models.md are rows of evaluate.py's table, and that table is its JSON."""
    results = (evaluate.HERE / "results.md").read_text()
    rows = [evaluate.Row(**fields) for fields in json.loads((evaluate.HERE / "results.json").read_text())]
    assert evaluate.table(rows, results.splitlines()[0]) == results
    measured = {line for line in results.splitlines() if line.startswith("| ")}
    for file in (SHIPPED / "README.md", ROOT / "docs" / "models.md"):
        quoted = re.search(r"<!-- figures: embedded model -->\n(.*?)<!-- /figures -->", file.read_text(), re.DOTALL)
        assert quoted is not None, file
        lines = [line for line in quoted[1].splitlines() if line.startswith("| ")]
        assert len(lines) > 5 and set(lines) <= measured, set(lines) - measured


@pytest.mark.parametrize("quantization", ["fp8", "int8"])
def test_weights_in_8_bits_answer_as_well(quantization: Literal["fp8", "int8"]) -> None:
    if quantization == "int8" and not multiplies_int8():
        pytest.skip("the processor has no VNNI")
    with Engine(device="cpu", kv_cache_tokens=32_768, dtype="float32", quantization=quantization) as engine:
        subject = evaluate.Subject(engine)
        asked = evaluate.collect(tools.make, "tools_call", 20, 121)
        assert evaluate.measure(subject, "", asked, evaluate.calls).right >= 16
        assert evaluate.measure(subject, "", evaluate.collect(recall.make, "recall", 20, 131)).right >= 18
        assert evaluate.measure(subject, "", evaluate.collect(arithmetic.make, "arithmetic_steps", 20, 172)).right >= 18
