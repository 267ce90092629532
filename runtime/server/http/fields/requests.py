"""What clients may send: types checked by pydantic, fields that would change the result but are not built refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ....constraint import KINDS
from ....errors import InvalidRequest, shown
from ....models.sampling_defaults import DEFAULTED
from ....sampling_params import MAX_LOGIT_BIAS, SamplingParams
from ..plumbing.body import MAX_FIELDS
from .cache import CacheFields
from .structured import constraint

Strings = Annotated[list[str], Field(fail_fast=True)]  # an error for each of thousands would be slow to tell
Integers = Annotated[list[int], Field(fail_fast=True)]
Prompts = Any  # str | list[int] | list[str] | list[list[int]], or an array: checked by `prompts.split_prompts`


class Strict(BaseModel):
    """No coercion: "1" is not 1, 1 is not true. Fields we do not know are ignored here; `refuse` has seen them."""

    model_config = ConfigDict(strict=True, extra="ignore")


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Structured(Strict):
    """What the output must be: at most one of these. OpenAI's field, vLLM's newer and older ones, SGLang's."""

    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = Field(None, description="json, regex, choice or grammar.")
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: Strings | None = None
    guided_grammar: str | None = Field(None, description="EBNF or Lark.")
    json_schema: str | dict[str, Any] | None = None
    regex: str | None = None
    ebnf: str | None = None


def models_own(name: str) -> Any:
    """A request's field that is in `DEFAULTED`: what it is where nobody says anything depends on the model."""
    neutral = getattr(SamplingParams(), name)
    return Field(None, description=f"null: the served model's own (`/get_model_info` shows it), else {neutral:g}.")


class SamplingFields(Strict):
    """How tokens are drawn, by the names that all dialects have for it."""

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
    """What OpenAI's routes take whatever their prompt is, and the fields vLLM and SGLang add to it."""

    model: str | None = None
    stream: bool = False
    seed: int | None = None
    min_tokens: int = 0
    include_stop_str_in_output: bool = False
    priority: int = 0
    user: str | None = None


class CompletionRequest(OpenAIFields):
    """OpenAI's ``/v1/completions``."""

    prompt: Prompts = Field(description="A string, a list of strings, a list of token ids, or a list of such lists.")
    max_tokens: int = 16
    n: int = 1
    best_of: int | None = None
    echo: bool = False
    logprobs: int | None = None
    stream_options: StreamOptions | None = None


class GenerateSampling(SamplingFields):
    """SGLang's ``sampling_params``."""

    model_config = ConfigDict(strict=True, extra="forbid")

    max_new_tokens: int | None = Field(128, description="null: as many as the context allows.")
    min_new_tokens: int = 0
    n: int = 1
    spaces_between_special_tokens: bool = Field(True, description="Accepted; it means nothing to fast tokenizers.")
    no_stop_trim: bool = False
    sampling_seed: int | None = None
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
    extra_key: str | None = None
    priority: int = 0


class AbortRequest(Strict):
    rid: str | None = None
    abort_all: bool = False


# Fields that other servers take, that would change the result, and that we do not have. Set to anything but null,
# false, "" or an empty list or object, they are refused: silence would be a wrong answer.
UNSUPPORTED = frozenset(
    {
        # structured output
        *("guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_decoding_backend"),
        *("response_format", "structured_outputs", "structural_tag", "json_schema", "regex", "ebnf", "stop_regex"),
        # other inputs than text
        *("image_data", "video_data", "audio_data", "modalities", "input_embeds", "prompt_embeds", "suffix"),
        # other ways to sample
        *("use_beam_search", "beam_width", "length_penalty", "allowed_token_ids", "bad_words", "logits_processors"),
        *("custom_logit_processor", "custom_params", "watermark", "truncate_prompt_tokens", "max_thinking_tokens"),
        *("require_reasoning", "prompt_logprobs", "vllm_xargs", "max_completion_tokens", "messages"),
        # other models, other outputs, sessions
        *("lora_path", "lora_id", "lora_request", "return_hidden_states", "return_entropy", "token_ids_logprob"),
        *("session_id", "session_params", "return_routed_experts", "kv_transfer_params", "bootstrap_host"),
    }
)

# A dialect's names of our fields, for `InvalidRequest.renamed`.
COMPLETION_NAMES = {"include_stop": "include_stop_str_in_output", "prompt_logprobs": "logprobs"}


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


MAX_ENTRIES = 16_384  # of a field that holds many; token ids are as many as the body holds
_IDS = frozenset({"prompt", "input_ids", "extend", "tokens"})  # fields that may be one flat list of them

_NULL_MEANS_SOMETHING = frozenset({"max_new_tokens"})

R = TypeVar("R", bound=BaseModel)


class Sampling(NamedTuple):
    """Parameters that are not checked against their bounds yet (`prompts.prepare_params`), and the client's names of
    their fields, for `InvalidRequest.renamed`."""

    params: SamplingParams
    names: Mapping[str, str]


def parse(kind: type[R], body: Mapping[str, Any], within: str = "", unsupported: frozenset[str] = UNSUPPORTED) -> R:
    """``body`` as a ``kind``. Null means the default, or what the field's description says.

    Raises `InvalidRequest` naming the first field that is wrong.
    """
    _bounded(kind, body, within)
    for name in body:
        if name in unsupported and name not in kind.model_fields and body[name] not in (None, False, "", [], {}):
            raise InvalidRequest(f"{within}{name}", "is not supported by this server")
    given = {name: value for name, value in body.items() if value is not None or name in _NULL_MEANS_SOMETHING}
    if kind.model_config.get("extra") == "forbid":
        given = {name: value for name, value in given.items() if name not in unsupported - kind.model_fields.keys()}
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        # Of a union's branches, the one that got furthest is the one that was meant.
        first = max(error.errors(include_url=False, include_context=False), key=lambda one: len(one["loc"]))
        field = within + _path(first["loc"])
        if first["type"] == "missing":
            problem = "is required"
        elif first["type"] == "extra_forbidden":
            problem = "is not a field this server knows"
        else:
            expected = first["msg"].removeprefix("Input should be ")
            problem = f"must be {expected}, got {type(first['input']).__name__}"
        raise InvalidRequest(field, f"{problem}") from error


def _bounded(kind: type[BaseModel], body: Mapping[str, Any], within: str) -> None:
    """What would be slow to look at one by one is counted first: one client's absurd body must not stall the others.
    Of a list of four million that are all wrong, pydantic tells all: it took a minute."""
    if len(body) > MAX_FIELDS:
        about = within.rstrip(".") or "the body"
        raise InvalidRequest(None, f"{about} must have at most {MAX_FIELDS} fields, got {len(body)}")
    for name in kind.model_fields:
        value = body.get(name)
        if not isinstance(value, (dict, list)) or len(value) <= MAX_ENTRIES:
            continue
        if isinstance(value, dict) or name not in _IDS or not isinstance(value[0], int):
            raise InvalidRequest(f"{within}{name}", f"must have at most {MAX_ENTRIES} entries, got {len(value)}")
    bias = body.get("logit_bias")
    if isinstance(bias, dict) and len(bias) > MAX_LOGIT_BIAS:
        raise InvalidRequest(f"{within}logit_bias", f"must hold at most {MAX_LOGIT_BIAS} entries, got {len(bias)}")
    if body.get("add_special_tokens") is False:
        raise InvalidRequest("add_special_tokens", "must be true; send token ids instead of text to add none")


def completion_sampling(request: CompletionRequest, preferred: Mapping[str, float]) -> Sampling:
    """``preferred``: the served model's `sampling_defaults`, here and below."""
    if request.best_of is not None and request.best_of != request.n:
        raise InvalidRequest(
            "best_of",
            f"must equal n ({request.n}): choosing the best of more samples is not supported, got {request.best_of}",
        )
    return openai_sampling(
        request,
        preferred,
        COMPLETION_NAMES,
        max_tokens=request.max_tokens,
        n=request.n,
        skip_special_tokens=request.skip_special_tokens,
        logprobs=request.logprobs,
        prompt_logprobs=request.logprobs if request.echo else None,
    )


def openai_sampling(
    request: OpenAIFields, preferred: Mapping[str, float], names: Mapping[str, str], **own: Any
) -> Sampling:
    """``own``: the fields for which the route has names of its own, ``names``."""
    constrained, called = constraint(request)
    params = SamplingParams(
        min_tokens=request.min_tokens,
        seed=request.seed,
        include_stop=request.include_stop_str_in_output,
        **_sampling(request, preferred),
        **constrained,
        **own,
    )
    return Sampling(params, {**names, **called})


def generate_sampling(
    sampling: GenerateSampling, preferred: Mapping[str, float], logprobs: int | None, start: int
) -> SamplingParams:
    """``logprobs``: alternatives of each token, None for no logprobs; ``start``: first prompt position with logprobs,
    -1 for none. Errors about the result are `renamed` by `generate_names`.
    """
    return SamplingParams(
        max_tokens=sampling.max_new_tokens,
        min_tokens=sampling.min_new_tokens,
        n=sampling.n,
        seed=sampling.sampling_seed,
        regex=sampling.regex,
        json_schema=sampling.json_schema,
        ebnf=sampling.ebnf,
        choices=None if sampling.choices is None else tuple(sampling.choices),
        include_stop=sampling.no_stop_trim,
        skip_special_tokens=sampling.skip_special_tokens,
        logprobs=logprobs,
        prompt_logprobs=logprobs if logprobs is not None and start != -1 else None,
        prompt_logprob_start=start if logprobs is not None and start != -1 else 0,
        **_sampling(sampling, preferred, "sampling_params."),
    )


def _sampling(request: SamplingFields, preferred: Mapping[str, float], within: str = "") -> dict[str, Any]:
    """The `SamplingFields`, but for skip_special_tokens: that is not always for the client to say."""
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


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _logit_bias(bias: Mapping[str, float] | None, field: str) -> dict[int, float]:
    result = {}
    for key, value in (bias or {}).items():
        # isascii and isdigit together: int() alone would also take " 7", "1_000" and other alphabets' digits.
        if not (key.isascii() and key.isdigit()):
            raise InvalidRequest(field, f"keys must be token ids, got {shown(key)}")
        result[int(key) if len(key) < 20 else -1] = value
    return result


def _path(location: tuple[str | int, ...]) -> str:
    """``stream_options.include_usage``, ``stop[3]``: without the branches of unions (``list[str]``) pydantic names."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part not in ("str", "int", "bool") and "[" not in part:
            path += f".{part}" if path else part
    return path
