"""The feed-forward part of a layer."""

from __future__ import annotations

from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.base import Ops
from ...kernels.ops import Activation
from .config import ModelConfig
from .linear import make_linear


class MLP(Protocol):
    def __call__(self, x: Tensor) -> Tensor:
        """Normed hidden states ``[T, hidden]`` to what is added to the residual stream, before any norm of it."""
        ...


def make_mlp(config: ModelConfig, layer: str, weights: dict[str, Tensor], ops: Ops) -> MLP:
    """The MLP of ``layer``, whose weights it takes out of ``weights``."""
    return GatedMLP(config, layer, weights, ops) if config.gated_mlp else PlainMLP(config, layer, weights)


class GatedMLP:
    """``down(activation(gate(x)) * up(x))`` (Shazeer, 2020), with gate and up in one product.

    Takes ``{layer}.gate_up``, ``{layer}.down`` and their biases out of ``weights``.
    """

    def __init__(self, config: ModelConfig, layer: str, weights: dict[str, Tensor], ops: Ops) -> None:
        self._activation, self._ops = cast(Activation, config.activation), ops  # `config.py` admits no other
        self._gate_up = make_linear(f"{layer}.gate_up", weights)
        self._down = make_linear(f"{layer}.down", weights)

    def __call__(self, x: Tensor) -> Tensor:
        return self._down(self._ops.gate_mul(self._gate_up(x), self._activation))


class PlainMLP:
    """``down(activation(up(x)))``; relu2 is squared ReLU (So et al., 2021), xielu has learned slopes.

    Takes ``{layer}.up``, ``{layer}.down``, their biases and xielu's parameters out of ``weights``.
    """

    def __init__(self, config: ModelConfig, layer: str, weights: dict[str, Tensor]) -> None:
        self._activation = config.activation
        self._slopes: tuple[Tensor, Tensor] | None = None
        if config.activation == "xielu":
            alpha_p, alpha_n = weights.pop(f"{layer}.alpha_p"), weights.pop(f"{layer}.alpha_n")
            self._slopes = F.softplus(alpha_p), _XIELU_BETA + F.softplus(alpha_n)
        self._up, self._down = make_linear(f"{layer}.up", weights), make_linear(f"{layer}.down", weights)

    def __call__(self, x: Tensor) -> Tensor:
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
