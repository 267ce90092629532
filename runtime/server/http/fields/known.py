"""Fields of other servers' requests that this one does not have and refuses by name.

A field of OpenAI's, vLLM's or SGLang's requests is a field of our model, is refused, or cannot change an answer: the
manual lists those (tests/runtime/server/http/test_known_fields.py). Other fields are ignored, as they are there.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_NONE = ""

# name: what to send instead, if anything. Accepted with a value that has no effect (`asks_for_nothing`).
REFUSED: dict[str, str] = {
    # structured output
    "guided_json": "send structured_outputs.json",
    "guided_regex": "send structured_outputs.regex",
    "guided_choice": "send structured_outputs.choice",
    "guided_grammar": "send structured_outputs.grammar",
    "choice": "send structured_outputs.choice",
    "choices": "send structured_outputs.choice",
    "grammar": "send structured_outputs.grammar",
    "json": "send structured_outputs.json",
    **dict.fromkeys(("guided_decoding_backend", "guided_whitespace_pattern", "structural_tag", "stop_regex"), _NONE),
    **dict.fromkeys(("response_format", "structured_outputs", "json_schema", "regex", "ebnf"), _NONE),
    # inputs other than text
    **dict.fromkeys(("image_data", "video_data", "audio_data", "modalities", "images_config", "prompt_embeds"), _NONE),
    **dict.fromkeys(("input_embeds", "positional_embed_overrides", "suffix", "messages", "task"), _NONE),
    # sampling
    **dict.fromkeys(("use_beam_search", "beam_width", "length_penalty", "allowed_token_ids", "bad_words"), _NONE),
    **dict.fromkeys(("logits_processors", "custom_logit_processor", "custom_params", "watermark", "vllm_xargs"), _NONE),
    **dict.fromkeys(("watermarking", "repetition_detection", "truncate_prompt_tokens", "require_reasoning"), _NONE),
    **dict.fromkeys(("max_thinking_tokens", "thinking_token_budget", "reasoning", "add_special_tokens"), _NONE),
    "max_completion_tokens": "send max_tokens",
    # further output
    **dict.fromkeys(("logprob_token_ids", "token_ids_logprob", "return_hidden_states"), _NONE),
    **dict.fromkeys(("return_entropy", "return_routed_experts", "return_indexer_topk", "return_meta_info"), _NONE),
    **dict.fromkeys(("return_flat_raw_top_logprobs", "return_flat_raw_top_logprobs_b64", "return_bytes"), _NONE),
    **dict.fromkeys(("return_sampling_mask", "return_prompt_text", "return_cached_tokens_details"), _NONE),
    **dict.fromkeys(("include_reasoning", "multi_item_delimiter_indices", "background", "stream_reasoning"), _NONE),
    "return_prompt_token_ids": "/v1/completions and /v1/chat/completions have return_token_ids",
    # other models and servers, sessions that are stored
    **dict.fromkeys(("lora_path", "lora_id", "lora_request", "session_params"), _NONE),
    **dict.fromkeys(("kv_transfer_params", "ec_transfer_params"), _NONE),
    **dict.fromkeys(("bootstrap_host", "bootstrap_port", "bootstrap_room", "bootstrap_pair_key"), _NONE),
}
UNSUPPORTED = frozenset(REFUSED)

# Fields of this server's own routes that change an answer: a generating route that lacks one refuses it.
ANSWER_FIELDS = frozenset(
    (
        *("stop", "stop_sequences", "stop_token_ids", "ignore_eos", "include_stop_str_in_output", "no_stop_trim"),
        *("temperature", "top_p", "top_k", "min_p", "logit_bias", "seed", "sampling_seed", "sampling_params"),
        *("frequency_penalty", "presence_penalty", "repetition_penalty", "skip_special_tokens", "add_special_tokens"),
        *("max_tokens", "max_completion_tokens", "max_output_tokens", "max_new_tokens", "min_tokens", "min_new_tokens"),
        *("n", "best_of", "echo", "logprobs", "top_logprobs", "return_logprob", "top_logprobs_num"),
        *("logprob_start_len", "return_text_in_logprobs", "prompt_logprobs"),
        *("return_token_ids", "return_tokens_as_token_ids"),
        *("return_prompt_token_ids", "stream_options", "include", "priority", "parse_special", "truncation"),
        *("tools", "tool_choice", "parallel_tool_calls", "functions", "function_call", "max_tool_calls"),
        *("chat_template", "chat_template_kwargs", "add_generation_prompt", "continue_final_message", "documents"),
        *("system", "instructions", "thinking", "reasoning", "reasoning_effort", "separate_reasoning"),
        *("output_config", "output_format", "output_mode"),
        *("text", "input", "input_ids", "prompt", "messages", "extend", "token_ids"),
    )
)

# Values of fields in `REFUSED` with which they ask for what this server does anyway.
_NEUTRAL: dict[str, Any] = {
    "length_penalty": 1.0,
    "repetition_penalty": 1.0,
    **dict.fromkeys(("n", "best_of"), 1),
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "min_p", "priority", "min_tokens", "top_logprobs"), 0),
    **dict.fromkeys(("skip_special_tokens", "parallel_tool_calls", "separate_reasoning", "add_special_tokens"), True),
    "thinking_token_budget": -1,
    "include_reasoning": True,
    "modalities": ["text"],
    "stream_reasoning": True,
}
_NOTHING: tuple[Any, ...] = (None, False, "", [], {})


def asks_for_nothing(name: str, value: Any) -> bool:
    """Whether a refused field has the value of what this server does anyway. Lists of token ids arrive as arrays."""
    if isinstance(value, np.ndarray):
        return not value.size
    if isinstance(value, list) and any(isinstance(each, np.ndarray) for each in value):
        return False
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return name in _NEUTRAL and value == _NEUTRAL[name]
    return value in _NOTHING or (name in _NEUTRAL and value == _NEUTRAL[name])
