"""One text that the tokenizer library cannot take is one answer, not the end of everybody's server."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from branchwise.runtime.config import EngineConfig, ServerConfig
from branchwise.runtime.messages import BranchOp, Deltas, Generate, Limits, Piece, Ready, Refusal, Shutdown
from branchwise.runtime.sampling_params import SamplingParams
from branchwise.runtime.server.processes.channels import Inbox, Outbox
from branchwise.runtime.server.processes.launch import RunDirectory
from branchwise.runtime.server.processes.tokenizer_worker import TokenizerWorker


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
    assert isinstance(http.receive(5000)[0], Ready)
    thread = threading.Thread(target=worker.run)
    thread.start()
    yield worker, http, scheduler, outbox
    outbox.send([Shutdown()])
    thread.join(10)
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
        return (scheduler if isinstance(message, BranchOp) or message.text == "whole" else http).receive(5000)[0]

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
