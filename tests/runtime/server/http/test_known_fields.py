"""No field that a peer knows is dropped in silence: it is ours, refused by name, or listed as without effect."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from openai.types.chat import completion_create_params as openai_chat
from openai.types.completion_create_params import CompletionCreateParamsBase

from branchwise.runtime.messages import Message
from branchwise.runtime.server.http.anthropic.request import MessagesRequest
from branchwise.runtime.server.http.app import make_app
from branchwise.runtime.server.http.fields.known import REFUSED, asks_for_nothing
from branchwise.runtime.server.http.native.branches import RunRequest
from branchwise.runtime.server.http.openai.chat.request import ChatRequest
from branchwise.runtime.server.http.openai.completions import CompletionRequest
from branchwise.runtime.server.http.openai.responses.request import ResponsesRequest
from branchwise.runtime.server.http.sglang.request import GenerateRequest, GenerateSampling
from branchwise.runtime.server.http.state import AppState
from branchwise.runtime.server.http.vllm.request import InferenceRequest

MANUAL = Path(__file__).parents[4] / "docs" / "http" / "README.md"

# The fields of vLLM's and SGLang's requests beside OpenAI's (vLLM 0.13's protocol.py, SGLang 0.5.23's protocol.py and
# io_struct.py).
VLLM = [
    "use_beam_search",
    "top_k",
    "min_p",
    "repetition_penalty",
    "watermarking",
    "length_penalty",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "truncate_prompt_tokens",
    "truncation_side",
    "allowed_token_ids",
    "prompt_logprobs",
    "logprob_token_ids",
    "bad_words",
    "add_special_tokens",
    "response_format",
    "structured_outputs",
    "priority",
    "request_id",
    "session_id",
    "return_tokens_as_token_ids",
    "return_token_ids",
    "routed_experts_prompt_start",
    "return_token_offsets",
    "return_mm_kwargs",
    "cache_salt",
    "kv_transfer_params",
    "ec_transfer_params",
    "vllm_xargs",
    "repetition_detection",
    "thinking_token_budget",
    "stream_interval",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "guided_decoding_backend",
]
VLLM_CHAT = [
    "include_reasoning",
    "echo",
    "add_generation_prompt",
    "continue_final_message",
    "documents",
    "chat_template",
    "chat_template_kwargs",
    "media_io_kwargs",
    "mm_processor_kwargs",
    "return_prompt_text",
]
SGLANG = [
    "return_hidden_states",
    "return_routed_experts",
    "routed_experts_start_len",
    "return_cached_tokens_details",
    "return_token_ids",
    "top_k",
    "min_p",
    "min_tokens",
    "json_schema",
    "regex",
    "ebnf",
    "repetition_penalty",
    "stop_token_ids",
    "stop_regex",
    "no_stop_trim",
    "ignore_eos",
    "skip_special_tokens",
    "lora_path",
    "session_id",
    "session_params",
    "custom_params",
    "custom_logit_processor",
    "images_config",
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "routed_dp_rank",
    "disagg_prefill_dp_rank",
    "data_parallel_rank",
    "rid",
    "extra_key",
    "cache_salt",
    "ngram_corpus_id",
    "priority",
    "custom_labels",
]
SGLANG_CHAT = [
    "return_prompt_token_ids",
    "return_meta_info",
    "task",
    "separate_reasoning",
    "stream_reasoning",
    "chat_template_kwargs",
    "reasoning",
    "max_dynamic_patch",
    "min_dynamic_patch",
    "use_audio_in_video",
    "continue_final_message",
]
GENERATE = [
    "rid",
    "session_id",
    "text",
    "input_ids",
    "input_embeds",
    "image_data",
    "video_data",
    "audio_data",
    "mm_hashes",
    "mm_content_hashes",
    "use_audio_in_video",
    "video_config",
    "sampling_params",
    "return_logprob",
    "logprob_start_len",
    "top_logprobs_num",
    "token_ids_logprob",
    "return_sampling_mask",
    "return_text_in_logprobs",
    "return_flat_raw_top_logprobs",
    "return_flat_raw_top_logprobs_b64",
    "stream",
    "log_metrics",
    "return_hidden_states",
    "return_routed_experts",
    "routed_experts_start_len",
    "return_indexer_topk",
    "modalities",
    "session_params",
    "lora_path",
    "lora_id",
    "custom_logit_processor",
    "positional_embed_overrides",
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "bootstrap_pair_key",
    "decode_tp_size",
    "routed_dp_rank",
    "data_parallel_rank",
    "disagg_prefill_dp_rank",
    "kv_router_hint",
    "routing_key",
    "conversation_id",
    "http_worker_ipc",
    "background",
    "require_reasoning",
    "max_thinking_tokens",
    "priority",
    "extra_key",
    "no_logs",
    "custom_labels",
    "return_bytes",
    "return_entropy",
    "return_prompt_token_ids",
    "external_trace_header",
    "received_time",
    "need_wait_for_mm_inputs",
    "num_items_assigned",
    "encoder_urls",
    "max_dynamic_patch",
    "min_dynamic_patch",
    "image_max_dynamic_patch",
    "video_max_dynamic_patch",
    "images_config",
    "multi_item_delimiter_indices",
    "cache_salt",
]
INFERENCE = [  # vLLM 0.33's GenerateRequest
    *("token_offsets", "features", "content_parts", "sampling_params", "model", "reasoning_ended", "stream"),
    *("reasoning_parser_kwargs", "return_token_ids", "output_mode", "stream_options", "kv_transfer_params"),
]
SAMPLING = [
    "max_new_tokens",
    "stop",
    "stop_token_ids",
    "stop_regex",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "min_new_tokens",
    "n",
    "beam_width",
    "json_schema",
    "regex",
    "ebnf",
    "structural_tag",
    "ignore_eos",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "no_stop_trim",
    "stream_interval",
    "logit_bias",
    "sampling_seed",
    "custom_params",
    "watermark",
]

ROUTES: dict[str, tuple[str, Any, dict[str, Any], set[str]]] = {
    "completions": (
        "/v1/completions",
        CompletionRequest,
        {"prompt": "a", "max_tokens": 1},
        {*CompletionCreateParamsBase.__annotations__, "stream", *VLLM, *SGLANG},
    ),
    "chat": (
        "/v1/chat/completions",
        ChatRequest,
        {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
        {*openai_chat.CompletionCreateParamsBase.__annotations__, "stream", *VLLM, *VLLM_CHAT, *SGLANG, *SGLANG_CHAT},
    ),
    "responses": ("/v1/responses", ResponsesRequest, {"input": "a", "max_output_tokens": 1}, {*VLLM, *SGLANG}),
    "messages": (
        "/v1/messages",
        MessagesRequest,
        {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
        {*VLLM, *SGLANG},
    ),
    "generate": ("/generate", GenerateRequest, {"text": "a", "sampling_params": {"max_new_tokens": 1}}, {*GENERATE}),
    "inference": (
        "/inference/v1/generate",
        InferenceRequest,
        {"token_ids": [5], "sampling_params": {"max_tokens": 1}},
        {*VLLM, *SGLANG, *INFERENCE},
    ),
    "branches": (
        "/branches/x/generate",
        RunRequest,
        {"sampling_params": {"max_new_tokens": 1}},
        {*GENERATE},
    ),
}
# Fields that cannot change an answer here, and why.
NO_EFFECT: dict[str, str] = {
    **dict.fromkeys(("user", "safety_identifier", "metadata", "session_id", "conversation_id"), "they name the caller"),
    **dict.fromkeys(("request_id", "custom_labels", "external_trace_header", "received_time"), "they name the request"),
    "verbosity": "a hint to OpenAI's own models",
    **dict.fromkeys(("log_metrics", "no_logs"), "requests are never logged, and metrics name none"),
    **dict.fromkeys(("store", "service_tier", "prompt_cache_retention"), "they concern OpenAI's own service"),
    **dict.fromkeys(("prediction", "ngram_corpus_id"), "they speed up an answer and do not change it"),
    **dict.fromkeys(("routed_dp_rank", "data_parallel_rank", "disagg_prefill_dp_rank", "routing_key"), "one worker"),
    **dict.fromkeys(("kv_router_hint", "decode_tp_size", "http_worker_ipc"), "one worker"),
    **dict.fromkeys(("spaces_between_special_tokens", "stream_interval"), "as `sampling_params` has them"),
    **dict.fromkeys(("return_token_offsets", "return_mm_kwargs"), "vLLM ignores them on these routes"),
    "token_offsets": "what vLLM's /render adds to token ids",
    **dict.fromkeys(("truncation_side", "routed_experts_prompt_start", "routed_experts_start_len"), "of other fields"),
    **dict.fromkeys(("mm_hashes", "mm_content_hashes", "use_audio_in_video", "video_config"), "of images and videos"),
    **dict.fromkeys(("max_dynamic_patch", "min_dynamic_patch", "image_max_dynamic_patch"), "of images and videos"),
    **dict.fromkeys(("video_max_dynamic_patch", "need_wait_for_mm_inputs"), "of images and videos"),
    **dict.fromkeys(("num_items_assigned", "encoder_urls"), "of images and videos"),
}
OTHERS = [  # fields of other routes, which people mix up
    *("choice", "choices", "grammar", "json", "guided_json", "guided_choice", "suffix", "image_data", "lora_path"),
    *("use_beam_search", "allowed_token_ids", "session_params", "truncate_prompt_tokens", "stop_regex"),
]
# Our own routes', too. `store`, `user` and the like are in NO_EFFECT; these are of the answer's envelope or the cache.
HARMLESS = {"model", "metadata", "rid", "cache_control", "cache_salt", "extra_key", "prompt_cache_key", "stream"}
HARMLESS |= {"prompt_cache_options", "prompt_cache_breakpoint"}


@pytest.mark.parametrize("route", ROUTES)
async def test_a_peers_field_is_ours_or_refused_or_known_to_do_nothing(
    make_state: Callable[..., AppState], sent: list[Message], route: str
) -> None:
    path, model, good, peers = ROUTES[route]
    unexplained = []
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(make_app(make_state())), base_url="http://localhost"
    ) as http:
        ours = {name for _, other, _, _ in ROUTES.values() for name in other.model_fields} | set(SAMPLING)
        wanted = {*peers, *OTHERS, *ours} - HARMLESS
        for name in sorted(wanted - model.model_fields.keys() - NO_EFFECT.keys()):
            asked = asyncio.create_task(http.post(path, json={**good, name: {"type": "x"}}))
            while not asked.done() and not sent:
                await asyncio.sleep(0)
            if not asked.done():  # it went to the engine
                asked.cancel()
                sent.clear()
                unexplained.append((name, "accepted"))
                continue
            answer = asked.result()
            if answer.status_code != 400 or not answer.json()["error"]["message"].startswith(name):
                unexplained.append((name, answer.text))
    assert not unexplained


async def test_a_peers_sampling_field_is_ours_or_refused(make_state: Callable[..., AppState]) -> None:
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(make_app(make_state())), base_url="http://localhost"
    ) as http:
        for name in sorted({*SAMPLING, "seed", "max_tokens"} - GenerateSampling.model_fields.keys()):
            answer = await http.post("/generate", json={"text": "a", "sampling_params": {name: "x"}})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, f"sampling_params.{name}")


def test_what_replaces_a_field_is_said() -> None:
    for ours in ("json", "regex", "choice", "grammar"):
        assert REFUSED[f"guided_{ours}"] == f"send structured_outputs.{ours}"


def test_the_manual_lists_what_has_no_effect() -> None:
    manual = MANUAL.read_text()
    assert [name for name in NO_EFFECT if f"`{name}`" not in manual] == []
    assert not NO_EFFECT.keys() & REFUSED.keys()


@pytest.mark.parametrize(
    ("name", "value", "nothing"),
    [
        *(("guided_json", value, True) for value in (None, False, "", [], {})),
        *(("guided_json", value, False) for value in (True, "{}", [1], {"a": 1}, 0, 1)),
        *(("length_penalty", value, value == 1.0) for value in (1, 1.0, 0.5, 2, True)),
        *(("include_reasoning", value, value) for value in (True,)),
        *(("input_ids", np.array(ids), not ids) for ids in ([], [0], [400], [1, 2])),
        *(("modalities", value, value == ["text"]) for value in (["text"], ["text", "audio"])),
        ("modalities", [np.array([1, 2])], False),
    ],
)
def test_values_that_ask_for_nothing(name: str, value: Any, nothing: bool) -> None:
    assert asks_for_nothing(name, value) is bool(nothing)
