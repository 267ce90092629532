"""A sum whose addends are in the memory of several devices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Addends:
    """The addends of a sum, which the operation that reads it adds up in the same pass.

    They are in one order on all ranks, so all compute the same sum. Each has its values once the stream reaches the
    operation.
    """

    tensors: tuple[Tensor, ...]  # [T, H] each, contiguous, of one dtype
    addresses: Tensor  # int64 [addends], on the device: where each begins, a multiple of 16

    def total(self) -> Tensor:
        """``[T, H]``, added up in float32 and rounded once."""
        total = self.tensors[0].float()
        for addend in self.tensors[1:]:
            total = total + addend
        return total.to(self.tensors[0].dtype)


def summed(x: Tensor | Addends) -> Tensor:
    """``x``, or its total."""
    return x if isinstance(x, torch.Tensor) else x.total()
