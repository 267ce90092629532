"""The tokenizer process: fair between owners, alive under a flood, and not ended by one text."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from branchwise.runtime.config import EngineConfig, ServerConfig
from branchwise.runtime.messages import (
    Abort,
    BranchOp,
    Deltas,
    Generate,
    Heartbeat,
    Limits,
    Piece,
    Ready,
    Refusal,
    Shutdown,
)
from branchwise.runtime.sampling_params import SamplingParams
from branchwise.runtime.server.processes.channels import Inbox, Outbox
from branchwise.runtime.server.processes.launch import RunDirectory
from branchwise.runtime.server.processes.tokenizer_worker import LONG, TokenizerWorker


class Panic(BaseException):
    """What pyo3 makes of a panic of Rust's: not an `Exception`."""


@pytest.fixture
def server(checkpoint: Callable[[str], Path]) -> Iterator[tuple[TokenizerWorker, Inbox[Any], Inbox[Any], Outbox]]:
    """A tokenizer at work in a thread, what it says to HTTP and to the scheduler, and the way to it."""
    config = ServerConfig(engine=EngineConfig(model=str(checkpoint("llama-gqa"))))
    directory, context = RunDirectory(config), zmq.Context()
    http: Inbox[Any] = Inbox(context, directory.path, "http")
    scheduler: Inbox[Any] = Inbox(context, directory.path, "scheduler")
    worker = TokenizerWorker(config, context, directory.path, Outbox(context, directory.path, "http"))
    outbox = Outbox(context, directory.path, "tokenizer")
    assert isinstance(http.receive(60_000)[0], Ready)
    thread = threading.Thread(target=worker.run)
    thread.start()
    yield worker, http, scheduler, outbox
    outbox.send([Shutdown()])
    thread.join(100)
    assert not thread.is_alive()
    context.destroy(0)
    directory.remove()


@pytest.mark.parametrize("error", [RuntimeError, Panic])
def test_what_breaks_the_tokenizer_is_refused(
    server: tuple[TokenizerWorker, Inbox[Any], Inbox[Any], Outbox],
    monkeypatch: pytest.MonkeyPatch,
    error: type[BaseException],
) -> None:
    worker, http, scheduler, outbox = server

    def breaks(*args: object) -> None:
        raise error("byte index 3 is not a char boundary")

    def said(message: Any) -> Any:
        outbox.send([message])
        return (scheduler if isinstance(message, BranchOp) or message.text == "whole" else http).receive(60_000)[0]

    outbox.send([Limits(1000, 1000, 1000)])
    with monkeypatch.context() as patch:
        patch.setattr(worker._tokenizer, "encode_marked", breaks)
        patch.setattr(worker._tokenizer, "encode_more", breaks)
        answer = said(Generate([7], SamplingParams(), text="broken"))
        assert isinstance(answer, Deltas)
        (delta,) = answer.items
        assert (delta.id, delta.finish.error) == (7, Refusal(None, "the prompt could not be tokenized", 500))
        told = said(BranchOp(8, "extend", ("", ""), "b", Piece("broken")))
        assert (told.id, told.refusal.problem, told.refusal.status) == (8, "the text could not be tokenized", 500)
    passed = said(Generate([9, 10], SamplingParams(max_tokens=1, n=2), text="whole"))
    assert isinstance(passed, Generate)
    assert (passed.ids, passed.text, len(passed.tokens) > 0) == ([9, 10], None, True)


Flow = tuple[TokenizerWorker, Inbox[Any], Inbox[Any], Outbox]


def generate(id: int, text: str, owner: str = "a") -> Generate:
    return Generate([id], SamplingParams(max_tokens=1), text=text, namespace=(owner, ""))


def receive(inbox: Inbox[Any], count: int) -> list[Any]:
    got: list[Any] = []
    while len(got) < count:
        new = inbox.receive(60_000)
        assert new, f"only {len(got)} of {count} messages came"
        got += new
    return got


def slowly(worker: TokenizerWorker, monkeypatch: pytest.MonkeyPatch, gate: threading.Event) -> None:
    """Long texts are tokenized only once the gate is open."""
    encode = worker._tokenizer.encode_marked

    def wait(text: str, *rest: Any) -> Any:
        if len(text) > LONG:
            assert gate.wait(200)
        return encode(text[:100], *rest)

    monkeypatch.setattr(worker._tokenizer, "encode_marked", wait)
    monkeypatch.setattr(worker._tokenizer, "longest_token", None)


def test_owners_take_turns(server: Flow) -> None:
    _, _, scheduler, outbox = server
    outbox.send([Limits(1000, 10_000, 10_000)])
    outbox.send([*(generate(i, "flood " * 300) for i in range(200)), generate(1000, "small", "b")])
    order = [message.ids[0] for message in receive(scheduler, 201)]
    assert order.index(1000) <= 2
    assert [id for id in order if id != 1000] == list(range(200))


def test_short_texts_heartbeats_and_aborts_do_not_wait_for_long_texts(
    server: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, http, scheduler, outbox = server
    gate = threading.Event()
    slowly(worker, monkeypatch, gate)
    outbox.send([Limits(1000, 10_000, 10_000)])
    outbox.send([generate(i, "x" * (LONG + 1)) for i in range(5)])
    outbox.send([Heartbeat(7), generate(10, "small", "b"), generate(11, "of the same owner"), Abort(2), Abort(99)])
    got = receive(scheduler, 4)
    assert Heartbeat(7) in got
    assert Abort(99) in got  # its request went before
    assert {message.ids[0] for message in got if isinstance(message, Generate)} == {10, 11}
    assert receive(http, 1)[0].passed == "tokenizer"
    gate.set()
    assert [message.ids[0] for message in receive(scheduler, 4)] == [0, 1, 3, 4]
    ((delta,),) = (message.items for message in receive(http, 1))
    assert (delta.id, delta.finish.reason) == (2, "abort")  # it was not even tokenized


def test_an_abort_follows_its_request(server: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, _, scheduler, outbox = server
    gate = threading.Event()
    slowly(worker, monkeypatch, gate)
    outbox.send([Limits(1000, 10_000, 10_000)])
    both = generate(1, "x" * (LONG + 1))
    both.ids.append(2)
    outbox.send([both, Abort(2)])
    gate.set()
    first, second = receive(scheduler, 2)
    assert (first.ids, second) == ([1, 2], Abort(2))
    outbox.send([Abort(1)])
    assert receive(scheduler, 1) == [Abort(1)]


def test_operations_on_branches_keep_the_order_of_their_owner(server: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, _, scheduler, outbox = server
    monkeypatch.setattr(worker._tokenizer, "longest_token", None)
    outbox.send([Limits(1000, 1_000_000, 1_000_000)])
    texts = ["x" * (LONG + 1) if i % 3 == 0 else "short" for i in range(12)]
    outbox.send([BranchOp(i, "extend", ("a", ""), "b", Piece(text)) for i, text in enumerate(texts)])
    assert [message.id for message in receive(scheduler, 12)] == list(range(12))


def test_no_prompt_of_a_request_goes_ahead_of_one_that_is_refused(
    server: tuple[TokenizerWorker, Inbox[Any], Inbox[Any], Outbox],
) -> None:
    """Short and long ones: what is refused is said before the scheduler hears of the others."""
    _, http, scheduler, outbox = server
    outbox.send([Limits(1000, 30_000, 30_000)])
    for first, much in ((10, "word " * 60_000), (20, "w " * 8_000)):
        limits = [] if first == 10 else [Limits(1000, 100, 100)]
        prompts = [Generate([first], SamplingParams(max_tokens=1), text="ok", more=1)]
        prompts.append(Generate([first + 1], SamplingParams(max_tokens=1), text=much))
        outbox.send([*limits, *prompts])
        forwarded = scheduler.receive(60_000)
        assert [message.ids for message in forwarded] == [[first]]
        (refused,) = http.receive(60_000)
        assert [delta.id for delta in refused.items] == [first + 1]
