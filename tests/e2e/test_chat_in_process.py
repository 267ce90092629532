"""A conversation is answered in process as a server answers it: the same prompt, the same greedy words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from branchwise import Engine, SamplingParams

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
SYSTEM = {"role": "system", "content": [{"type": "text", "text": "You are a helpful assistant."}]}
USER = {"role": "user", "content": "Bruno lives in Milford. Where does Bruno live?"}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(kv_cache_tokens=8192, max_num_seqs=8) as engine:
        yield engine
        engine.check()


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [USER]},
        {"messages": [SYSTEM, USER]},
        {"messages": [USER], "tools": [TOOL]},
        {"messages": [USER, {"role": "assistant", "content": "Bruno lives"}], "continue_final_message": True},
    ],
)
def test_the_answer_is_the_servers(shipped: Any, engine: Engine, fields: dict[str, Any]) -> None:
    tokens = shipped.http.post("/tokenize", json=fields).json()["tokens"]
    assert engine.chat_prompt(**fields) == tokens
    asked = {**fields, "temperature": 0, "max_tokens": 24}
    answer = shipped.http.post("/v1/chat/completions", json=asked).json()
    output = engine.chat(**fields, params=SamplingParams(temperature=0, max_tokens=24))
    assert output.prompt_tokens == answer["usage"]["prompt_tokens"] == len(tokens)
    assert len(output.token_ids) == answer["usage"]["completion_tokens"]
    assert output.finish_reason == answer["choices"][0]["finish_reason"]
    assert output.text == answer["choices"][0]["message"]["content"]
