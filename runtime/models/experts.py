"""Settings of mixtures of experts, read from config.json."""

from __future__ import annotations

from dataclasses import dataclass

from ...kernels.ops import Routing
from ..errors import LoadError
from .architecture import Experts
from .fields import Fields


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """The sparse layers of one model. Sizes are numbers of channels.

    Args:
        family: names in the checkpoint and how the router scores.
        count: routed experts.
        routing: how tokens choose them.
        size: of a routed expert.
        shared_size: of the expert that all tokens are sent to; 0: there is none.
    """

    family: Experts
    count: int
    routing: Routing
    size: int
    shared_size: int


_SWIGLU_OAI = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}  # the constants of `ops.gate_mul`


def parse_experts(fields: Fields, family: Experts) -> ExpertsConfig:
    """Raises `LoadError` that names the file and the key."""
    count, count_key = _first(fields, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    top_k, top_k_key = _first(fields, "num_experts_per_tok", "moe_k", "moe_topk")
    size, _ = _first(fields, "moe_intermediate_size", "intermediate_size")
    groups, top_groups = fields.count("n_group", 1), fields.count("topk_group", 1)
    if top_k > count:
        raise LoadError(f"{fields.where}: {top_k_key} ({top_k}) is larger than {count_key} ({count})")
    if family.scores == "sparsemixer" and top_k != 2:
        raise LoadError(f"{fields.where}: {top_k_key} must be 2, got {top_k}")
    if (
        count % groups
        or top_groups > groups
        or top_groups * (count // groups) < top_k
        or (groups > 1 and count // groups < 2)
    ):
        raise LoadError(
            f"{fields.where}: n_group {groups} and topk_group {top_groups} do not fit {top_k} of {count} experts"
        )
    for key, value in _SWIGLU_OAI.items() if family.activation == "swigluoai" else ():
        if fields.number(key, value) != value:
            raise LoadError(f"{fields.where}: {key} {fields.get(key)} is not supported; supported: {value}")
    shared = fields.get(family.shared_size) or 0
    if isinstance(shared, bool) or not isinstance(shared, int) or shared < 0:
        raise LoadError(
            f"{fields.where}: {family.shared_size} must be a number of {family.shared_unit}, got {shared!r}"
        )
    return ExpertsConfig(
        family=family,
        count=count,
        routing=Routing(
            top_k=top_k,
            scores=family.scores,
            normalize=family.normalize == "always" or bool(fields.get(family.normalize, False)),
            scale=fields.number("routed_scaling_factor", 1.0),
            groups=groups,
            top_groups=top_groups,
            jitter=fields.number("router_jitter_noise", 0.01) if family.scores == "sparsemixer" else 0.0,
        ),
        size=size,
        shared_size=shared * size if family.shared_unit == "experts" else shared,
    )


def sparse_layers(fields: Fields, count: int) -> list[bool]:
    """Which of ``count`` layers are mixtures of experts; the others have a plain MLP."""
    dense = fields.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(i, int) for i in dense):
        raise LoadError(f"{fields.where}: mlp_only_layers must be a list of layer numbers")
    step = fields.count("decoder_sparse_step", fields.count("moe_layer_interval", 1))
    first = fields.get("first_k_dense_replace", fields.get("moe_layer_start_index", 0))
    last = fields.get("moe_layer_end_index", -1)
    if not isinstance(first, int) or not isinstance(last, int):
        raise LoadError(f"{fields.where}: the first and the last layer with experts must be numbers")
    end = count if last < 0 else last + 1
    return [first <= i < end and (i + 1) % step == 0 and i not in dense for i in range(count)]


def _first(fields: Fields, *keys: str) -> tuple[int, str]:
    """The value of the first of ``keys`` that config.json has, and which that is. A list has one value for each layer:
    all must be the same."""
    key = next((key for key in keys if fields.get(key) is not None), keys[0])
    value = fields.get(key)
    if isinstance(value, list) and value and value.count(value[0]) == len(value):
        return Fields({key: value[0]}, fields.where).count(key), key
    return fields.count(key), key
