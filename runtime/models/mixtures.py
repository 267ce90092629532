"""The supported families with mixtures of experts, as `dense` has the others."""

from __future__ import annotations

from .architecture import Architecture, Experts
from .dense import GRANITE, HUNYUAN, QWEN

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

MIXTURES: dict[str, Architecture] = {
    "MixtralForCausalLM": Architecture(
        "mixtral",
        windows="all",
        experts=Experts(router="block_sparse_moe.gate.weight", experts=_MIXTRAL_EXPERTS, normalize="always"),
        defaults={"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0},
    ),
    "Qwen2MoeForCausalLM": Architecture(
        "qwen2_moe",
        qkv_bias="qkv_bias",
        o_bias="never",
        windows="qwen_even",
        experts=Experts(
            shared=("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj"),
            shared_size="shared_expert_intermediate_size",
            shared_unit="channels",
            shared_gate="mlp.shared_expert_gate",
        ),
        defaults=QWEN | {"qkv_bias": True},
    ),
    "Qwen3MoeForCausalLM": Architecture(
        "qwen3_moe",
        qk_norm="head",
        windows="all",
        experts=Experts(),
        defaults=QWEN | {"use_sliding_window": False, "sliding_window": 4096},
    ),
    "Qwen3VLMoeForConditionalGeneration": Architecture(  # text only
        "qwen3_vl_moe",
        qk_norm="head",
        experts=Experts(
            experts=("mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
            transposed=True,
            normalize="always",
        ),
        text_config=True,
        defaults=QWEN | {"head_dim": 128},
    ),
    "OlmoeForCausalLM": Architecture(
        "olmoe",
        qk_norm="all",
        experts=Experts(),
        defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    ),
    "GraniteMoeForCausalLM": Architecture("granitemoe", experts=_GRANITE_EXPERTS, defaults=GRANITE),
    "GraniteMoeSharedForCausalLM": Architecture("granitemoeshared", experts=_GRANITE_EXPERTS, defaults=GRANITE),
    "Glm4MoeForCausalLM": Architecture(  # GLM 4.5 and 4.6, and their Air
        "glm4_moe",
        o_bias="never",
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
        lm_head_bias="lm_head_bias",
        norm_kind="layer",
        norm_bias=True,
        windows="all",
        experts=Experts(router="block_sparse_moe.gate.weight", experts=_MIXTRAL_EXPERTS, scores="sparsemixer"),
        defaults={"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 1_000_000.0},
    ),
    "Dots1ForCausalLM": Architecture(
        "dots1",
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
        **HUNYUAN,
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
