"""Host memory that is pinned for a GPU a piece at a time, ahead of its use."""

from __future__ import annotations

import ctypes
import logging
import mmap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch

logger = logging.getLogger(__name__)

_POPULATED = 256 << 20  # bytes taken from the system before they are registered
_PIECE = 32 << 20  # bytes of one registration: the driver blocks launches meanwhile, shorter than a step runs
_PAUSE = 0.002  # seconds between two registrations
_LEAST_AHEAD, _MOST_AHEAD = 512 << 20, 4 << 30  # bytes pinned beyond those in use; as many as in use between the two
_POPULATE_BYTES = 16 << 20  # taken from the system by one call
_POPULATE_THREADS = 8  # one thread takes about 2 GB/s, less than a prefill fills
_PORTABLE = 1  # cudaHostRegisterPortable
_HUGE_PAGES, _POPULATE_WRITE = 14, 23  # <linux/mman.h>; populating takes memory without changing its contents


def anonymous_memory(rows: int, row_bytes: int) -> npt.NDArray[np.uint8]:
    """uint8 [rows, row_bytes], aligned to a page of the system, which provides it when it is first written."""
    size, flags = rows * row_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return np.frombuffer(mmap.mmap(-1, size, flags=flags), np.uint8).reshape(rows, row_bytes)


class PinningThread:
    """Pins ``memory``, uint8 [rows, row_bytes], from its first row on, ahead of the rows in use.

    Copies from and to rows that are not pinned yet are correct, and slower: they go through a buffer of the driver.
    """

    def __init__(self, memory: npt.NDArray[np.uint8]) -> None:
        self._memory = memory
        self._used = 0  # rows
        self._wake = threading.Condition()
        self._closing = False
        self.pinned_bytes = 0
        self._pieces: list[int] = []  # addresses
        self._thread = threading.Thread(target=self._run, name="branchwise-pin", daemon=True)
        self._thread.start()

    def use(self, rows: int) -> None:
        """The first ``rows`` rows are in use."""
        if rows > self._used:
            with self._wake:
                self._used = rows
                self._wake.notify()

    def close(self) -> None:
        """Unpins the memory. No copy may be under way."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        for address in self._pieces:
            torch.cuda.cudart().cudaHostUnregister(address)

    def _target(self) -> int:
        """Bytes to have pinned."""
        used = self._used * self._memory.shape[1]
        return min(self._memory.nbytes, used + min(max(used, _LEAST_AHEAD), _MOST_AHEAD))

    def _run(self) -> None:
        """Registers piece by piece. No row lies in two pieces, and no two pieces share a page of the system."""
        row_bytes = self._memory.shape[1]
        rows = max(1, _PIECE // row_bytes)
        while rows * row_bytes % mmap.PAGESIZE:
            rows += 1
        system, flat = ctypes.CDLL(None), self._memory.reshape(-1)
        _advise(system, flat, _HUGE_PAGES)
        populated = 0
        with ThreadPoolExecutor(_POPULATE_THREADS, "branchwise-populate") as threads:
            for first in range(0, len(self._memory), rows):
                with self._wake:
                    self._wake.wait_for(lambda: self._closing or self.pinned_bytes < self._target())
                if self._closing:
                    return
                piece = self._memory[first : first + rows].reshape(-1)
                end = self.pinned_bytes + piece.nbytes
                if populated < end:
                    more = flat[populated : max(end, populated + _POPULATED)]
                    parts = [more[at : at + _POPULATE_BYTES] for at in range(0, len(more), _POPULATE_BYTES)]
                    list(threads.map(lambda part: _advise(system, part, _POPULATE_WRITE), parts))
                    populated += len(more)
                error = int(torch.cuda.cudart().cudaHostRegister(piece.ctypes.data, piece.nbytes, _PORTABLE))
                if error:
                    logger.warning("host cache: pinning memory failed with CUDA error %d; copies are slower", error)
                    return
                self._pieces.append(piece.ctypes.data)
                self.pinned_bytes += piece.nbytes
                time.sleep(_PAUSE)


def _advise(system: ctypes.CDLL, memory: npt.NDArray[np.uint8], advice: int) -> None:
    """``madvise``. Failures are ignored: an older kernel does without."""
    system.madvise(ctypes.c_void_p(memory.ctypes.data), ctypes.c_size_t(memory.nbytes), advice)
