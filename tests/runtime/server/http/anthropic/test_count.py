"""What a request's fields do to its prompt, counted: thinking, tools that may not be used, an answer begun."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from branchwise.runtime.chat.template import ChatTemplate
from branchwise.runtime.messages import Message
from branchwise.runtime.server.http.app import make_app
from branchwise.runtime.server.http.state import AppState
from branchwise.runtime.tokenizer.tokenizer import Tokenizer

TEMPLATE = Path(__file__).parents[3] / "chat" / "templates" / "qwen3.jinja"
PATH = "/v1/messages/count_tokens"
HI = {"role": "user", "content": "Hi."}
TOOL = {"name": "look", "input_schema": {"type": "object"}}


@pytest.fixture
def thinking_site(
    make_state: Callable[..., AppState], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> AppState:
    monkeypatch.setattr(tokenizer, "chat_template", ChatTemplate(TEMPLATE.read_text(), {}))
    return make_state()


async def test_a_prompt_is_counted_as_it_would_be_sent(
    thinking_site: AppState, tokenizer: Tokenizer, sent: list[Message]
) -> None:
    def tokens(text: str) -> int:
        return len(tokenizer.encode(text, False))

    transport = httpx.ASGITransport(make_app(thinking_site))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:

        async def count(**fields: Any) -> int:
            answer = await http.post(PATH, json={"messages": [HI], **fields})
            assert answer.status_code == 200, answer.text
            return answer.json()["input_tokens"]

        user, begun = "<|im_start|>user\nHi.<|im_end|>\n", "<|im_start|>assistant\n"
        assert await count() == await count(thinking={"type": "enabled"}) == tokens(user + begun)
        assert await count(thinking={"type": "disabled"}) == tokens(f"{user}{begun}<think>\n\n</think>\n\n")
        assert await count(system="Be brief.") == tokens(f"<|im_start|>system\nBe brief.<|im_end|>\n{user}{begun}")
        assert await count(tools=[TOOL], tool_choice={"type": "none"}) == tokens(user + begun)
        assert await count(tools=[TOOL]) > tokens(user + begun) + 20
        prefilled = await count(messages=[HI, {"role": "assistant", "content": "Well"}])
        assert prefilled == tokens(f"{user}{begun}<think>\n\n</think>\n\nWell")
        assert (await http.post(PATH, json={"messages": [HI], "model": "other"})).status_code == 404
    assert not sent, "nothing goes to the engine"
