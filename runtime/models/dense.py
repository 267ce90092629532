"""The supported dense families, as data: how each differs from Llama, and the defaults of its config.json."""

from __future__ import annotations

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
_GEMMA = {
    "vocab_size": 256000,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_GEMMA2 = _GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window_pattern": 2}
_GEMMA3 = _GEMMA | {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "sliding_window_pattern": 6,
}
QWEN = {"max_window_layers": 28, "max_position_embeddings": 32768}
_GLM = {
    "head_dim": 128,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-07,
}
_COHERE = {
    "layer_norm_eps": 1e-5,
    "logit_scale": 0.0625,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
GRANITE = {"max_position_embeddings": 2048, "attention_multiplier": 1.0}
HUNYUAN: dict[str, Any] = {
    "qkv_bias": "attention_bias",
    "o_bias": "attention_bias",
    "qk_norm": "head_rotated",
    "qk_norm_modules": ("query_layernorm", "key_layernorm"),
    "defaults": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
}
_MISTRAL = {"sliding_window": 4096, "max_position_embeddings": 131072}

DENSE: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture(
        "llama",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
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
    "Qwen2ForCausalLM": Architecture("qwen2", qkv_bias="always", windows="qwen", defaults=QWEN),
    "Qwen3ForCausalLM": Architecture(
        "qwen3",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm="head",
        windows="qwen",
        defaults=QWEN | {"head_dim": 128},
    ),
    "GemmaForCausalLM": Architecture(
        "gemma",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        gemma=True,
        defaults={
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            "eos_token_id": 1,
        },
    ),
    "Gemma2ForCausalLM": Architecture(
        "gemma2",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        norms=_GEMMA_NORMS,
        gemma=True,
        windows="alternate",
        defaults=_GEMMA2,
    ),
    "Gemma3ForCausalLM": Architecture(
        "gemma3_text",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        norms=_GEMMA_NORMS,
        qk_norm="head",
        gemma=True,
        windows="alternate",
        defaults=_GEMMA3,
    ),
    # The multimodal checkpoints of Gemma 3, text only.
    "Gemma3ForConditionalGeneration": Architecture(
        "gemma3",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        norms=_GEMMA_NORMS,
        qk_norm="head",
        gemma=True,
        windows="alternate",
        text_config=True,
        defaults=_GEMMA3,
    ),
    "Phi3ForCausalLM": Architecture(  # Phi 3 and 4
        "phi3",
        qkv=("qkv_proj", "qkv_proj", "qkv_proj"),
        mlp=_FUSED_MLP,
        windows="all",
        defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    ),
    "SmolLM3ForCausalLM": Architecture(
        "smollm3",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
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
        qkv_bias="attention_bias",
        o_bias="attention_out_bias",
        mlp_bias="mlp_bias",
        defaults={"head_dim": 128, "attention_bias": True, "max_position_embeddings": 524288},
    ),
    "GraniteForCausalLM": Architecture(
        "granite",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
        defaults=GRANITE,
    ),
    "OlmoForCausalLM": Architecture(
        "olmo",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        norm_kind="layer",
        norm_weight=False,
        norm_eps="layer_norm_eps",
        defaults={"max_position_embeddings": 2048, "layer_norm_eps": 1e-5},
    ),
    "Olmo2ForCausalLM": Architecture(
        "olmo2",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        norms=_POST_NORMS,
        qk_norm="all",
        defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    ),
    "Olmo3ForCausalLM": Architecture(
        "olmo3",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
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
    "GlmForCausalLM": Architecture(
        "glm", qkv_bias="attention_bias", mlp=_FUSED_MLP, interleaved_rope=True, defaults=_GLM
    ),
    "Glm4ForCausalLM": Architecture(
        "glm4",
        qkv_bias="attention_bias",
        norms=_GLM4_NORMS,
        mlp=_FUSED_MLP,
        interleaved_rope=True,
        defaults=_GLM,
    ),
    "ArceeForCausalLM": Architecture(
        "arcee",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
        mlp=("up_proj", "down_proj"),
        defaults={"hidden_act": "relu2", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    ),
    "ApertusForCausalLM": Architecture(
        "apertus",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
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
    "CohereForCausalLM": Architecture(
        "cohere",
        length="model_max_length",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        norm_kind="layer",
        norm_eps="layer_norm_eps",
        parallel="always",
        interleaved_rope=True,
        qk_norm="head_layer",
        qk_norm_if="use_qk_norm",
        defaults=_COHERE,
    ),
    "Cohere2ForCausalLM": Architecture(
        "cohere2",
        length="model_max_length",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        norm_kind="layer",
        norm_eps="layer_norm_eps",
        parallel="always",
        interleaved_rope=True,
        unrotated="full",
        windows="alternate",
        defaults=_COHERE | {"sliding_window": 4096, "sliding_window_pattern": 4},
    ),
}
