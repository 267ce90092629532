"""Mixtures of experts in torch: the specification, and the way of CPUs.

A step's tokens are sorted by expert, so that each expert's are neighbours (Gale et al., 2022), and each expert that has
tokens multiplies its own. `triton_experts` is for GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from .linear import Linear
from .ops import Activation, gate_mul
from .quantize import in_blocks


class Experts(Protocol):
    """The routed experts of a layer: ``down(activation(gate(x)) * up(x))`` each."""

    def __call__(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """The sum of each token's experts' outputs times their weights, summed in the order of its experts.

        Args:
            x: ``[T, hidden]``.
            weights: float32 ``[T, k]``.
            ids: int32 ``[T, k]``, different for one token.

        Returns:
            ``[T, hidden]``, in ``x``'s dtype.
        """
        ...


class ExpertWeight(NamedTuple):
    """The weights of one linear layer of all experts, one below the other.

    values: ``[E * outputs, inputs]`` in the model's dtype or in FP8; ``[E * outputs, inputs / 2]`` in MXFP4.
    scale: see `quantize.dequantize_weight`; None: there is none.
    bias: ``[E * outputs]``, or None.
    """

    values: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None

    def chunk(self, count: int) -> list[ExpertWeight]:
        """Those of each of ``count`` experts."""
        parts = ([None] * count if part is None else part.chunk(count) for part in self)
        return [ExpertWeight(*one) for one in zip(*parts, strict=True)]

    @property
    def format(self) -> Literal["plain", "channel", "block", "mxfp4"]:
        """What shares a scale."""
        if self.scale is None:
            return "plain"
        if self.values.dtype == torch.uint8:
            return "mxfp4"
        return "block" if in_blocks(self.values, self.scale) else "channel"


class LoopedExperts:
    """Products for each expert that has tokens. Reads the row counts back to the host: for CPUs.

    Args:
        gate_up: gate and up of each expert in one product, gate first.
        down: of each expert.
        activation: of the gate.
    """

    def __init__(self, gate_up: Sequence[Linear], down: Sequence[Linear], activation: Activation) -> None:
        self._pairs, self._activation = list(zip(gate_up, down, strict=True)), activation

    def __call__(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """See `Experts`."""
        top_k = ids.shape[1]
        order = ids.flatten().argsort(stable=True)
        counts = torch.bincount(ids.flatten(), minlength=len(self._pairs)).tolist()
        out = x.new_empty(len(order), x.shape[1])
        for (gate_up, down), slots in zip(self._pairs, order.split(counts), strict=True):
            if len(slots):
                out[slots] = down(gate_mul(gate_up(x[slots // top_k]), self._activation))
        return (out.unflatten(0, (-1, top_k)) * weights[:, :, None]).sum(1).to(x.dtype)
