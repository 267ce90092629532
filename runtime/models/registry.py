"""The supported architectures, as data: how each differs from Llama, and the defaults of its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Bias = Literal["never", "always", "config"]


@dataclass(frozen=True, slots=True)
class Architecture:
    """Feature switches of one family. ``defaults`` are the values its config.json may leave out."""

    model_type: str  # as config.json names the family
    qkv_bias: Bias = "never"
    o_bias: Bias = "never"
    mlp_bias: Bias = "never"
    qk_norm: bool = False
    gemma: bool = False  # (1 + w) norms, norms after attention and MLP too, scaled embeddings, its own query scale
    windows: Literal["none", "all", "qwen", "alternate"] = "none"  # which layers slide when layer_types is absent
    text_config: bool = False  # the language model's settings are nested under "text_config"
    defaults: Mapping[str, Any] = field(default_factory=dict)


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

ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture(
        "llama",
        qkv_bias="config",
        o_bias="config",
        mlp_bias="config",
        defaults={"max_position_embeddings": 2048},
    ),
    "MistralForCausalLM": Architecture(
        "mistral", windows="all", defaults={"sliding_window": 4096, "max_position_embeddings": 131072}
    ),
    "Qwen2ForCausalLM": Architecture("qwen2", qkv_bias="always", windows="qwen", defaults=_QWEN),
    "Qwen3ForCausalLM": Architecture(
        "qwen3",
        qkv_bias="config",
        o_bias="config",
        qk_norm=True,
        windows="qwen",
        defaults=_QWEN | {"head_dim": 128},
    ),
    "Gemma2ForCausalLM": Architecture(
        "gemma2", qkv_bias="config", o_bias="config", gemma=True, windows="alternate", defaults=_GEMMA2
    ),
    "Gemma3ForCausalLM": Architecture(
        "gemma3_text",
        qkv_bias="config",
        o_bias="config",
        qk_norm=True,
        gemma=True,
        windows="alternate",
        defaults=_GEMMA3,
    ),
    # The multimodal checkpoints of Gemma 3, text only. transformers 5 and 4 name the same weights differently.
    "Gemma3ForConditionalGeneration": Architecture(
        "gemma3",
        qkv_bias="config",
        o_bias="config",
        qk_norm=True,
        gemma=True,
        windows="alternate",
        text_config=True,
        defaults=_GEMMA3,
    ),
}

MODEL_TYPES = {known.model_type: name for name, known in ARCHITECTURES.items()}
