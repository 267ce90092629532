"""Publishes KV events on ZeroMQ: a PUB socket for subscribers, and a ROUTER socket for batches that one has missed."""

from __future__ import annotations

import logging
import threading
from collections import deque
from contextlib import ExitStack
from typing import Any

import msgspec
import zmq

from ...radix.tree import RadixTree
from ..errors import LoadError
from .block_events import BlockEvents
from .kv_events import END_OF_REPLAY, sequence_frame, sequence_number

logger = logging.getLogger(__name__)

REPLAYED_BATCHES = 10_000  # kept for subscribers that missed some, at most
REPLAYED_BYTES = 64 << 20  # of them together, at most
HIGH_WATER = 100_000  # batches queued for one subscriber; more are dropped, and it sees a gap
LINGER_MS = 500


class KVEventPublisher:
    """Sends a tree's events, one batch a call of `publish`, with numbers from 0 on.

    Encoding happens on the caller's thread; a thread of its own owns the public sockets, so that neither a slow
    subscriber nor a request for a replay delays a step. A replay request is a sequence number; the answer is every
    kept batch from there on, each as (number, batch), and then the number -1. As in vLLM and SGLang.
    """

    def __init__(self, tree: RadixTree, address: str, replay_address: str | None = None) -> None:
        """Raises `LoadError` if an address cannot be bound."""
        self._events = BlockEvents(tree)
        self._block_size = tree.page_size
        self._encoder = msgspec.msgpack.Encoder()
        self._next = 0
        self._context: zmq.Context[Any] = zmq.Context()
        with ExitStack() as undo:
            undo.callback(self._context.destroy, 0)
            public = self._context.socket(zmq.PUB)
            public.setsockopt(zmq.SNDHWM, HIGH_WATER)
            self.address = _bind(public, address, "--kv-events")
            self.replay_address: str | None = None
            replay = None
            if replay_address is not None:
                replay = self._context.socket(zmq.ROUTER)
                replay.setsockopt(zmq.SNDHWM, REPLAYED_BATCHES + 1)
                self.replay_address = _bind(replay, replay_address, "--kv-events-replay")
            self._queue = self._context.socket(zmq.PAIR)
            self._queue.setsockopt(zmq.SNDHWM, 0)
            self._queue.bind("inproc://batches")
            self._thread = threading.Thread(target=self._serve, args=(public, replay), name="kv-events", daemon=True)
            self._thread.start()
            undo.pop_all()
        self.publish()  # the tree's present contents

    def publish(self) -> None:
        """Sends the events since the last call, if there are any. Does not block."""
        batch = self._events.take()
        if batch is not None:
            self._queue.send_multipart((sequence_frame(self._next), self._encoder.encode(batch)), copy=False)
            self._next += 1

    def snapshot(self) -> dict[str, Any]:
        """The tree's blocks and the number of the last batch that they include: see `block_events.snapshot`."""
        self.publish()
        return {"seq": self._next - 1, "block_size": self._block_size, "contents": self._events.contents()}

    def info(self) -> dict[str, Any]:
        """Where events are published, and the number of the last batch (-1: none was published). JSON-able."""
        addresses = {"kv_events": self.address, "kv_events_replay": self.replay_address}
        return {**addresses, "kv_events_seq": self._next - 1}

    def close(self) -> None:
        """Sends queued batches and closes the sockets."""
        self._queue.send(b"")
        self._thread.join()
        self._queue.close(LINGER_MS)
        self._context.term()

    def _serve(self, public: zmq.Socket[bytes], replay: zmq.Socket[bytes] | None) -> None:
        queue = self._context.socket(zmq.PAIR)
        queue.setsockopt(zmq.RCVHWM, 0)
        queue.connect("inproc://batches")
        poller = zmq.Poller()
        for socket in filter(None, (queue, replay)):
            poller.register(socket, zmq.POLLIN)
        kept: deque[tuple[bytes, bytes]] = deque()
        kept_bytes = 0
        while True:
            ready = dict(poller.poll())
            if queue in ready:
                frames = queue.recv_multipart()
                if len(frames) == 1:
                    break
                number, payload = frames
                public.send_multipart((b"", number, payload))
                kept.append((number, payload))
                kept_bytes += len(payload)
                while len(kept) > REPLAYED_BATCHES or (kept_bytes > REPLAYED_BYTES and len(kept) > 1):
                    kept_bytes -= len(kept.popleft()[1])
            elif replay is not None and replay in ready:
                _answer(replay, kept)
        for socket in filter(None, (queue, public, replay)):
            socket.close(LINGER_MS)


def _answer(replay: zmq.Socket[bytes], kept: deque[tuple[bytes, bytes]]) -> None:
    """Answers one request for a replay. Another form of request is ignored, as its sender would not understand."""
    frames = replay.recv_multipart()
    if len(frames) != 3 or len(frames[2]) != 8:
        logger.warning(
            "kv events: ignored a replay request of %d frames; it must be one number of 8 bytes", len(frames)
        )
        return
    client, start = frames[0], sequence_number(frames[2])
    try:
        for number, payload in kept:
            if sequence_number(number) >= start:
                replay.send_multipart((client, b"", number, payload), zmq.NOBLOCK)
        replay.send_multipart((client, b"", END_OF_REPLAY, b""), zmq.NOBLOCK)
    except zmq.Again:
        logger.warning("kv events: a subscriber does not read its replay; it must take a snapshot")


def _bind(socket: zmq.Socket[bytes], address: str, flag: str) -> str:
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        raise LoadError(f"{flag} {address}: {error}; write it like tcp://127.0.0.1:5557 or ipc:///path") from error
    found = socket.getsockopt(zmq.LAST_ENDPOINT)
    return found.rstrip(b"\0").decode() if isinstance(found, bytes) else address
