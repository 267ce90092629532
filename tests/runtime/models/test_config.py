"""config.json as transformers 4 and 5 write it, against transformers' own reading; and what cannot be read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from branchwise.runtime.errors import LoadError
from branchwise.runtime.models.config import ModelConfig, load_config, parse_config
from branchwise.runtime.models.registry import MODEL_TYPES
from branchwise.runtime.models.rope import RopeConfig, RopeTable

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
}
# google/gemma-3-4b-it's: nearly everything is left to the family's defaults.
GEMMA3_NESTED = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "eos_token_id": [1, 106],
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {"hidden_size": 1152},
}

QWEN_WINDOW = {"sliding_window": 30, "use_sliding_window": True, "max_window_layers": 3}


def parse(changes: dict[str, Any] | None = None, base: dict[str, Any] = LLAMA, **generation: Any) -> ModelConfig:
    values = {key: value for key, value in {**base, **(changes or {})}.items() if value != "absent"}
    return parse_config(values, generation)


def test_what_a_small_config_leaves_out() -> None:
    config = parse()
    assert (config.num_kv_heads, config.head_dim, config.norm_eps, config.dtype) == (4, 16, 1e-6, "auto")
    assert config.ropes == (RopeConfig(theta=10000.0, dim=16),)
    assert (config.eos_ids, config.tied_embeddings, config.qkv_bias, config.activation) == ((), False, False, "silu")


def test_gemma3_nested() -> None:
    config = parse(base=GEMMA3_NESTED)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (34, 8, 4, 256)
    assert [i for i, layer in enumerate(config.layers) if layer.window is None] == [5, 11, 17, 23, 29]
    assert {layer.window for layer in config.layers} == {1024, None}
    assert config.layers[0].rope == RopeConfig(theta=10_000.0, dim=256)
    assert config.layers[5].rope == RopeConfig(theta=1_000_000.0, dim=256, kind="linear", factor=8.0)
    assert (config.vocab_size, config.max_model_len, config.dtype) == (262208, 131072, "bfloat16")
    assert config.eos_ids == (1, 106)
    assert config.tied_embeddings
    assert config.qk_norm == "head"
    assert config.attention_scale == 256**-0.5


@pytest.mark.parametrize(
    ("architecture", "changes", "windows"),
    [
        ("MistralForCausalLM", {"sliding_window": 30}, [30] * 4),
        ("MistralForCausalLM", {"sliding_window": None}, [None] * 4),
        ("Qwen2ForCausalLM", {"sliding_window": 30, "max_window_layers": 1}, [None] * 4),
        ("Qwen3ForCausalLM", QWEN_WINDOW, [None] * 3 + [30]),
        ("Gemma2ForCausalLM", {"sliding_window": 30}, [30, None] * 2),
        ("Gemma3ForCausalLM", {"sliding_window": 30, "sliding_window_pattern": 3}, [30, 30, None, 30]),
        ("LlamaForCausalLM", {"sliding_window": 30}, [None] * 4),
    ],
)  # fmt: skip
def test_windows(architecture: str, changes: dict[str, Any], windows: list[int | None]) -> None:
    config = parse({"architectures": [architecture], "num_hidden_layers": 4, **changes})
    assert [layer.window for layer in config.layers] == windows


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "attention_factor": 1.5},
        {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.3, "beta_fast": 16, "beta_slow": 2},
        {"rope_type": "yarn", "factor": 4.0, "truncate": False},
    ],
)
@pytest.mark.parametrize("style", [4, 5])
def test_rope_tables_equal_transformers(scaling: dict[str, Any], style: int) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theta = {"rope_theta": 50_000.0}
    changes = {"rope_scaling": scaling, **theta} if style == 4 else {"rope_parameters": scaling | theta}
    config = parse(changes)
    (rope,) = config.ropes
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=64, num_attention_heads=4, max_position_embeddings=2048, rope_parameters=scaling | theta
        )
    )
    positions = torch.arange(2048)
    cos, sin = theirs(torch.zeros(1), positions[None])
    table = RopeTable(rope, torch.device("cpu"))
    for length in (10, 2000, 2048):  # grown in between
        table.reserve(length)
    got = table.lookup(positions)
    torch.testing.assert_close(got[0], cos[0, :, :8], atol=1e-5, rtol=0)
    torch.testing.assert_close(got[1], sin[0, :, :8], atol=1e-5, rtol=0)


def test_yarn_stretches_the_context() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    assert parse({"rope_scaling": scaling}).max_model_len == 8192


def test_end_tokens_are_those_of_every_file() -> None:
    assert parse({"eos_token_id": 5}).eos_ids == (5,)
    assert parse({"eos_token_id": [5, 6, 5]}).eos_ids == (5, 6)
    assert parse({"eos_token_id": 5}, eos_token_id=[7, 8]).eos_ids == (7, 8, 5)
    assert parse({"eos_token_id": 5}, eos_token_id=None).eos_ids == (5,)
    assert parse({"eos_token_id": None}, eos_token_id=5).eos_ids == (5,)
    assert parse({"eos_token_id": [5, 100, -1]}).eos_ids == (5,)  # ids outside the vocabulary
    assert parse_config({**LLAMA, "eos_token_id": 5}, {}, tokenizer_eos=9).eos_ids == (5, 9)
    assert parse_config(LLAMA, {}, tokenizer_eos=0).eos_ids == (0,)


def test_end_tokens_of_a_nested_config() -> None:
    """Written in full, Gemma 3's text_config says 1, and what stands outside it says that 106 ends a turn too."""
    nested = {**GEMMA3_NESTED, "text_config": {**GEMMA3_NESTED["text_config"], "eos_token_id": 1}}
    assert parse(base=nested).eos_ids == (1, 106)
    assert parse({"eos_token_id": "absent"}, GEMMA3_NESTED).eos_ids == (1,)  # the family's default


def test_a_faulty_end_token_names_its_file(tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        (tmp_path / "config.json").write_text(json.dumps(LLAMA))
        values = LLAMA if name == "config.json" else {}
        (tmp_path / name).write_text(json.dumps({**values, "eos_token_id": "</s>"}))
        with pytest.raises(LoadError, match=rf"{tmp_path}/{name}: eos_token_id must hold integers, got '</s>'"):
            load_config(tmp_path)


@pytest.mark.parametrize("declared", ["vocabulary", "added tokens", "config", "map"])
def test_the_tokenizers_end_token_counts(declared: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "eos_token_id": 0}))
    token: dict[str, Any] = {"id": 7, "content": "<end>"}
    tokenizer = {"added_tokens": [] if declared == "vocabulary" else [token], "model": {"vocab": {"a": 1, "<end>": 7}}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    name = "special_tokens_map.json" if declared == "map" else "tokenizer_config.json"
    (tmp_path / name).write_text(json.dumps({"eos_token": {"content": "<end>"} if declared == "config" else "<end>"}))
    assert load_config(tmp_path).eos_ids == (0, 7)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("architectures", [None, [], ["SomeModel"], "absent"])
def test_the_model_type_says_what_architectures_leaves_out(model_type: str, architectures: Any) -> None:
    experts: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
    if model_type == "granitemoehybrid":  # ours where all layers have attention and one MLP
        layers = ["attention"] * LLAMA["num_hidden_layers"]
        experts = {"num_local_experts": 0, "shared_intermediate_size": 128, "layer_types": layers}
    changes = {"architectures": architectures, "model_type": model_type, **experts}
    assert parse(changes).architecture == MODEL_TYPES[model_type]


def test_a_context_length_that_is_left_out_is_the_familys() -> None:
    import transformers

    for family, theirs in (("Llama", 2048), ("Mistral", 131072), ("Qwen2", 32768), ("Qwen3", 32768)):
        assert getattr(transformers, f"{family}Config")().max_position_embeddings == theirs
        changes = {"architectures": [f"{family}ForCausalLM"], "max_position_embeddings": "absent"}
        assert parse(changes).max_model_len == theirs


def test_dynamic_rope_is_plain_within_the_context() -> None:
    config = parse({"rope_scaling": {"type": "dynamic", "factor": 4.0}})
    assert config.ropes == (RopeConfig(theta=10000.0, dim=16),)
    assert config.max_model_len == 2048
    (fixed,) = parse({"rope_scaling": {"type": "dynamic", "alpha": 1000.0}}).ropes
    assert fixed.theta == pytest.approx(10000.0 * 1000.0 ** (16 / 14))


@pytest.mark.parametrize(
    "changes",
    [
        {"quantization_config": {"quant_method": "fp8"}},
        {"compression_config": {"format": "float-quantized"}},
        {"quantization": {"group_size": 64, "bits": 4}},
        {"quant_method": "awq"},
        {"text_config": {"quantization_config": {"bits": 4}}},
    ],
)
def test_quantized_configs_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(LoadError, match=r"quantized checkpoints.* are not supported") as caught:
        parse(changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["quantize_config.json", "quant_config.json"])
def test_quantization_files_are_refused(file: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "quantization_config": {}}))
    load_config(tmp_path)
    (tmp_path / file).write_text("{}")
    with pytest.raises(LoadError, match=f"{file}: quantized checkpoints are not supported"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architectures": "absent"}, "no architectures"),
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported natively"),
        ({"hidden_size": "absent"}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size must be a positive integer, got '64'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, got 0"),
        ({"vocab_size": True}, "vocab_size must be a positive integer, got True"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) is not a multiple of num_key_value_heads \(3\)"),
        ({"head_dim": 7}, "head_dim must be even, got 7"),
        ({"hidden_act": "relu6"}, "activation 'relu6' is not supported"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps must be a positive number"),
        ({"rope_scaling": {"rope_type": "other"}}, "rope_type 'other' is not supported; supported: def"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope factor must be a positive number, got None"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "4"}}, "rope factor must be a positive number, got '4'"),
        ({"rope_parameters": [1]}, "rope_parameters must be an object, got list"),
        ({"torch_dtype": "int8"}, "dtype int8 is not supported"),
        ({"layer_types": ["full_attention"]}, "layer_types must name"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id must hold integers, got '</s>'"),
        ({"bos_token_id": "<s>"}, "bos_token_id must be an integer, got '<s>'"),
        ({"is_causal": False}, "its attention is not causal"),
        ({"use_bidirectional_attention": True}, "its attention is not causal"),
        ({"layer_types": ["mamba", "attention"]}, "layers of mamba are not supported natively"),
        ({"num_local_experts": 8}, "LlamaForCausalLM with a mixture of experts is not supported natively"),
    ],
)  # fmt: skip
def test_configs_that_cannot_be(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(LoadError, match=says) as caught:
        parse(changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[]", "\ud800", "null"])
def test_config_that_is_no_json_object(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(LoadError, match=r"config\.json"):
        load_config(tmp_path)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match="is not a folder"):
        load_config(tmp_path / "nowhere")
    with pytest.raises(LoadError, match=r"has no config\.json"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 3}))
    assert load_config(tmp_path).eos_ids == (3,)


def test_rope_reads_half_rotated_heads() -> None:
    (rope,) = parse({"partial_rotary_factor": 0.5}).ropes
    assert rope.dim == 8
    np.testing.assert_allclose(rope.inverse_frequencies(), 10000.0 ** -(np.arange(0, 8, 2) / 8), rtol=1e-6)


# -- families, as their makers write config.json (transformers 4) ------------------------------------------------------


def small(**changes: Any) -> dict[str, Any]:
    return {"num_hidden_layers": 4, "num_key_value_heads": 2, **changes}


def test_mistral_small_3_inside_a_multimodal_config() -> None:
    text = {key: value for key, value in LLAMA.items() if key != "architectures"}
    text |= {"model_type": "mistral", "sliding_window": None, "head_dim": 32, "rope_theta": 1e9}
    config = parse(base={"architectures": ["Mistral3ForConditionalGeneration"], "text_config": text})
    assert (config.head_dim, config.ropes[0].theta, config.layers[0].window) == (32, 1e9, None)
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "llama_4_scaling_beta": 0.1}
    with pytest.raises(LoadError, match="rope_parameters: original_max_position_embeddings is missing"):
        parse(base={"architectures": ["Mistral3ForConditionalGeneration"], "text_config": text})
    text["rope_parameters"]["original_max_position_embeddings"] = 100  # Ministral 3: queries grow with their position
    scaling = parse(base={"architectures": ["Mistral3ForConditionalGeneration"], "text_config": text}).query_scaling
    assert scaling is not None
    scales = scaling(torch.tensor([0, 99, 100, 299]))
    assert scales.tolist() == pytest.approx([1, 1, 1 + 0.1 * math.log(2), 1 + 0.1 * math.log(3)])


@pytest.mark.parametrize("kind", ["longrope", "su"])
def test_phi_4_mini(kind: str) -> None:
    scaling = {"type": kind, "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
    changes = {
        "architectures": ["Phi3ForCausalLM"],
        "partial_rotary_factor": 0.75,
        "rope_scaling": scaling,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "sliding_window": 262144,
    }
    config = parse(changes)
    (rope,) = config.ropes
    assert (rope.dim, config.max_model_len) == (12, 4096)
    assert rope.attention_factor == pytest.approx((1 + np.log(32) / np.log(4096)) ** 0.5)
    assert config.for_length(None) == config.for_length(4096) == config and not config.long_rope
    stretched = config.for_length(4097)
    assert stretched.max_model_len == 131072 and stretched.long_rope
    (longer,) = stretched.ropes
    assert torch.equal(longer.inverse_frequencies(), rope.inverse_frequencies() / 2)
    for key in ("short_factor", "long_factor"):
        with pytest.raises(LoadError, match=f"rope {key} must hold 6 positive numbers"):
            parse({**changes, "rope_scaling": {**scaling, key: [1.0]}})


def test_smollm3_layers_without_rope() -> None:
    changes = small(architectures=["SmolLM3ForCausalLM"], use_sliding_window=False)
    assert [layer.rope.kind for layer in parse(changes).layers] == ["default"] * 3 + ["none"]
    assert parse({**changes, "no_rope_layers": [0, 1, 1, 1]}).layers[0].rope.kind == "none"
    with pytest.raises(LoadError, match="no_rope_layers must hold 0 or 1 for each of 4 layers"):
        parse({**changes, "no_rope_layers": [1]})


def test_olmo3_scales_the_rope_of_full_layers_alone() -> None:
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192, "attention_factor": 1.2}
    changes = small(architectures=["Olmo3ForCausalLM"], rope_theta=500000, rope_scaling=yarn, sliding_window=64)
    config = parse(changes)
    assert [(layer.window, layer.rope.kind) for layer in config.layers] == [(64, "default")] * 3 + [(None, "yarn")]
    assert {layer.rope.theta for layer in config.layers} == {500_000.0}


def test_exaone4_full_layers_have_no_rope_beside_sliding_ones() -> None:
    types = ["sliding_attention"] * 3 + ["full_attention"]
    changes = small(architectures=["Exaone4ForCausalLM"], sliding_window_pattern="LLLG", layer_types=types)
    config = parse({**changes, "sliding_window": 64})
    assert [(layer.window, layer.rope.kind) for layer in config.layers] == [(64, "default")] * 3 + [(None, "none")]
    plain = parse({**changes, "sliding_window": None, "layer_types": ["full_attention"] * 4})
    assert {(layer.window, layer.rope.kind) for layer in plain.layers} == {(None, "default")}


def test_glm_rotates_half_of_each_head() -> None:
    config = parse({"architectures": ["Glm4ForCausalLM"], "head_dim": "absent"})
    assert (config.head_dim, config.ropes[0].dim, config.qkv_bias, config.sandwich_norms) == (128, 64, True, True)


def test_an_activation_of_another_kind_of_mlp() -> None:
    for architecture, activation in (("ArceeForCausalLM", "silu"), ("LlamaForCausalLM", "relu2")):
        with pytest.raises(LoadError, match=f"activation '{activation}' is not supported for {architecture}"):
            parse({"architectures": [architecture], "hidden_act": activation})
