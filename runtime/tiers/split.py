"""Rank 0's side of the tiers of a model that is split over ranks. Each rank keeps its part of a page, in the same slot.

Rank 0 decides, and sends every copy to the others in its own order. A copy ends once all ranks have made it, with the
pages that all of them have: a page that one rank lost is a miss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from ...radix.node import Int32, Namespace
from .copies import Ended, HostCopier, HostCopies
from .disk import DiskTier
from .folder import CacheFolder


class OpenDisk(msgspec.Struct, tag=True):
    """Open this folder for the rank's own pages. ``facts``: of its fingerprint."""

    folder: str
    facts: dict[str, str | int]
    max_records: int


class Store(msgspec.Struct, tag=True):
    """`HostCopies` without loads. int32 arrays travel as their bytes, which all ranks of a machine read alike."""

    pages: bytes
    slots: bytes
    after: int


class Load(msgspec.Struct, tag=True):
    """`HostCopies.loads`."""

    loads: list[tuple[int, bytes, bytes]]


class Read(msgspec.Struct, tag=True):
    """`DiskTier.read`. ``prefixes``: the hash of what each record must hold."""

    id: int
    records: bytes
    slots: bytes
    prefixes: list[bytes]


class Write(msgspec.Struct, tag=True):
    """`DiskTier.write`."""

    id: int
    pages: list[tuple[Namespace, int, bytes]]
    records: bytes
    slots: bytes


class Verify(msgspec.Struct, tag=True):
    """`DiskTier.verify`."""

    id: int
    records: list[int]
    prefixes: list[bytes]
    read: bool


class Delete(msgspec.Struct, tag=True):
    """`DiskTier.delete`."""

    records: bytes


Message = OpenDisk | Store | Load | Read | Write | Verify | Delete


class Report(msgspec.Struct):
    """A rank's copies that ended since its last report."""

    stored: int  # calls of `HostCopier.store`, ever
    ended: list[Ended]
    bad: list[tuple[int, list[int]]]  # of each `Verify` that has ended: its id, and the damaged records


class Link(Protocol):
    """The other ranks: ``size`` counts rank 0 too."""

    size: int

    def send_copies(self, message: bytes) -> None:
        """Hands an encoded `Message` to every other rank, in order with the steps."""
        ...

    def copy_reports(self) -> list[tuple[int, bytes]]:
        """The ranks' encoded `Report`s since the last call, each with its rank."""
        ...


_encoder = msgspec.msgpack.Encoder()
_reports = msgspec.msgpack.Decoder(Report)


class Parts(NamedTuple):
    """The ranks' reports on one copy."""

    ended: list[Ended]
    bad: list[int]  # damaged records that a `Verify` found


class RankCopies:
    """The copies that all ranks make, and how far each of them has got."""

    def __init__(self, link: Link) -> None:
        self.size = link.size
        self._link = link
        self._stored = [0] * (link.size - 1)
        self._under_way: dict[int, Parts] = {}

    def send(self, message: Message) -> None:
        """Hands a message to every other rank."""
        self._link.send_copies(_encoder.encode(message))

    def begin(self, id: int, bad: list[int] | None = None) -> None:
        """Expects an `Ended` of this id from every rank."""
        self._under_way[id] = Parts([], [] if bad is None else bad)

    def stored(self, here: int) -> int:
        """The number of `HostCopier.store` calls that all ranks have completed; ``here``: rank 0's."""
        self._receive()
        return min(here, *self._stored)

    def ended(self, here: Sequence[Ended]) -> list[Ended]:
        """The copies that all ranks have made. ``here``: those of rank 0 since the last call; one that was not begun
        on other ranks has ended with it."""
        alone = [end for end in here if end.id not in self._under_way]
        for end in here:
            self._add(end)
        self._receive()
        whole = [id for id, parts in self._under_way.items() if len(parts.ended) == self.size]
        return alone + [_together(self._under_way.pop(id).ended) for id in whole]

    def _receive(self) -> None:
        for rank, data in self._link.copy_reports():
            report = _reports.decode(data)
            self._stored[rank - 1] = report.stored
            for id, records in report.bad:
                self._under_way[id].bad.extend(records)
            for end in report.ended:
                self._add(end)

    def _add(self, end: Ended) -> None:
        if end.id in self._under_way:
            self._under_way[end.id].ended.append(end)


def _together(parts: list[Ended]) -> Ended:
    """The copy of whole pages that these copies of their parts are."""
    good = min(part.good for part in parts)
    damaged = any(part.damaged for part in parts if part.good == good)
    return Ended(parts[0].id, good, max(part.seconds for part in parts), damaged)


class SplitHost:
    """A `HostCopier` whose every page is in parts, one on each rank. ``local``: rank 0's; ``page_bytes``: of a part."""

    def __init__(self, local: HostCopier, copies: RankCopies) -> None:
        self.num_slots, self.page_bytes, self.memory = local.num_slots, local.page_bytes, local.memory
        self._local, self._copies = local, copies

    def store(self, copies: HostCopies) -> None:
        """See `copies.HostCopier`."""
        self._copies.send(Store(copies.pages.tobytes(), copies.slots.tobytes(), copies.after))
        self._local.store(copies)

    def load(self, copies: HostCopies) -> None:
        """See `copies.HostCopier`."""
        if copies.loads:
            for id, _, _ in copies.loads:
                self._copies.begin(id)
            self._copies.send(Load([(id, slots.tobytes(), pages.tobytes()) for id, slots, pages in copies.loads]))
        self._local.load(copies)

    def stored(self) -> int:
        """See `copies.HostCopier`."""
        return self._copies.stored(self._local.stored())

    def ended(self) -> list[Ended]:
        """See `copies.HostCopier`."""
        return self._copies.ended(self._local.ended())


class SplitDisk(DiskTier):
    """A `DiskTier` whose every record is in parts. Each rank keeps its part in a folder of its own, `rank_folder`, in
    the record of the same number; rank 0's index lists the prefixes."""

    def __init__(self, folder: CacheFolder, keep_salted: bool, copies: RankCopies) -> None:
        super().__init__(folder, keep_salted)
        self.parts = copies.size
        self._copies = copies

    def ended(self) -> list[Ended]:
        return self._copies.ended(super().ended())

    def read(
        self,
        id: int,
        records: Int32,
        memory: npt.NDArray[np.uint8],
        slots: Int32,
        prefixes: Sequence[bytes] | None = None,
    ) -> None:
        prefixes = self.prefixes(records)
        self._copies.begin(id)
        self._copies.send(Read(id, records.tobytes(), slots.tobytes(), prefixes))
        super().read(id, records, memory, slots, prefixes)

    def write(
        self,
        id: int,
        pages: list[tuple[Namespace, int, Int32]],
        records: Int32,
        memory: npt.NDArray[np.uint8],
        slots: Int32,
    ) -> None:
        encoded = [(namespace, before, tokens.tobytes()) for namespace, before, tokens in pages]
        self._copies.begin(id)
        self._copies.send(Write(id, encoded, records.tobytes(), slots.tobytes()))
        super().write(id, pages, records, memory, slots)

    def verify(
        self,
        id: int,
        records: Sequence[int],
        bad: list[int],
        prefixes: Sequence[bytes] | None = None,
        read: bool = True,
    ) -> None:
        prefixes = self.prefixes(np.array(records, np.int32))
        self._copies.begin(id, bad)
        self._copies.send(Verify(id, list(records), prefixes, read))
        super().verify(id, records, bad, prefixes, read)

    def delete(self, records: Int32) -> None:
        if len(records):
            self._copies.send(Delete(records.tobytes()))
        super().delete(records)
