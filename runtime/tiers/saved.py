"""A file of cached pages, to be loaded by another server of the same model: what `save` writes and `load` reads.

A magic line, the fingerprint, then each page: a header (`SavedPage`) and its bytes. The file names no namespace.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from ...radix.node import Int32
from ..errors import LoadError
from .fingerprint import Fingerprint
from .folder import Damaged, page_checksum
from .index import prefix_hash

_MAGIC = b"branchwise-cache-2\n"
_HEADER_BYTES = 1 << 20  # more is not a header of ours
_NOBODY = ("", "")  # prefixes in the file are hashed in this namespace

_encoder = msgspec.msgpack.Encoder()
T = TypeVar("T")


class SavedPage(msgspec.Struct, array_like=True):
    """``before``: the place in the file of the page before it, -1: none."""

    before: int
    tokens: bytes  # int32, little-endian
    checksum: bytes  # of its bytes and of every token to its end

    @property
    def ids(self) -> Int32:
        """Its tokens."""
        return np.frombuffer(self.tokens, "<i4").astype(np.int32)


class SavedFileWriter:
    """Writes a file page by page, each after the page before it."""

    def __init__(self, file: BinaryIO, fingerprint: Fingerprint) -> None:
        self._file = file
        self._prefixes = [b""]  # of the pages so far, the last entry is of none
        file.write(_MAGIC)
        self._write(_encoder.encode(fingerprint.facts()))

    def add(self, before: int, tokens: Int32, payload: npt.NDArray[np.uint8]) -> int:
        """Adds a page, uint8 [page_bytes], and returns its place. Raises OSError."""
        prefix = prefix_hash(self._prefixes[before], _NOBODY, tokens)
        page = SavedPage(before, tokens.astype("<i4").tobytes(), page_checksum(prefix, payload))
        self._write(_encoder.encode(page))
        self._file.write(payload.data)
        self._prefixes.insert(-1, prefix)
        return len(self._prefixes) - 2

    def _write(self, data: bytes) -> None:
        self._file.write(len(data).to_bytes(4, "little") + data)


class SavedFile:
    """An open file that `SavedFileWriter` wrote. Raises `LoadError` if it is not one, is of another engine, or is cut
    off; the bytes of pages are checked when they are read."""

    def __init__(self, path: Path, fingerprint: Fingerprint) -> None:
        self._page_bytes = fingerprint.page_bytes
        self.pages: list[SavedPage] = []
        self._offsets: list[int] = []
        self._prefixes = [b""]
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise LoadError(f"{path} cannot be read: {error.strerror}") from error
        try:
            self._scan(fingerprint, path.stat().st_size)
        except BaseException:
            self._file.close()
            raise

    def _scan(self, fingerprint: Fingerprint, size: int) -> None:
        if self._file.read(len(_MAGIC)) != _MAGIC:
            raise LoadError("the file was not written by `branchwise cache save` of this version")
        facts = _decode(self._header(), dict[str, Any])
        if facts != fingerprint.facts():
            differing = sorted(key for key, value in fingerprint.facts().items() if facts.get(key) != value)
            raise LoadError(f"the file is of another engine: {', '.join(differing)} differ")
        while header := self._header(may_end=True):
            page = _decode(header, SavedPage)
            if not -1 <= page.before < len(self.pages) or not page.tokens or len(page.tokens) % 4:
                raise LoadError("the file is damaged")
            self._offsets.append(self._file.tell())
            if self._file.seek(self._page_bytes, 1) > size:
                raise LoadError("the file is cut off")
            self._prefixes.insert(-1, prefix_hash(self._prefixes[page.before], _NOBODY, page.ids))
            self.pages.append(page)

    def read(self, place: int) -> npt.NDArray[np.uint8]:
        """The bytes of a page, uint8 [page_bytes]. Raises `Damaged` or OSError."""
        self._file.seek(self._offsets[place])
        payload = np.frombuffer(self._file.read(self._page_bytes), np.uint8)
        if len(payload) != self._page_bytes or self.pages[place].checksum != page_checksum(
            self._prefixes[place], payload
        ):
            raise Damaged(f"page {place} of the file has changed")
        return payload

    def paths(self) -> Iterable[list[int]]:
        """The places of the pages of each prefix that no other continues, from its first page on."""
        inner = {page.before for page in self.pages}
        for end in range(len(self.pages)):
            if end not in inner:
                path, place = [], end
                while place >= 0:
                    path.append(place)
                    place = self.pages[place].before
                yield path[::-1]

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _header(self, may_end: bool = False) -> bytes:
        length = self._file.read(4)
        if may_end and not length:
            return b""
        size = int.from_bytes(length, "little")
        data = self._file.read(size) if len(length) == 4 and 0 < size <= _HEADER_BYTES else b""
        if not data or len(data) != size:
            raise LoadError("the file is damaged or cut off")
        return data


def _decode(data: bytes, type_: type[T]) -> T:
    try:
        return msgspec.msgpack.decode(data, type=type_)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise LoadError(f"the file is damaged: {error}") from error
