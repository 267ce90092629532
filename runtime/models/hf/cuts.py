"""Tensor parallelism of a model of transformers: what its plan cuts, and one rank's part of each tensor.

The plan (``base_model_tp_plan`` of the config class) is data: a style for each module or parameter. Styles of linear
layers and of parameters, such as the stacked weights of experts, are followed; any other one is refused by name. A
model is then traced with one rank's parts (`rank_heads`): shapes that do not fit together are an error before any
weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from ....kernels.linear import Linear, PlainLinear
from ...errors import LoadError
from ...parallel.group import TensorGroup
from .trace import Trace, trace

# What a linear layer does about its cut. column: nothing. gather: all ranks get all outputs. row: products are summed
# over ranks. split: the same, of an input that every rank has all of.
Cut = Literal["column", "gather", "row", "split"]
_CUTS: Mapping[str, Cut] = {
    "colwise": "column",
    "packed_colwise": "column",
    "colwise_gather_output": "gather",
    "rowwise": "row",
    "rowwise_split_input": "split",
}
# Of a parameter: the dimension from the end that is cut, and into how many equal parts it is divided before.
_DIMENSIONS: Mapping[str, tuple[int, int]] = {
    "colwise": (2, 1),
    "colwise_gather_output": (2, 1),
    "packed_colwise": (2, 2),
    "rowwise": (1, 1),
    "rowwise_split_input": (1, 1),
    "packed_rowwise": (1, 2),
}
# Styles of modules without a cut: their gradients differ, or they are the owner of a parameter that is cut.
_REPLICATED = {"replicated_with_grad_allreduce", "replicate", "mla_kv_a_proj", "local_params"}
_SUMMED = "moe_tp_experts"


@dataclass(frozen=True, slots=True)
class Slices:
    """One tensor's cut: dimension ``dim`` consists of ``parts`` equal parts, and each rank has its range of each."""

    dim: int
    parts: int = 1

    def of(self, tensor: Tensor, rank: int, ranks: int) -> Tensor:
        """The slices of ``rank``, in the order of the parts."""
        parts = tensor.unflatten(self.dim, (self.parts, ranks, -1)).select(self.dim + 1, rank)
        return parts.flatten(self.dim, self.dim + 1).contiguous()


@dataclass(frozen=True, slots=True)
class Cuts:
    """The cuts of a model. Every tensor that is not named is on every rank.

    Args:
        linears: linear layers, by module.
        tensors: parameters, those of ``linears`` included, by name.
        summed: modules whose outputs are summed over ranks.
    """

    linears: Mapping[str, Cut]
    tensors: Mapping[str, Slices]
    summed: tuple[str, ...] = ()

    def shape(self, name: str, shape: tuple[int, ...], ranks: int) -> tuple[int, ...]:
        """The shape of a rank's part of parameter ``name``."""
        cut = self.tensors.get(name)
        return shape if cut is None else (*shape[: cut.dim], shape[cut.dim] // ranks, *shape[cut.dim + 1 :])


NO_CUTS = Cuts({}, {})


def cuts_of(model: Any, ranks: int) -> Cuts:
    """The cuts of transformers' plan for ``model``. Raises `LoadError` for a model that it does not cut, for a style
    that is not known here, and for sizes that ``ranks`` does not divide."""
    if ranks == 1:
        return NO_CUTS
    plan = dict(getattr(model, "_tp_plan", None) or {})
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
    linears: dict[str, Cut] = {}
    tensors: dict[str, Slices] = {}
    summed: list[str] = []
    for pattern, style in plan.items():
        if style in _REPLICATED or style.startswith("embedding"):
            continue
        named = re.compile(re.escape(pattern).replace(r"\*", "[^.]+"))
        for name in filter(named.fullmatch, [*modules, *parameters]):
            module = modules.get(name)
            if style == _SUMMED and module is not None:
                summed.append(name)
            elif type(module) is nn.Linear and style in _CUTS:
                if style != "colwise_gather_output" or module.out_features % ranks == 0:
                    linears[name] = _CUTS[style]
                    tensors.update(_of_linear(name, module, style))
            elif name in parameters and style in _DIMENSIONS:
                from_end, parts = _DIMENSIONS[style]
                tensors[name] = Slices(max(0, parameters[name].dim() - from_end), parts)
            elif not isinstance(module, nn.Embedding):
                raise LoadError(f"transformers cuts {name} in a way ({style}) that is not supported")
    if not set(linears.values()) - {"gather"} and not summed:
        raise LoadError("transformers has no plan that cuts it")
    for name, cut in tensors.items():
        if parameters[name].shape[cut.dim] % (cut.parts * ranks):
            raise LoadError(f"{parameters[name].shape[cut.dim]} channels of {name} cannot be divided by it")
    for name in summed:
        whole = [f"{name}.{one}" for one, _ in modules[name].named_parameters() if f"{name}.{one}" not in tensors]
        if whole:
            raise LoadError(f"transformers does not cut {whole[0]}, whose module it sums over ranks")
    return Cuts(linears, tensors, tuple(summed))


def _of_linear(name: str, linear: nn.Linear, style: str) -> dict[str, Slices]:
    from_end, parts = _DIMENSIONS[style]
    found = {f"{name}.weight": Slices(2 - from_end, parts)}
    if linear.bias is not None and from_end == 2:
        found[f"{name}.bias"] = Slices(0, parts)
    return found


class RankLinear(nn.Module):
    """One rank's part of a linear layer: ``[..., inputs]`` to ``[..., outputs]``.

    Args:
        linear: of the rank's weight.
        weight: that weight, of which dtype and shape are kept: models compute in the dtype of ``layer.weight``.
        cut: see `Cut`; None: every rank has all of the layer.
        group: the ranks.
    """

    def __init__(self, linear: Linear, weight: Tensor, cut: Cut | None, group: TensorGroup) -> None:
        super().__init__()
        self.weight = weight.to("meta")
        self._linear, self._cut, self._group = linear, cut, group

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        if self._cut == "split":
            rows = rows.chunk(self._group.size, 1)[self._group.rank].contiguous()
        out = self._linear(rows)
        if self._cut in ("row", "split"):
            out = self._group.all_reduce(out).clone()  # the sum is only valid until the next one
        elif self._cut == "gather":
            out = self._group.all_gather(out).transpose(0, 1).flatten(1)
        return out.unflatten(0, x.shape[:-1])


def rank_part(linear: nn.Linear, name: str, cuts: Cuts, group: TensorGroup) -> tuple[Tensor, Tensor | None]:
    """The rank's weight and bias of a linear layer. A bias that is added to a sum over ranks is rank 0's alone."""
    tensors = []
    for which, tensor in (("weight", linear.weight), ("bias", linear.bias)):
        cut = cuts.tensors.get(f"{name}.{which}")
        whole = None if tensor is None else tensor.detach()
        tensors.append(whole if cut is None or whole is None else cut.of(whole, group.rank, group.size))
    weight, bias = tensors
    assert weight is not None
    return weight, None if cuts.linears.get(name) in ("row", "split") and group.rank else bias


def cut_parameters(model: Any, cuts: Cuts, group: TensorGroup) -> None:
    """Replaces the parameters that are cut and are not of linear layers, and sums what `Cuts.summed` says."""
    for name, cut in cuts.tensors.items():
        module, _, parameter = name.rpartition(".")
        if module not in cuts.linears:
            part = cut.of(model.get_parameter(name).detach(), group.rank, group.size)
            setattr(model.get_submodule(module), parameter, nn.Parameter(part, requires_grad=False))

    def add_up(module: nn.Module, inputs: Any, out: Tensor) -> Tensor:
        return group.all_reduce(out.flatten(0, -2).contiguous()).clone().view(out.shape)

    for name in cuts.summed:
        model.get_submodule(name).register_forward_hook(add_up)


def rank_heads(model: Any, whole: Trace, cuts: Cuts, ranks: int) -> tuple[int, int]:
    """The attention heads and KV heads of one of ``ranks``: a part of them, or all if the plan does not cut attention.

    Cuts ``model``, which is on the meta device, in place. Raises `LoadError` if the parts do not fit together.
    """
    heads = whole.num_heads, whole.num_kv_heads
    if ranks == 1:
        return heads
    group = _NoExchange(ranks)
    cut_parameters(model, cuts, group)
    for name, cut in cuts.linears.items():
        weight, bias = rank_part(model.get_submodule(name), name, cuts, group)
        model.set_submodule(name, RankLinear(PlainLinear(weight, bias), weight, cut, group))
    try:
        part = trace(model)
    except LoadError as error:
        if any(count % ranks for count in heads):
            raise LoadError(f"{heads[0]} attention heads and {heads[1]} KV heads cannot be divided by it") from error
        raise LoadError(f"the parts that transformers' plan makes do not fit together: {error}") from error
    found = part.num_heads, part.num_kv_heads
    if found != heads and found != (heads[0] / ranks, heads[1] / ranks):
        raise LoadError(f"{found[0]} of {heads[0]} attention heads would attend to {found[1]} of {heads[1]} KV heads")
    return found


class _NoExchange:
    """Rank 0 of a `TensorGroup` whose tensors have shapes and no values."""

    rank = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def addends(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x.expand(self.size, *x.shape)

    def broadcast(self, x: Tensor) -> Tensor:
        return x
