"""The expressions a program appends: text, ``gen``, ``select``, roles. Values only; `interpreter` runs them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Union

import msgspec

from ...runtime.sampling_params import SamplingParams, validate
from .choices import ChoicesMethod, token_length_normalized
from .errors import call_site

Dtype = Callable[[str], Any]  # int, float, str or bool
Appendable = Union[str, int, float, bool, "Expr"]

DTYPE_REGEX: dict[Any, str] = {
    int: r"[-+]?[0-9]+",
    float: r"[-+]?[0-9]+(\.[0-9]+)?",
    bool: r"(True|False)",
    str: r'"[^"\\\n]*"',
}
_ANY_VOCABULARY = 2**31 - 1  # token ids are checked against the real one by the backend


class Expr:
    """Anything a state can append; ``+`` chains."""

    def __add__(self, other: Appendable) -> Expr:
        return Chain((*_parts(self), *_parts(as_expr(other))))

    def __radd__(self, other: Appendable) -> Expr:
        return Chain((*_parts(as_expr(other)), *_parts(self)))


@dataclass(frozen=True)
class Text(Expr):
    """``special``: markers such as ``<|im_start|>`` in it become the tokens they name; otherwise they stay text."""

    text: str
    special: bool = False


@dataclass(frozen=True)
class Chain(Expr):
    parts: tuple[Expr, ...]


@dataclass(frozen=True)
class RoleBegin(Expr):
    role: str


@dataclass(frozen=True)
class RoleEnd(Expr):
    role: str


@dataclass(frozen=True)
class Sampling:
    """The arguments of a ``gen``, in `SamplingParams`' names; those of ``constraint`` in SGLang's."""

    options: Mapping[str, Any] = field(default_factory=dict)
    constraint: Mapping[str, str] = field(default_factory=dict)
    text_in_logprobs: bool = False

    def over(self, defaults: Sampling) -> Sampling:
        """This one, with ``defaults`` for what it does not set."""
        return Sampling(
            {**defaults.options, **self.options},
            self.constraint or defaults.constraint,
            self.text_in_logprobs or defaults.text_in_logprobs,
        )


@dataclass(frozen=True)
class Gen(Expr):
    name: str | None
    sampling: Sampling
    dtype: Dtype | None = None
    site: str = ""


@dataclass(frozen=True)
class Select(Expr):
    name: str | None
    choices: tuple[str, ...]
    method: ChoicesMethod
    site: str = ""


def as_expr(value: Any) -> Expr:
    if isinstance(value, Expr):
        return value
    if isinstance(value, (str, int, float)):
        return Text(str(value))
    if isinstance(value, Sequence):
        return Chain(tuple(part for item in value for part in _parts(as_expr(item))))
    raise TypeError(f"a state takes text and expressions, not {type(value).__name__}")


def _parts(expr: Expr) -> tuple[Expr, ...]:
    return expr.parts if isinstance(expr, Chain) else (expr,)


def parts(value: Any) -> tuple[Expr, ...]:
    """``value`` as a flat sequence of expressions. Raises TypeError for what cannot be appended."""
    return _parts(as_expr(value))


def gen(
    name: str | None = None,
    max_tokens: int | None = None,
    min_tokens: int | None = None,
    n: int | None = None,
    stop: str | Sequence[str] | None = None,
    stop_token_ids: Sequence[int] | None = None,
    stop_regex: str | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    frequency_penalty: float | None = None,
    presence_penalty: float | None = None,
    ignore_eos: bool | None = None,
    return_logprob: bool | None = None,
    logprob_start_len: int | None = None,
    top_logprobs_num: int | None = None,
    return_text_in_logprobs: bool = False,
    dtype: Dtype | None = None,
    choices: Sequence[str] | None = None,
    choices_method: ChoicesMethod | None = None,
    regex: str | None = None,
    json_schema: Any = None,
    *,
    repetition_penalty: float | None = None,
    logit_bias: Mapping[int, float] | None = None,
    seed: int | None = None,
    logprobs: int | bool | None = None,
) -> Expr:
    """Lets the model write here; the text becomes variable ``name``.

    What is None comes from the program's ``run(...)``, then from the served model's own sampling defaults, then from
    `SamplingParams`. ``n`` > 1 makes the variable a list; the text continues with the first. ``logprobs=k``: of every
    generated token and its k likeliest alternatives, in ``s.meta(name)``. ``regex``, ``json_schema`` (a string, a dict
    or a pydantic model) and ``dtype`` (int, float, str, bool: the variable has that type) constrain the text; a backend
    that cannot do so is an error. ``choices`` makes it a ``select``. Raises `InvalidRequest` (a ValueError) for a value
    out of bounds, TypeError for an unknown argument.
    """
    given = dict(locals())
    for own in ("name", "choices", "choices_method"):
        del given[own]
    site = call_site()
    if choices is not None:
        if regex or json_schema or dtype:
            raise ValueError("choices, regex, json_schema and dtype exclude each other")
        return select(name, choices, choices_method=choices_method or token_length_normalized)
    return Gen(_name(name), make_sampling(**given), dtype, site)


def gen_int(name: str | None = None, **options: Any) -> Expr:
    """``gen`` of an integer."""
    return gen(name, dtype=int, **options)


def gen_string(name: str | None = None, **options: Any) -> Expr:
    """``gen`` of a quoted string."""
    return gen(name, dtype=str, **options)


def select(
    name: str | None = None,
    choices: Sequence[str] | None = None,
    temperature: float = 0.0,
    choices_method: ChoicesMethod = token_length_normalized,
) -> Select:
    """Lets the model choose one of ``choices``, by their logprobs as the continuation.

    ``temperature`` exists for SGLang's programs and must be 0: the choice is the likeliest one, never sampled.
    """
    if temperature:
        raise ValueError("select takes the likeliest choice; temperature must be 0")
    if choices is None or isinstance(choices, str) or not list(choices):
        raise ValueError("select needs a list of choices")
    for choice in choices:
        if not isinstance(choice, str) or not choice:
            raise ValueError(f"choices must be non-empty strings, got {choice!r}")
    return Select(_name(name), tuple(choices), choices_method, call_site())


def special(text: str) -> Text:
    """Text whose markers (``<|im_start|>``, ``</s>``) become the tokens they name. Never use it for untrusted text."""
    return Text(text, special=True)


def make_sampling(
    *,
    stop_regex: str | None = None,
    regex: str | None = None,
    json_schema: Any = None,
    dtype: Dtype | None = None,
    logprobs: int | bool | None = None,
    return_logprob: bool | None = None,
    logprob_start_len: int | None = None,
    top_logprobs_num: int | None = None,
    return_text_in_logprobs: bool = False,
    stop: str | Sequence[str] | None = None,
    stop_token_ids: Sequence[int] | None = None,
    logit_bias: Mapping[int, float] | None = None,
    **plain: Any,
) -> Sampling:
    """From `gen`'s arguments. Checks every value here, where the program's line is known."""
    if logprob_start_len is not None and logprob_start_len != -1:
        raise ValueError("logprob_start_len: only generated tokens have logprobs here; score a text with select")
    if return_logprob or top_logprobs_num:
        logprobs = top_logprobs_num or 0
    options = {name: value for name, value in plain.items() if value is not None}
    if stop is not None:
        options["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    if stop_token_ids is not None:
        options["stop_token_ids"] = tuple(stop_token_ids)
    if logit_bias is not None:
        options["logit_bias"] = dict(logit_bias)
    if logprobs is not None and logprobs is not False:
        options["logprobs"] = 0 if logprobs is True else logprobs
    unlimited = {} if "max_tokens" in options else {"max_tokens": None}  # ``run`` may set it
    validate(SamplingParams(**{**options, **unlimited}), _ANY_VOCABULARY)
    return Sampling(options, _constraint(regex, json_schema, dtype, stop_regex), return_text_in_logprobs)


def _constraint(regex: str | None, json_schema: Any, dtype: Dtype | None, stop_regex: str | None) -> dict[str, str]:
    if sum(value is not None for value in (regex, json_schema, dtype)) > 1:
        raise ValueError("regex, json_schema and dtype exclude each other")
    if dtype is not None and dtype not in DTYPE_REGEX:
        raise ValueError(f"dtype must be int, float, str or bool, got {dtype!r}")
    found: dict[str, str] = {}
    if dtype is not None:
        found["regex"] = DTYPE_REGEX[dtype]
    if regex is not None:
        if not isinstance(regex, str) or not regex:
            raise ValueError(f"regex must be a non-empty string, got {regex!r}")
        found["regex"] = regex
    if json_schema is not None:
        found["json_schema"] = _schema_text(json_schema)
    if stop_regex is not None:
        found["stop_regex"] = stop_regex
    return found


def _schema_text(schema: Any) -> str:
    """A JSON schema as text, from text, a dict, or a pydantic model class."""
    if hasattr(schema, "model_json_schema"):
        schema = schema.model_json_schema()
    if isinstance(schema, str):
        try:
            schema = msgspec.json.decode(schema)
        except msgspec.DecodeError as error:
            raise ValueError(f"json_schema is not JSON: {error}") from error
    if not isinstance(schema, (dict, bool)):
        raise ValueError(f"json_schema must be a JSON object, got {type(schema).__name__}")
    return json.dumps(schema)


def _name(name: str | None) -> str | None:
    if name is not None and not isinstance(name, str):
        raise TypeError(f"a variable's name must be a string, got {type(name).__name__}")
    return name


def convert(text: str, dtype: Dtype | None) -> Any:
    """The variable's value. Raises ValueError if the text is not one of ``dtype``."""
    if dtype is None:
        return text
    if dtype is bool:
        return {"True": True, "False": False}[text.strip()]
    return json.loads(text) if dtype is str else dtype(text)


def role(name: str, body: Any = None) -> Expr:
    """A turn of role ``name``, as the model's own chat template writes it."""
    return Chain((RoleBegin(name), *(() if body is None else parts(body)), RoleEnd(name)))


def system(body: Any = None) -> Expr:
    return role("system", body)


def user(body: Any = None) -> Expr:
    return role("user", body)


def assistant(body: Any = None) -> Expr:
    return role("assistant", body)


def system_begin() -> Expr:
    return RoleBegin("system")


def system_end() -> Expr:
    return RoleEnd("system")


def user_begin() -> Expr:
    return RoleBegin("user")


def user_end() -> Expr:
    return RoleEnd("user")


def assistant_begin() -> Expr:
    return RoleBegin("assistant")


def assistant_end() -> Expr:
    return RoleEnd("assistant")
