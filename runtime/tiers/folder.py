"""A folder of cached pages: segment files of fixed-size records, and their index. Blocking; see `disk` for threads.

FOLDER/lock, secret                        one server at a time; the key of namespaces
FOLDER/<fingerprint>/format.json           what the pages are of
FOLDER/<fingerprint>/index.sqlite          which prefix each record holds
FOLDER/<fingerprint>/segment-00000.bin     record r is page r % n of segment r // n
FOLDER/<fingerprint>/rank-1/               of a model that is split: a folder like this one for the parts of each rank
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import secrets
import sqlite3
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import xxhash

from ...radix.node import Int32, Namespace
from ..errors import LoadError, why
from .fingerprint import Fingerprint
from .index import Index, PageRow, is_damage, now, prefix_hash, sound

logger = logging.getLogger(__name__)

SEGMENT_BYTES = 128 << 20
_MIN_FREE = 1 << 30  # bytes that are left free on the file system


class Damaged(Exception):
    """A record differs from its row in the index: short, or changed."""


class CacheFolder:
    """An open folder, locked against others. Raises `LoadError` if it cannot be used, or another process uses it.

    Args:
        path: made if need be, readable by its owner only.
        max_records: records that fit in the quota.
    """

    def __init__(self, path: Path, fingerprint: Fingerprint, max_records: int) -> None:
        self.fingerprint = fingerprint
        self.page_bytes = fingerprint.page_bytes
        self.max_records = max_records
        self._per_segment = max(1, SEGMENT_BYTES // self.page_bytes)
        self._segments: dict[int, int] = {}  # open files
        with ExitStack() as undo:
            try:
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._lock = lock_folder(path)
                undo.callback(self._lock.close)
                self.path = path / fingerprint.digest
                self.path.mkdir(mode=0o700, exist_ok=True)
                (self.path / "format.json").write_text(json.dumps(fingerprint.facts(), indent=1))
                self.index = self._open_index()
            except (OSError, sqlite3.Error) as error:
                raise LoadError(f"the disk cache {path} cannot be used: {why(error, path)}") from error
            undo.pop_all()

    def _open_index(self) -> Index:
        file = self.path / "index.sqlite"
        try:
            return Index(file)
        except sqlite3.Error as error:
            if not is_damage(error):
                raise
            logger.warning("disk cache: the index %s is damaged (%s): starting an empty one", file, error)
            return self._empty_index()

    def _empty_index(self) -> Index:
        for each in self.path.glob("index.sqlite*"):
            each.unlink()
        return Index(self.path / "index.sqlite")

    def load(self) -> list[PageRow]:
        """The rows of every prefix that is whole, parents first. Others are deleted. Raises `LoadError` if the folder
        cannot be used now; what it holds stays."""
        try:
            good, moved, bad = sound(self.index.rows(), self.max_records)
            self.index.add(moved)
            if bad:
                logger.warning("disk cache: %d pages are incomplete or beyond the quota, and are dropped", len(bad))
                self.index.delete(bad)
                self.trim()
            return good
        except (OSError, sqlite3.Error) as error:
            if isinstance(error, OSError) or not is_damage(error):
                raise LoadError(f"the disk cache {self.path} cannot be used: {why(error, self.path)}") from error
            logger.warning("disk cache: the index cannot be read (%s): starting empty", error)
            self.index.close()
            self.index = self._empty_index()
            return []

    def read(self, record: int, prefix: bytes, checksum: bytes, out: npt.NDArray[np.uint8]) -> None:
        """Reads one record into ``out``, uint8 [page_bytes]. Raises `Damaged`, or OSError."""
        file, offset = self._place(record)
        if os.preadv(file, [out.data], offset) != self.page_bytes:
            raise Damaged(f"record {record} is short")
        if page_checksum(prefix, out) != checksum:
            raise Damaged(f"record {record} has changed")

    def write(
        self,
        pages: Sequence[tuple[Namespace, int, Int32]],
        records: Sequence[int],
        payloads: Sequence[npt.NDArray[np.uint8]],
    ) -> None:
        """Writes pages, and then their rows. ``pages``: (namespace, record before, tokens) of each, parents first.

        Raises OSError or `sqlite3.Error`; then nothing was added.
        """
        self.require_space(len(records))
        befores = [before for _, before, _ in pages if before >= 0]
        hashes = {record: prefix for record, (prefix, _) in self.index.checksums(befores).items()}
        hashes[-1] = b""
        rows = []
        files = set()
        for (namespace, before, tokens), record, payload in zip(pages, records, payloads, strict=True):
            if before not in hashes:
                raise OSError(errno.ENOENT, f"the page before record {record} is not on the disk")
            file, offset = self._place(record)
            view = payload.data.cast("B")
            while len(view):
                written = os.pwrite(file, view, offset)
                view, offset = view[written:], offset + written
            files.add(file)
            prefix = hashes[record] = prefix_hash(hashes[before], namespace, tokens)
            rows.append(PageRow(record, before, namespace, tokens, prefix, page_checksum(prefix, payload), now()))
        for file in files:
            os.fdatasync(file)
        self.index.add(rows)

    def trim(self) -> None:
        """Gives space back to the file system: what lies behind the last used record of each segment."""
        used: dict[int, int] = {}
        for row in self.index.rows():
            segment, index = divmod(row.record, self._per_segment)
            used[segment] = max(used.get(segment, 0), index + 1)
        for file in self.path.glob("segment-*.bin"):
            pages = used.get(int(file.stem.partition("-")[2]), 0)
            os.truncate(file, min(file.stat().st_size, pages * self.page_bytes))

    def close(self) -> None:
        """Closes all files and releases the lock."""
        self.index.close()
        for file in self._segments.values():
            os.close(file)
        self._segments.clear()
        self._lock.close()

    def _place(self, record: int) -> tuple[int, int]:
        """The file and the offset of a record."""
        segment, index = divmod(record, self._per_segment)
        file = self._segments.get(segment)
        if file is None:
            path = self.path / f"segment-{segment:05}.bin"
            file = self._segments[segment] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        return file, index * self.page_bytes

    def require_space(self, records: int) -> None:
        """Raises OSError if the file system has no room for so many records more."""
        free = os.statvfs(self.path)
        if free.f_bavail * free.f_frsize - records * self.page_bytes < _MIN_FREE:
            raise OSError(errno.ENOSPC, f"less than {_MIN_FREE >> 30} GiB would be left free in {self.path}")


def rank_folder(part: Path, rank: int) -> Path:
    """The folder of a rank other than 0, for its parts of the pages of ``part``, the folder of one fingerprint."""
    return part / f"rank-{rank}"


def rank_folders(part: Path) -> list[Path]:
    """All of them that exist."""
    return sorted(part.glob("rank-*"))


def bytes_of_others(path: Path, digest: str) -> int:
    """Bytes that the pages of other models take in a folder."""
    files = (file for file in path.glob("*/**/*") if file.relative_to(path).parts[0] != digest)
    return sum(file.stat().st_size for file in files if file.is_file())


def folder_secret(path: Path) -> bytes:
    """The key of the names of namespaces: 32 random bytes, the same as long as the folder. Raises `LoadError`."""
    file = path / "secret"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            pass
        else:
            with os.fdopen(descriptor, "wb") as made:
                made.write(secrets.token_bytes(32))
        found = file.read_bytes()
    except OSError as error:
        raise LoadError(f"the disk cache {path} cannot be used: {why(error, path)}") from error
    if len(found) != 32:
        raise LoadError(f"{file} is damaged: delete it, and with it what keys and salts had in the cache")
    return found


def lock_folder(path: Path) -> IO[str]:
    """The folder's lock, held until the file is closed. Raises `LoadError` if another process has it."""
    lock = (path / "lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.seek(0)
        owner = lock.read(64).strip() or "another process"
        lock.close()
        raise LoadError(f"the disk cache {path} is in use by {owner}: give each server a folder of its own") from error
    with ExitStack() as undo:
        undo.callback(lock.close)
        lock.truncate(0)
        lock.write(f"process {os.getpid()}")
        lock.flush()
        undo.pop_all()
    return lock


def page_checksum(prefix: bytes, payload: npt.NDArray[np.uint8]) -> bytes:
    """xxh3-128 of a page's bytes, uint8 [page_bytes], after the hash of its prefix."""
    digest = xxhash.xxh3_128(prefix)
    digest.update(payload.data)
    return digest.digest()
