"""Typed, one-way channels between the processes: ZeroMQ PUSH/PULL over ``ipc://``, msgspec msgpack, never pickle.

A frame is a list of messages, so the output of one step is one frame. The sockets are in a private directory (mode
0700), so only the user who started the server can open them. There is no high-water mark: a full queue would block a
step or drop a message. The number of requests is bounded where HTTP admits them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
import zmq

from ...messages import (
    Abort,
    BranchOp,
    BranchRun,
    Control,
    ControlReply,
    Deltas,
    Failed,
    Generate,
    Heartbeat,
    Limits,
    Message,
    Progress,
    Ready,
    Settled,
    Shutdown,
    Stats,
    StepOutput,
    StopMatched,
)

LINGER_MS = 2000  # how long an exiting process may try to deliver its last messages
MAX_PATH = 100  # bytes of a Unix socket's path (sun_path holds 108)

ToTokenizer = Generate | BranchOp | BranchRun | Abort | Limits | Heartbeat | Shutdown
ToScheduler = Generate | BranchOp | BranchRun | Abort | StopMatched | Settled | Control | Heartbeat | Shutdown
ToDetokenizer = StepOutput | Heartbeat | Shutdown
ToHttp = Deltas | Stats | ControlReply | Progress | Ready | Failed | Heartbeat

# The messages that each inbox accepts; any other is a decoding error.
INBOXES: dict[str, Any] = {
    "tokenizer": list[ToTokenizer],
    "scheduler": list[ToScheduler],
    "detokenizer": list[ToDetokenizer],
    "http": list[ToHttp],
}

M = TypeVar("M")


def address(run_dir: Path, name: str) -> str:
    """The address that the inbox of that name is bound to."""
    return f"ipc://{run_dir / name}.sock"


class Inbox(Generic[M]):
    """The receiving end of a channel. Frames of one sender arrive in the order in which they were sent."""

    def __init__(self, context: zmq.Context[Any], run_dir: Path, name: str) -> None:
        self._decoder: msgspec.msgpack.Decoder[list[M]] = msgspec.msgpack.Decoder(INBOXES[name])
        self._socket = context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(address(run_dir, name))

    @property
    def fd(self) -> int:
        """Becomes readable when something may have arrived. It is edge-triggered: `receive` then everything."""
        return int(self._socket.getsockopt(zmq.FD))

    def receive(self, timeout_ms: int | None = 0) -> list[M]:
        """All messages that have arrived, in order. Waits up to ``timeout_ms`` for the first (None: without limit)."""
        messages: list[M] = []
        if timeout_ms != 0 and not self._socket.poll(timeout_ms):
            return messages
        while True:
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return messages
            messages += self._decoder.decode(frame)

    def close(self) -> None:
        self._socket.close()


class Outbox:
    """The sending end of a channel. `send` never blocks and never drops a message."""

    def __init__(self, context: zmq.Context[Any], run_dir: Path, name: str) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._socket = context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.connect(address(run_dir, name))

    def send(self, messages: Sequence[Message]) -> None:
        if messages:
            self._socket.send(self._encoder.encode(messages), zmq.NOBLOCK)

    def close(self, linger_ms: int | None = None) -> None:
        self._socket.close(linger_ms)
