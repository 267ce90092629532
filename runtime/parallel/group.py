"""The collectives of tensor parallelism: how the ranks that a model is split over exchange tensors."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ...kernels.addends import Addends


class TensorGroup(Protocol):
    """The ranks of one model, for one of them. All ranks must call the same methods with the same shapes in the same
    order. Each call is enqueued on the current stream; on a GPU it can be captured in a CUDA graph."""

    rank: int
    size: int

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's ``x``. ``x`` may be overwritten; the result is valid until the next call."""
        ...

    def addends(self, x: Tensor) -> Tensor | Addends:
        """As `all_reduce`, but the sum may be left to the operation that reads it. The result is valid until the second
        call after this one. Each step must call another method of this group before its first `addends`."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """``[size, *x.shape]``: every rank's ``x``, in the order of ranks."""
        ...

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's ``x``. The ``x`` of other ranks may be overwritten."""
        ...


class SingleRank:
    """A model on one device: nothing is exchanged."""

    rank, size = 0, 1

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def addends(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x[None]

    def broadcast(self, x: Tensor) -> Tensor:
        return x
