"""Programs as a type checker sees them: `test_types` has mypy check this file, nothing runs it."""

from __future__ import annotations

from array import array
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, assert_type

from branchwise import AsyncEngine, Engine, RequestOutput, SamplingParams
from branchwise.runtime.engine.request_output import StreamChunk

GREEDY = SamplingParams(temperature=0)
HELLO = [{"role": "user", "content": "Hello."}]


def generate(engine: Engine, texts: Sequence[str], ids: list[list[int]], packed: array[int]) -> None:
    assert_type(engine.generate("x", GREEDY), RequestOutput)
    assert_type(engine.generate([1, 2]), RequestOutput)
    assert_type(engine.generate(packed), RequestOutput)
    assert_type(engine.generate(["x", "y"], [GREEDY, GREEDY]), list[RequestOutput])
    assert_type(engine.generate(("x", "y")), list[RequestOutput])
    assert_type(engine.generate(texts), list[RequestOutput])
    assert_type(engine.generate(ids, GREEDY), list[RequestOutput])
    assert_type(engine.generate([[1, 2], "x"]), list[RequestOutput])
    assert_type(engine.stream("x"), Iterator[StreamChunk])
    engine.generate(3)  # type: ignore[call-overload]
    engine.generate("x", {"temperature": 0})  # type: ignore[call-overload]


def chat(engine: Engine, messages: list[dict[str, Any]]) -> None:
    assert_type(engine.chat(HELLO, GREEDY), RequestOutput)
    assert_type(engine.chat(messages, tools=messages), RequestOutput)
    assert_type(engine.chat([HELLO, HELLO], [GREEDY, GREEDY]), list[RequestOutput])
    assert_type(engine.chat([messages, HELLO]), list[RequestOutput])
    assert_type(engine.chat_prompt(messages), list[int])
    assert_type(engine.generate(engine.chat_prompt(messages)), RequestOutput)
    engine.chat("Hello.")  # type: ignore[arg-type]


def branch(engine: Engine) -> None:
    with engine.branch("x") as branch:
        assert_type(branch.generate(GREEDY), RequestOutput)
        assert_type(branch.generate(GREEDY, stream=True), Iterator[StreamChunk])


async def asynchronous(engine: AsyncEngine, other: Engine, messages: list[dict[str, Any]]) -> None:
    assert_type(await engine.generate("x", GREEDY), RequestOutput)
    assert_type(await engine.generate(["x"]), list[RequestOutput])
    assert_type(await engine.chat(messages), RequestOutput)
    assert_type(await engine.chat([messages]), list[RequestOutput])
    assert_type(engine.stream([1, 2]), AsyncIterator[StreamChunk])
    assert_type(await other.agenerate([[1], [2]]), list[RequestOutput])
    assert_type(await other.achat(messages), RequestOutput)
    async with engine as same, await same.branch(messages) as branch:
        assert_type(same, AsyncEngine)
        assert_type(await branch.tokens(), list[int])
        assert_type(await branch.generate(GREEDY), RequestOutput)
        assert_type(branch.generate(GREEDY, stream=True), AsyncIterator[StreamChunk])


with Engine() as running:
    assert_type(running, Engine)
