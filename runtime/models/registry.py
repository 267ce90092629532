"""The supported architectures, as data: how each differs from Llama, and the defaults of its config.json."""

from __future__ import annotations

from typing import Any

from .architecture import PRE_NORMS, Architecture, Experts, Norms

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
_QWEN = {"max_window_layers": 28, "max_position_embeddings": 32768}
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
_MIXTRAL_EXPERTS = (
    "block_sparse_moe.experts.{}.w1.weight",
    "block_sparse_moe.experts.{}.w3.weight",
    "block_sparse_moe.experts.{}.w2.weight",
)
_GRANITE_EXPERTS = Experts(
    router="block_sparse_moe.router.layer.weight",
    experts=(
        "block_sparse_moe.input_linear.weight",
        "block_sparse_moe.input_linear.weight",
        "block_sparse_moe.output_linear.weight",
    ),
    shared=("shared_mlp.input_linear", "shared_mlp.input_linear", "shared_mlp.output_linear"),
    shared_size="shared_intermediate_size",
    shared_unit="channels",
    normalize="always",  # a softmax over the chosen experts' logits alone, which is the same
)
_GLM_EXPERTS = Experts(
    shared_size="n_shared_experts",
    bias="mlp.gate.e_score_correction_bias",
    scores="sigmoid",
    float32_router=True,
)
_GRANITE = {"max_position_embeddings": 2048, "attention_multiplier": 1.0}
_HUNYUAN: dict[str, Any] = {
    "qkv_bias": "attention_bias",
    "o_bias": "attention_bias",
    "qk_norm": "head_rotated",
    "qk_norm_modules": ("query_layernorm", "key_layernorm"),
    "defaults": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
}
_MISTRAL = {"sliding_window": 4096, "max_position_embeddings": 131072}

ARCHITECTURES: dict[str, Architecture] = {
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
    "HunYuanDenseV1ForCausalLM": Architecture("hunyuan_v1_dense", **_HUNYUAN),
    "Qwen2ForCausalLM": Architecture("qwen2", qkv_bias="always", windows="qwen", defaults=_QWEN),
    "Qwen3ForCausalLM": Architecture(
        "qwen3",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm="head",
        windows="qwen",
        defaults=_QWEN | {"head_dim": 128},
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
        defaults=_GRANITE,
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
    "MixtralForCausalLM": Architecture(
        "mixtral",
        windows="all",
        experts=Experts(router="block_sparse_moe.gate.weight", experts=_MIXTRAL_EXPERTS, normalize="always"),
        defaults={"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0},
    ),
    "Qwen2MoeForCausalLM": Architecture(
        "qwen2_moe",
        qkv_bias="qkv_bias",
        windows="qwen_even",
        experts=Experts(
            shared=("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj"),
            shared_size="shared_expert_intermediate_size",
            shared_unit="channels",
            shared_gate="mlp.shared_expert_gate",
        ),
        defaults=_QWEN | {"qkv_bias": True},
    ),
    "Qwen3MoeForCausalLM": Architecture(
        "qwen3_moe",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm="head",
        windows="all",
        experts=Experts(),
        defaults=_QWEN | {"use_sliding_window": False, "sliding_window": 4096},
    ),
    "OlmoeForCausalLM": Architecture(
        "olmoe",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm="all",
        experts=Experts(),
        defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    ),
    "GraniteMoeForCausalLM": Architecture(
        "granitemoe",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        experts=_GRANITE_EXPERTS,
        defaults=_GRANITE,
    ),
    "GraniteMoeSharedForCausalLM": Architecture(
        "granitemoeshared",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        experts=_GRANITE_EXPERTS,
        defaults=_GRANITE,
    ),
    "Glm4MoeForCausalLM": Architecture(  # GLM 4.5 and 4.6, and their Air
        "glm4_moe",
        qkv_bias="attention_bias",
        qk_norm="head",
        qk_norm_if="use_qk_norm",
        experts=_GLM_EXPERTS,
        defaults={
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "partial_rotary_factor": 0.5,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
        },
    ),
    "PhimoeForCausalLM": Architecture(  # Phi 3.5 MoE
        "phimoe",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        lm_head_bias="lm_head_bias",
        norm_kind="layer",
        norm_bias=True,
        windows="all",
        experts=Experts(router="block_sparse_moe.gate.weight", experts=_MIXTRAL_EXPERTS, scores="sparsemixer"),
        defaults={"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0},
    ),
    "Dots1ForCausalLM": Architecture(
        "dots1",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        qk_norm="head",
        experts=_GLM_EXPERTS,
        windows="qwen",
        defaults={
            "max_position_embeddings": 2048,
            "use_sliding_window": True,
            "sliding_window": 4096,
            "max_window_layers": 62,
        },
    ),
    "HunYuanMoEV1ForCausalLM": Architecture(
        "hunyuan_v1_moe",
        **_HUNYUAN,
        experts=Experts(
            router="mlp.gate.wg.weight",
            shared=("mlp.shared_mlp.gate_proj", "mlp.shared_mlp.up_proj", "mlp.shared_mlp.down_proj"),
            shared_size="intermediate_size",
            shared_unit="channels",
            float32_router=True,
            normalize="always",
        ),
    ),
    "MiniMaxM2ForCausalLM": Architecture(
        "minimax_m2",
        qk_norm="all",
        experts=Experts(
            router="block_sparse_moe.gate.weight",
            experts=_MIXTRAL_EXPERTS,
            bias="block_sparse_moe.e_score_correction_bias",
            scores="sigmoid",
            normalize="always",
        ),
        defaults={"max_position_embeddings": 196608, "rope_theta": 5_000_000.0},
    ),
    "GptOssForCausalLM": Architecture(
        "gpt_oss",
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        sinks=True,
        windows="alternate",
        experts=Experts(
            router="mlp.router.weight",
            router_bias="mlp.router.bias",
            experts=("mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
            biases=("mlp.experts.gate_up_proj_bias", "mlp.experts.down_proj_bias"),
            transposed=True,
            alternating=True,
            activation="swigluoai",
            normalize="always",  # a softmax over the chosen experts' logits alone, which is the same
        ),
        defaults={
            "head_dim": 64,
            "attention_bias": True,
            "sliding_window": 128,
            "sliding_window_pattern": 2,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150_000.0,
        },
    ),
    "Ernie4_5_MoeForCausalLM": Architecture(
        "ernie4_5_moe",
        qkv_bias="use_bias",
        o_bias="use_bias",
        mlp_bias="use_bias",
        lm_head_bias="use_bias",
        interleaved_rope=True,
        experts=Experts(
            bias="mlp.moe_statics.e_score_correction_bias",
            bias_shape=(1,),
            shared_size="moe_num_shared_experts",
            float32_router=True,
            normalize="always",
        ),
        defaults={
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0,
            "tie_word_embeddings": True,
            "moe_layer_start_index": 1,
            "moe_num_shared_experts": 2,
        },
    ),
}

MODEL_TYPES = {known.model_type: name for name, known in ARCHITECTURES.items()}


def listing() -> str:
    """The supported architectures by kind, a line each, without the ``ForCausalLM`` of their names."""
    kinds: dict[str, list[str]] = {"Dense": [], "Mixtures of experts": [], "Text of multimodal models": []}
    for name, known in ARCHITECTURES.items():
        kind = "Text of multimodal models" if known.text_config else "Mixtures of experts" if known.experts else "Dense"
        kinds[kind].append(name.removesuffix("ForCausalLM"))
    return "\n".join(f"- {kind}: {', '.join(sorted(names))}" for kind, names in kinds.items())
