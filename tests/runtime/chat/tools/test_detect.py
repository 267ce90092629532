"""Formats guessed from chat templates, in the lines that tell them apart."""

from __future__ import annotations

import json

import pytest

from branchwise.runtime.chat.tools.detect import Detected, detect, ends_in_reasoning
from branchwise.runtime.models.folder import SHIPPED

HERMES = (
    '{%- if tools %}within <tool_call></tool_call> XML tags:\\n<tool_call>\\n{"name": <function-name>, "arguments": '
)
THINKING = "{%- if '</think>' in content %}{{- content.split('</think>')[-1] }}"
CODER = (
    "{%- for call in message.tool_calls %}{{- '<tool_call>\\n<function=' + call.name + '>\\n<parameter=' + k + '>\\n'"
)
LLAMA = "{%- if tools is not none %}{{- '{\"name\": \"' + call.name + '\", ' }}{{- '\"parameters\": ' }}"
GLM = (
    "{%- if tools %}<tool_call>{function-name}\\n<arg_key>{arg-key-1}</arg_key>\\n<arg_value>{arg-value-1}</arg_value>"
    "\\n</tool_call>{%- for tc in m.tool_calls %}{{ '\\n<tool_call>' + tc.name }}"
)
SEED = (
    "{%- set toolcall_begin_token = '<seed:tool_call>' %}{%- set think_end_token = '</seed:think>' %}"
    "{{ toolcall_begin_token + '\\n<function=' + name + '>\\n<parameter=' + key }}"
)
MINIMAX = (
    """{%- set toolcall_begin_token = '<minimax:tool_call>' %}{{- '<invoke name="' + tool_call.name + '">\\n' }}"""
)
APRIEL = (
    'Return calls as a list within <tool_calls></tool_calls> XML tags: <tool_calls>[{"name": <name>, "arguments": {}}]'
    "{%- if '<tool_call>' in content %}{%- for call in message.tool_calls %}"
)
R1 = (
    "{{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name']"
    " + '\\n' + '```json' + '\\n' + tool['function']['arguments'] + '\\n' + '```' + '<｜tool▁call▁end｜>'}}"
)
V31 = R1.replace(" + '\\n' + '```json' + '\\n'", "").replace(" + '\\n' + '```'", "")
KIMI = "<|tool_calls_section_begin|><|tool_call_begin|>{{ call['id'] }}<|tool_call_argument_begin|>{{ call.arguments }}"
FUNCTION_GEMMA = "{{- '<start_function_call>call:' + tool_call.function.name + '{' }}"
GEMMA_4 = "{{- '<|tool_call>call:' + function['name'] + '{' }}"
XLAM = 'make calls in a single JSON array: \\n\\n[{\\"name\\": \\"tool_call_name\\", \\"arguments\\": {}}]{{ tools }}'
NEMOTRON = "{{- '<TOOLCALL>[' }}{%- for call in message.tool_calls %}"
COHERE = "{{- '<|START_ACTION|>[' }}<|START_RESPONSE|>{{ message.content }}{{ message.tool_plan }}<|END_THINKING|>"
COMMAND_R = "{{- '\\nAction:\\n```json\\n[\\n' }}{{- '\"tool_name\": \"'|indent(8, first=true) + tool_call.name }}"
APERTUS = "{%- set outer_token = '<|inner_suffix|>' -%}{%- set tool_calls_token = '<|tools_prefix|>' -%}"
LFM2 = '{%- set ns.system_prompt = "List of tools: <|tool_list_start|>[" -%}'
GRANITE = "{%- set available_tools = tools -%}respond only with <|tool_call|> followed by a JSON list of tools used."
GRANITE_THINKS = "Write your thoughts between <think></think> and write your response between <response></response>"
DSML = '{%- set dsml_token = "｜DSML｜" -%}<{{ dsml_token }}function_calls>'
APRIEL_THINKS = (
    "provide the final response after the marker [BEGIN FINAL RESPONSE].{{- 'Here are my reasoning steps:\\n' }}"
)
# What no known format reads: calls between <tool_call> markers with another payload.
OTHERS = [
    "{%- for call in message.tool_calls %}{{ '<tool_call>\\n' + call.name + '(' + call.arguments + ')</tool_call>' }}",
    "{%- for call in calls %}<tool_call>\\n<invoke name={{ call.name }}>{{ call.arguments }}</invoke></tool_call>",
    "<tool_call>{function-name}<args>{name: value}</args></tool_call>{%- for call in message.tool_calls %}",
    "{%- for call in message.tool_calls %}<function={{ call.name }}>{{ call.arguments }}</function>",
]
HARMONY = (
    "{{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}"
    "{{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' }}{{- '<|call|>' }}"
)
PHI = "{{- '<|user|>' + message.content + '<|end|><|assistant|>' }}"
MINIMAX_M1 = 'within <tool_calls></tool_calls> XML tags, one a line:\n<tool_calls>\n{"name": <name>, "arguments": {}}'
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
        (GLM + THINKING, ["<tool_call>"], Detected("glm45", "think")),
        (GLM.replace("\\n", ""), [], Detected("glm47", None)),
        (SEED, [], Detected("seed_oss", "seed_oss")),
        (MINIMAX, ["<tool_call>"], Detected("minimax_m2", None)),
        (APRIEL, [], Detected("apriel", None)),
        (HARMONY, ["<|end|>", "<|call|>"], Detected("harmony", "harmony")),
        (PHI, ["<|end|>"], Detected(None, None)),
        (MINIMAX_M1, [], Detected("minimax_m1", None)),
        (R1 + THINKING, [], Detected("deepseek_v3", "think")),
        (V31, [], Detected("deepseek_v31", None)),
        (KIMI, [], Detected("kimi_k2", None)),
        (FUNCTION_GEMMA, [], Detected("functiongemma", None)),
        (GEMMA_4, [], Detected("gemma4", None)),
        (XLAM, [], Detected("xlam", None)),
        (NEMOTRON, [], Detected("nemotron", None)),
        (COHERE, [], Detected("cohere", "cohere_command3")),
        (COHERE.replace("START_RESPONSE", "START_TEXT"), [], Detected("cohere", "cohere_command4")),
        (COMMAND_R, [], Detected("command_r", None)),
        (APERTUS, [], Detected("apertus", "apertus")),
        (LFM2, ["<|tool_call_start|>"], Detected("lfm2", None)),
        (LFM2, [], Detected(None, None)),
        (GRANITE, [], Detected("granite", None)),
        (GRANITE + GRANITE_THINKS, [], Detected("granite", "granite")),
        (DSML + THINKING, [], Detected("deepseek_v32", "think")),
        (DSML.replace("function_calls", "tool_calls"), [], Detected("deepseek_v4", None)),
        (GEMMA_4 + "{{- text.split('<channel|>')[0] }}", [], Detected("gemma4", "gemma4")),
        (APRIEL + APRIEL_THINKS, [], Detected("apriel", "apriel")),
        *((other, ["<tool_call>", "</tool_call>"], Detected(None, None)) for other in OTHERS),
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


def test_a_comment_of_the_template_is_no_format() -> None:
    mention = '{# does not support <tool_call>\n{"name": … #}{{ messages[0].content }}{#- nor <think> </think> -#}'
    assert detect(mention) == (None, None)
