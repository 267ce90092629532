"""The scheduler process: the engine core's loop, between an inbox and the detokenizer."""

from __future__ import annotations

import os
import time
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import zmq

from ...config import ServerConfig
from ...engine.loading import load_engine, load_null_engine
from ...fair_queue import FairQueue
from ...fleet.publisher import KVEventPublisher
from ...messages import (
    Abort,
    BranchOp,
    BranchRun,
    Control,
    ControlReply,
    Failed,
    Generate,
    Heartbeat,
    Message,
    Progress,
    Ready,
    Settled,
    Shutdown,
    StopMatched,
)
from .channels import Inbox, Outbox, ToScheduler
from .launch import EXIT_FAILED

CONTROL_SECONDS = 0.005  # of control messages between two steps; the rest are answered after the next step
STATS_SECONDS = 0.2  # shortest time between two `Stats` while there is work; one more when it ends


class SchedulerWorker:
    """Runs the engine core on messages from the tokenizer, the detokenizer and HTTP."""

    def __init__(self, config: ServerConfig, context: zmq.Context[Any], run_dir: Path, http: Outbox) -> None:
        self._inbox: Inbox[ToScheduler] = Inbox(context, run_dir, "scheduler")
        self._detokenizer = Outbox(context, run_dir, "detokenizer")
        self._tokenizer = Outbox(context, run_dir, "tokenizer")
        self._http = http
        if config.null_executor:
            loaded = load_null_engine(config.engine, config.null_step_seconds)
        else:
            failed: Future[str] = Future()
            failed.add_done_callback(partial(_leave, run_dir))
            progress = partial(_send_progress, http)
            loaded = load_engine(config.engine, progress, failed, tokenizer_later=True)
        self._core = loaded.core
        self._core.scheduler.send_early = lambda output: self._detokenizer.send([output])
        self._events: KVEventPublisher | None = None
        if config.kv_events is not None:
            self._events = KVEventPublisher(self._core.scheduler.tree, config.kv_events, config.kv_events_replay)
        self._stats_at = 0.0
        self._controls: FairQueue[Control] = FairQueue()
        self._heartbeats: list[Heartbeat] = []  # received, to be passed on after the next step
        facts = {"memory_plan": loaded.memory_plan, "rank_pids": loaded.rank_pids}
        http.send([Ready("scheduler", {**self._core.info(), **self._events_info(), **facts})])

    def run(self) -> None:
        """Steps while there is work and blocks while there is none, until `Shutdown` has arrived and every request has
        ended."""
        core = self._core
        leaving = False
        timeout_ms: int | None = None
        while True:
            for message in sorted(self._inbox.receive(timeout_ms), key=_after_ends):
                leaving |= self._handle(message)
            self._answer_controls()
            self._answer_branches()  # before the step, which may take long
            output = core.step()
            if output is not None:
                self._detokenizer.send([output])
            self._pass_heartbeats()
            self._answer_branches()
            if self._events is not None:
                self._events.publish()
            working = core.has_work
            self._report(working)
            if self._controls:
                timeout_ms = 0
            elif not working:
                if leaving:
                    break
                again = core.idle()
                timeout_ms = None if again is None else int(1000 * again) + 1
            else:
                # If nothing can advance (grammars are compiling), wait a moment instead of spinning.
                timeout_ms = 0 if core.advanced else 1
        self._detokenizer.send([Shutdown()])
        if self._events is not None:
            self._events.close()
        core.close()
        self._detokenizer.close()
        self._tokenizer.close(0)
        self._inbox.close()

    def _handle(self, message: ToScheduler) -> bool:
        """Returns whether it was `Shutdown`."""
        match message:
            case Generate():
                self._core.add(message)
            case BranchOp() | BranchRun():
                self._core.branches.take(message)
            case Settled():
                self._core.branches.settled(message)
            case Abort():
                self._core.abort(message.id)
            case StopMatched():
                self._core.stop_matched(message.id)
            case Control():
                asked = message.argument
                owner = asked["namespace"][0] if isinstance(asked, dict) and "namespace" in asked else ""
                self._controls.put(owner, message)
            case Heartbeat():
                self._heartbeats.append(message)
            case Shutdown():
                return True
        return False

    def _pass_heartbeats(self) -> None:
        """After a step: a heartbeat that passes proves that the device answers, not only that this process runs."""
        if self._heartbeats:
            self._core.beat()
            self._detokenizer.send(self._heartbeats)
            self._http.send([Heartbeat(each.number, "scheduler") for each in self._heartbeats])
            self._heartbeats.clear()

    def _answer_controls(self) -> None:
        end = time.monotonic() + CONTROL_SECONDS
        while self._controls and time.monotonic() < end:
            self._http.send([self._answer(self._controls.take())])

    def _answer(self, control: Control) -> ControlReply:
        if control.what == "kv_events":
            return ControlReply(control.id, True, None if self._events is None else self._events.snapshot())
        reply = self._core.control(control)
        if control.what == "info" and reply.ok:
            reply.value |= self._events_info()
        return reply

    def _events_info(self) -> dict[str, Any]:
        return {} if self._events is None else self._events.info()

    def _answer_branches(self) -> None:
        branches = self._core.branches
        if branches.replies:
            self._http.send(branches.replies)
            branches.replies.clear()
        if branches.to_encode:
            self._tokenizer.send(branches.to_encode)
            branches.to_encode.clear()

    def _report(self, working: bool) -> None:
        now = time.monotonic()
        if not working or now - self._stats_at >= STATS_SECONDS:
            self._stats_at = now
            messages: list[Message] = [self._core.stats()]
            self._http.send(messages)


def _after_ends(message: ToScheduler) -> bool:
    """Sorts what the detokenizer says about ends before all else: who has the end of an answer may use its branch again
    at once, and where both are waiting ZeroMQ takes frames of the two senders in turn."""
    return not isinstance(message, (Settled, StopMatched))


def _leave(run_dir: Path, failed: Future[str]) -> None:
    """Ends this process: its main thread may be stuck in a step whose other ranks have ended."""
    context: zmq.Context[Any] = zmq.Context()  # sockets belong to their thread
    http = Outbox(context, run_dir, "http")
    http.send([Failed("scheduler", failed.result())])
    http.close()
    context.term()  # once the message has been delivered
    os._exit(EXIT_FAILED)


def _send_progress(http: Outbox, done: int, total: int) -> None:
    http.send([Progress("scheduler", "loading weights", done, total)])
