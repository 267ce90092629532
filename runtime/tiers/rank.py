"""The tiers of a rank other than 0, which makes the copies that rank 0 hands it: see `split`."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from ...radix.node import Int32
from .copies import Ended, HostCopier, HostCopies
from .disk import DiskTier
from .fingerprint import Fingerprint
from .folder import CacheFolder, rank_folder
from .split import Delete, Load, Message, OpenDisk, Read, Report, Store, Verify, Write

POLL_SECONDS = 0.001  # between two looks at copies under way
_NO_SLOTS = np.empty(0, np.int32)

_messages = msgspec.msgpack.Decoder(Message)
_encoder = msgspec.msgpack.Encoder()


class RankTiers:
    """``host``: the rank's host tier. Its disk is opened on a message of rank 0."""

    def __init__(self, rank: int, host: HostCopier) -> None:
        self._rank, self._host = rank, host
        self._disk: DiskTier | None = None
        self._calls = self._reported = 0  # of `HostCopier.store`
        self._under_way: set[int] = set()
        self._verifying: dict[int, list[int]] = {}

    @property
    def busy(self) -> bool:
        """Whether there is something to report, now or soon."""
        return bool(self._under_way) or self._reported < self._calls

    def receive(self, data: bytes) -> bool:
        """Starts the operation of an encoded `split.Message`. Returns whether it has opened the disk.

        Raises `LoadError` if the folder cannot be used.
        """
        message = _messages.decode(data)
        match message:
            case OpenDisk():
                self._open(message)
                return True
            case Store():
                self._calls += 1
                self._host.store(HostCopies(_ids(message.pages), _ids(message.slots), message.after))
            case Load():
                loads = [(id, _ids(slots), _ids(pages)) for id, slots, pages in message.loads]
                self._under_way.update(id for id, _, _ in loads)
                self._host.load(HostCopies(_NO_SLOTS, _NO_SLOTS, -1, loads))
            case Read():
                self._under_way.add(message.id)
                where = self._host.memory, _ids(message.slots)
                self._opened.read(message.id, _ids(message.records), *where, message.prefixes)
            case Write():
                self._under_way.add(message.id)
                pages = [(namespace, before, _ids(tokens)) for namespace, before, tokens in message.pages]
                where = self._host.memory, _ids(message.slots)
                self._opened.write(message.id, pages, _ids(message.records), *where)
            case Verify():
                self._under_way.add(message.id)
                bad = self._verifying[message.id] = []
                self._opened.verify(message.id, message.records, bad, message.prefixes, message.read)
            case Delete():
                self._opened.delete(_ids(message.records))
        return False

    def report(self) -> bytes | None:
        """The copies that ended since the last call, as an encoded `split.Report`; None if none has."""
        stored = self._host.stored()
        ended: list[Ended] = self._host.ended()
        if self._disk is not None:
            ended += self._disk.ended()
        if not ended and stored == self._reported:
            return None
        self._reported = stored
        self._under_way -= {end.id for end in ended}
        bad = [(end.id, self._verifying.pop(end.id)) for end in ended if end.id in self._verifying]
        return _encoder.encode(Report(stored, ended, bad))

    def close(self) -> None:
        """Waits for what the disk's threads do, and closes the folder."""
        if self._disk is not None:
            self._disk.close()

    @property
    def _opened(self) -> DiskTier:
        if self._disk is None:
            raise RuntimeError("a copy to or from the disk before it was opened")
        return self._disk

    def _open(self, message: OpenDisk) -> None:
        fingerprint = msgspec.convert(message.facts, Fingerprint)
        if fingerprint.page_bytes != self._host.page_bytes:
            raise RuntimeError(f"pages of {self._host.page_bytes} bytes, {fingerprint.page_bytes} on rank 0")
        folder = CacheFolder(rank_folder(Path(message.folder), self._rank), fingerprint, message.max_records)
        self._disk = DiskTier(folder)
        self._disk.load_index()


def _ids(data: bytes) -> Int32:
    return np.frombuffer(data, np.int32)
