"""RMSNorm in one kernel, in place of a module of transformers that computes it in six."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ....kernels.base import Ops
from ....kernels.ops import rms_norm

_ROWS, _TOLERANCE = 4, 1e-4  # of the comparison, in float32


class RMSNorm(nn.Module):
    """See `kernels.ops.rms_norm`. ``weight``: float32 ``[D]``, with any offset."""

    def __init__(self, weight: Tensor, eps: float, ops: Ops) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self._eps, self._ops = eps, ops

    def forward(self, x: Tensor) -> Tensor:
        """The norm over the last dimension of ``[..., D]``."""
        weight = self.get_buffer("weight")
        return self._ops.rms_norm(x.flatten(0, -2), weight, self._eps).view(x.shape)


def replace_norms(model: Any, ops: Ops) -> int:
    """Replaces the modules that compute an RMSNorm, and returns how many. Families differ in it by offsets and by when
    they round, and more may: a module is replaced if it gives the same for random values in float32."""
    found = [(name, module) for name, module in model.named_modules() if type(module).__name__.endswith("RMSNorm")]
    replaced = 0
    for name, module in found:
        parameters = dict(module.named_parameters())
        if set(parameters) != {"weight"} or len(inspect.signature(module.forward).parameters) != 1:
            continue
        made = _equal_norm(module, parameters["weight"].detach().float(), ops)
        if made is not None:
            model.set_submodule(name, made)
            replaced += 1
    return replaced


def _equal_norm(module: nn.Module, weight: Tensor, ops: Ops) -> RMSNorm | None:
    eps = next((float(getattr(module, name)) for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)
    if eps is None or weight.dim() != 1:
        return None
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(_ROWS, len(weight), device=weight.device, generator=generator)
    expected = module(x).float()
    rounding = torch.finfo(next(module.parameters()).dtype).eps
    for offset in (0.0, 1.0):
        if torch.allclose(rms_norm(x, weight + offset, eps), expected, rtol=max(_TOLERANCE, 2 * rounding), atol=1e-5):
            return RMSNorm(weight + offset, eps, ops)
    return None
