"""Programs through OpenAI's API: on our server, and on one that only chats."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

import branchwise as bw
from branchwise.frontend.lang.backend import Turn
from branchwise.frontend.lang.openai import OpenAIBackend
from branchwise.frontend.lang.openai_tools import conversation, written

KEY = "the-key"


def test_our_server_through_openais_completions(server: Any, engine: Any) -> None:
    backend = OpenAIBackend(server.url, "branchwise", api_key=KEY)

    @bw.function
    def program(s):
        s += "Mira is the baker of Fernhollow. She lives"
        s += bw.gen("where", max_tokens=8) + bw.select("x", [" market", " forge"]) + bw.gen("rest", max_tokens=3)

    here, there = program.run(temperature=0), program.run(backend=backend, temperature=0)
    assert here["where"] == there["where"] and here["x"] == there["x"]
    assert here.text() == there.text()
    assert there.meta("where")["cached_tokens"] >= 0 and backend.usage.prompt_tokens > 0
    streamed = program.run(backend=backend, temperature=0, stream=True)
    assert "".join(streamed.text_iter()) == there.text()


def get_weather(city: str) -> dict:
    """Get the weather."""
    return {"temperature": 21, "code": "KX-4417", "city": city}


@pytest.mark.parametrize("stream", [False, True])
def test_tools_are_sent_and_their_calls_read_through_openais_chat(server: Any, engine: Any, stream: bool) -> None:
    @bw.function
    def agent(s):
        s += bw.user("Please get the weather. The city is Zemol.")
        return bw.tool_loop(s, [get_weather], max_tokens=60)

    backend = OpenAIBackend(server.url, "branchwise", api_key=KEY)
    here, there = agent.run(temperature=0), agent.run(backend=backend, temperature=0, stream=stream)
    if stream:
        assert "".join(there.text_iter()) == there.text()
    assert (
        [dict(one.arguments) for one in here.ret_value]
        == [{"city": "Zemol"}]
        == [dict(one.arguments) for one in there.ret_value]
    )
    assert here["answer"] == there["answer"] and "KX-4417" in there["answer"]
    assert [one["role"] for one in there.messages()] == ["user", "assistant", "tool", "assistant"]
    assert here.messages()[1:] == there.messages()[1:]


def test_a_conversation_with_calls_is_sent_as_openai_has_it() -> None:
    calls = [
        {"function": {"name": name, "arguments": arguments}} for name, arguments in (("f", '{"a":  1}'), ("g", ""))
    ]
    said = Turn("assistant", written("Let me see.", calls))
    assert said.content.count("<tool_call>") == 2
    sent = conversation([Turn("user", "?"), said, Turn("tool", "1"), Turn("tool", "2"), Turn("user", "!")])
    asked = sent[1]
    assert (asked["role"], asked["content"]) == ("assistant", "Let me see.")
    assert [call["function"] for call in asked["tool_calls"]] == [
        {"name": "f", "arguments": '{"a":  1}'},
        {"name": "g", "arguments": "{}"},
    ]
    ids = [call["id"] for call in asked["tool_calls"]]
    assert len(set(ids)) == 2 and [message["tool_call_id"] for message in sent[2:4]] == ids
    assert sent[4] == {"role": "user", "content": "!"}


class _Chat(BaseHTTPRequestHandler):
    """A server that only chats: it says how many messages it was sent, and remembers them."""

    bodies: list[dict[str, Any]] = []  # noqa: RUF012

    def do_GET(self) -> None:
        if self.path != "/v1/models":
            self.send_error(404)
            return
        self._json({"data": [{"id": "chatty"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).bodies.append(body)
        if self.path != "/v1/chat/completions":
            self.send_error(404)
            return
        said = f"{len(body['messages'])} messages"
        if body.get("stream"):
            self.send_response(200)
            self.end_headers()
            for piece in (said[:3], said[3:]):
                event = {"choices": [{"delta": {"content": piece}, "finish_reason": None}]}
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")
            return
        choice = {"message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
        self._json({"choices": [choice] * body.get("n", 1), "usage": usage})

    def _json(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def chatty() -> Iterator[OpenAIBackend]:
    _Chat.bodies = []
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), _Chat)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    backend = bw.connect(f"http://127.0.0.1:{httpd.server_port}/v1")
    assert isinstance(backend, OpenAIBackend) and backend.model == "chatty"
    yield backend
    httpd.shutdown()
    httpd.server_close()


def test_a_server_that_only_chats_gets_messages(chatty: OpenAIBackend) -> None:
    @bw.function
    def program(s):
        s += bw.system("Be brief.")
        s += bw.user("One?") + bw.assistant(bw.gen("a", json_schema={"type": "string"}))
        forks = s.fork(2)
        forks += lambda i: bw.user(f"Fork {i}?") + bw.assistant(bw.gen("b") + "!")
        forks.join()
        s += bw.user("Two?") + bw.assistant(bw.gen("c", top_k=5))

    state = program.run(backend=chatty, seed=2, temperature=0)
    assert (state["a"], state["b"], state["c"]) == ("2 messages", ["4 messages"] * 2, "4 messages")
    first, *_, last = _Chat.bodies
    assert first["response_format"]["json_schema"]["schema"] == {"type": "string"}
    assert "top_k" not in first and last["top_k"] == 5 and isinstance(last["seed"], int)
    assert last["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "2 messages"},
        {"role": "user", "content": "Two?"},
    ]
    assert state.meta("a")["cached_tokens"] == 4
    assert state.messages()[-1] == {"role": "assistant", "content": "4 messages"}
    assert "".join(program.stream(backend=chatty, variable="a")) == "2 messages"


@pytest.mark.parametrize(
    ("append", "problem"),
    [
        (lambda s: s.__iadd__(bw.user("x") + bw.gen("a")), "must stand in the assistant's turn"),
        (lambda s: s.__iadd__("Hello" + bw.user("x") + bw.assistant(bw.gen("a"))), "text must stand in a turn"),
        (lambda s: s.__iadd__(bw.user("x") + bw.assistant("Well" + bw.gen("a"))), "must begin with its gen"),
        (lambda s: s.__iadd__(bw.user("x") + bw.assistant(bw.gen("a", regex="x"))), "cannot constrain.*regex"),
        (lambda s: s.__iadd__(bw.user("x") + bw.assistant(bw.select("a", ["x"]))), "cannot score"),
    ],
)
def test_what_chat_cannot_do_names_the_server(chatty: OpenAIBackend, append: Any, problem: str) -> None:
    program = bw.function(lambda s: append(s) and None)
    with pytest.raises(bw.ProgramError, match=f"{chatty.name}.*{problem}"):
        program.run(backend=chatty)
