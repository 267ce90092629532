"""Heartbeats: which process a missing one is blamed on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zmq

from branchwise.runtime.config import EngineConfig, ServerConfig
from branchwise.runtime.messages import Heartbeat, Shutdown
from branchwise.runtime.server.processes.channels import Inbox, Outbox
from branchwise.runtime.server.processes.launch import RunDirectory
from branchwise.runtime.server.processes.scheduler_worker import SchedulerWorker
from branchwise.runtime.server.processes.tokenizer_worker import TokenizerWorker


class Recorded(Outbox):
    """Notes each heartbeat that is sent."""

    def __init__(self, sent: list[str], *to: Any) -> None:
        super().__init__(*to)
        self._sent, self._name = sent, to[-1]

    def send(self, messages: Any) -> None:
        self._sent += [self._name for message in messages if isinstance(message, Heartbeat)]
        super().send(messages)


@pytest.mark.parametrize(
    ("role", "worker_class", "next_role"),
    [("tokenizer", TokenizerWorker, "scheduler"), ("scheduler", SchedulerWorker, "detokenizer")],
)
def test_a_process_reports_a_heartbeat_once_it_has_passed_it_on(
    checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    role: str,
    worker_class: type[TokenizerWorker | SchedulerWorker],
    next_role: str,
) -> None:
    """If it were stopped after a report and before that, the next process would be taken for the one that hangs."""
    config = ServerConfig(engine=EngineConfig(model=str(checkpoint("llama-gqa"))), null_executor=True)
    directory, context, sent = RunDirectory(config), zmq.Context(), []
    http: Inbox[Any] = Inbox(context, directory.path, "http")
    further: Inbox[Any] = Inbox(context, directory.path, next_role)
    worker = worker_class(config, context, directory.path, Recorded(sent, context, directory.path, "http"))
    monkeypatch.setattr(worker, f"_{next_role}", Recorded(sent, context, directory.path, next_role))
    outbox = Outbox(context, directory.path, role)
    thread = threading.Thread(target=worker.run)
    thread.start()
    outbox.send([Heartbeat(7)])
    told: list[Any] = []
    while Heartbeat(7, role) not in told:
        told += http.receive(60_000) or pytest.fail("no report came")
    outbox.send([Shutdown()])
    thread.join(100)
    assert not thread.is_alive()
    assert further.receive(60_000)[0] == Heartbeat(7)
    context.destroy(0)
    directory.remove()
    assert sent == [next_role, "http"]
