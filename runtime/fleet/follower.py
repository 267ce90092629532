"""Applies the KV events of one replica to a router's index; detects lost events and recovers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from .kv_events import END_OF_REPLAY, IndexEvent, sequence_frame, sequence_number

logger = logging.getLogger(__name__)

LATE_SECONDS = 1.0  # after a report of a batch; one that has not come by then is lost
REPLAY_SECONDS = 2.0  # that a replay may take; then a snapshot is taken
RETRY_SECONDS = 0.5  # after a failed snapshot, doubled up to `MAX_RETRY_SECONDS`
MAX_RETRY_SECONDS = 10.0
HIGH_WATER = 10_000  # batches queued here at most; more are dropped, which is a gap


class Batch(msgspec.Struct, array_like=True, gc=False):
    """A `KVEventBatch`."""

    ts: float
    events: list[IndexEvent]
    data_parallel_rank: int | None = None


class Snapshot(msgspec.Struct):
    """A `KVSnapshot`."""

    seq: int
    block_size: int
    batch: Batch


class Sink:
    """Receives a follower's events. `view.FleetView` has one for each replica."""

    def apply(self, events: list[IndexEvent]) -> None:
        """The next events, in order."""
        raise NotImplementedError

    def reset(self) -> None:
        """Discards all blocks: the events of a snapshot follow."""
        raise NotImplementedError

    def sure(self, sure: bool) -> None:
        """``sure``: whether all events up to now have been applied."""
        raise NotImplementedError


class Follower:
    """Subscribes to one replica. ``snapshot`` gets the bytes of its ``/cache/events/snapshot``.

    It subscribes first, then takes a snapshot, then applies the batches after it, so nothing is missed in between. A
    missing sequence number is a gap: the batches are requested again or, if the replica no longer has them, a snapshot
    is taken; until then the sink is not sure. So it is if a batch was lost and none follows, which the replica's
    reports show: the publisher drops what it publishes before the subscription has reached it, or while the connection
    is down. Sequence numbers start again at 0 when the engine restarts.
    """

    def __init__(
        self,
        address: str,
        replay_address: str | None,
        snapshot: Callable[[], Awaitable[bytes]],
        sink: Sink,
        context: zmq.asyncio.Context | None = None,
    ) -> None:
        self._address, self._replay_address = address, replay_address
        self._snapshot, self._sink = snapshot, sink
        self._context = context or zmq.asyncio.Context.instance()
        self._last = -1  # the number of the last batch applied
        self._received = -1  # of the last batch from the subscription: a lower one follows only where numbers restart
        self._decode = msgspec.msgpack.Decoder(Batch).decode
        self.gaps = 0  # found so far
        self._lock = asyncio.Lock()  # of the tasks that apply events
        self._task: asyncio.Task[None] | None = None
        self._late: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Starts following, on the running loop."""
        self._sink.sure(False)
        self._task = asyncio.create_task(self._run(), name=f"follow {self._address}")

    def stop(self) -> None:
        """Stops following. The sink gets no further calls."""
        for task in filter(None, (self._task, self._late)):
            task.cancel()

    def published(self, number: int) -> None:
        """Says that the replica has published the batches up to ``number``. Those that have not come `LATE_SECONDS`
        later are fetched."""
        if number > self._last and (self._late is None or self._late.done()):
            self._late = asyncio.create_task(self._fetch_late(number), name=f"late events of {self._address}")

    async def _fetch_late(self, number: int) -> None:
        await asyncio.sleep(LATE_SECONDS)
        async with self._lock:
            if number > self._last:
                await self._recover(number)

    async def _run(self) -> None:
        socket = self._context.socket(zmq.SUB)
        socket.setsockopt(zmq.RCVHWM, HIGH_WATER)
        socket.subscribe(b"")
        try:
            socket.connect(self._address)
            async with self._lock:
                await self._take_snapshot()
            while True:
                _, number, payload = await socket.recv_multipart()
                async with self._lock:
                    await self._receive(sequence_number(number), payload)
        finally:
            socket.close(0)

    async def _receive(self, number: int, payload: bytes) -> None:
        restarted, self._received = number <= self._received, number
        if restarted:
            self._sink.sure(False)
            await self._take_snapshot()
            return
        if number > self._last + 1:
            await self._recover(number - 1)
        if number == self._last + 1:
            try:
                self._apply(number, payload)
            except msgspec.DecodeError as error:  # of another version's replica, perhaps
                logger.warning("kv events of %s: batch %d cannot be read: %s", self._address, number, error)
                self._sink.sure(False)
                await asyncio.sleep(RETRY_SECONDS)  # the next batches may be no better
                await self._take_snapshot()
        # Else the snapshot or the replay included it.

    async def _recover(self, number: int) -> None:
        """Applies the batches up to ``number``, which are missing."""
        self.gaps += 1
        logger.warning("kv events of %s: batches %d to %d are missing", self._address, self._last + 1, number)
        self._sink.sure(False)
        if await self._replay() and self._last >= number:
            self._sink.sure(True)
        else:
            await self._take_snapshot()

    def _apply(self, number: int, payload: bytes) -> None:
        self._last = number
        self._sink.apply(self._decode(payload).events)

    async def _take_snapshot(self) -> None:
        seconds = RETRY_SECONDS
        while True:
            try:
                found = msgspec.json.decode(await self._snapshot(), type=Snapshot)
                break
            except Exception as error:
                logger.warning("kv events of %s: no snapshot: %s", self._address, error)
                await asyncio.sleep(seconds)
                seconds = min(2 * seconds, MAX_RETRY_SECONDS)
        self._sink.reset()
        self._last = found.seq
        self._sink.apply(found.batch.events)
        self._sink.sure(True)

    async def _replay(self) -> bool:
        """Applies the missing batches, if the replica still has them all."""
        if self._replay_address is None:
            return False
        socket: Any = self._context.socket(zmq.DEALER)
        try:
            socket.connect(self._replay_address)
            async with asyncio.timeout(REPLAY_SECONDS):
                await socket.send_multipart((b"", sequence_frame(self._last + 1)))
                while True:
                    _, number, payload = await socket.recv_multipart()
                    if number == END_OF_REPLAY:
                        return True
                    if sequence_number(number) != self._last + 1:
                        return False
                    self._apply(sequence_number(number), payload)
        except (TimeoutError, msgspec.DecodeError):
            return False
        finally:
            socket.close(0)
