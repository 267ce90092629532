"""Output constraints: what a request's output must match, as text, and the size limits of that text."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import msgspec

Kind = Literal["regex", "json_schema", "ebnf", "choices"]
KINDS: tuple[Kind, ...] = get_args(Kind)

MAX_BYTES = 128 * 1024  # of one constraint, as UTF-8
MAX_SAMPLES_BYTES = 8 * 1024 * 1024  # of one constraint times n: each sample's message carries a copy
MAX_CHOICES = 1024


class Constraint(NamedTuple):
    """``text``: a regular expression, a JSON schema, a Lark or EBNF grammar, or a JSON list of choices."""

    kind: Kind
    text: str

    @classmethod
    def of_value(cls, kind: Kind, value: Any) -> Constraint:
        """From a field of `SamplingParams` that `constraint_problem` has accepted."""
        return cls(kind, value if isinstance(value, str) else msgspec.json.encode(value).decode())


class ConstraintError(Exception):
    """A constraint that cannot be enforced.

    Args:
        problem: continues a sentence whose subject is the constraint's field, e.g. "must be valid JSON".
        status: the HTTP status it becomes.
    """

    def __init__(self, problem: str, *, status: int = 400) -> None:
        super().__init__(problem)
        self.problem = problem
        self.status = status


def constraint_problem(kind: Kind, value: Any, n: int) -> str | None:
    """The fault in the type or size of a constraint that ``n`` samples share, or None.

    Whether it can be enforced is for the grammar compiler to say.
    """
    if kind == "choices":
        if not isinstance(value, (tuple, list)) or not value:
            return "must be a list of strings, not empty"
        if not all(isinstance(choice, str) and choice for choice in value):
            return "must hold non-empty strings"
        if len(value) > MAX_CHOICES:
            return f"must hold at most {MAX_CHOICES} strings, got {len(value)}"
    elif not isinstance(value, (str, dict) if kind == "json_schema" else str):
        return f"must be a string, got {type(value).__name__}"
    elif not value and kind != "json_schema":
        return "must not be empty"
    try:
        size = len(value.encode() if isinstance(value, str) else msgspec.json.encode(value))
    except (TypeError, ValueError, RecursionError) as error:  # not JSON, or a lone surrogate
        return f"must be valid JSON and Unicode: {error}"
    if size > MAX_BYTES:
        return f"must be at most {MAX_BYTES} bytes, got {size}"
    if size * n > MAX_SAMPLES_BYTES:
        return f"times n must be at most {MAX_SAMPLES_BYTES} bytes, got {size} × {n}"
    return None
