"""Small random checkpoints of every family, saved by transformers, with a real BPE tokenizer beside them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CORPUS = [
    "Compute every shared prefix once, and remember what was read.",
    "A tree of tokens grows a branch for every question that is asked of one document.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 东京 is a city; 🌳 is a tree.",
    "def fork(program, branches): return [program.copy() for _ in range(branches)]",
    '{"name": "lookup", "arguments": {"city": "Paris", "days": 3}}',
]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """How to make one checkpoint: transformers' config and model classes, and the config's values."""

    config: str
    model: str
    values: dict[str, Any] = field(default_factory=dict)
    shard_size: str | None = None


_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.12,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 128}
_YARN_GPT_OSS = {**_YARN, "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
_EXPERTS = {"num_local_experts": 6, "num_experts": 6, "num_experts_per_tok": 3}
_SIGMOID_EXPERTS = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 48,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
}


def _llama(**values: Any) -> Family:
    return Family("LlamaConfig", "LlamaForCausalLM", values)


# Weights of what a layer adds to the residual stream.
_OUTPUTS = ("o_proj.weight", "down_proj.weight", "experts.down_proj", "c_proj.weight", "dense.weight", "fc2.weight")

FAMILIES: dict[str, Family] = {
    "llama-mha": _llama(num_key_value_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
    "llama-gqa": _llama(rope_parameters=_LLAMA3, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama-mqa": _llama(num_key_value_heads=1, rope_parameters=_YARN, tie_word_embeddings=False),
    "llama-linear": _llama(rope_parameters=_LINEAR, head_dim=24, tie_word_embeddings=True),
    "llama-sharded": Family("LlamaConfig", "LlamaForCausalLM", {"tie_word_embeddings": False}, shard_size="100KB"),
    "mistral": Family("MistralConfig", "MistralForCausalLM", {"sliding_window": 24}),
    "qwen2": Family("Qwen2Config", "Qwen2ForCausalLM", {"tie_word_embeddings": True, "head_dim": 16}),
    "qwen2-window": Family(
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {"head_dim": 16, "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    ),
    "qwen3": Family("Qwen3Config", "Qwen3ForCausalLM", {"tie_word_embeddings": True, "head_dim": 32}),
    "gemma2": Family(
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            "sliding_window": 24,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 8.0,
        },
    ),
    "gemma3": Family(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            "sliding_window": 24,
            "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
            },
        },
    ),
    "gemma": Family("GemmaConfig", "GemmaForCausalLM", {"head_dim": 24}),
    "phi3": Family(
        "Phi3Config",
        "Phi3ForCausalLM",
        {
            "sliding_window": 24,
            "original_max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1000.0,
                "partial_rotary_factor": 0.5,
                "short_factor": [1.0, 1.2, 1.5, 2.0],
                "long_factor": [2.0, 3.0, 4.0, 5.0],
            },
        },
    ),
    "smollm3": Family("SmolLM3Config", "SmolLM3ForCausalLM", {"no_rope_layers": [1, 0, 1]}),
    "seed-oss": Family("SeedOssConfig", "SeedOssForCausalLM", {"attention_out_bias": True}),
    "granite": Family(
        "GraniteConfig",
        "GraniteForCausalLM",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.6,
            "attention_multiplier": 0.2,
            "logits_scaling": 0.5,
            "head_dim": 16,
        },
    ),
    "olmo2": Family("Olmo2Config", "Olmo2ForCausalLM", {"head_dim": 16}),
    "olmo3": Family(
        "Olmo3Config",
        "Olmo3ForCausalLM",
        {
            "head_dim": 16,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
                "full_attention": _YARN,
            },
        },
    ),
    "exaone4": Family(
        "Exaone4Config",
        "Exaone4ForCausalLM",
        {
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
        },
    ),
    "ernie": Family("Ernie4_5Config", "Ernie4_5ForCausalLM", {"use_bias": True}),
    "glm": Family("GlmConfig", "GlmForCausalLM", {"attention_bias": True}),
    "glm4": Family("Glm4Config", "Glm4ForCausalLM", {"attention_bias": True}),
    "arcee": Family("ArceeConfig", "ArceeForCausalLM", {"mlp_bias": True}),
    "apertus": Family("ApertusConfig", "ApertusForCausalLM", {"head_dim": 16}),
    "starcoder2": Family("Starcoder2Config", "Starcoder2ForCausalLM", {"sliding_window": 24, "head_dim": 16}),
    "stablelm": Family("StableLmConfig", "StableLmForCausalLM", {"use_qkv_bias": True, "head_dim": 16}),
    "stablelm-parallel": Family("StableLmConfig", "StableLmForCausalLM", {"use_parallel_residual": True}),
    "cohere": Family("CohereConfig", "CohereForCausalLM", {"logit_scale": 0.5, "head_dim": 16}),
    "cohere2": Family(
        "Cohere2Config",
        "Cohere2ForCausalLM",
        {
            "logit_scale": 0.5,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
    ),
    "cohere-qk-norm": Family(
        "CohereConfig", "CohereForCausalLM", {"logit_scale": 0.5, "use_qk_norm": True, "head_dim": 16}
    ),
    "stablelm-qk-norm": Family("StableLmConfig", "StableLmForCausalLM", {"qk_layernorm": True, "head_dim": 16}),
    "hunyuan": Family(
        "HunYuanDenseV1Config",
        "HunYuanDenseV1ForCausalLM",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 20.0, "factor": 1.0}},
    ),
    "hunyuan-moe": Family(
        "HunYuanMoEV1Config", "HunYuanMoEV1ForCausalLM", {"num_experts": 6, "moe_topk": 3, "attention_bias": True}
    ),
    "ministral3": Family(
        "Ministral3Config",
        "Ministral3ForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 16.0,
                "original_max_position_embeddings": 32,
                "max_position_embeddings": 512,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale_all_dim": 1.0,
                "mscale": 1.0,
                "llama_4_scaling_beta": 0.3,
            }
        },
    ),
    "mixtral": Family("MixtralConfig", "MixtralForCausalLM", {**_EXPERTS, "sliding_window": 24}),
    "qwen2-moe": Family(
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {
            **_EXPERTS,
            "head_dim": 16,
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 80,
            "norm_topk_prob": False,
            "mlp_only_layers": [1],
            "use_sliding_window": True,
            "sliding_window": 20,
        },
    ),
    "qwen3-moe": Family(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {**_EXPERTS, "moe_intermediate_size": 48, "norm_topk_prob": True, "tie_word_embeddings": True},
    ),
    "olmoe": Family("OlmoeConfig", "OlmoeForCausalLM", {**_EXPERTS, "head_dim": 16, "clip_qkv": 1.5}),
    "olmo": Family("OlmoConfig", "OlmoForCausalLM", {"clip_qkv": 1.5, "head_dim": 16, "tie_word_embeddings": False}),
    "granite-moe": Family(
        "GraniteMoeConfig",
        "GraniteMoeForCausalLM",
        {**_EXPERTS, "attention_multiplier": 0.2, "residual_multiplier": 0.6, "head_dim": 16},
    ),
    "granite-moe-shared": Family(
        "GraniteMoeSharedConfig",
        "GraniteMoeSharedForCausalLM",
        {**_EXPERTS, "attention_multiplier": 0.2, "shared_intermediate_size": 80, "head_dim": 16},
    ),
    "granite-4": Family(
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        {
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.6,
            "logits_scaling": 2.0,
            "shared_intermediate_size": 80,
            "num_local_experts": 0,
            "layer_types": ["full_attention"] * 3,
            "position_embedding_type": "rope",
        },
    ),
    "glm4-moe": Family(
        "Glm4MoeConfig",
        "Glm4MoeForCausalLM",
        {**_SIGMOID_EXPERTS, "use_qk_norm": True, "attention_bias": True, "routed_scaling_factor": 1.5},
    ),
    "phimoe": Family(
        "PhimoeConfig",
        "PhimoeForCausalLM",
        {
            **_EXPERTS,
            "head_dim": 16,
            "num_experts_per_tok": 2,
            "router_jitter_noise": 0.1,
            "attention_bias": True,
            "lm_head_bias": True,
        },
    ),
    "dots1": Family(
        "Dots1Config", "Dots1ForCausalLM", {**_SIGMOID_EXPERTS, "sliding_window": 24, "max_window_layers": 1}
    ),
    "minimax-m2": Family("MiniMaxM2Config", "MiniMaxM2ForCausalLM", {**_EXPERTS, "rotary_dim": 8}),
    "gpt-oss": Family(
        "GptOssConfig", "GptOssForCausalLM", {**_EXPERTS, "sliding_window": 24, "rope_parameters": _YARN_GPT_OSS}
    ),
    "ernie-moe": Family(
        "Ernie4_5_MoeConfig",
        "Ernie4_5_MoeForCausalLM",
        {
            "moe_intermediate_size": 48,
            "moe_num_experts": 6,
            "moe_k": 3,
            "moe_num_shared_experts": 1,
            "use_bias": True,
        },
    ),
}


_MLA = {
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
# Families that our decoder does not have: transformers computes them, with our attention.
OTHERS: dict[str, Family] = {
    "gpt2": Family("GPT2Config", "GPT2LMHeadModel", {"n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": 512}),
    "gpt-neox": Family("GPTNeoXConfig", "GPTNeoXForCausalLM", {"rotary_pct": 0.5}),
    "opt": Family("OPTConfig", "OPTForCausalLM", {"ffn_dim": 112, "word_embed_proj_dim": 64, "pad_token_id": 2}),
    "phi": Family("PhiConfig", "PhiForCausalLM"),
    "nemotron": Family("NemotronConfig", "NemotronForCausalLM"),
    "helium": Family("HeliumConfig", "HeliumForCausalLM"),
    "cwm": Family("CwmConfig", "CwmForCausalLM", {"sliding_window": 24}),
    "vaultgemma": Family(
        "VaultGemmaConfig",
        "VaultGemmaForCausalLM",
        {"sliding_window": 24, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0},
    ),
    "diffllama": Family("DiffLlamaConfig", "DiffLlamaForCausalLM"),  # attends twice a layer
    "minicpm3": Family("MiniCPM3Config", "MiniCPM3ForCausalLM", {**_MLA, "head_dim": None}),  # narrow values
    "granite-swa": Family("GraniteSWAConfig", "GraniteSWAForCausalLM", {"sliding_window": 24}),  # sinks
    "afmoe": Family(
        "AfmoeConfig",
        "AfmoeForCausalLM",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 48,
            "num_dense_layers": 1,
            "sliding_window": 24,
        },
    ),
}


def build(family: str, folder: Path, **overrides: Any) -> Path:
    """Makes the checkpoint in ``folder``: config, safetensors, tokenizer. The same bytes every time.

    ``overrides``: values of the config that go before the family's own.
    """
    import torch
    import transformers

    recipe = {**FAMILIES, **OTHERS}[family]
    vocab_size = write_tokenizer(folder)
    values = {**_SIZES, "vocab_size": vocab_size, **recipe.values, **overrides}
    config = getattr(transformers, recipe.config)(**values)
    seed = sum(family.encode())
    torch.manual_seed(seed)
    model = getattr(transformers, recipe.model)(config)
    sharpen(model, seed)
    model.save_pretrained(folder, **({"max_shard_size": recipe.shard_size} if recipe.shard_size else {}))
    return folder


def sharpen(model: Any, seed: int) -> None:
    """Changes a model's initial weights in place, so that mistakes show in its tokens: the same for the same seed."""
    import torch

    generator, gemma = torch.Generator().manual_seed(seed), type(model).__name__.startswith("Gemma")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # As initialised, norms are all alike and biases zero: mistakes in them would not show.
            if "norm" in name or name.endswith(("bias", "alpha_p", "alpha_n", "sinks")):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
            # The layers must outweigh the residual stream, or a model with tied embeddings repeats its last token.
            if name.endswith(_OUTPUTS):
                parameter *= 4
            if gemma and "post_" in name:
                parameter += 3
            # Sharp attention: what is said depends on where one looks, so texts do not settle on one token.
            if name.endswith(("q_proj.weight", "q_norm.weight", "c_attn.weight", "query_key_value.weight")):
                parameter *= 5
            # Experts of unequal weights.
            if name.endswith(("gate.weight", "router.weight", "gate.wg.weight")):
                parameter *= 3
            if name.endswith("sinks"):
                parameter += torch.randn(parameter.shape, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer += 0.3 * torch.randn(buffer.shape, generator=generator)


def write_tokenizer(folder: Path) -> int:
    """Trains a byte-level BPE tokenizer with chat markers; writes its files and returns its vocabulary size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    special = ["<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", 0)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    return int(tokenizer.get_vocab_size())
