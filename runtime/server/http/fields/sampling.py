"""Sampling fields that dialects share, and the `SamplingParams` they become."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import Field

from ....errors import InvalidRequest, shown
from ....models.sampling_defaults import DEFAULTED
from ....sampling_params import MAX_SEED, SamplingParams
from .cache import CacheFields
from .parse import Integers, Strict, Strings
from .structured import Structured, constraint


class ParsedSampling(NamedTuple):
    """Parameters that are not checked against their bounds yet (`prompts.prepare_params`), and the client's names of
    their fields, for `InvalidRequest.renamed`."""

    params: SamplingParams
    names: Mapping[str, str]


def models_own(name: str) -> Any:
    """A request's field that is in `DEFAULTED`: its default depends on the model."""
    neutral = getattr(SamplingParams(), name)
    return Field(None, description=f"null: the served model's own (`/get_model_info` shows it), else {neutral:g}.")


class SamplingFields(Strict):
    """Fields that all dialects name alike."""

    stop: str | Strings | None = None
    stop_token_ids: Integers | None = None
    temperature: float | None = models_own("temperature")
    top_p: float | None = models_own("top_p")
    top_k: int | None = models_own("top_k")
    min_p: float | None = models_own("min_p")
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float | None = models_own("repetition_penalty")
    logit_bias: dict[str, float] | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True


class OpenAIFields(SamplingFields, Structured, CacheFields):
    """The fields of OpenAI's routes that do not depend on the kind of prompt, and those vLLM and SGLang add."""

    model: str | None = None
    stream: bool = False
    seed: int | None = Field(None, description="-1 means null.")
    min_tokens: int = 0
    include_stop_str_in_output: bool = False
    no_stop_trim: bool = Field(False, description="SGLang's name of include_stop_str_in_output.")
    priority: int = Field(0, description="Lower is earlier, as in vLLM; SGLang's routes have it the other way round.")
    rid: str | None = Field(None, description="The name by which /abort_request ends the request.")
    user: str | None = None
    return_token_ids: bool = Field(
        False, description="The ids of the prompt and of the output: prompt_token_ids, token_ids."
    )
    return_tokens_as_token_ids: bool = Field(False, description="token_id:123 instead of texts in logprobs.")


def openai_sampling(
    request: OpenAIFields,
    preferred: Mapping[str, float],
    names: Mapping[str, str],
    text_format: Mapping[str, Any] | None = None,
    **own: Any,
) -> ParsedSampling:
    """``preferred``: the served model's `sampling_defaults`. ``own``: the fields for which the route has names of its
    own, ``names``. ``text_format``: as in `constraint`."""
    constrained, called = constraint(request, text_format)
    params = SamplingParams(
        min_tokens=request.min_tokens,
        seed=engine_seed(request.seed),
        include_stop=request.include_stop_str_in_output or request.no_stop_trim,
        **shared_sampling(request, preferred),
        **constrained,
        **own,
    )
    return ParsedSampling(params, {**names, **called})


def shared_sampling(request: SamplingFields, preferred: Mapping[str, float], within: str = "") -> dict[str, Any]:
    """The `SamplingFields` but skip_special_tokens, which a route may override. ``within``: their path, with a dot."""
    said = {name: value for name in DEFAULTED if (value := getattr(request, name)) is not None}
    return {
        **preferred,
        **said,
        "stop": _stops(request.stop),
        "stop_token_ids": tuple(request.stop_token_ids or ()),
        "frequency_penalty": request.frequency_penalty,
        "presence_penalty": request.presence_penalty,
        "logit_bias": _logit_bias(request.logit_bias, f"{within}logit_bias"),
        "ignore_eos": request.ignore_eos,
    }


def prompt_logprobs_field() -> Any:
    """vLLM's ``prompt_logprobs``, of the routes that have it."""
    return Field(None, description="Alternatives for every prompt token; not in a stream.")


def check_prompt_logprobs(asked: int | None, *, stream: bool, path: str = "prompt_logprobs") -> int | None:
    """Raises `InvalidRequest` if the answer is streamed: a stream has the new output only. Returns ``asked``."""
    if stream and asked is not None:
        raise InvalidRequest(path, "cannot be combined with stream")
    return asked


def engine_seed(seed: int | None) -> int | None:
    """A client's seed, of 64 bits with a sign: -1 is none, as in vLLM and llama.cpp; others are taken modulo 2^63."""
    if seed is None or seed == -1:
        return None
    return seed & MAX_SEED if -MAX_SEED - 1 <= seed < 0 else seed


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _logit_bias(bias: Mapping[str, float] | None, path: str) -> dict[int, float]:
    result = {}
    for key, value in (bias or {}).items():
        # isascii and isdigit together: int() alone would also take " 7", "1_000" and other alphabets' digits.
        if not (key.isascii() and key.isdigit()):
            raise InvalidRequest(path, f"keys must be token ids, got {shown(key)}")
        result[int(key) if len(key) < 20 else -1] = value
    return result
