"""SGLang's ``/generate``: the fields of a request. Branches are run with these fields too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from ....constraint import KINDS
from ....errors import InvalidRequest
from ....sampling_params import SamplingParams
from ..fields.cache import CacheFields
from ..fields.parse import Integers, Prompts, Strings
from ..fields.sampling import SamplingFields, engine_seed, shared_sampling


class GenerateSampling(SamplingFields):
    """SGLang's ``sampling_params``."""

    model_config = ConfigDict(strict=True, extra="forbid")

    max_new_tokens: int | None = Field(128, description="null: as many as the context allows.")
    min_new_tokens: int = 0
    n: int = 1
    spaces_between_special_tokens: bool = Field(True, description="Accepted; it means nothing to fast tokenizers.")
    no_stop_trim: bool = False
    sampling_seed: int | None = Field(None, description="-1 means null.")
    regex: str | None = None
    json_schema: str | dict[str, Any] | None = None
    ebnf: str | None = Field(None, description="EBNF or Lark.")
    choices: Strings | None = Field(None, description="The output is one of these.")
    stream_interval: int | None = Field(None, description="Accepted; every token is sent as soon as there is one.")


class GenerateRequest(CacheFields):
    """SGLang's ``/generate``. Exactly one of ``text`` and ``input_ids``; a list of either is a batch."""

    text: str | Strings | None = None
    input_ids: Prompts = Field(None, description="A list of token ids, or a list of such lists.")
    sampling_params: dict[str, Any] | Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None
    stream: bool = False
    rid: str | Strings | None = None
    return_logprob: bool | Annotated[list[bool], Field(fail_fast=True)] = False
    logprob_start_len: int | Integers = -1
    top_logprobs_num: int | Integers = 0
    return_text_in_logprobs: bool = False
    return_prompt_token_ids: bool = False
    priority: int = Field(0, description="Higher is earlier, as in SGLang.")


def check_places(raw: Mapping[str, Any]) -> None:
    """Raises `InvalidRequest` for a field of ``sampling_params`` that is beside it."""
    for misplaced in sorted(raw.keys() & GenerateSampling.model_fields.keys()):
        raise InvalidRequest(misplaced, "belongs in sampling_params")


def generate_sampling(
    sampling: GenerateSampling, preferred: Mapping[str, float], logprobs: int | None, start: int
) -> SamplingParams:
    """``preferred``: the served model's `sampling_defaults`. ``logprobs``: alternatives of each token, None for no
    logprobs; ``start``: first prompt position with logprobs, -1 for none. Not checked against its bounds yet; errors
    about it are `renamed` by `generate_names`.
    """
    if start == -1 and sampling.max_new_tokens == 0:
        start = 0  # nothing is generated: the prompt's logprobs are the only ones (SGLang's unconditional likelihoods)
    return SamplingParams(
        max_tokens=sampling.max_new_tokens,
        min_tokens=sampling.min_new_tokens,
        n=sampling.n,
        seed=engine_seed(sampling.sampling_seed),
        regex=sampling.regex,
        json_schema=sampling.json_schema,
        ebnf=sampling.ebnf,
        choices=None if sampling.choices is None else tuple(sampling.choices),
        include_stop=sampling.no_stop_trim,
        skip_special_tokens=sampling.skip_special_tokens,
        logprobs=logprobs,
        prompt_logprobs=logprobs if logprobs is not None and start != -1 else None,
        prompt_logprob_start=start if logprobs is not None and start != -1 else 0,
        **shared_sampling(sampling, preferred, "sampling_params."),
    )


def generate_names(prompt: str, within: str = "sampling_params") -> dict[str, str]:
    """SGLang's names of our fields. ``prompt``: the field with the prompt; ``within``: with its sampling."""
    own = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens", "seed": "sampling_seed"}
    own |= {"include_stop": "no_stop_trim", **{name: name for name in (*SamplingFields.model_fields, *KINDS, "n")}}
    return {
        **{ours: f"{within}.{theirs}" for ours, theirs in own.items()},
        "prompt": prompt,
        "logprobs": "top_logprobs_num",
        "prompt_logprobs": "top_logprobs_num",
        "prompt_logprob_start": "logprob_start_len",
    }
