"""vLLM's ``/inference/v1/generate`` (0.33): the fields of a request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ConfigDict, Field

from ....errors import renaming
from ....sampling_params import SamplingParams
from ..fields.cache import CacheFields
from ..fields.parse import Prompts, StreamOptions, parse
from ..fields.sampling import (
    ParsedSampling,
    SamplingFields,
    check_prompt_logprobs,
    engine_seed,
    prompt_logprobs_field,
    shared_sampling,
)
from ..fields.structured import Structured, constraint

# Of the request: inputs other than token ids, and fields of /render for vLLM's own reasoning parsers.
UNSUPPORTED = frozenset({"features", "content_parts", "reasoning_ended", "reasoning_parser_kwargs"})
_WITHIN = "sampling_params."


class InferenceSampling(SamplingFields):
    """vLLM's ``SamplingParams`` as JSON."""

    model_config = ConfigDict(strict=True, extra="forbid")

    n: int = 1
    max_tokens: int | None = Field(None, description="null: as many as the context allows.")
    min_tokens: int = 0
    seed: int | None = None
    logprobs: int | None = Field(None, description="Alternatives for every output token.")
    prompt_logprobs: int | None = prompt_logprobs_field()
    include_stop_str_in_output: bool = False
    spaces_between_special_tokens: bool = Field(True, description="Accepted; it means nothing to fast tokenizers.")
    detokenize: bool = Field(True, description="Accepted: stop strings are always matched.")
    output_kind: int | None = Field(None, description="Accepted; stream says it.")
    structured_outputs: dict[str, Any] | None = Field(None, description="json, regex, choice or grammar.")


class InferenceRequest(CacheFields):
    """Token ids in, token ids out."""

    token_ids: Prompts = Field(description="A list of token ids: the prompt.")
    sampling_params: dict[str, Any]
    model: str | None = None
    request_id: str | None = Field(None, description="Given back, and the name by which /abort_request ends it.")
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = Field(False, description="Add the prompt's token ids.")
    output_mode: Literal["tokens", "text"] = Field("tokens", description="text: add the output's text.")
    priority: int = Field(0, description="Lower is earlier.")


def inference_sampling(raw: Mapping[str, Any], preferred: Mapping[str, float], *, stream: bool) -> ParsedSampling:
    """``preferred``: the served model's `sampling_defaults`. Bounds are checked later. Raises `InvalidRequest`."""
    sampling = parse(InferenceSampling, raw, _WITHIN)
    check_prompt_logprobs(sampling.prompt_logprobs, stream=stream, path=f"{_WITHIN}prompt_logprobs")
    with renaming({"structured_outputs": f"{_WITHIN}structured_outputs"}):
        constrained, called = constraint(Structured(structured_outputs=sampling.structured_outputs))
    own: dict[str, Any] = {
        "n": sampling.n,
        "max_tokens": sampling.max_tokens,
        "min_tokens": sampling.min_tokens,
        "seed": engine_seed(sampling.seed),
        "logprobs": sampling.logprobs,
        "prompt_logprobs": sampling.prompt_logprobs,
        "include_stop": sampling.include_stop_str_in_output,
        "skip_special_tokens": sampling.skip_special_tokens,
    }
    params = SamplingParams(**own, **constrained, **shared_sampling(sampling, preferred, _WITHIN))
    names = {name: f"{_WITHIN}{name}" for name in (*own, *SamplingFields.model_fields)}
    names["include_stop"] = f"{_WITHIN}include_stop_str_in_output"
    names |= {ours: f"{_WITHIN}{theirs}" for ours, theirs in called.items()}
    return ParsedSampling(params, {**names, "prompt": "token_ids"})
