"""The supported dense families, as data: how each differs from Llama, and the defaults of its config.json."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .architecture import PRE_NORMS, Architecture, Norms

_POST_NORMS: Norms = {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_GEMMA_NORMS: Norms = {**_POST_NORMS, "attention_norm": "input_layernorm", "mlp_norm": "pre_feedforward_layernorm"}
_GLM4_NORMS: Norms = {
    **PRE_NORMS,
    "attention_post_norm": "post_self_attn_layernorm",
    "mlp_post_norm": "post_mlp_layernorm",
}
_FUSED_MLP = ("gate_up_proj", "gate_up_proj", "down_proj")
_GEMMA = Architecture(
    "gemma",
    gemma=True,
    defaults={
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "eos_token_id": 1,
    },
)
_GEMMA2 = replace(
    _GEMMA,
    model_type="gemma2",
    norms=_GEMMA_NORMS,
    windows="alternate",
    defaults={
        **_GEMMA.defaults,
        "vocab_size": 256000,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 2,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "bos_token_id": 2,
    },
)
_GEMMA3 = replace(
    _GEMMA2,
    model_type="gemma3_text",
    qk_norm="head",
    defaults={
        **_GEMMA2.defaults,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "sliding_window_pattern": 6,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
)
QWEN = {"max_window_layers": 28, "max_position_embeddings": 32768}
_GLM = {
    "head_dim": 128,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-07,
}
_COHERE = Architecture(
    "cohere",
    length="model_max_length",
    norm_kind="layer",
    norm_eps="layer_norm_eps",
    parallel="always",
    interleaved_rope=True,
    defaults={
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.0625,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
)
GRANITE = {"max_position_embeddings": 2048, "attention_multiplier": 1.0}
HUNYUAN: dict[str, Any] = {
    "qk_norm": "head_rotated",
    "qk_norm_modules": ("query_layernorm", "key_layernorm"),
    "defaults": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
}
_MISTRAL = {"sliding_window": 4096, "max_position_embeddings": 131072}

_QWEN2 = Architecture("qwen2", qkv_bias="always", o_bias="never", windows="qwen", defaults=QWEN)
_QWEN3 = Architecture("qwen3", qk_norm="head", windows="qwen", defaults=QWEN | {"head_dim": 128})

DENSE: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture(
        "llama",
        mlp_bias="mlp_bias",
        defaults={"max_position_embeddings": 2048},
    ),
    "MistralForCausalLM": Architecture("mistral", windows="all", defaults=_MISTRAL),
    # The multimodal checkpoints of Mistral Small 3, text only.
    "Mistral3ForConditionalGeneration": Architecture("mistral3", windows="all", text_config=True, defaults=_MISTRAL),
    "Ministral3ForCausalLM": Architecture(
        "ministral3",
        windows="all",
        defaults={"head_dim": 128, "max_position_embeddings": 262144, "rms_norm_eps": 1e-5},
    ),
    "HunYuanDenseV1ForCausalLM": Architecture("hunyuan_v1_dense", **HUNYUAN),
    "Qwen2ForCausalLM": _QWEN2,
    # Vision models, text only. Those of Qwen 2 have their settings outside of text_config too.
    "Qwen2VLForConditionalGeneration": replace(_QWEN2, model_type="qwen2_vl", text_config=True),
    "Qwen2_5_VLForConditionalGeneration": replace(_QWEN2, model_type="qwen2_5_vl", text_config=True),
    "Qwen3ForCausalLM": _QWEN3,
    "Qwen3VLForConditionalGeneration": replace(_QWEN3, model_type="qwen3_vl", text_config=True),
    "GemmaForCausalLM": _GEMMA,
    "Gemma2ForCausalLM": _GEMMA2,
    "Gemma3ForCausalLM": _GEMMA3,
    # The multimodal checkpoints of Gemma 3, text only.
    "Gemma3ForConditionalGeneration": replace(_GEMMA3, model_type="gemma3", text_config=True),
    "Phi3ForCausalLM": Architecture(  # Phi 3 and 4
        "phi3",
        qkv=("qkv_proj", "qkv_proj", "qkv_proj"),
        mlp=_FUSED_MLP,
        windows="all",
        defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    ),
    "SmolLM3ForCausalLM": Architecture(
        "smollm3",
        mlp_bias="mlp_bias",
        unrotated="listed",
        windows="qwen",
        defaults={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 2_000_000.0,
            "tie_word_embeddings": True,
            "no_rope_layer_interval": 4,
            "max_window_layers": 1 << 20,
        },
    ),
    "SeedOssForCausalLM": Architecture(
        "seed_oss",
        o_bias="attention_out_bias",
        mlp_bias="mlp_bias",
        defaults={"head_dim": 128, "attention_bias": True, "max_position_embeddings": 524288},
    ),
    "GraniteForCausalLM": Architecture(
        "granite",
        mlp_bias="mlp_bias",
        defaults=GRANITE,
    ),
    "GraniteMoeHybridForCausalLM": Architecture(  # Granite 4, where all layers have attention and one MLP
        "granitemoehybrid",
        mlp=("shared_mlp.input_linear", "shared_mlp.input_linear", "shared_mlp.output_linear"),
        mlp_size="shared_intermediate_size",
        unrotated="unless_rope",
        defaults=GRANITE | {"layer_types": ["mamba"], "num_local_experts": 8},
    ),
    "OlmoForCausalLM": Architecture(
        "olmo",
        norm_kind="layer",
        norm_weight=False,
        norm_eps="layer_norm_eps",
        defaults={"max_position_embeddings": 2048, "layer_norm_eps": 1e-5},
    ),
    "Olmo2ForCausalLM": Architecture(
        "olmo2",
        norms=_POST_NORMS,
        qk_norm="all",
        defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    ),
    "Olmo3ForCausalLM": Architecture(
        "olmo3",
        norms=_POST_NORMS,
        qk_norm="all",
        scaled_rope="full",
        windows="alternate",
        defaults={
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
        },
    ),
    "Exaone4ForCausalLM": Architecture(
        "exaone4",
        norms=_POST_NORMS,
        qk_norm="head",
        unrotated="full",
        windows="alternate",
        defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "sliding_window_pattern": 4},
    ),
    "Ernie4_5ForCausalLM": Architecture(
        "ernie4_5",
        qkv_bias="use_bias",
        o_bias="use_bias",
        mlp_bias="use_bias",
        interleaved_rope=True,
        defaults={
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
        },
    ),
    "GlmForCausalLM": Architecture("glm", o_bias="never", mlp=_FUSED_MLP, interleaved_rope=True, defaults=_GLM),
    "Glm4ForCausalLM": Architecture(
        "glm4",
        o_bias="never",
        norms=_GLM4_NORMS,
        mlp=_FUSED_MLP,
        interleaved_rope=True,
        defaults=_GLM,
    ),
    "ArceeForCausalLM": Architecture(
        "arcee",
        mlp_bias="mlp_bias",
        mlp=("up_proj", "down_proj"),
        defaults={"hidden_act": "relu2", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    ),
    "ApertusForCausalLM": Architecture(
        "apertus",
        norms={"attention_norm": "attention_layernorm", "mlp_norm": "feedforward_layernorm"},
        qk_norm="head",
        mlp=("up_proj", "down_proj"),
        defaults={"hidden_act": "xielu", "max_position_embeddings": 65536, "rms_norm_eps": 1e-5},
    ),
    "Starcoder2ForCausalLM": Architecture(
        "starcoder2",
        qkv_bias="use_bias",
        o_bias="use_bias",
        mlp_bias="use_bias",
        norm_kind="layer",
        norm_bias=True,
        norm_eps="norm_epsilon",
        mlp=("c_fc", "c_proj"),
        windows="all",
        defaults={
            "hidden_act": "gelu_pytorch_tanh",
            "max_position_embeddings": 4096,
            "norm_epsilon": 1e-5,
            "use_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "StableLmForCausalLM": Architecture(
        "stablelm",
        qkv_bias="use_qkv_bias",
        norm_kind="layer",
        norm_bias=True,
        norm_eps="layer_norm_eps",
        parallel="use_parallel_residual",
        qk_norm="head_layer",
        qk_norm_if="qk_layernorm",
        qk_norm_modules=("q_layernorm.norms.{}", "k_layernorm.norms.{}"),
        defaults={"max_position_embeddings": 4096, "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25},
    ),
    "CohereForCausalLM": replace(_COHERE, qk_norm="head_layer", qk_norm_if="use_qk_norm"),
    "Cohere2ForCausalLM": replace(
        _COHERE,
        model_type="cohere2",
        unrotated="full",
        windows="alternate",
        defaults={**_COHERE.defaults, "sliding_window": 4096, "sliding_window_pattern": 4},
    ),
}
