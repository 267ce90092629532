"""Mixtures of experts: a router that chooses experts for each token, and the experts."""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor

from ...kernels.base import Ops
from ...kernels.ops import Activation
from ...kernels.quantize import Rows
from .config import ModelConfig
from .experts import ExpertsConfig
from .linear import LinearFactory
from .mlp import GatedMLP


class MixtureOfExperts:
    """The sum of the chosen experts' outputs times their weights (Shazeer et al., 2017), and of a shared expert's.

    Takes the weights of ``layer`` out of ``weights``. Under tensor parallelism every rank has its part of each expert's
    channels and all of the router, so ranks choose alike.
    """

    quantizer = None

    def __init__(
        self, config: ModelConfig, layer: str, weights: dict[str, Tensor], ops: Ops, make_linear: LinearFactory
    ) -> None:
        experts = config.experts
        assert experts is not None
        router = (weights.pop(f"{layer}.{name}", None) for name in ("router_bias", "router_logit_bias"))
        self._router = Router(experts, ops, weights.pop(f"{layer}.router"), *router)
        activation = cast(Activation, experts.family.activation or config.activation)  # `config.py` admits no other
        self._experts = make_linear.experts(f"{layer}.experts", experts.count, activation)
        self._shared, self._shared_gate = None, weights.pop(f"{layer}.shared_gate", None)
        if experts.shared_size:
            self._shared = GatedMLP(config, f"{layer}.shared", ops, make_linear.plain)

    def __call__(self, x: Rows) -> Tensor:
        assert isinstance(x, Tensor)  # nothing quantizes the input of a layer without a quantizer
        out = self._experts(x, *self._router(x))
        if self._shared is None:
            return out
        shared = self._shared(x)
        return out + (shared if self._shared_gate is None else F.linear(x, self._shared_gate).sigmoid() * shared)


class Router:
    """Chooses each token's experts.

    Args:
        config: of the mixture.
        ops: the small operations.
        weight: ``[E, hidden]``.
        bias: float32 ``[E]``, see `ops.route`, or None.
        logit_bias: ``[E]``, added to the logits, or None.
    """

    def __init__(
        self, config: ExpertsConfig, ops: Ops, weight: Tensor, bias: Tensor | None, logit_bias: Tensor | None = None
    ) -> None:
        self._routing, self._ops, self._bias, self._logit_bias = config.routing, ops, bias, logit_bias
        self._weight = weight.float() if config.family.float32_router else weight

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[T, hidden]`` to the weights, float32 ``[T, k]``, and the numbers, int32 ``[T, k]``, of its experts."""
        logits = F.linear(x.to(self._weight.dtype), self._weight, self._logit_bias)
        return self._ops.route(logits, self._bias, self._routing)
