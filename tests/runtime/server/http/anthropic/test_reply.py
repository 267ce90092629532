"""Any output, however it arrives: what the ``anthropic`` package makes of the stream is the message sent whole."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx2
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from branchwise.runtime.chat.tools.definitions import Tool
from branchwise.runtime.chat.tools.parser import StreamParser
from branchwise.runtime.messages import CacheReport, Delta, Finished
from branchwise.runtime.outputs import Output
from branchwise.runtime.sampling_params import SamplingParams
from branchwise.runtime.server.http.anthropic.reply import MessageReply, input_usage
from branchwise.runtime.server.http.chat.sample import Sample
from branchwise.runtime.tokenizer.tokenizer import Tokenizer

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


class Client:
    """The package, answered with what is given instead of by a server."""

    def __init__(self) -> None:
        self._answer = b""
        self._type = ""
        http = httpx2.Client(transport=httpx2.MockTransport(self._respond))
        self._client = anthropic.Anthropic(api_key="none", base_url="http://x", http_client=http, max_retries=0)
        self._asked: Any = {"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": "x"}]}

    def _respond(self, _request: Any) -> Any:
        return httpx2.Response(200, content=self._answer, headers={"content-type": self._type})

    def whole(self, message: dict[str, Any]) -> Any:
        self._answer, self._type = msgspec.json.encode(message), "application/json"
        return self._client.messages.create(**self._asked)

    def streamed(self, events: bytes) -> Any:
        self._answer, self._type = events, "text/event-stream"
        with self._client.messages.stream(**self._asked) as stream:
            return stream.get_final_message()


@pytest.fixture(scope="module")
def client() -> Client:
    return Client()


def batches(pieces: list[str], reason: Any, matched: str | None = None) -> Iterator[list[tuple[int, Delta]]]:
    """A token a character; the last piece has the finish reason."""
    report = CacheReport(hit_tokens=3, reason="diverged")
    kept = CacheReport(hit_tokens=3, reason="diverged", pinned_tokens=5)
    pieces = [piece for piece in pieces if piece] or [""]
    for piece in pieces[:-1]:
        tokens = array("i", [5] * len(piece)).tobytes()
        yield [(0, Delta(1, piece, tokens, prompt_tokens=9, cache=report))]
    last = pieces[-1]
    count = sum(map(len, pieces))
    finish = Finished(1, reason, prompt_tokens=9, completion_tokens=count, cache=kept)
    tokens = array("i", [5] * len(last)).tobytes()
    yield [(0, Delta(1, last, tokens, prompt_tokens=9, finish=finish, cache=report, matched_stop=matched))]


def whole(tokenizer: Tokenizer, parser: Any, text: str, reason: str = "stop", **more: Any) -> dict[str, Any]:
    answer = MessageReply("m", Sample(tokenizer, SamplingParams(), parser, one_call=False), "req_1")
    return answer.whole([entry for batch in batches([text], reason, **more) for entry in batch])


def stream(tokenizer: Tokenizer, parser: Any, pieces: list[str], reason: str = "stop", **more: Any) -> bytes:
    answer = MessageReply("m", Sample(tokenizer, SamplingParams(), parser, one_call=False), "req_1")
    sent = b"".join(b"".join(answer.events(batch)) for batch in batches(pieces, reason, **more))
    return sent + b"".join(answer.end())


def events(sent: bytes) -> list[dict[str, Any]]:
    found = []
    for one in sent.decode().split("\n\n")[:-1]:
        name, data = one.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def plain(message: Any) -> dict[str, Any]:
    """What must be the same: all but the message's id and what only one of the package's classes has."""
    found = message.model_dump(exclude={"id"})
    for block in found["content"]:
        block.pop("parsed_output", None)
    return found


def cut(text: str, size: int) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


# Two hundred cases in three ways, in one test: pytest's own work for each would take as long.
def test_the_stream_of_every_output_is_its_message(client: Client, tokenizer: Tokenizer, corpus: list[Any]) -> None:
    assert len(corpus) > 150
    for case in corpus:
        message = whole(tokenizer, case.parser(), case.text)
        expected = client.whole(message)
        parsed = case.read()
        blocks = expected.content
        assert "".join(block.text for block in blocks if block.type == "text") == parsed.content, case
        assert "".join(block.thinking for block in blocks if block.type == "thinking") == parsed.reasoning, case
        uses = [block for block in blocks if block.type == "tool_use"]
        assert [use.name for use in uses] == [call.name for call in parsed.calls], case
        for use, call in zip(uses, parsed.calls, strict=True):
            assert isinstance(use.input, dict), case
            if call.complete and call.arguments.startswith("{") and "wrong JSON" not in case.name:
                lone = r"\ud83d" in call.arguments and r"\ud83d\ude00" not in call.arguments
                assert lone or use.input == json.loads(call.arguments), case
        for size in (1, 3, 1000):
            assembled = client.streamed(stream(tokenizer, case.parser(), cut(case.text, size)))
            assert plain(assembled) == plain(expected), (case, size)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_however_it_is_cut(client: Client, tokenizer: Tokenizer, corpus: list[Any], data: st.DataObject) -> None:
    case = data.draw(st.sampled_from(corpus))
    at = sorted(data.draw(st.lists(st.integers(0, len(case.text)), max_size=20)))
    pieces = [case.text[i:j] for i, j in zip([0, *at], [*at, len(case.text)], strict=True)]
    expected = client.whole(whole(tokenizer, case.parser(), case.text))
    assert plain(client.streamed(stream(tokenizer, case.parser(), pieces))) == plain(expected)


def test_events_come_in_order(tokenizer: Tokenizer) -> None:
    """A block starts, goes on and stops before the next one starts; their indices count."""
    text = f"<think>hm</think>Let me see.\n{CALL}\n{CALL}\nDone."
    for size in (1, 7, 1000):
        parser = StreamParser("hermes", "think", [Tool("f", {"type": "object"})])
        found = events(stream(tokenizer, parser, cut(text, size)))
        kinds = [event["type"] for event in found]
        assert kinds[:2] == ["message_start", "ping"]
        assert kinds[-2:] == ["message_delta", "message_stop"]
        index, is_open = -1, False
        for event in found[2:-2]:
            match event["type"]:
                case "content_block_start":
                    assert not is_open
                    index, is_open = index + 1, True
                case "content_block_stop":
                    assert is_open
                    is_open = False
                case kind:
                    assert kind == "content_block_delta" and is_open
            assert event["index"] == index
        assert not is_open
        starts = [event["content_block"] for event in found if event["type"] == "content_block_start"]
        assert [start["type"] for start in starts] == ["thinking", "text", "tool_use", "tool_use", "text"]
        assert starts[0] == {"type": "thinking", "thinking": "", "signature": ""}
        assert starts[2]["input"] == {}
        signatures = [event for event in found if event.get("delta", {}).get("type") == "signature_delta"]
        assert [event["delta"] for event in signatures] == [{"type": "signature_delta", "signature": ""}]


@pytest.mark.parametrize(
    ("text", "reason", "matched", "expected"),
    [
        ("Yes.", "stop", None, ("end_turn", None)),
        ("Yes.", "stop", "\n", ("stop_sequence", "\n")),
        ("Yes.", "length", None, ("max_tokens", None)),
        ("Yes.", "abort", None, ("pause_turn", None)),
        (CALL, "stop", None, ("tool_use", None)),
        (CALL, "stop", "END", ("stop_sequence", "END")),
        (CALL[:40], "length", None, ("max_tokens", None)),
    ],
)
def test_why_it_stopped(tokenizer: Tokenizer, text: str, reason: str, matched: Any, expected: Any) -> None:
    def parser() -> StreamParser:
        return StreamParser("hermes", None, [Tool("f", {"type": "object"})])

    message = whole(tokenizer, parser(), text, reason, matched=matched)
    assert (message["stop_reason"], message["stop_sequence"]) == expected
    last = events(stream(tokenizer, parser(), cut(text, 2), reason, matched=matched))[-2]
    assert (last["delta"]["stop_reason"], last["delta"]["stop_sequence"]) == expected


def test_usage_says_at_the_end_what_a_breakpoint_kept(tokenizer: Tokenizer) -> None:
    found = events(stream(tokenizer, None, ["Yes", "."]))
    start = found[0]["message"]
    assert (start["stop_reason"], start["content"]) == (None, [])
    begun, ended = start["usage"], found[-2]["usage"]
    names = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    assert [begun[name] for name in names] == [6, 0, 3]
    assert [ended[name] for name in names] == [4, 2, 3]
    assert ended["output_tokens"] == 4


@pytest.mark.parametrize(("hit", "kept", "expected"), [(0, 0, 0), (0, 9, 9), (3, 9, 6), (9, 3, 0), (8, 9, 1)])
def test_the_three_add_up_to_the_prompt(hit: int, kept: int, expected: int) -> None:
    output = Output(prompt_tokens=9, cache=CacheReport(hit, "hit", pinned_tokens=kept))
    usage = input_usage(output)
    assert sum(usage.values()) == 9
    assert usage["cache_creation_input_tokens"] == expected
    assert usage["cache_read_input_tokens"] == hit


def test_the_input_is_the_models_own_writing(tokenizer: Tokenizer) -> None:
    """Not decoded and encoded again: no number changes on the way."""
    arguments = '{"n": -1.50e+3, "big": 123456789012345678901234567890, "s": "\\u00e9"}'
    parser = StreamParser("hermes", None, [Tool("f", {"type": "object"})])
    message = whole(tokenizer, parser, f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>')
    assert arguments.encode() in msgspec.json.encode(message)
