"""The scheduler process: messages of different senders that arrive during one step."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from branchwise.runtime.config import EngineConfig, ServerConfig
from branchwise.runtime.messages import (
    BranchOp,
    BranchRun,
    ControlReply,
    Piece,
    Settled,
    Shutdown,
    StepOutput,
    StopMatched,
)
from branchwise.runtime.sampling_params import SamplingParams
from branchwise.runtime.server.processes.channels import Inbox, Outbox
from branchwise.runtime.server.processes.launch import RunDirectory
from branchwise.runtime.server.processes.scheduler_worker import SchedulerWorker

OWNER = ("owner", "")


def piece(*tokens: int) -> Piece:
    return Piece(tokens=np.array(tokens, "<i4").tobytes())


def test_a_branch_may_be_used_again_once_its_client_has_the_end(checkpoint: Callable[[str], Path]) -> None:
    """Also where the next operation is read before the detokenizer's word that a stop string has ended the answer."""
    model = EngineConfig(model=str(checkpoint("llama-gqa")))
    config = ServerConfig(engine=model, null_executor=True, null_step_seconds=0.01)
    directory, context = RunDirectory(config), zmq.Context()
    http: Inbox[Any] = Inbox(context, directory.path, "http")
    detokenizer: Inbox[Any] = Inbox(context, directory.path, "detokenizer")
    worker = SchedulerWorker(config, context, directory.path, Outbox(context, directory.path, "http"))
    outbox = Outbox(context, directory.path, "scheduler")

    def reply(id: int) -> ControlReply:
        while True:
            for each in http.receive(60_000) or pytest.fail("no reply came"):
                if isinstance(each, ControlReply) and each.id == id:
                    return each

    thread = threading.Thread(target=worker.run)
    thread.start()
    outbox.send([BranchOp(1, "create", OWNER, piece=piece(5, 6, 7))])
    branch = reply(1).value["id"]
    outbox.send([BranchRun([1], branch, OWNER, SamplingParams(max_tokens=10_000, ignore_eos=True))])
    generated = 0
    while generated < 4:
        steps = detokenizer.receive(60_000) or pytest.fail("no tokens came")
        generated += sum(len(step.tokens) // 4 for step in steps if isinstance(step, StepOutput))
    outbox.send([BranchOp(2, "extend", OWNER, branch, piece(8, 9)), Settled(1, kept=3), StopMatched(1)])
    extended = reply(2)
    outbox.send([Shutdown()])
    thread.join(100)
    assert not thread.is_alive()
    context.destroy(0)
    directory.remove()
    assert extended.ok and extended.value["num_tokens"] == 3 + 3 + 2
