"""Linear layers of a model of transformers, stored and multiplied as ours are, and cut over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ....kernels.base import Ops
from ....kernels.linear import Linear
from ....kernels.quantize import quantize_weight
from ...parallel.group import TensorGroup
from ..linear import LinearFactory
from .config import Cut, TransformersConfig


class RankLinear(nn.Module):
    """One rank's part of a linear layer: ``[..., inputs]`` to ``[..., outputs]``.

    Args:
        linear: of the rank's weight.
        cut: see `Cut`; None: every rank has all of the layer.
        group: the ranks.
    """

    def __init__(self, linear: Linear, cut: Cut | None, group: TensorGroup) -> None:
        super().__init__()
        self._linear, self._cut, self._group = linear, cut if group.size > 1 else None, group

    def forward(self, x: Tensor) -> Tensor:
        out = self._linear(x.flatten(0, -2))
        if self._cut == "row":
            out = self._group.all_reduce(out).clone()  # the sum is only valid until the next one
        elif self._cut == "gather":
            out = self._group.all_gather(out).transpose(0, 1).flatten(1)
        return out.unflatten(0, x.shape[:-1])


def replace_linears(
    model: Any,
    config: TransformersConfig,
    cuts: dict[str, Cut],
    ops: Ops,
    device: torch.device,
    group: TensorGroup,
    *,
    int8: bool,
) -> None:
    """Replaces every `nn.Linear`, one at a time, by its part of ``group``'s rank on ``device``. Then moves the rest.

    An output layer that is tied to the embedding comes last, so that both are one tensor on the device.
    """
    embedding = model.get_input_embeddings().weight
    tied: list[tuple[str, nn.Linear]] = []
    for name, linear in list(_linears(model)):
        if linear.weight is embedding:
            tied.append((name, linear))
        else:
            _replace(model, name, linear, config, cuts, ops, device, group, int8=int8)
    model.to(device)
    for name, linear in tied:
        _replace(model, name, linear, config, cuts, ops, device, group, int8=int8)


def _replace(
    model: Any,
    name: str,
    linear: nn.Linear,
    config: TransformersConfig,
    cuts: dict[str, Cut],
    ops: Ops,
    device: torch.device,
    group: TensorGroup,
    *,
    int8: bool,
) -> None:
    cut = cuts.get(name) if group.size > 1 else None
    if cut == "gather" and linear.out_features % group.size:
        cut = None  # every rank computes all of it
    weight, bias = _part(linear, cut, group)
    weights, dtype = {"weight": weight.to(device)}, weight.dtype
    if bias is not None:
        weights["weight_bias"] = bias.to(device)
    if config.quantizes(name):
        weights["weight"], weights["weight_scale"] = quantize_weight(weights["weight"], torch.float8_e4m3fn)
    made = LinearFactory(weights, ops, dtype, int8=int8)("weight")
    model.set_submodule(name, RankLinear(made, cut, group))


def _part(linear: nn.Linear, cut: Cut | None, group: TensorGroup) -> tuple[Tensor, Tensor | None]:
    """The rank's rows or columns of weight and bias, in equal parts."""
    weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
    if cut is None:
        return weight, bias
    if cut == "row":  # the bias is added once
        return weight.chunk(group.size, 1)[group.rank].contiguous(), bias if group.rank == 0 else None
    return weight.chunk(group.size)[group.rank], None if bias is None else bias.chunk(group.size)[group.rank]


def _linears(model: Any) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            yield name, module
