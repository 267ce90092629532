"""The index of a disk tier: which prefix each record holds, in SQLite.

A row is written after its record, and deleted before the record is used again, so a row that is found after a crash
speaks of data that was written whole. Should it not, because the file system lost a write, checksums say so.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from ...radix.node import Int32, Namespace

_SCHEMA = """
CREATE TABLE IF NOT EXISTS pages (
    record INTEGER PRIMARY KEY,  -- where the page is
    before INTEGER NOT NULL,     -- record of the page before, -1: none
    owner TEXT NOT NULL,
    salt TEXT NOT NULL,
    tokens BLOB NOT NULL,        -- int32, little-endian
    prefix BLOB NOT NULL,        -- xxh3-128 of the namespace and every token to the end of the page
    checksum BLOB NOT NULL,      -- xxh3-128 of prefix and payload
    written INTEGER NOT NULL     -- seconds since 1970
);
"""

# What SQLite says of a file that it cannot use now; of all else, the file itself is the reason.
_UNUSABLE_NOW = {
    sqlite3.SQLITE_AUTH,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_INTERRUPT,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_READONLY,
}


class PageRow(NamedTuple):
    """One page on the disk: see the schema."""

    record: int
    before: int
    namespace: Namespace
    tokens: Int32
    prefix: bytes
    checksum: bytes
    written: int


def prefix_hash(before: bytes, namespace: Namespace, tokens: Int32) -> bytes:
    """The hash of a prefix: of ``before``, the hash of the pages before its last (b"" if there are none), and the
    tokens of that page."""
    start = before or "\0".join(namespace).encode("utf-8", "surrogatepass")
    return xxhash.xxh3_128_digest(len(start).to_bytes(4, "little") + start + tokens.astype("<i4").tobytes())


def is_damage(error: sqlite3.Error) -> bool:
    """Whether an index is damaged, which stays so; else it cannot be used now: no access, no space, no descriptors."""
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF not in _UNUSABLE_NOW


class Index:
    """One folder's index. Used by one thread. Opening it and methods raise `sqlite3.Error` if the disk is full or
    damaged."""

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=1000"):
                self._database.execute(f"PRAGMA {pragma}")
            self._database.executescript(_SCHEMA)
            len(self)  # reads the table
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return int(self._database.execute("SELECT COUNT(*) FROM pages").fetchone()[0])

    def rows(self) -> Iterator[PageRow]:
        """Every row, in no particular order, without checking it."""
        query = "SELECT record, before, owner, salt, tokens, prefix, checksum, written FROM pages"
        for record, before, owner, salt, tokens, prefix, checksum, written in self._database.execute(query):
            ids = np.frombuffer(tokens[: len(tokens) // 4 * 4], "<i4").astype(np.int32)
            yield PageRow(record, before, (owner, salt), ids, prefix, checksum, written)

    def add(self, rows: Iterable[PageRow]) -> None:
        """Adds rows, all or none."""
        self._change(
            "INSERT OR REPLACE INTO pages VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            [(row.record, row.before, *row.namespace, row.tokens.astype("<i4").tobytes(), *row[4:]) for row in rows],
        )

    def delete(self, records: Iterable[int]) -> None:
        """Deletes rows, all or none."""
        self._change("DELETE FROM pages WHERE record = ?", [(record,) for record in records])

    def checksums(self, records: list[int]) -> dict[int, tuple[bytes, bytes]]:
        """(prefix, checksum) of each record that has a row."""
        found = {}
        for first in range(0, len(records), 500):
            some = records[first : first + 500]
            marks = ",".join("?" * len(some))
            query = f"SELECT record, prefix, checksum FROM pages WHERE record IN ({marks})"
            found.update({row[0]: (row[1], row[2]) for row in self._database.execute(query, some)})
        return found

    def close(self) -> None:
        """Closes the database."""
        self._database.close()

    def _change(self, statement: str, values: list[tuple[object, ...]]) -> None:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            self._database.executemany(statement, values)
            self._database.execute("COMMIT")
        except BaseException:
            self._database.execute("ROLLBACK")
            raise


class Sound(NamedTuple):
    """The usable rows of an index: see `sound`."""

    rows: list[PageRow]  # parents first
    moved: list[PageRow]  # those of them that name another record before them than in the index
    bad: list[int]  # records of all other rows


def sound(rows: Iterable[PageRow], limit: int) -> Sound:
    """The rows that form whole prefixes. Bad are those whose page before is missing, or whose hash is wrong.

    Two rows can have one prefix: two writes of one page at once, and a kill before one was deleted. The first counts,
    and what follows the other follows it. ``limit``: records are below it.
    """
    by_before: dict[int, list[PageRow]] = {}
    everything = []
    for row in rows:
        everything.append(row.record)
        by_before.setdefault(row.before, []).append(row)
    found: dict[int, PageRow] = {}
    moved: list[PageRow] = []
    kept = {-1: -1}  # record -> the one that counts for its prefix
    records: dict[bytes, int] = {}  # by prefix
    queue = [-1]
    for before in queue:
        above = found.get(kept[before])
        for row in by_before.get(before, ()):
            fits = 0 <= row.record < limit and len(row.tokens) > 0
            follows = above is None or above.namespace == row.namespace
            start = b"" if above is None else above.prefix
            if not fits or not follows or row.prefix != prefix_hash(start, row.namespace, row.tokens):
                continue
            queue.append(row.record)
            kept[row.record] = records.setdefault(row.prefix, row.record)
            if kept[row.record] == row.record:
                if kept[before] != before:
                    row = row._replace(before=kept[before])
                    moved.append(row)
                found[row.record] = row
    return Sound(list(found.values()), moved, [record for record in everything if record not in found])


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())
