"""What a request's output must be: one of four kinds of constraint, as text, and its bounds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import msgspec

if TYPE_CHECKING:
    from .sampling_params import SamplingParams

Kind = Literal["regex", "json_schema", "ebnf", "choices"]
KINDS: tuple[Kind, ...] = get_args(Kind)

MAX_BYTES = 128 * 1024  # of one constraint, as UTF-8
MAX_SAMPLES_BYTES = 8 * 1024 * 1024  # of one constraint times n: every sample's message holds it
MAX_CHOICES = 1024


class Constraint(NamedTuple):
    """``text``: a regular expression, a JSON schema, a Lark or EBNF grammar, or a JSON list of choices."""

    kind: Kind
    text: str


def constraint_of(params: SamplingParams) -> Constraint | None:
    """The constraint that checked ``params`` ask for."""
    if params.regex is not None:
        return Constraint("regex", params.regex)
    if params.json_schema is not None:
        schema = params.json_schema
        return Constraint("json_schema", schema if isinstance(schema, str) else msgspec.json.encode(schema).decode())
    if params.ebnf is not None:
        return Constraint("ebnf", params.ebnf)
    if params.choices is not None:
        return Constraint("choices", msgspec.json.encode(params.choices).decode())
    return None


def without_constraint(params: SamplingParams) -> SamplingParams:
    """``params`` for those who only read the output."""
    if not params.constrained:
        return params
    return msgspec.structs.replace(params, regex=None, json_schema=None, ebnf=None, choices=None)


def problem_with(params: SamplingParams) -> tuple[Kind, str] | None:
    """The field whose type or size is wrong, and how; whether it can be compiled is for the compiler to say."""
    given: list[Kind] = [kind for kind in KINDS if getattr(params, kind) is not None]
    if not given:
        return None
    kind = given[0]
    if len(given) > 1:
        return kind, f"cannot be combined with {given[1]}: an output has one constraint"
    value = getattr(params, kind)
    if kind == "choices":
        if not isinstance(value, (tuple, list)) or not value:
            return kind, "must be a list of strings, not empty"
        if not all(isinstance(choice, str) and choice for choice in value):
            return kind, "must hold non-empty strings"
        if len(value) > MAX_CHOICES:
            return kind, f"must hold at most {MAX_CHOICES} strings, got {len(value)}"
    elif not isinstance(value, (str, dict) if kind == "json_schema" else str):
        return kind, f"must be a string, got {type(value).__name__}"
    elif not value and kind != "json_schema":
        return kind, "must not be empty"
    try:
        size = len(value.encode() if isinstance(value, str) else msgspec.json.encode(value))
    except (TypeError, ValueError, RecursionError) as error:  # not JSON, or a lone surrogate
        return kind, f"must be valid JSON and Unicode: {error}"
    if size > MAX_BYTES:
        return kind, f"must be at most {MAX_BYTES} bytes, got {size}"
    if size * params.n > MAX_SAMPLES_BYTES:
        return kind, f"times n must be at most {MAX_SAMPLES_BYTES} bytes, got {size} × {params.n}"
    return None
