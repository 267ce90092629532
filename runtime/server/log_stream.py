"""A text stream that never blocks its writer: lines are dropped and counted while its descriptor is not read."""

from __future__ import annotations

import atexit
import io
import os
import select
import threading
from collections import deque
from collections.abc import Callable

MAX_BYTES = 256 * 1024  # of text waiting to be written
EXIT_SECONDS = 1.0  # how long a process that exits may take to write the rest


def _dropped(count: int) -> str:
    return f"branchwise: {count} lines of the log were dropped: they were not read in time\n"


class DroppingStream(io.TextIOBase):
    """Writes text to descriptor ``fd`` from a thread, which alone blocks on a full pipe or a stopped terminal.

    Text that does not fit into ``max_bytes`` is dropped, whole writes at a time. Once there is room again a line says
    how many lines are missing.

    Args:
        dropped: that line, with its newline, for the number of lines that are missing.
    """

    def __init__(self, fd: int, max_bytes: int = MAX_BYTES, dropped: Callable[[int], str] = _dropped) -> None:
        self._fd = fd
        self._report = dropped
        self._max = max_bytes
        self._queue: deque[bytes] = deque()
        self._bytes = 0  # in the queue, and being written
        self._dropped = 0  # lines, since the last report
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="log", daemon=True).start()
        atexit.register(self.drain, EXIT_SECONDS)

    def write(self, text: str) -> int:
        data = text.encode("utf-8", "backslashreplace")
        with self._changed:
            if self._bytes + len(data) > self._max:
                self._dropped += text.count("\n")
                return len(text)
            if self._dropped:
                data, self._dropped = self._report(self._dropped).encode() + data, 0
            self._queue.append(data)
            self._bytes += len(data)
            self._changed.notify_all()
        return len(text)

    def drain(self, seconds: float) -> bool:
        """Waits up to ``seconds`` until everything has been written. Returns whether it has."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._bytes, seconds)

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def fileno(self) -> int:
        return self._fd

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue)
                data = self._queue.popleft()
            self._write(data)
            with self._changed:
                self._bytes -= len(data)
                self._changed.notify_all()

    def _write(self, data: bytes) -> None:
        """Blocks until the descriptor has taken all of it. What a closed descriptor does not take is lost."""
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self._fd, rest) :]
            except BlockingIOError:  # another process has made it non-blocking
                select.select((), (self._fd,), ())
            except OSError:
                return
