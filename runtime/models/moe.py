"""Mixtures of experts: a router that chooses experts for each token, and the experts."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.base import Ops
from ...kernels.experts import Dispatch
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
        assert config.experts is not None
        self._experts, self._ops = config.experts, ops
        # `config.py` admits no other
        self._activation = cast(Activation, config.experts.family.activation or config.activation)
        router = (weights.pop(f"{layer}.{name}", None) for name in ("router_bias", "router_logit_bias"))
        self._router = Router(config.experts, weights.pop(f"{layer}.router"), *router)
        count = config.experts.count
        self._gate_up = make_linear.experts(f"{layer}.experts.gate_up", count)
        self._down = make_linear.experts(f"{layer}.experts.down", count)
        self._shared, self._shared_gate = None, weights.pop(f"{layer}.shared_gate", None)
        if config.experts.shared_size:
            self._shared = GatedMLP(config, f"{layer}.shared", ops, make_linear.plain)

    def __call__(self, x: Rows) -> Tensor:
        assert isinstance(x, Tensor)  # nothing quantizes the input of a layer without a quantizer
        weights, ids = self._router(x)
        dispatch = Dispatch.of(ids, self._experts.count)
        gate_up = self._gate_up(dispatch.scatter(x), dispatch)
        out = dispatch.gather(self._down(self._ops.gate_mul(gate_up, self._activation), dispatch), weights)
        if self._shared is None:
            return out
        shared = self._shared(x)
        return out + (shared if self._shared_gate is None else F.linear(x, self._shared_gate).sigmoid() * shared)


class Router:
    """Chooses each token's experts.

    Args:
        config: of the mixture.
        weight: ``[E, hidden]``.
        bias: float32 ``[E]``, added to the scores for the choice alone (Wang et al., 2024), or None.
        logit_bias: ``[E]``, added to the logits, or None.
    """

    def __init__(
        self, config: ExpertsConfig, weight: Tensor, bias: Tensor | None, logit_bias: Tensor | None = None
    ) -> None:
        self._config, self._bias, self._logit_bias = config, bias, logit_bias
        self._weight = weight.float() if config.family.float32_router else weight

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[T, hidden]`` to the weights, float32 ``[T, k]``, and the numbers, int64 ``[T, k]``, of its experts."""
        config = self._config
        logits = F.linear(x.to(self._weight.dtype), self._weight, self._logit_bias).float()
        if config.family.scores == "sparsemixer":
            return _sparsemixer(logits, config.top_k, config.jitter)
        scores = logits.sigmoid() if config.family.scores == "sigmoid" else logits.softmax(-1)
        choice = scores if self._bias is None else scores + self._bias
        ids = self._of_best_groups(choice).topk(config.top_k, dim=-1).indices
        weights = scores.gather(1, ids)
        if config.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * config.scale, ids

    def _of_best_groups(self, choice: Tensor) -> Tensor:
        """DeepSeek V3's limit: a group's score is the sum of its two best experts'."""
        config = self._config
        if config.groups == 1:
            return choice
        groups = choice.unflatten(1, (config.groups, -1))
        best = groups.topk(2, dim=-1).values.sum(-1).topk(config.top_groups, dim=-1).indices
        left_out = torch.ones(groups.shape[:2], dtype=torch.bool, device=choice.device).scatter_(1, best, False)
        return groups.masked_fill(left_out[:, :, None], -torch.inf).flatten(1)


def _sparsemixer(logits: Tensor, top_k: int, jitter: float) -> tuple[Tensor, Tensor]:
    """SparseMixer (Liu et al., 2024): experts one after the other, each weighted by a softmax over those that are left
    and within ``2 * jitter`` of the best one, relative to the larger of the two magnitudes."""
    left, weights, ids = logits, [], []
    for _ in range(top_k):
        best, chosen = left.max(-1, keepdim=True)
        far = (best - logits) / logits.abs().clamp(min=best) > 2 * jitter
        weights.append(left.masked_fill(far, -torch.inf).softmax(-1).gather(1, chosen))
        left = left.scatter(1, chosen, -torch.inf)
        ids.append(chosen)
    return torch.cat(weights, 1), torch.cat(ids, 1)
