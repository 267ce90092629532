"""What a template writes for an answer is read as that answer: rendered, cut to what the model writes, and parsed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from branchwise.runtime.chat.messages import template_messages
from branchwise.runtime.chat.openai_messages import openai_turns
from branchwise.runtime.chat.template import ChatTemplate
from branchwise.runtime.chat.tools.definitions import Tool
from branchwise.runtime.chat.tools.detect import detect, ends_in_reasoning
from branchwise.runtime.chat.tools.parser import StreamParser

from .cases import assemble

FOLDER = Path(__file__).parents[1] / "templates"
ARGUMENTS = {
    "city": 'Köln "x" <b> 🌳',
    "days": 3,
    "tags": [True, None],
    "more": {"a": [1, {"b": "}]\\n"}], "q": "it's"},
}
PROPERTIES = {
    "city": {"type": "string"},
    "days": {"type": "integer"},
    "tags": {"type": "array"},
    "more": {"type": "object"},
}
TOOLS = [Tool("weather", {"type": "object", "properties": PROPERTIES}, "The weather.")]
OFFERED = [
    {"type": "function", "function": {"name": t.name, "description": "d", "parameters": t.parameters}} for t in TOOLS
]
CALLS = [
    {"type": "function", "id": f"functions.weather:{i}", "function": {"name": "weather", "arguments": arguments}}
    for i, arguments in enumerate([ARGUMENTS, {**ARGUMENTS, "city": ""}])
]
ASKED = [{"role": "user", "content": "Is it raining?"}]
ALWAYS, NEVER, WITH_CALLS = "always", "never", "with calls"
# Template: its formats, the turn's end, and when it writes an answer's thinking.
FAMILIES: dict[str, tuple[str, str | None, str, str]] = {
    "harmony": ("harmony", "harmony", "", ALWAYS),
    "glm4": ("glm45", "think", "", ALWAYS),
    "kimi": ("kimi_k2", "think", "<|im_end|>", ALWAYS),
    "minimax_m2": ("minimax_m2", "think", "[e~[\n", ALWAYS),
    "deepseek_v31": ("deepseek_v31", "think", "<｜end▁of▁sentence｜>", NEVER),
    "deepseek_v32": ("deepseek_v32", "think", "<｜end▁of▁sentence｜>", ALWAYS),
    "qwen3": ("hermes", "think", "<|im_end|>\n", ALWAYS),
    "qwen2.5": ("hermes", None, "<|im_end|>\n", NEVER),
    "cohere": ("cohere", "cohere_command4", "<|END_OF_TURN_TOKEN|>", ALWAYS),
    "apertus": ("apertus", "apertus", "", NEVER),
    "gemma4": ("gemma4", "gemma4", "<turn|>\n", WITH_CALLS),
    "lfm2": ("lfm2", "think", "<|im_end|>\n", ALWAYS),
    "granite": ("granite", "granite", "<|end_of_text|>\n", NEVER),
}


@pytest.fixture(params=FAMILIES)
def template_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def written(template: ChatTemplate, answer: dict[str, Any], end: str) -> tuple[str, str]:
    """The prompt, and what the model writes after it."""
    tools = {"tools": [tool["function"] for tool in OFFERED] if template.probes.reads_flat_tools else OFFERED}
    messages = template_messages(openai_turns([*ASKED, {"role": "assistant", "content": "", **answer}]), template)
    prompt, whole = template.render(ASKED, True, tools), template.render(messages, False, tools)
    if not whole.startswith(prompt):  # the prompt opens or closes thinking that the answer does not have
        prompt = prompt.removesuffix("<think>\n").removesuffix("<|channel>thought\n<channel|>")
    assert whole.startswith(prompt)
    return prompt, whole[len(prompt) :].removesuffix(end)


ANSWERS: dict[str, dict[str, Any]] = {
    "call": {"tool_calls": CALLS[:1]},
    "calls": {"tool_calls": CALLS},
    "text": {"content": "Yes: <b>rain</b>."},
    "text and a call": {"content": "Let me look.", "tool_calls": CALLS[:1]},
}
# What a family's template does not write.
LACKS = {("harmony", "text and a call"), ("cohere", "text and a call")}


@pytest.mark.parametrize("thought", ["Cologne.\nThree days?", ""])
@pytest.mark.parametrize("kind", ANSWERS)
def test_an_answer_is_read_as_it_was_written(template_name: str, kind: str, thought: str) -> None:
    """However it is cut; and a history with what was read is rendered to the same text."""
    if (template_name, kind) in LACKS:
        pytest.skip("the template does not write it")
    tools, reasoning, end, keeps = FAMILIES[template_name]
    template = ChatTemplate((FOLDER / f"{template_name}.jinja").read_text(encoding="utf-8"), {"bos_token": "<s>"})
    assert detect(template.source) == (tools, reasoning)
    answer = ANSWERS[kind] | ({"reasoning_content": thought} if thought else {})
    prompt, text = written(template, answer, end)
    opened = ends_in_reasoning(prompt, reasoning)
    for pieces in ([text], list(text), [text[i : i + 3] for i in range(0, len(text), 3)]):
        parser = StreamParser(tools, reasoning, TOOLS, reasoning_open=opened)
        events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
        found = assemble(events)
        assert "".join(event.source for event in events) == text
        assert found.reasoning == (thought if keeps == ALWAYS or (keeps == WITH_CALLS and found.calls) else "")
        assert found.content.strip() == answer.get("content", "")
        assert all(call.complete and call.name == "weather" for call in found.calls)
        read = [json.loads(call.arguments) for call in found.calls]
        assert read == [call["function"]["arguments"] for call in answer.get("tool_calls", [])]
        again: dict[str, Any] = {"content": found.content.strip()}
        if found.reasoning:
            again["reasoning_content"] = found.reasoning
        if found.calls:
            again["tool_calls"] = [
                {"type": "function", "id": f"functions.weather:{i}", "function": {"name": "weather", "arguments": one}}
                for i, one in enumerate(read)
            ]
        assert written(template, again, end) == (prompt, text)
