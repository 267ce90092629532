"""A program's variables: values that will be set, and their text while it is generated."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Variable:
    """One variable of one state. It is created when the expression that sets it is appended, so reading a name that
    does not exist is an error, not a wait."""

    __slots__ = ("future", "meta", "name", "site", "stream")

    def __init__(self, name: str, site: str, stream: ReplayStream | None = None) -> None:
        self.name = name
        self.site = site
        self.future: Future[Any] = Future()
        self.meta: Any = None
        self.stream = stream

    def set(self, value: Any, meta: Any = None) -> None:
        self.meta = meta
        self.future.set_result(value)
        if self.stream is not None:
            self.stream.end()

    def fail(self, error: BaseException) -> None:
        if not self.future.done():
            self.future.set_exception(error)
        if self.stream is not None:
            self.stream.end(error)


class ReplayStream:
    """Text that arrives in pieces, for any number of readers on any thread. A late reader gets all of it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pieces: list[str] = []
        self._readers: list[Callable[[str | None], None]] = []
        self.ended = False
        self.error: BaseException | None = None

    def put(self, text: str) -> None:
        if text:
            with self._lock:
                self._pieces.append(text)
                for read in self._readers:
                    read(text)

    def end(self, error: BaseException | None = None) -> None:
        with self._lock:
            if not self.ended:
                self.ended, self.error = True, error
                for read in self._readers:
                    read(None)

    @property
    def empty(self) -> bool:
        return not self._pieces

    def subscribe(self, read: Callable[[str | None], None]) -> None:
        """Calls ``read`` with every piece, past and future, then with None. It must not block."""
        with self._lock:
            for piece in self._pieces:
                read(piece)
            if self.ended:
                read(None)
            else:
                self._readers.append(read)
