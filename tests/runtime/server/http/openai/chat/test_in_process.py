"""A conversation becomes the same tokens in process as it does on its way through ``/v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from branchwise import Engine
from branchwise.runtime.errors import InvalidRequest
from branchwise.runtime.server.http.chat.prepare import ChatPreparer
from branchwise.runtime.server.http.fields.parse import parse
from branchwise.runtime.server.http.openai.chat.request import CHAT_UNSUPPORTED, ChatRequest, chat_spec
from branchwise.runtime.server.http.state import AppState
from branchwise.runtime.tokenizer.tokenizer import Tokenizer

TEMPLATES = Path(__file__).parents[5] / "runtime" / "chat" / "templates"
USER = {"role": "user", "content": "What is the weather in <Paris> & Rome?"}
SAID = {"role": "assistant", "content": "It rains, "}
TOOL = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Look it up.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        "strict": False,
    },
    "cache_control": {"type": "ephemeral"},
}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "lookup", "arguments": '{"city":  "Rome"}'}}
CALLED = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "abcdefghi", "name": "lookup", "content": "rain"},
]
PARTS = [
    {"type": "text", "text": "Be"},
    {"type": "input_text", "text": "brief.", "cache_control": {"type": "ephemeral"}},
]
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "a question": {"messages": [USER]},
    "parts of the developer's": {"messages": [{"role": "developer", "content": PARTS}, USER]},
    "an answer to go on with": {"messages": [USER, SAID], "continue_final_message": True},
    "no turn begun": {"messages": [USER, SAID, USER], "add_generation_prompt": False},
    "a call and its result": {"messages": CALLED, "tools": [TOOL]},
    "thinking": {"messages": [USER, {**SAID, "reasoning_content": "Hm."}, USER]},
    "no thinking": {"messages": [USER], "chat_template_kwargs": {"enable_thinking": False}},
    "special tokens in words": {"messages": [{"role": "user", "content": "<|begin|>a<|im_end|>\n<|im_start|>b"}]},
    "a role nobody has": {"messages": [{"role": "king", "content": "x"}]},
    "a variable nobody reads": {"messages": [USER], "chat_template_kwargs": {"unheard_of": 1}},
    "no words": {"messages": []},
    "two ends": {"messages": [USER, SAID], "continue_final_message": True, "add_generation_prompt": True},
    "tools that are none": {"messages": [USER], "tools": [{"type": "function", "function": {}}]},
    "a lone surrogate": {"messages": [{"role": "user", "content": "\ud800"}]},
}


@pytest.fixture(scope="module")
def engine(checkpoint: Callable[[str], Path]) -> Iterator[Engine]:
    with Engine(checkpoint("llama-gqa"), max_num_seqs=4, kv_cache_tokens=1024) as engine:
        yield engine


async def sent_by_the_server(state: AppState, body: dict[str, Any]) -> list[int]:
    """As the tokenizer process makes it of what the route sends it."""
    spec = chat_spec(parse(ChatRequest, body, unsupported=CHAT_UNSUPPORTED), state)
    prompt = (await ChatPreparer(state).prepare(spec)).prompt
    assert prompt.text is not None
    ids, _ = state.tokenizer.encode_marked(prompt.text, [], prompt.add_special_tokens)
    return list(ids.tolist())


@pytest.mark.parametrize("template", [None, *sorted(path.name for path in TEMPLATES.glob("*.jinja"))])
async def test_the_tokens_are_those_of_the_route(
    engine: Engine, make_state: Callable[..., AppState], monkeypatch: pytest.MonkeyPatch, template: str | None
) -> None:
    state, own = make_state(tool_call_parser="hermes"), engine.tokenizer  # said: it is not to be read off the template
    if template is not None:
        state.tokenizer = Tokenizer(
            own.backend, {"bos_token": "<|begin|>", "eos_token": "<|end|>"}, (TEMPLATES / template).read_text()
        )
        monkeypatch.setattr(engine, "tokenizer", state.tokenizer)
    compared = 0
    for name, body in CONVERSATIONS.items():
        try:
            theirs: Any = await sent_by_the_server(state, body)
            compared += 1
        except InvalidRequest as error:
            theirs = error.path
        try:
            ours: Any = engine.chat_prompt(**body)
        except InvalidRequest as error:
            ours = error.path
        assert ours == theirs, name
    assert compared >= 5
    twice = [own.backend.token_to_id("<|begin|>")] * 2
    assert engine.chat_prompt([USER])[:2] != twice, "the template's first token is not written twice"
