"""The tokens of each penalised row, on the device: sampled tokens are counted before the host knows them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..step import Int32, Int64


class TokenHistory:
    """Counts of output tokens and marks of all tokens seen, in tables [slots, V] that grow by doubling.

    A row has a slot, of five bytes a vocabulary entry, only while its request uses penalties.
    """

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size, self._device, self._max_rows = vocab_size, device, max_rows
        self._slot = np.full(max_rows, -1, np.int64)
        self._free: list[int] = []
        self._counts = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)  # in the output
        self._seen = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)  # in prompt or output

    def start(self, row: int, tokens: Int32, prompt_len: int) -> None:
        """Gives the row a cleared slot and enters ``tokens``; those from ``prompt_len`` on are output."""
        if self._slot[row] < 0:
            if not self._free:
                self._grow()
            self._slot[row] = self._free.pop()
        slot = int(self._slot[row])
        self._counts[slot].zero_()
        self._seen[slot].zero_()
        self._seen[slot].index_fill_(0, to_device(np.unique(tokens).astype(np.int64), self._device), True)
        ids, counts = np.unique(tokens[prompt_len:], return_counts=True)
        if len(ids):
            at = to_device(ids.astype(np.int64), self._device)
            self._counts[slot].index_copy_(0, at, to_device(counts.astype(np.int32), self._device))

    def forget(self, row: int) -> None:
        """Frees the row's slot, if it has one: its request uses no penalties."""
        if self._slot[row] >= 0:
            self._free.append(int(self._slot[row]))
            self._slot[row] = -1

    def of(self, rows: Int64) -> tuple[Tensor, Tensor]:
        """Counts [N, V] int32 and seen [N, V] bool of ``rows``."""
        slots = to_device(self._slot[rows], self._device)
        return self._counts[slots], self._seen[slots]

    def append(self, rows: Int64, tokens: Tensor, penalized: npt.NDArray[np.bool_]) -> None:
        """Enters ``tokens`` [S], which the host may not know yet, for the penalised ones of ``rows`` [S]."""
        index = np.flatnonzero(penalized)
        if not len(index):
            return
        at = to_device(self._slot[rows[index]] * self._vocab_size, self._device)
        at = at + tokens[to_device(index, self._device)]
        self._counts.view(-1).scatter_add_(0, at, torch.ones_like(at, dtype=torch.int32))
        self._seen.view(-1).index_fill_(0, at, True)

    def _grow(self) -> None:
        size = len(self._counts)
        more = min(max(size, 4), self._max_rows - size)
        self._counts = torch.cat([self._counts, self._counts.new_zeros((more, self._vocab_size))])
        self._seen = torch.cat([self._seen, self._seen.new_zeros((more, self._vocab_size))])
        self._free.extend(range(size + more - 1, size - 1, -1))


def to_device(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """A copy on ``device``. On a GPU it is asynchronous, from pinned memory."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
