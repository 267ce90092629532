"""Operations on the folder of a disk cache that no server uses: list, verify, prune, save to a file, load from one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import LoadError, why
from .fingerprint import Fingerprint
from .folder import CacheFolder, Damaged, rank_folders
from .index import PageRow, prefix_hash
from .saved import SavedFile, SavedFileWriter

_WRITE_AT_ONCE = 256  # pages


@dataclass(frozen=True, slots=True)
class Part:
    """The pages of one model in a folder."""

    digest: str
    facts: dict[str, object]
    pages: int
    tokens: int
    payload_bytes: int
    namespaces: int
    newest: int  # seconds since 1970


def digests(path: Path) -> list[str]:
    """The fingerprints in a folder. Raises `LoadError` if it is not one of ours."""
    found = sorted(each.parent.name for each in path.glob("*/format.json"))
    if not found:
        raise LoadError(f"{path} holds no disk cache")
    return found


def open_part(path: Path, digest: str) -> CacheFolder:
    """The pages of one model, locked. Raises `LoadError`."""
    file = path / digest / "format.json"
    try:
        fingerprint = Fingerprint(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise LoadError(f"{file} cannot be read: {why(error, file)}") from error
    if fingerprint.digest != digest:
        raise LoadError(f"{file} is of another format: {fingerprint.digest} instead of {digest}")
    return CacheFolder(path, fingerprint, 1 << 40)


@contextmanager
def open_ranks(folder: CacheFolder) -> Iterator[list[CacheFolder]]:
    """The other ranks' folders of an open part of a split model. Raises `LoadError`."""
    with ExitStack() as stack:
        opened = (open_part(path, folder.fingerprint.digest) for path in rank_folders(folder.path))
        yield [stack.enter_context(closing(each)) for each in opened]


def _require_one_device(folder: CacheFolder) -> None:
    """Raises `LoadError`: the pages of a saved file are whole."""
    ranks = 1 + len(rank_folders(folder.path))
    if ranks > 1:
        raise LoadError(
            f"{folder.path} is of a model that is split over {ranks} devices: files hold the pages of one on one device"
        )


def describe(path: Path) -> list[Part]:
    """The parts of a folder."""
    parts = []
    for digest in digests(path):
        with closing(open_part(path, digest)) as folder:
            rows, each, facts = list(folder.index.rows()), page_bytes(folder), folder.fingerprint.facts()
        parts.append(
            Part(
                digest,
                facts,
                len(rows),
                sum(len(row.tokens) for row in rows),
                len(rows) * each,
                len({row.namespace for row in rows}),
                max((row.written for row in rows), default=0),
            )
        )
    return parts


def page_bytes(folder: CacheFolder) -> int:
    """Bytes of a page, all its parts together."""
    return folder.page_bytes * (1 + len(rank_folders(folder.path)))


def verify(folder: CacheFolder) -> tuple[int, list[int]]:
    """Reads every page; deletes those of which a part is damaged, and what continues them. Returns (good pages,
    deleted)."""
    rows, out = folder.load(), np.empty(folder.page_bytes, np.uint8)
    bad: set[int] = set()
    with open_ranks(folder) as ranks:
        parts = [folder, *ranks]
        known = [part.index.checksums([row.record for row in rows]) for part in parts]
        for row in rows:
            try:
                for part, checksums in zip(parts, known, strict=True):
                    prefix, checksum = checksums.get(row.record, (b"", b""))
                    if row.before in bad or prefix != row.prefix:
                        raise Damaged(f"record {row.record} is not in the index")
                    part.read(row.record, prefix, checksum, out)
            except (Damaged, OSError):
                bad.add(row.record)
        for part in parts:
            part.index.delete(bad)
    return len(rows) - len(bad), sorted(bad)


def prune_folder(path: Path, keep_bytes: int) -> tuple[int, int]:
    """Deletes the oldest prefixes of all models until their pages take at most ``keep_bytes``: the model that was
    written last loses none while another has some. Returns (pages deleted, bytes left)."""
    deleted = left = 0
    for part in sorted(describe(path), key=lambda part: -part.newest):
        with closing(open_part(path, part.digest)) as folder:
            each = page_bytes(folder)
            gone = prune(folder, max(0, keep_bytes - left) // each)
        if gone == part.pages:
            shutil.rmtree(path / part.digest)
        deleted += gone
        left += (part.pages - gone) * each
    return deleted, left


def prune(folder: CacheFolder, keep_pages: int) -> int:
    """Deletes the oldest prefixes, from their ends, until at most ``keep_pages`` are left. Returns how many."""
    rows = folder.load()
    latest = {row.record: row.written for row in rows}
    for row in reversed(rows):
        if row.before >= 0:
            latest[row.before] = max(latest[row.before], latest[row.record])
    depth = {-1: 0}
    for row in rows:
        depth[row.record] = depth[row.before] + 1
    order = sorted(rows, key=lambda row: (latest[row.record], -depth[row.record]))
    gone = [row.record for row in order[: max(0, len(rows) - keep_pages)]]
    with open_ranks(folder) as ranks:
        for part in (folder, *ranks):
            part.index.delete(gone)
            part.trim()
    return len(gone)


def save(folder: CacheFolder, file: BinaryIO, owner: str = "") -> int:
    """Writes every whole prefix of an owner without a salt to a file, which does not name the owner. Returns the number
    of pages."""
    _require_one_device(folder)
    writer = SavedFileWriter(file, folder.fingerprint)
    out = np.empty(folder.page_bytes, np.uint8)
    places: dict[int, int] = {-1: -1}
    for row in folder.load():
        if row.before not in places or row.namespace != (owner, ""):
            continue
        try:
            folder.read(row.record, row.prefix, row.checksum, out)
        except (Damaged, OSError):
            continue
        places[row.record] = writer.add(places[row.before], row.tokens, out)
    return len(places) - 1


def load(folder: CacheFolder, path: Path, owner: str = "") -> tuple[int, int]:
    """Adds the pages of a file that `save` wrote, as those of ``owner``. Returns (pages added, pages that were there).

    Raises `LoadError` if the file is not one, is of another model or format, or is damaged: what came before stays.
    """
    _require_one_device(folder)
    known = {row.prefix: row.record for row in folder.load()}
    prefixes = {record: prefix for prefix, record in known.items()} | {-1: b""}
    namespace = (owner, "")
    free = _free_records(folder)
    records = [-1]  # of the pages so far, the last entry is of none
    there = 0
    batch: list[tuple[PageRow, np.ndarray]] = []
    file = SavedFile(path, folder.fingerprint)
    try:
        for place, page in enumerate(file.pages):
            before = records[page.before]
            prefix = prefix_hash(prefixes[before], namespace, page.ids)
            record = known.get(prefix)
            there += record is not None
            if record is None:
                payload = file.read(place)
                record = known[prefix] = next(free)
                prefixes[record] = prefix
                batch.append((PageRow(record, before, namespace, page.ids, prefix, b"", 0), payload))
            records.insert(-1, record)
            if len(batch) >= _WRITE_AT_ONCE:
                _flush(folder, batch)
    except Damaged as error:
        raise LoadError(str(error)) from error
    finally:
        file.close()
        _flush(folder, batch)
    return len(file.pages) - there, there


def _flush(folder: CacheFolder, batch: list[tuple[PageRow, np.ndarray]]) -> None:
    if batch:
        pages = [(row.namespace, row.before, row.tokens) for row, _ in batch]
        folder.write(pages, [row.record for row, _ in batch], [payload for _, payload in batch])
        batch.clear()


def _free_records(folder: CacheFolder) -> Iterator[int]:
    used = {row.record for row in folder.index.rows()}
    record = 0
    while True:
        if record not in used:
            yield record
        record += 1
