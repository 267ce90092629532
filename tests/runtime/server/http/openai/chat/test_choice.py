"""One sample of a chat: however its text arrives, the stream adds up to the message."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

from branchwise.runtime.chat.tools.definitions import Tool
from branchwise.runtime.chat.tools.parser import StreamParser
from branchwise.runtime.messages import Delta, Finished
from branchwise.runtime.sampling_params import SamplingParams
from branchwise.runtime.server.http.chat.sample import Sample
from branchwise.runtime.server.http.openai.chat.choice import ChatChoice
from branchwise.runtime.tokenizer.incremental import open_stream
from branchwise.runtime.tokenizer.tokenizer import Tokenizer

TOOL = Tool("f", {"type": "object"})
CALL = '<tool_call>\n{"name": "f", "arguments": {"x":  "</tool_call> \\u00e9"}}\n</tool_call>'
OUTPUTS = {
    "text": "Hello, 你好.",
    "nothing": "",
    "thinking": "<think>\nfirst, second\n</think>\n\nDone.",
    "call": CALL,
    "all": f"<think>hm</think>\nLet me see.\n{CALL}\n{CALL}",
    "cut": CALL[:40],
    "no call": '<tool_call>\n{"name": "unheard_of", "arguments": {}}\n</tool_call>',
}


def deltas(text: str, size: int, reason: Any) -> list[Delta]:
    """Three characters a token; the last delta has the finish reason."""
    pieces = [text[i : i + size] for i in range(0, len(text), size)] or [""]
    found = [Delta(1, piece, array("i", [5] * -(-len(piece) // 3)).tobytes(), prompt_tokens=4) for piece in pieces[:-1]]
    last = Finished(1, reason, prompt_tokens=4, completion_tokens=-(-len(text) // 3))
    return [*found, Delta(1, pieces[-1], array("i", [5]).tobytes(), prompt_tokens=4, finish=last)]


def choice(tokenizer: Tokenizer, one_call: bool = False) -> ChatChoice:
    sample = Sample(tokenizer, SamplingParams(), StreamParser("hermes", "think", [TOOL]), one_call=one_call)
    return ChatChoice(tokenizer, sample, {})


def assembled(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    """As a client does it."""
    message: dict[str, Any] = {"role": pieces[0]["delta"]["role"], "content": "", "reasoning_content": "", "calls": []}
    for piece in pieces:
        delta = piece["delta"]
        for name in ("content", "reasoning_content"):
            message[name] += delta.get(name) or ""
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                assert call["index"] == len(message["calls"])
                message["calls"].append([call["function"]["name"], ""])
            message["calls"][call["index"]][1] += call["function"]["arguments"]
    return message


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("one_call", [False, True])
def test_the_stream_adds_up_to_the_message(tokenizer: Tokenizer, name: str, one_call: bool) -> None:
    text = OUTPUTS[name]
    reason = "length" if name == "cut" else "stop"
    whole = choice(tokenizer, one_call)
    for delta in deltas(text, 10**6, reason):
        whole.feed(delta)
    answer = whole.whole(0)
    message = answer["message"]
    expected = [[call["function"]["name"], call["function"]["arguments"]] for call in message.get("tool_calls", ())]
    assert len(expected) == {"call": 1, "all": 1 if one_call else 2, "cut": 1}.get(name, 0)
    assert answer["finish_reason"] == ("tool_calls" if expected and reason == "stop" else reason)
    for size in (1, 2, 3, 7, 50):
        streamed = choice(tokenizer, one_call)
        pieces: list[dict[str, Any]] = []
        for delta in deltas(text, size, reason):
            streamed.feed(delta)
            pieces += streamed.pieces(0)
        found = assembled(pieces)
        assert found["content"] == (message["content"] or "")
        assert found["reasoning_content"] == message.get("reasoning_content", "")
        assert found["calls"] == expected
        assert [piece["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + [answer["finish_reason"]]


@pytest.mark.parametrize("special", [True, False])
def test_thinking_is_counted_in_tokens_however_they_come(tokenizer: Tokenizer, special: bool) -> None:
    """``special``: where special tokens are left out of the text, they are in no part of it."""
    thinking = "let me see, and see again"
    ids = tokenizer.encode(f"<think>\n{thinking}\n</think>\n\nDone, and done.", add_special_tokens=False).tolist()
    texts = [tokenizer.token_text(id) for id in ids]  # of ASCII: characters, each on its own
    starts = [len("".join(texts[:i])) for i in range(len(ids))]
    want = sum(len("<think>\n") <= start < len(f"<think>\n{thinking}") for start in starts)
    assert 5 < want < len(ids) - 5
    if special:
        ids, texts = [*sorted(tokenizer.special_ids), *ids], [*[""] * len(tokenizer.special_ids), *texts]
    for size in (1, 2, 3, 7, 1000):
        one = choice(tokenizer)
        for at in range(0, len(ids), size):
            last = Finished(1, "stop", completion_tokens=len(ids)) if at + size >= len(ids) else None
            tokens = array("i", ids[at : at + size]).tobytes()
            one.feed(Delta(1, "".join(texts[at : at + size]), tokens, finish=last))
        assert one.sample.reasoning_tokens == want


@pytest.mark.parametrize(
    "text", ["<think>one, two é</think>\n\nDone, and done again.", "No thought. <think>", "<think>é"]
)
def test_thinking_counts_the_same_in_one_piece(tokenizer: Tokenizer, text: str) -> None:
    """An answer that nobody reads along comes with many tokens at once."""
    tokens = tokenizer.encode(text, False).tolist()
    stream = open_stream(tokenizer, [], True)
    pieces = [stream.push(token) for token in tokens]
    pieces[-1] += stream.flush()
    found = []
    for size in (1, 2, len(tokens)):
        one = choice(tokenizer)
        for i in range(0, len(tokens), size):
            data = array("i", tokens[i : i + size]).tobytes()
            finish = Finished(1, "stop", completion_tokens=len(tokens)) if i + size >= len(tokens) else None
            one.feed(Delta(1, "".join(pieces[i : i + size]), data, finish=finish))
        found.append(one.sample.reasoning_tokens)
    assert found == [found[0]] * 3
    assert bool(found[0]) == text.startswith("<think>")
    assert found[0] < len(tokens) or "</think>" not in text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (CALL, "tool_calls"),
        (CALL[:48], "stop"),
        (f"{CALL}\n{CALL[:48]}", "stop"),
        (f"{CALL}\nDone.", "tool_calls"),
        (f"<think>\nhm\n{CALL}", "tool_calls"),
        (f"<think>\nhm\n{CALL}</think>Done.", "stop"),
    ],
)
def test_an_answer_that_stops_inside_a_call(tokenizer: Tokenizer, text: str, reason: str) -> None:
    """A stop string in arguments ends the answer with ``stop``: there is no whole call to make."""
    sample = Sample(tokenizer, SamplingParams(), StreamParser("hermes", "think", [TOOL]), one_call=False)
    for delta in deltas(text, 3, "stop"):
        sample.feed(delta)
    assert sample.finish_reason == reason
