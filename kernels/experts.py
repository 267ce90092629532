"""Products of tokens with the weights of the experts that they are sent to.

A step's tokens are sorted by expert, so that each expert's are neighbours (Gale et al., 2022): one grouped product for
all experts, or a product for each that has tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import Linear

_ALIGNMENT = 16  # bytes that the rows of a grouped product's operands are multiples of


@dataclass(frozen=True, slots=True)
class Dispatch:
    """T tokens, each sent to k of E experts, in order of the experts.

    Args:
        order: int64 ``[T * k]``: at each place, the token's number times k plus which of its experts this is.
        experts: int64 ``[T * k]``: the expert of each place, ascending.
        ends: int32 ``[E]``: behind the last place of each expert.
        top_k: k.
    """

    order: Tensor
    experts: Tensor
    ends: Tensor
    top_k: int

    @classmethod
    def of(cls, ids: Tensor, count: int) -> Dispatch:
        """From the experts of each token, int64 ``[T, k]``. Shapes do not depend on values and none is read back to
        the host, so that the step can be captured in a CUDA graph."""
        experts, order = ids.flatten().sort(stable=True)
        ends = torch.searchsorted(experts, torch.arange(count, device=ids.device), right=True, out_int32=True)
        return cls(order, experts, ends, ids.shape[1])

    def scatter(self, x: Tensor) -> Tensor:
        """``[T, H]`` to ``[T * k, H]``, in order of the experts."""
        return x.index_select(0, self.order // self.top_k)

    def gather(self, x: Tensor, weights: Tensor) -> Tensor:
        """``[T * k, H]`` in order of the experts to ``[T, H]``: each token's sum weighted with float32 ``[T, k]``.

        The order of the sum is that of the token's experts, whatever else is in the step.
        """
        places = torch.empty_like(x).index_copy_(0, self.order, x)
        return (places.unflatten(0, (-1, self.top_k)) * weights[:, :, None]).sum(1).to(x.dtype)


class ExpertLinear(Protocol):
    """``x @ weight[expert].T`` for each row of x."""

    def __call__(self, x: Tensor, dispatch: Dispatch) -> Tensor:
        """``[T * k, inputs]`` in order of the experts to ``[T * k, outputs]``."""
        ...


class GroupedLinear:
    """One grouped product for all experts, whose row counts stay on the device.

    Args:
        weight: ``[E, outputs, inputs]``, see `groups`.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight.transpose(1, 2)

    def __call__(self, x: Tensor, dispatch: Dispatch) -> Tensor:
        if not len(x):
            return x.new_empty(0, self._weight.shape[2])
        return F.grouped_mm(x, self._weight, offs=dispatch.ends)


class LoopedLinear:
    """A product for each expert that has tokens. Reads the row counts back to the host: for CPUs."""

    def __init__(self, experts: Sequence[Linear]) -> None:
        self._experts = experts

    def __call__(self, x: Tensor, dispatch: Dispatch) -> Tensor:
        out, start = [], 0
        for linear, end in zip(self._experts, dispatch.ends.tolist(), strict=True):
            if end > start:
                out.append(linear(x[start:end]))
            start = end
        return torch.cat(out) if out else self._experts[0](x)


class MaskedLinear:
    """All experts' products with all rows, of which each keeps its own: E times the work, but shapes that do not depend
    on values. For GPUs and dtypes that have no grouped product."""

    def __init__(self, experts: Sequence[Linear]) -> None:
        self._experts = experts

    def __call__(self, x: Tensor, dispatch: Dispatch) -> Tensor:
        out: Tensor | None = None
        for i, linear in enumerate(self._experts):
            one = linear(x)
            out = one if out is None else torch.where((dispatch.experts == i)[:, None], one, out)
        assert out is not None
        return out


def groups(dtype: torch.dtype, device: torch.device, inputs: int, outputs: int) -> bool:
    """Whether a device multiplies experts of these sizes in a grouped product without reading values back."""
    aligned = all(size * dtype.itemsize % _ALIGNMENT == 0 for size in (inputs, outputs))
    return device.type == "cuda" and dtype == torch.bfloat16 and aligned
