"""A tier in host memory: page-first, pinned on a GPU, with streams of its own for the copies."""

from __future__ import annotations

import ctypes
import functools
import time
from collections import deque
from typing import Any

import numpy as np
import torch

from ...kernels.kv_pool import KVPool
from ...radix.node import Int32
from .copies import Ended, HostCopies
from .page_format import PageFormat
from .pinned import PinningThread, anonymous_memory

_MAX_PITCH = 2**31 - 1  # bytes between rows of a two-dimensional copy
_TO_HOST, _TO_DEVICE = 2, 1  # cudaMemcpyKind
_BATCH = 16  # pages of one gather, where pages need one


class HostTier:
    """`copies.HostCopier` for a `KVPool`: ``memory[slot]`` holds a page in every layer, in the tier's `PageFormat`.

    On a GPU, where a page is stored byte for byte, one `cudaMemcpy2DAsync` a page moves its fragments without a kernel.
    Memory is pinned ahead of its use (`pinned.PinningThread`). On a CPU both tiers are host memory, and a copy is done
    when the call returns.
    """

    def __init__(self, pool: KVPool, num_slots: int, *, fp8: bool = False) -> None:
        self._fragments = pool.fragments()
        self._format = PageFormat(pool.layout, fp8)
        self.num_slots, self.page_bytes = num_slots, self._format.page_bytes
        self.memory = anonymous_memory(num_slots, self.page_bytes)
        self._ended: list[Ended] = []
        self._calls = 0
        self._device: _Streams | None = None
        if pool.device.type == "cuda":
            self._device = _Streams(pool.device)
            self._pinning = PinningThread(self.memory)

    def store(self, copies: HostCopies) -> None:
        """See `copies.HostCopier`."""
        self._calls += 1
        if self._device is not None:
            self._pinning.use(int(copies.slots.max(initial=-1)) + 1)
            with torch.cuda.device(self._fragments.device):
                self._device.store(self, copies, self._calls)
        elif len(copies.pages):
            stored = torch.from_numpy(copies.pages.astype(np.int64))
            self.memory[copies.slots] = self._format.encode(self._fragments.index_select(1, stored)).numpy()

    def load(self, copies: HostCopies) -> None:
        """See `copies.HostCopier`."""
        for id, slots, pages in copies.loads:
            if self._device is not None:
                self._pinning.use(int(slots.max()) + 1)
                with torch.cuda.device(self._fragments.device):
                    self._device.load(self, id, slots, pages)
                continue
            started = time.perf_counter()
            data = self._format.decode(torch.from_numpy(self.memory[slots]))
            self._fragments.index_copy_(1, torch.from_numpy(pages.astype(np.int64)), data)
            self._ended.append(Ended(id, len(slots), time.perf_counter() - started))

    def launched(self, step: int) -> None:
        """A step has been launched on the current stream."""
        if self._device is not None:
            self._device.launched(step)

    def stored(self) -> int:
        """See `copies.HostCopier`."""
        return self._calls if self._device is None else self._device.stored()

    def ended(self) -> list[Ended]:
        """See `copies.HostCopier`."""
        if self._device is not None:
            return self._device.ended()
        ended, self._ended = self._ended, []
        return ended

    def close(self) -> None:
        """Waits for copies, and unpins the memory. The pool may be freed afterwards."""
        if self._device is not None:
            self._device.close()
            self._pinning.close()
        del self._fragments

    def copy(self, slots: Int32, pages: Int32, kind: int, stream: torch.cuda.Stream) -> None:
        """Enqueues copies of whole pages on a CUDA stream: ``kind`` `_TO_HOST` or `_TO_DEVICE`."""
        rows, num_pages, width = self._fragments.shape
        pitch = num_pages * width
        if self._format.fp8 or pitch > _MAX_PITCH:
            self._copy_gathered(slots, pages, kind)
            return
        here = (self._fragments.data_ptr() + pages.astype(np.int64) * width).tolist()
        there = (self.memory.ctypes.data + slots.astype(np.int64) * self.page_bytes).tolist()
        copy, handle = _memcpy_2d(), stream.cuda_stream
        if kind == _TO_HOST:
            errors = [copy(b, width, a, pitch, width, rows, kind, handle) for a, b in zip(here, there, strict=True)]
        else:
            errors = [copy(a, pitch, b, width, width, rows, kind, handle) for a, b in zip(here, there, strict=True)]
        if any(errors):
            raise RuntimeError(f"cudaMemcpy2DAsync failed with CUDA error {max(errors)}")

    def _copy_gathered(self, slots: Int32, pages: Int32, kind: int) -> None:
        """The same through a contiguous buffer: for records that are not a page's bytes, and for a pool whose rows are
        too far apart for a two-dimensional copy."""
        host = torch.from_numpy(self.memory)
        for first in range(0, len(pages), _BATCH):
            some = pages[first : first + _BATCH].astype(np.int64)
            index = torch.from_numpy(some).to(self._fragments.device)
            places = slots[first : first + _BATCH].tolist()
            if kind == _TO_HOST:
                gathered = self._format.encode(self._fragments.index_select(1, index))
                for i, slot in enumerate(places):
                    host[slot].copy_(gathered[i], non_blocking=True)
            else:
                gathered = torch.empty(len(some), self.page_bytes, dtype=torch.uint8, device=self._fragments.device)
                for i, slot in enumerate(places):
                    gathered[i].copy_(host[slot], non_blocking=True)
                self._fragments.index_copy_(1, index, self._format.decode(gathered))


class _Streams:
    """The streams and events of a GPU: stores wait for the steps that wrote their pages and later steps for them; loads
    wait for stores and for every step launched before, which may still use their pages."""

    def __init__(self, device: torch.device) -> None:
        self._down, self._up = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._steps: deque[tuple[int, torch.cuda.Event]] = deque(maxlen=8)
        self._stores: deque[tuple[int, torch.cuda.Event]] = deque()
        self._loads: deque[tuple[int, int, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._stored = 0

    def launched(self, step: int) -> None:
        event = torch.cuda.Event()
        event.record()
        self._steps.append((step, event))

    def store(self, tier: HostTier, copies: HostCopies, number: int) -> None:
        if len(copies.pages):
            # Steps run in order: the first kept one at or after ``after``, else the last, has all the writes.
            writer = next((event for step, event in self._steps if step >= copies.after), None)
            if self._steps:
                self._down.wait_event(writer or self._steps[-1][1])
            with torch.cuda.stream(self._down):
                tier.copy(copies.slots, copies.pages, _TO_HOST, self._down)
            torch.cuda.current_stream().wait_event(self._record(self._down, number))
        elif self._stores:
            self._stores.append((number, self._stores[-1][1]))
        else:
            self._stored = number

    def load(self, tier: HostTier, id: int, slots: Int32, pages: Int32) -> None:
        self._up.wait_event(self._now(torch.cuda.current_stream()))
        begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(self._up):
            begun.record()
            tier.copy(slots, pages, _TO_DEVICE, self._up)
            ended.record()
        self._loads.append((id, len(slots), begun, ended))

    def stored(self) -> int:
        while self._stores and self._stores[0][1].query():
            self._stored = self._stores.popleft()[0]
        return self._stored

    def ended(self) -> list[Ended]:
        done = []
        while self._loads and self._loads[0][3].query():
            id, pages, begun, ended = self._loads.popleft()
            done.append(Ended(id, pages, begun.elapsed_time(ended) / 1e3))
        return done

    def close(self) -> None:
        self._down.synchronize()
        self._up.synchronize()

    def _record(self, stream: torch.cuda.Stream, number: int) -> torch.cuda.Event:
        event = self._now(stream)
        self._stores.append((number, event))
        return event

    @staticmethod
    def _now(stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(stream)
        return event


@functools.cache
def _memcpy_2d() -> Any:
    """``cudaMemcpy2DAsync`` of the CUDA runtime that torch has loaded."""
    version = str(torch.version.cuda).partition(".")[0]
    try:
        runtime = ctypes.CDLL(f"libcudart.so.{version}")
    except OSError:
        runtime = ctypes.CDLL("libcudart.so")
    copy = runtime.cudaMemcpy2DAsync
    address, size = ctypes.c_void_p, ctypes.c_size_t  # declared, so that a call makes no object of an argument
    copy.argtypes = [address, size, address, size, size, size, ctypes.c_int, address]
    return copy
