"""Linear layers of a model of transformers, stored and multiplied as ours are, and cut over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ....kernels.base import Ops
from ....kernels.quantize import quantize_weight
from ...parallel.group import TensorGroup
from ..linear import LinearFactory
from .config import TransformersConfig
from .cuts import Cuts, RankLinear, rank_part


def replace_linears(
    model: Any,
    config: TransformersConfig,
    cuts: Cuts,
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
    cuts: Cuts,
    ops: Ops,
    device: torch.device,
    group: TensorGroup,
    *,
    int8: bool,
) -> None:
    weight, bias = rank_part(linear, name, cuts, group)
    weights, dtype = {"weight": weight.to(device)}, weight.dtype
    if bias is not None:
        weights["weight_bias"] = bias.to(device)
    if config.quantizes(name):
        weights["weight"], weights["weight_scale"] = quantize_weight(weights["weight"], torch.float8_e4m3fn)
    made = LinearFactory(weights, ops, dtype, int8=int8)("weight")
    model.set_submodule(name, RankLinear(made, weight, cuts.linears.get(name), group))


def _linears(model: Any) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            yield name, module
