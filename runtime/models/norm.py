"""Norms of the residual stream."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.addends import Addends, summed
from ...kernels.base import Ops
from ...kernels.quantize import Quantizer, Rows
from .config import ModelConfig


class Norm:
    """RMSNorm, or LayerNorm (Ba et al., 2016) in float32. Takes ``name`` and its ``name_bias`` out of ``weights``."""

    def __init__(self, config: ModelConfig, name: str, weights: dict[str, Tensor], ops: Ops) -> None:
        if config.norm_weight:
            self._weight = weights.pop(name)
        else:
            devices = (weight.device for weight in weights.values())
            # Without any tensor, all weights are in files, as a CPU's may be.
            self._weight = torch.ones(config.hidden_size, device=next(devices, torch.device("cpu")))
        self._bias = weights.pop(f"{name}_bias", None)
        self._centered, self._eps, self._ops = config.norm_kind == "layer", config.norm_eps, ops

    def __call__(self, x: Tensor) -> Tensor:
        """The norm of each row of ``[T, hidden]``, in ``x``'s dtype."""
        if not self._centered:
            return self._ops.rms_norm(x, self._weight, self._eps)
        return F.layer_norm(x.float(), x.shape[-1:], self._weight, self._bias, self._eps).to(x.dtype)

    def add(self, delta: Tensor | Addends | None, hidden: Tensor) -> Tensor:
        """Adds ``delta``, if there is one, into ``hidden`` in place. Returns the norm of the sum. Both ``[T, H]``."""
        if delta is None:
            return self(hidden)
        if not self._centered:
            return self._ops.add_rms_norm(delta, hidden, self._weight, self._eps)
        return self(hidden.add_(summed(delta)))

    def add_quantized(self, delta: Tensor | Addends | None, hidden: Tensor, quantizer: Quantizer | None) -> Rows:
        """`add`, for a linear layer with this ``quantizer``; quantized here where that is the same pass."""
        if delta is None or quantizer is None or self._centered:
            return self.add(delta, hidden)
        return self._ops.add_rms_norm_quantized(delta, hidden, self._weight, self._eps, quantizer)
