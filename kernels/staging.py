"""Copying small arrays to the device: one pinned buffer, one copy, the same addresses for the same layout."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


class Fence:
    """A point in the device's current stream that the host can wait for. On a CPU it does nothing."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = torch.cuda.Event() if device.type == "cuda" else None

    def record(self) -> None:
        """Moves the point to the end of the work enqueued so far."""
        if self._event is not None:
            self._event.record()

    def wait(self) -> None:
        """Blocks the host until the point is reached; at once if none was recorded."""
        if self._event is not None:
            self._event.synchronize()


class Staging:
    """Packs a step's arrays and copies them all at once.

    A step calls `begin`, then `put` for each array, then `send`. The views that `put` returns have their values once
    `send`'s copy has run, in stream order. Their addresses depend only on the sizes put before them, so a CUDA graph
    that was captured over them reads what was sent last.

    Args:
        size: elements. `begin` can grow it, which changes the addresses that captured graphs read.
        dtype: int32 or int64.
        device: on a CPU the views are the staging memory itself.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._copied = Fence(device)
        self._used = 0
        self._allocate(size)

    def _allocate(self, size: int) -> None:
        self._host = torch.empty(size, dtype=self._dtype, pin_memory=self._device.type == "cuda")
        self._array = self._host.numpy()
        self._on_device = torch.empty_like(self._host, device=self._device) if self._host.is_pinned() else self._host
        self._views: list[tuple[int, int, Tensor]] = []  # of the step before, which mostly has the same layout
        self._puts = 0

    def begin(self, size: int = 0) -> None:
        """Starts over, with room for ``size`` elements. Waits for the previous copy, which normally ended long ago."""
        self._copied.wait()
        self._used = self._puts = 0
        if size > self._array.size:
            self._allocate(2 * size)

    def put(self, array: npt.NDArray[np.integer], padded: int = 0, pad: int = 0, filled: int | None = None) -> Tensor:
        """Returns the array's place on the device, of at least ``padded`` elements.

        The elements behind the array become ``pad``: all of them, or those before ``filled``. The others keep the
        values of the step before, or are undefined in the first.
        """
        start, size, nth = self._used, len(array), self._puts
        end = start + max(padded, size)
        if end > self._array.size:
            raise ValueError(f"{end} elements do not fit {self._array.size}")
        self._array[start : start + size] = array
        last = end if filled is None else start + filled
        if last > start + size:
            self._array[start + size : last] = pad
        self._used, self._puts = end, nth + 1
        if nth < len(self._views) and self._views[nth][:2] == (start, end):
            return self._views[nth][2]
        view = self._on_device[start:end]
        self._views[nth:] = [(start, end, view)]
        return view

    def send(self) -> None:
        """Copies everything put since `begin` to the device, in stream order, without waiting."""
        if self._on_device is not self._host and self._used:
            self._on_device[: self._used].copy_(self._host[: self._used], non_blocking=True)
            self._copied.record()
