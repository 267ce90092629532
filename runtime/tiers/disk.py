"""The disk tier: reads and writes of a `CacheFolder` on threads of their own."""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...radix.node import Int32, Namespace
from ...radix.tree import RadixTree
from .copies import Ended
from .folder import CacheFolder, Damaged
from .index import PageRow
from .saved import SavedFile, SavedFileWriter

logger = logging.getLogger(__name__)

_READERS = 4
_LOADED_AT_ONCE = 16  # pages of a file in memory
_LOG_SECONDS = 60.0  # between two lines about failures


class DiskTier:
    """Jobs on a folder. All changes of the index and all writes run on one thread, in order; reads run on others.

    ``keep_salted``: also prefixes of requests with a salt, which is a secret of theirs, are written. ``parts``: on how
    many ranks each record has a part (`split.SplitDisk`).
    """

    parts = 1

    def __init__(self, folder: CacheFolder, keep_salted: bool = False) -> None:
        self.folder = folder
        self._keep_salted = keep_salted
        self._writer = ThreadPoolExecutor(1, "branchwise-disk-write")
        self._readers = ThreadPoolExecutor(_READERS, "branchwise-disk-read")
        self._checksums: dict[int, tuple[bytes, bytes]] = {}  # record -> (prefix, checksum) of what is in the index
        self._guard = threading.Lock()
        self._ended: deque[Ended] = deque()
        self._logged = 0.0
        self._failing = False

    def keeps(self, namespace: Namespace) -> bool:
        """Whether a namespace's prefixes are written."""
        return self._keep_salted or not namespace[1]

    def restore(self, tree: RadixTree) -> int:
        """Adds the folder's prefixes to an empty tree. Returns the number of tokens."""
        rows = self.load_index()
        tree.restore([(row.record, row.before, row.namespace, row.tokens, row.written) for row in rows])
        return sum(len(row.tokens) for row in rows)

    def load_index(self) -> list[PageRow]:
        """Reads the folder's index, before any job. Returns its rows, parents first."""
        rows = self.folder.load()
        self._checksums = {row.record: (row.prefix, row.checksum) for row in rows}
        return rows

    def prefixes(self, records: Int32) -> list[bytes]:
        """The prefix hash of each record; b"" for one that is not in the index."""
        with self._guard:
            return [self._checksums.get(record, (b"", b""))[0] for record in records.tolist()]

    def ended(self) -> list[Ended]:
        """The jobs that have ended since the last call."""
        ended = []
        while self._ended:
            ended.append(self._ended.popleft())
        return ended

    def read(
        self,
        id: int,
        records: Int32,
        memory: npt.NDArray[np.uint8],
        slots: Int32,
        prefixes: Sequence[bytes] | None = None,
    ) -> None:
        """Reads records into slots of ``memory``. ``prefixes``: the hash of the prefix that each must hold. None: the
        one in this folder's index, which is right unless another folder's index decides (`split`)."""
        expected = self.prefixes(records) if prefixes is None else prefixes
        wanted = list(zip(records.tolist(), slots.tolist(), expected, strict=True))

        def job() -> Ended:
            started = time.perf_counter()
            good, damaged = 0, False
            try:
                for record, slot, prefix in wanted:
                    known = self._known(record)
                    if known is None or known[0] != prefix:
                        raise Damaged(f"record {record} is not in the index")
                    self.folder.read(record, *known, memory[slot])
                    good += 1
            except Damaged as error:
                damaged = True
                self._log("a page is dropped: %s", error)
            except OSError as error:
                damaged = True  # a disk that cannot read it now will hardly do so later
                self._log("reading failed: %s", error)
            return Ended(id, good, time.perf_counter() - started, damaged)

        self._run(self._readers, id, job)

    def write(
        self,
        id: int,
        pages: list[tuple[Namespace, int, Int32]],
        records: Int32,
        memory: npt.NDArray[np.uint8],
        slots: Int32,
    ) -> None:
        """Writes slots of ``memory`` to records, all or none: see `CacheFolder.write`."""
        targets, sources = records.tolist(), slots.tolist()

        def job() -> Ended:
            started = time.perf_counter()
            try:
                self.folder.write(pages, targets, [memory[slot] for slot in sources])
                found = self.folder.index.checksums(targets)
            except (OSError, sqlite3.Error) as error:
                self._failing = True
                self._log("writing failed: %s", error)
                return Ended(id, 0, 0.0)
            self._failing = False
            with self._guard:
                self._checksums.update(found)
            return Ended(id, len(targets), time.perf_counter() - started)

        self._run(self._writer, id, job)

    @property
    def failing(self) -> bool:
        """Whether the last write failed."""
        return self._failing

    def verify(
        self,
        id: int,
        records: Sequence[int],
        bad: list[int],
        prefixes: Sequence[bytes] | None = None,
        read: bool = True,
    ) -> None:
        """Adds to ``bad`` the records that are damaged, or of which the index has another prefix than ``prefixes`` (as
        in `read`). Without ``read`` only the index is compared."""
        expected = self.prefixes(np.array(records, np.int32)) if prefixes is None else prefixes
        wanted = {}
        for record, prefix in zip(records, expected, strict=True):  # now: later messages may delete or write records
            known = self._known(record)
            if known is not None and known[0] == prefix:
                wanted[record] = known
            elif prefix:
                bad.append(record)

        def job() -> Ended:
            out = np.empty(self.folder.page_bytes, np.uint8)
            for record, known in wanted.items() if read else ():
                try:
                    self.folder.read(record, *known, out)
                except (Damaged, OSError) as error:
                    if self._known(record) == known:  # else it was deleted or written again meanwhile
                        bad.append(record)
                        self._log("a page is dropped: %s", error)
            return Ended(id, len(records), 0.0)

        self._run(self._readers, id, job)

    def save(self, id: int, path: Path, records: Int32, pages: Sequence[Int32]) -> None:
        """Writes the records of one prefix, whose tokens are ``pages``, to a new file: all or nothing."""

        def job() -> Ended:
            unfinished = path.with_name(f"{path.name}.{id}.tmp")
            out = np.empty(self.folder.page_bytes, np.uint8)
            try:
                path.parent.mkdir(mode=0o700, exist_ok=True)
                self.folder.require_space(len(records))
                with unfinished.open("xb") as file:
                    writer = SavedFileWriter(file, self.folder.fingerprint)
                    for place, (record, tokens) in enumerate(zip(records.tolist(), pages, strict=True)):
                        known = self._known(record)
                        if known is None:
                            raise Damaged(f"record {record} is not in the index")
                        self.folder.read(record, *known, out)
                        writer.add(place - 1, tokens, out)
                unfinished.rename(path)
            except (Damaged, OSError) as error:
                unfinished.unlink(missing_ok=True)
                self._log("saving failed: %s", error)
                return Ended(id, 0, 0.0)
            return Ended(id, len(records), 0.0)

        self._run(self._readers, id, job)

    def read_file(self, id: int, scan: Callable[[], None]) -> None:
        """Runs ``scan``, which reads a file, on a thread for reading."""

        def job() -> Ended:
            scan()
            return Ended(id, 0, 0.0)

        self._run(self._readers, id, job)

    def load(
        self,
        id: int,
        file: SavedFile,
        places: Sequence[int],
        before: int,
        rows: Sequence[tuple[Namespace, Int32]],
        records: Int32,
    ) -> None:
        """Writes consecutive pages of a file to records, the first of them after the record ``before``. Those before
        the first that fails are written."""

        def job() -> Ended:
            good, last = 0, before
            try:
                for first in range(0, len(places), _LOADED_AT_ONCE):
                    some = slice(first, first + _LOADED_AT_ONCE)
                    targets = records[some].tolist()
                    payloads = [file.read(place) for place in places[some]]
                    befores = [last, *targets[:-1]]
                    pages = [(space, prior, ids) for (space, ids), prior in zip(rows[some], befores, strict=True)]
                    self.folder.write(pages, targets, payloads)
                    found = self.folder.index.checksums(targets)
                    with self._guard:
                        self._checksums.update(found)
                    good, last = good + len(targets), targets[-1]
            except (Damaged, OSError, sqlite3.Error) as error:
                self._log("loading a file failed: %s", error)
            return Ended(id, good, 0.0)

        self._run(self._writer, id, job)

    def delete(self, records: Int32) -> None:
        """Deletes records, before any write that is queued later."""
        if not len(records):
            return
        gone = records.tolist()
        with self._guard:
            for record in gone:
                self._checksums.pop(record, None)

        def job() -> Ended | None:
            try:
                self.folder.index.delete(gone)
            except sqlite3.Error as error:  # checksums will show what the records hold
                self._log("deleting failed: %s", error)
            return None

        self._run(self._writer, 0, job)

    def close(self) -> None:
        """Waits for queued jobs and closes the folder."""
        self._readers.shutdown(wait=True)
        self._writer.shutdown(wait=True)
        self.folder.close()

    def _known(self, record: int) -> tuple[bytes, bytes] | None:
        """(prefix, checksum) of a record, if it is in the index."""
        with self._guard:
            return self._checksums.get(record)

    def _run(self, pool: ThreadPoolExecutor, id: int, job: Callable[[], Ended | None]) -> None:
        def done(future: Future[Ended | None]) -> None:
            error = future.exception()
            if error is not None:
                logger.error("disk cache: a job failed", exc_info=error)
            ended = Ended(id, 0, 0.0) if error is not None and id else (None if error is not None else future.result())
            if ended is not None:
                self._ended.append(ended)

        pool.submit(job).add_done_callback(done)

    def _log(self, message: str, error: Exception) -> None:
        if time.monotonic() - self._logged > _LOG_SECONDS or not self._logged:
            self._logged = time.monotonic()
            logger.warning("disk cache: " + message, error)
