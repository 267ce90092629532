"""What a template writes for an answer is read as that answer: rendered, cut to what the model writes, and parsed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from branchwise.runtime.chat.template import ChatTemplate
from branchwise.runtime.chat.tools import StreamParser, Tool, assemble, detect, ends_in_reasoning

FOLDER = Path(__file__).parents[1] / "templates"
ARGUMENTS = {"city": 'Köln "x" <b>', "days": 3, "tags": [True, None]}
PROPERTIES = {"city": {"type": "string"}, "days": {"type": "integer"}, "tags": {"type": "array"}}
TOOLS = [Tool("weather", {"type": "object", "properties": PROPERTIES}, "The weather.")]
OFFERED = [
    {"type": "function", "function": {"name": t.name, "description": "d", "parameters": t.parameters}} for t in TOOLS
]
CALL = {"type": "function", "id": "functions.weather:0", "function": {"name": "weather", "arguments": ARGUMENTS}}
ASKED = [{"role": "user", "content": "Is it raining?"}]
# Template: its formats, the turn's end, and whether it keeps an answer's thinking.
FAMILIES = {
    "harmony": ("harmony", "harmony", "", True),
    "glm4": ("glm45", "think", "", True),
    "kimi": ("kimi_k2", "think", "<|im_end|>", True),
    "minimax_m2": ("minimax_m2", "think", "[e~[\n", True),
    "deepseek_v31": ("deepseek_v31", "think", "<｜end▁of▁sentence｜>", False),
    "qwen3": ("hermes", "think", "<|im_end|>\n", True),
}


@pytest.fixture(params=FAMILIES)
def template_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def written(template: ChatTemplate, answer: dict[str, Any], end: str) -> tuple[str, str]:
    """The prompt, and what the model writes after it."""
    prompt = template.render(ASKED, True, {"tools": OFFERED})
    whole = template.render([*ASKED, {"role": "assistant", "content": "", **answer}], False, {"tools": OFFERED})
    if not whole.startswith(prompt):  # the prompt opens thinking that the answer does not have
        prompt = prompt.removesuffix("<think>\n")
    assert whole.startswith(prompt)
    return prompt, whole[len(prompt) :].removesuffix(end)


@pytest.mark.parametrize("thought", ["Cologne.\nThree days?", ""])
@pytest.mark.parametrize("answer", [{"tool_calls": [CALL]}, {"content": "Yes: <b>rain</b>."}], ids=["call", "text"])
def test_an_answer_is_read_as_it_was_written(template_name: str, answer: dict[str, Any], thought: str) -> None:
    tools, reasoning, end, keeps = FAMILIES[template_name]
    template = ChatTemplate((FOLDER / f"{template_name}.jinja").read_text(encoding="utf-8"), {"bos_token": "<s>"})
    assert detect(template.source) == (tools, reasoning)
    given = {**answer, "reasoning_content": thought} if thought else answer
    prompt, text = written(template, given, end)
    opened = ends_in_reasoning(prompt, reasoning)
    for size in (len(text), 1, 3):
        parser = StreamParser(tools, reasoning, TOOLS, reasoning_open=opened)
        events = [event for at in range(0, len(text), size) for event in parser.feed(text[at : at + size])]
        events += parser.finish()
        found = assemble(events)
        assert "".join(event.source for event in events) == text
        assert found.reasoning == (thought if keeps else "")
        assert found.content.strip() == answer.get("content", "")
        calls = [(call.name, json.loads(call.arguments), call.complete) for call in found.calls]
        assert calls == ([("weather", ARGUMENTS, True)] if "tool_calls" in answer else [])
