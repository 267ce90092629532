"""Sampling parameters of one request. Validated once, at the boundary, by `validate`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from .constraint import KINDS, Constraint, Kind, constraint_problem
from .errors import InvalidRequest

MAX_STOPS = 64
MAX_STOP_LENGTH = 1024  # characters
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20
MAX_N = 128
MAX_TOKENS = 2**31 - 1
MAX_SEED = 2**63 - 1


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sampling parameters of one request.

    Args:
        max_tokens: Maximum number of output tokens; 0 or more. 0 computes and caches the prompt and generates nothing.
            None: as many as the context allows.
        min_tokens: Output tokens before a stop token may end the output; 0 or more, and at most max_tokens.
        temperature: From 0 to 100. 0 is greedy.
        top_p: Sample from the most likely tokens whose probabilities sum to this; more than 0, at most 1. 1: off.
        top_k: Sample from this many most likely tokens; -1 or more. 0 or -1: off.
        min_p: Sample from tokens whose probability is at least this share of the most likely token's. From 0 to 1.
            0: off.
        frequency_penalty: Subtracted from a token's logit once for each of its occurrences in the output. From -2 to 2.
        presence_penalty: Subtracted once from the logit of each token that occurs in the output. From -2 to 2.
        repetition_penalty: Divides positive and multiplies negative logits of tokens that occur in the prompt or the
            output; more than 0, at most 100. 1: off.
        logit_bias: Added to the logits of tokens: id to -100 to 100. 1024 entries at most.
        seed: The same seed gives the same random numbers, whatever else runs; 0 or more. None: a new seed for each
            request.
        n: Number of samples of the prompt. From 1 to 128.
        stop: Strings that end the output and are removed from it. 64 at most, of 1024 characters at most.
        stop_token_ids: Token ids that end the output, besides the model's own. 256 at most.
        ignore_eos: Continue after the model's end-of-sequence tokens.
        include_stop: Keep the stop string that ended the output.
        skip_special_tokens: Omit special tokens from the text.
        logprobs: Number of most likely tokens to report beside each output token's logprob. From 0 to 20. None: no
            logprobs.
        prompt_logprobs: The same for prompt tokens. From 0 to 20. None: no logprobs.
        prompt_logprob_start: First prompt position to report a logprob for; 0 or more.
        regex: The whole output matches this regular expression. At most one of regex, json_schema, ebnf and choices.
        json_schema: The whole output is JSON that satisfies this schema, a dict or its text.
        ebnf: The whole output is derived from this grammar, in EBNF (``root ::= …``) or Lark (``start: …``).
        choices: The whole output is one of these strings. 1024 at most.
    """

    max_tokens: int | None = 128
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop: bool = False  # SGLang's no_stop_trim
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprob_start: int = 0
    regex: str | None = None
    json_schema: str | dict[str, Any] | None = None
    ebnf: str | None = None
    choices: tuple[str, ...] | None = None

    def sample(self, i: int) -> SamplingParams:
        """The parameters of sample ``i`` of ``n``: one sample, seeded with ``seed + i``."""
        seed = None if self.seed is None else (self.seed + i) & MAX_SEED
        return msgspec.structs.replace(self, n=1, seed=seed)

    @property
    def constraint_kind(self) -> Kind | None:
        """The field that constrains the output, if one does."""
        return next((kind for kind in KINDS if getattr(self, kind) is not None), None)

    @property
    def constrained(self) -> bool:
        return self.constraint_kind is not None

    @property
    def constraint(self) -> Constraint | None:
        """The constraint on the output. Only for validated parameters."""
        kind = self.constraint_kind
        return None if kind is None else Constraint.of_value(kind, getattr(self, kind))

    def without_constraint(self) -> SamplingParams:
        """The same parameters without the constraint, which may be large: for readers of the output."""
        if self.constraint_kind is None:
            return self
        return msgspec.structs.replace(self, regex=None, json_schema=None, ebnf=None, choices=None)

    @property
    def penalized(self) -> bool:
        """Whether the logits depend on the tokens so far."""
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1.0, 0.0, 0.0)

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-6 or self.top_k == 1


# field: (low, high, low is exclusive). The bounds of integers are integers.
_RANGES: dict[str, tuple[float, float, bool]] = {
    "max_tokens": (0, MAX_TOKENS, False),
    "min_tokens": (0, MAX_TOKENS, False),
    "temperature": (0.0, 100.0, False),
    "top_p": (0.0, 1.0, True),
    "top_k": (-1, 2**31 - 1, False),
    "min_p": (0.0, 1.0, False),
    "frequency_penalty": (-2.0, 2.0, False),
    "presence_penalty": (-2.0, 2.0, False),
    "repetition_penalty": (0.0, 100.0, True),
    "seed": (0, MAX_SEED, False),
    "n": (1, MAX_N, False),
    "logprobs": (0, MAX_LOGPROBS, False),
    "prompt_logprobs": (0, MAX_LOGPROBS, False),
    "prompt_logprob_start": (0, 2**31 - 1, False),
}
_DEFAULTS = msgspec.structs.asdict(SamplingParams())
_CONTAINERS: tuple[tuple[str, tuple[type, ...], str], ...] = (
    ("stop", (tuple, list), "a tuple of strings"),
    ("stop_token_ids", (tuple, list), "a tuple of token ids"),
    ("logit_bias", (dict,), "a dict of token ids"),
)
_OPTIONAL = {"max_tokens", "seed", "logprobs", "prompt_logprobs"}


def validate(params: SamplingParams, vocab_size: int) -> SamplingParams:
    """Check every field against its bounds, and token ids against ``vocab_size``.

    Raises `InvalidRequest` naming the field, the value and the limit.
    """
    if not isinstance(params, SamplingParams):
        hint = ": write SamplingParams(**params)" if isinstance(params, Mapping) else ""
        raise InvalidRequest("params", f"must be a SamplingParams, got {type(params).__name__}{hint}")
    for field, (low, high, exclusive) in _RANGES.items():
        value = getattr(params, field)
        if value is _DEFAULTS[field]:
            continue
        if value is None:
            if field in _OPTIONAL:
                continue
            raise InvalidRequest(field, "must not be null")
        if isinstance(value, bool) or not isinstance(value, int if isinstance(low, int) else (int, float)):
            kind = "an integer" if isinstance(low, int) else "a number"
            raise InvalidRequest(field, f"must be {kind}, got {type(value).__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidRequest(field, f"must be finite, got {value}")
        if value < low or value > high or (exclusive and value == low):
            edge = f"greater than {low}" if exclusive else f"at least {low}"
            problem = f"must be {edge} and at most {high}, got {value}"
            raise InvalidRequest(field, problem, value=value, limit=high if value > high else low)
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        raise InvalidRequest(
            "min_tokens",
            f"must be at most {{0}} ({params.max_tokens}), got {params.min_tokens}",
            others=("max_tokens",),
            value=params.min_tokens,
            limit=params.max_tokens,
        )
    for field, types, kind in _CONTAINERS:  # a str is also a sequence: stop="ab" would stop at "a" and at "b"
        if not isinstance(getattr(params, field), types):
            raise InvalidRequest(field, f"must be {kind}, got {type(getattr(params, field)).__name__}")
    if len(params.stop) > MAX_STOPS:
        raise InvalidRequest("stop", f"must hold at most {MAX_STOPS} strings, got {len(params.stop)}")
    for text in params.stop:
        if not isinstance(text, str) or not text:
            raise InvalidRequest("stop", "must hold non-empty strings")
        if len(text) > MAX_STOP_LENGTH:
            raise InvalidRequest("stop", f"strings must be at most {MAX_STOP_LENGTH} characters, got {len(text)}")
    if len(params.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest(
            "stop_token_ids", f"must hold at most {MAX_STOP_TOKEN_IDS} ids, got {len(params.stop_token_ids)}"
        )
    for token in params.stop_token_ids:
        _check_id("stop_token_ids", token, vocab_size)
    if len(params.logit_bias) > MAX_LOGIT_BIAS:
        raise InvalidRequest("logit_bias", f"must hold at most {MAX_LOGIT_BIAS} entries, got {len(params.logit_bias)}")
    for token, bias in params.logit_bias.items():
        _check_id("logit_bias", token, vocab_size)
        if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not -100 <= bias <= 100:
            raise InvalidRequest("logit_bias", f"values must be between -100 and 100, got {bias}")
    for field in ("logprobs", "prompt_logprobs"):
        if (getattr(params, field) or 0) > vocab_size:
            raise InvalidRequest(
                field, f"must be at most the vocabulary size ({vocab_size}), got {getattr(params, field)}"
            )
    given = [kind for kind in KINDS if getattr(params, kind) is not None]
    if given:
        if len(given) > 1:
            problem = "cannot be combined with {0}: an output has one constraint"
            raise InvalidRequest(given[0], problem, others=given[1:2])
        wrong = constraint_problem(given[0], getattr(params, given[0]), params.n)
        if wrong is not None:
            raise InvalidRequest(given[0], wrong)
    return params


def _check_id(field: str, token: Any, vocab_size: int) -> None:
    if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
        raise InvalidRequest(field, f"must hold token ids from 0 to {vocab_size - 1}, got {token!r}")
