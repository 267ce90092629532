"""Mixtures of experts: their settings, the limit to groups, and experts in FP8 and int8."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from branchwise.kernels import ops
from branchwise.kernels.experts import LoopedExperts
from branchwise.kernels.linear import Int8Linear
from branchwise.runtime.errors import LoadError
from branchwise.runtime.models.config import load_config, parse_config
from branchwise.runtime.models.decoder import Decoder
from branchwise.runtime.models.linear import weight_bytes
from branchwise.runtime.models.loader import load_weights
from branchwise.runtime.models.moe import Router
from branchwise.runtime.models.quantization import ONLINE_FP8
from branchwise.runtime.models.weights import weight_specs

CPU = torch.device("cpu")


@pytest.fixture
def raw(checkpoint: Callable[[str], Path]) -> Callable[[str], dict[str, Any]]:
    """The config.json of a family's checkpoint."""
    return lambda family: json.loads((checkpoint(family) / "config.json").read_text())


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        ("mixtral", {"num_local_experts": None, "num_experts": None}, "num_experts is missing"),
        ("mixtral", {"num_experts_per_tok": 9}, r"num_experts_per_tok \(9\) is larger than num_\w+ \(6\)"),
        ("mixtral", {"num_experts_per_tok": 0}, "num_experts_per_tok must be a positive integer"),
        ("phimoe", {"num_experts_per_tok": 3}, "num_experts_per_tok must be 2, got 3"),
        ("glm4-moe", {"n_group": 3}, "n_group 3 and topk_group 2 do not fit 3 of 8 experts"),
        ("glm4-moe", {"n_group": 2, "topk_group": 3}, "n_group 2 and topk_group 3 do not fit"),
        ("glm4-moe", {"n_group": 8, "topk_group": 4}, "n_group 8 and topk_group 4 do not fit"),
        ("glm4-moe", {"n_shared_experts": -1}, "n_shared_experts must be a number of experts"),
        ("glm4-moe", {"first_k_dense_replace": "1"}, "the first and the last layer with experts must be numbers"),
        ("qwen3-moe", {"mlp_only_layers": [0.5]}, "mlp_only_layers must be a list of layer numbers"),
        ("olmoe", {"clip_qkv": -8.0}, "clip_qkv must be a positive number"),
    ],
)
def test_settings_that_cannot_be(
    family: str, values: dict[str, Any], message: str, raw: Callable[[str], dict[str, Any]]
) -> None:
    with pytest.raises(LoadError, match=message):
        parse_config({**raw(family), **values}, {})


@pytest.mark.parametrize(
    ("family", "values", "sparse"),
    [
        ("qwen3-moe", {"decoder_sparse_step": 2}, [False, True, False]),
        ("qwen3-moe", {"mlp_only_layers": [0, 2]}, [False, True, False]),
        ("glm4-moe", {"first_k_dense_replace": 2}, [False, False, True]),
        ("ernie-moe", {"moe_layer_start_index": 0, "moe_layer_end_index": 1}, [True, True, False]),
        ("ernie-moe", {"moe_layer_end_index": -1}, [False, True, True]),
    ],
)
def test_which_layers_have_experts(
    family: str, values: dict[str, Any], sparse: list[bool], raw: Callable[[str], dict[str, Any]]
) -> None:
    assert [layer.sparse for layer in parse_config({**raw(family), **values}, {}).layers] == sparse


def test_only_experts_of_the_best_groups_are_chosen(raw: Callable[[str], dict[str, Any]]) -> None:
    config = parse_config(raw("glm4-moe"), {}).experts  # 3 of 8 experts, in 4 groups of which 2 are chosen
    assert config is not None
    # Scores are sigmoids of these: expert 7 is the second best of all, but its group has nothing else.
    logits = torch.tensor([[3.0, 0.0, 1.0, 1.5, -9.0, -9.0, -9.0, 2.0]])
    weights, ids = Router(config, ops, logits.T.contiguous(), None)(torch.ones(1, 1))
    assert sorted(ids[0].tolist()) == [0, 2, 3]
    assert weights.sum() == pytest.approx(config.routing.scale)
    # The bias decides which are chosen, and not how much they weigh.
    biased, ids = Router(config, ops, logits.T.contiguous(), torch.tensor([0, 0, 0, 0, 9.0, 9.0, 0, 0]))(
        torch.ones(1, 1)
    )
    assert sorted(ids[0].tolist()) == [3, 4, 5]
    expected = torch.tensor([1.5, -9.0, -9.0]).sigmoid()
    torch.testing.assert_close(biased.sort(descending=True).values[0], expected / expected.sum() * config.routing.scale)


def test_experts_on_a_cpu_may_be_int8(checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint("qwen3-moe")
    config = load_config(folder)
    decoder = Decoder(config, load_weights(folder, config, torch.float32, CPU), ops, int8=True)
    experts = decoder._layers[0].mlp._experts  # type: ignore[attr-defined]
    assert isinstance(experts, LoopedExperts)
    assert all(isinstance(one, Int8Linear) for pair in experts._pairs for one in pair)


def test_experts_are_quantized_while_loading(checkpoint: Callable[[str], Path]) -> None:
    """A router decides by small differences: it stays as it is."""
    from dataclasses import replace

    config = replace(load_config(checkpoint("glm4-moe")), quantization=ONLINE_FP8)
    kinds = {spec.name: spec.kind for spec in weight_specs(config)}
    assert kinds["layers.1.router"] == "weight"
    assert kinds["layers.1.experts.gate_up"] == kinds["layers.1.qkv"] == kinds["layers.1.shared.gate_up"] == "fp8"


def test_experts_are_counted_as_they_are_stored(checkpoint: Callable[[str], Path]) -> None:
    """A GPU keeps experts in FP8; a CPU dequantizes them."""
    from dataclasses import replace

    from branchwise.runtime.models.quantization import Quantization

    config, gpu = load_config(checkpoint("qwen3-moe")), torch.device("cuda")
    stored = replace(config, quantization=Quantization("channel", "token", "weight_scale", ignored=("re:.*self_attn",)))
    experts = [spec for spec in weight_specs(stored) if ".experts." in spec.name]
    values = sum(math.prod(spec.shape) for spec in experts if spec.kind == "fp8")
    scales = sum(spec.shape[0] for spec in experts if spec.kind == "fp8")
    plain = weight_bytes(config, torch.bfloat16, gpu)
    assert weight_bytes(stored, torch.bfloat16, gpu) == plain - values + 4 * scales
    assert weight_bytes(stored, torch.bfloat16, CPU) == weight_bytes(config, torch.bfloat16, CPU)
