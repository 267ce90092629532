"""Variables: a value that will be there, and a stream of text while it comes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Slot:
    """One variable of one state. Made when it is appended, so a name that is not there never will be."""

    __slots__ = ("feed", "future", "meta", "name", "site")

    def __init__(self, name: str, site: str, feed: Feed | None = None) -> None:
        self.name = name
        self.site = site
        self.future: Future[Any] = Future()
        self.meta: Any = None
        self.feed = feed

    @classmethod
    def of(cls, name: str, site: str, value: Any) -> Slot:
        slot = cls(name, site)
        slot.future.set_result(value)
        return slot

    def set(self, value: Any, meta: Any = None) -> None:
        self.meta = meta
        self.future.set_result(value)
        if self.feed is not None:
            self.feed.end()

    def fail(self, error: BaseException) -> None:
        if not self.future.done():
            self.future.set_exception(error)
        if self.feed is not None:
            self.feed.end(error)


class Feed:
    """Text as it comes, for any number of readers on any thread; who comes late reads it all again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunks: list[str] = []
        self.ended = False
        self._error: BaseException | None = None
        self._readers: list[Callable[[str | None], None]] = []

    def put(self, text: str) -> None:
        if text:
            with self._lock:
                self._chunks.append(text)
                for tell in self._readers:
                    tell(text)

    def end(self, error: BaseException | None = None) -> None:
        with self._lock:
            if not self.ended:
                self.ended, self._error = True, error
                for tell in self._readers:
                    tell(None)

    @property
    def empty(self) -> bool:
        return not self._chunks

    @property
    def error(self) -> BaseException | None:
        return self._error

    def subscribe(self, tell: Callable[[str | None], None]) -> None:
        """``tell`` gets every chunk, past and to come, then None. It must not block."""
        with self._lock:
            for chunk in self._chunks:
                tell(chunk)
            if self.ended:
                tell(None)
            else:
                self._readers.append(tell)
