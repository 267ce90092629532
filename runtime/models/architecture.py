"""What may differ between families of models: the columns of the table in `registry`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# Queries and keys are normed by head; by head after their rotation; by head with LayerNorm and weights of each head; or
# all heads as one vector.
QKNorm = Literal["none", "head", "head_rotated", "head_layer", "all"]
Switch = str  # "never", "always", or a key of config.json that says
# The norms of a layer: what each one normalizes -> its module in the checkpoint.
Norms = Mapping[Literal["attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm"], str]

PRE_NORMS: Norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


@dataclass(frozen=True, slots=True)
class Experts:
    """How a family's mixtures of experts are named and how they choose. Names are relative to the layer.

    Args:
        router: tensor of the router.
        experts: tensors of gate, up and down; of one name: rows of one tensor. ``{}`` is the expert's number; without
            it, one tensor has all experts.
        shared: modules of the shared expert's gate, up and down; of one name: rows of one tensor.
        shared_size: key of the shared expert's size, in ``shared_unit``.
        shared_gate: module whose sigmoid multiplies the shared expert's output.
        transposed: the tensors of experts are ``[E, inputs, outputs]``.
        alternating: gate and up are the even and the odd outputs of one tensor.
        biases: tensors ``[E, outputs]`` of gate and up, and of down.
        activation: of the experts, where it is not config.json's.
        router_bias: tensor added to the router's logits.
        bias: tensor added to the scores for the choice; ``bias_shape``: its dimensions before that of the experts.
        scores: of the logits. sparsemixer: see `ops._sparsemixer`.
        float32_router: the router is multiplied in float32.
        normalize: the weights of a token's experts are divided by their sum.
    """

    router: str = "mlp.gate.weight"
    experts: tuple[str, str, str] = (
        "mlp.experts.{}.gate_proj.weight",
        "mlp.experts.{}.up_proj.weight",
        "mlp.experts.{}.down_proj.weight",
    )
    shared: tuple[str, str, str] = (
        "mlp.shared_experts.gate_proj",
        "mlp.shared_experts.up_proj",
        "mlp.shared_experts.down_proj",
    )
    shared_size: str = ""
    shared_unit: Literal["experts", "channels"] = "experts"
    shared_gate: str = ""
    transposed: bool = False
    alternating: bool = False
    biases: tuple[str, str] | None = None
    activation: str = ""
    router_bias: str = ""
    bias: str = ""
    bias_shape: tuple[int, ...] = ()
    scores: Literal["softmax", "sigmoid", "sparsemixer"] = "softmax"
    float32_router: bool = False
    normalize: Switch = "norm_topk_prob"


@dataclass(frozen=True, slots=True)
class Architecture:
    """Feature switches of one family. ``defaults`` are the values its config.json may leave out."""

    model_type: str  # as config.json names the family
    qkv_bias: Switch = "attention_bias"
    o_bias: Switch = "attention_bias"
    mlp_bias: Switch = "never"
    norms: Norms = field(default_factory=lambda: PRE_NORMS)
    qk_norm: QKNorm = "none"
    qk_norm_modules: tuple[str, str] = ("q_norm", "k_norm")  # ``{}``: the head's number
    qk_norm_if: Switch = "always"
    gemma: bool = False  # (1 + w) norms, scaled embeddings, its own query scale and name of the activation
    norm_kind: Literal["rms", "layer"] = "rms"
    norm_bias: bool = False
    norm_weight: bool = True
    norm_eps: str = "rms_norm_eps"  # config.json's key
    length: str = "max_position_embeddings"  # config.json's key of the longest context, where it is there
    parallel: Switch = "never"  # attention and MLP get the same input and are added together
    qkv: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj")  # modules; of one name: rows of one tensor
    # Modules of ``mlp``, or with a dot of the layer; two: without a gate; of one name: rows of one tensor.
    mlp: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    mlp_size: str = "intermediate_size"  # config.json's key
    interleaved_rope: bool = False  # channels 2i and 2i + 1 are rotated together, rather than i and i + dim / 2
    scaled_rope: Literal["all", "full"] = "all"  # full: rope_scaling leaves sliding layers alone
    # Layers without rope: no_rope_layers, full ones beside sliding ones, or all unless position_embedding_type is rope.
    unrotated: Literal["none", "listed", "full", "unless_rope"] = "none"
    # Which layers slide when layer_types is absent.
    windows: Literal["none", "all", "qwen", "qwen_even", "alternate"] = "none"
    text_config: bool = False  # the language model's settings are nested under "text_config"
    experts: Experts | None = None  # of layers with a mixture of experts
    lm_head_bias: Switch = "never"
    sinks: bool = False  # every query head has a learned logit that joins the softmax's denominator
    defaults: Mapping[str, Any] = field(default_factory=dict)
