"""The feed-forward part of a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.base import Ops
from ...kernels.linear import Linear
from ...kernels.ops import Activation
from ...kernels.quantize import Quantizer, Rows
from .config import ModelConfig


class MLP(Protocol):
    @property
    def quantizer(self) -> Quantizer | None:
        """Of its input."""
        ...

    def __call__(self, x: Rows) -> Tensor:
        """Normed hidden states ``[T, hidden]`` to what is added to the residual stream, before any norm of it."""
        ...


class GatedMLP:
    """``down(activation(gate(x)) * up(x))`` (Shazeer, 2020), with gate and up in one product.

    ``make_linear`` makes ``{layer}.gate_up`` and ``{layer}.down``.
    """

    def __init__(self, config: ModelConfig, layer: str, ops: Ops, make_linear: Callable[[str], Linear]) -> None:
        self._activation, self._ops = cast(Activation, config.activation), ops  # `config.py` admits no other
        self._gate_up, self._down = make_linear(f"{layer}.gate_up"), make_linear(f"{layer}.down")
        self.quantizer = self._gate_up.quantizer

    def __call__(self, x: Rows) -> Tensor:
        quantizer = self._down.quantizer
        # No name holds the product of gate and up, a step's largest tensor, while `down` runs.
        if quantizer is None:
            return self._down(self._ops.gate_mul(self._gate_up(x), self._activation))
        return self._down(self._ops.gate_mul_quantized(self._gate_up(x), self._activation, quantizer))


class PlainMLP:
    """``down(activation(up(x)))``; relu2 is squared ReLU (So et al., 2021), xielu has learned slopes.

    ``make_linear`` makes ``{layer}.up`` and ``{layer}.down``. Takes xielu's parameters out of ``weights``.
    """

    def __init__(
        self, config: ModelConfig, layer: str, weights: dict[str, Tensor], make_linear: Callable[[str], Linear]
    ) -> None:
        self._activation = config.activation
        self._slopes: tuple[Tensor, Tensor] | None = None
        if config.activation == "xielu":
            alpha_p, alpha_n = weights.pop(f"{layer}.alpha_p"), weights.pop(f"{layer}.alpha_n")
            self._slopes = F.softplus(alpha_p), _XIELU_BETA + F.softplus(alpha_n)
        self._up, self._down = make_linear(f"{layer}.up"), make_linear(f"{layer}.down")
        self.quantizer = self._up.quantizer

    def __call__(self, x: Rows) -> Tensor:
        x = self._up(x)
        if self._slopes is not None:
            return self._down(_xielu(x, *self._slopes))
        match self._activation:
            case "relu2":
                x = x.relu_().square_()
            case "gelu_tanh":
                x = F.gelu(x, approximate="tanh")
            case _:
                x = F.gelu(x)
        return self._down(x)


_XIELU_BETA, _XIELU_EPS = 0.5, -1e-6


def _xielu(x: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """xIELU (Huang and Schlag, 2024) in float32: a parabola of slope ``positive`` above 0, of ``negative`` below it an
    integrated exponential."""
    y = x.float()
    below = (torch.expm1(y.clamp(max=_XIELU_EPS)) - y).mul_(negative)
    return torch.where(y > 0, positive * y * y, below).add_(y, alpha=_XIELU_BETA).to(x.dtype)
