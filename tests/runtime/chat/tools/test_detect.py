"""Formats guessed from chat templates, in the lines that tell them apart."""

from __future__ import annotations

import json

import pytest

from branchwise.runtime.chat.tools import Detected, detect, ends_in_reasoning
from branchwise.runtime.models.folder import SHIPPED

HERMES = (
    '{%- if tools %}within <tool_call></tool_call> XML tags:\\n<tool_call>\\n{"name": <function-name>, "arguments": '
)
THINKING = "{%- if '</think>' in content %}{{- content.split('</think>')[-1] }}"
CODER = (
    "{%- for call in message.tool_calls %}{{- '<tool_call>\\n<function=' + call.name + '>\\n<parameter=' + k + '>\\n'"
)
LLAMA = "{%- if tools is not none %}{{- '{\"name\": \"' + call.name + '\", ' }}{{- '\"parameters\": ' }}"
MISTRAL = "{%- if message.tool_calls %}{{- '[TOOL_CALLS] [' }}"


@pytest.mark.parametrize(
    ("template", "specials", "expected"),
    [
        ("", [], Detected(None, None)),
        ("{{ messages[0].content }}", ["<|python_tag|>", "[TOOL_CALLS]"], Detected(None, None)),
        (HERMES, ["<|im_end|>"], Detected("hermes", None)),
        (HERMES + THINKING, [], Detected("hermes", "think")),
        (HERMES, ["<think>", "</think>"], Detected("hermes", "think")),
        (THINKING, [], Detected(None, "think")),
        (CODER, [], Detected("qwen3_coder", None)),
        (LLAMA, ["<|python_tag|>"], Detected("llama3_json", None)),
        (LLAMA + "{{- '<|python_tag|>' }}", [], Detected("llama3_json", None)),
        (LLAMA, [], Detected(None, None)),
        ("{% if tools %}[func_name1(params_name1=params_value1)]", ["<|python_start|>"], Detected("pythonic", None)),
        (MISTRAL, [], Detected("mistral", None)),
        (MISTRAL, ["[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]"], Detected("mistral_named", "mistral")),
        ("", ["[TOOL_CALLS]"], Detected("mistral", None)),
    ],
)
def test_detect(template: str, specials: list[str], expected: Detected) -> None:
    assert detect(template, specials) == expected


def test_the_model_that_ships() -> None:
    template = json.loads((SHIPPED / "tokenizer_config.json").read_text())["chat_template"]
    assert detect(template) == Detected("hermes", None)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|im_start|>assistant\n<think>", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("<|im_start|>assistant\n", False),
        ("Say <think>\n<|im_start|>assistant\n", False),
    ],
)
def test_a_prompt_that_opens_reasoning(prompt: str, expected: bool) -> None:
    assert ends_in_reasoning(prompt, "think") is expected
    assert not ends_in_reasoning(prompt, None)
