"""From a JSON object to a request's model: types checked by pydantic, fields of other servers refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ....errors import InvalidRequest
from ....sampling_params import MAX_LOGIT_BIAS
from ..plumbing.body import MAX_FIELDS
from .known import ANSWER_FIELDS, REFUSED, UNSUPPORTED, asks_for_nothing

# Fail fast: an error for each of thousands of elements would be slow to build.
Strings = Annotated[list[str], Field(fail_fast=True)]
Integers = Annotated[list[int], Field(fail_fast=True)]
Prompts = Any  # str | list[int] | list[str] | list[list[int]], or an array: checked by `prompts.split_prompts`

MAX_ENTRIES = 16_384  # of a field that holds many; token ids are as many as the body holds
_IDS = frozenset({"prompt", "input_ids", "token_ids", "extend", "tokens"})  # fields that may be one flat list of them
_NULL_MEANS_SOMETHING = frozenset({"max_new_tokens"})


class Strict(BaseModel):
    """No coercion: "1" is not 1, 1 is not true. `parse` has refused the unknown fields that must not be ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", defer_build=True)


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


R = TypeVar("R", bound=BaseModel)


def parse(kind: type[R], body: Mapping[str, Any], within: str = "", unsupported: frozenset[str] = UNSUPPORTED) -> R:
    """``body`` as a ``kind``. Null means the default, or what the field's description states.

    ``within``: the path of the body, with a dot. ``unsupported``: fields that are refused, with any value that asks for
    something. Raises `InvalidRequest` for the first field that is wrong.
    """
    _check_sizes(kind, body, within)
    fields = kind.model_fields
    for name, value in body.items():
        if name in unsupported and name not in fields and not asks_for_nothing(name, value):
            known = name in ANSWER_FIELDS and name not in REFUSED
            problem = "is not a field of this route" if known else "is not supported by this server"
            hint = REFUSED.get(name)
            raise InvalidRequest(f"{within}{name}", problem + (f": {hint}" if hint else ""))
    given = {name: value for name, value in body.items() if value is not None or name in _NULL_MEANS_SOMETHING}
    if kind.model_config.get("extra") == "forbid":
        given = {name: value for name, value in given.items() if name not in unsupported - fields.keys()}
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _invalid(error, within) from error


def _invalid(error: ValidationError, within: str) -> InvalidRequest:
    # Of a union's branches, the one that matched deepest is the one that was meant.
    first = max(error.errors(include_url=False, include_context=False), key=lambda one: len(one["loc"]))
    path = within + _path(first["loc"])
    if first["type"] == "missing":
        return InvalidRequest(path, "is required")
    if first["type"] == "extra_forbidden":
        return InvalidRequest(path, "is not a field this server knows")
    expected = first["msg"].removeprefix("Input should be ")
    return InvalidRequest(path, f"must be {expected}, got {type(first['input']).__name__}")


def _check_sizes(kind: type[BaseModel], body: Mapping[str, Any], within: str) -> None:
    """Count entries before pydantic looks at each: it reports every wrong one, which took a minute for four million."""
    if len(body) > MAX_FIELDS:
        raise InvalidRequest(
            within.rstrip(".") or "the body", f"must have at most {MAX_FIELDS} fields, got {len(body)}"
        )
    for name, value in body.items():
        if not isinstance(value, (dict, list)) or len(value) <= MAX_ENTRIES or name not in kind.model_fields:
            continue
        if isinstance(value, dict) or name not in _IDS or not isinstance(value[0], int):
            raise InvalidRequest(f"{within}{name}", f"must have at most {MAX_ENTRIES} entries, got {len(value)}")
    bias = body.get("logit_bias")
    if isinstance(bias, dict) and len(bias) > MAX_LOGIT_BIAS:
        raise InvalidRequest(f"{within}logit_bias", f"must hold at most {MAX_LOGIT_BIAS} entries, got {len(bias)}")


def _path(location: tuple[str | int, ...]) -> str:
    """``stream_options.include_usage``, ``stop[3]``: pydantic's location without union branches (``list[str]``)."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part not in ("str", "int", "bool") and "[" not in part:
            path += f".{part}" if path else part
    return path
