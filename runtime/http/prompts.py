"""From a request's prompts to what the engine client takes: one validator for both dialects."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import InvalidRequest
from ..limits import check_token_ids, fit
from ..messages import Limits
from ..sampling_params import SamplingParams, validate
from .client import Prompt

MAX_PRIORITY = 2**31 - 1
MAX_LABEL = 512  # characters of a salt or a request's label


def prepare_params(params: SamplingParams, limits: Limits, names: Mapping[str, str]) -> SamplingParams:
    """Every bound, in the client's words. Raises `InvalidRequest`."""
    return validate(params, limits.vocab_size, names)


def split_prompts(value: Any, field: str) -> tuple[list[str | list[int]], bool]:
    """The prompts of a field that takes ``str | list[str] | list[int] | list[list[int]]``, and whether it is a list.

    Raises `InvalidRequest` for anything else, naming the element.
    """
    if isinstance(value, str):
        return [value], False
    if not isinstance(value, list):
        raise InvalidRequest(
            f"{field} must be a string, a list of strings, a list of token ids or a list of such lists, "
            f"got {type(value).__name__}",
            field=field,
        )
    if not value:
        raise InvalidRequest(f"{field} must not be empty", field=field)
    if not isinstance(value[0], (str, list)):
        return [value], False  # one prompt of token ids; its elements are checked with the vocabulary at hand
    kind = type(value[0])
    for i, element in enumerate(value):
        if type(element) is not kind:
            raise InvalidRequest(
                f"{field}[{i}] must be a {_NAMES[kind]} like the first element, got {type(element).__name__}",
                field=field,
            )
    return value, True


_NAMES: dict[type, str] = {str: "string", list: "list of token ids"}


def check_count(samples: int, bound: int, field: str) -> None:
    """Prompts × n against the server's bound."""
    if samples > bound:
        raise InvalidRequest(
            f"{field}: prompts × n = {samples} is more than the {bound} samples one request may ask for", field=field
        )


def make_prompt(
    prompt: str | Sequence[Any],
    params: SamplingParams,
    limits: Limits,
    field: str,
    names: Mapping[str, str],
    **where: Any,
) -> Prompt:
    """Token ids are checked here; a text's length in tokens is checked by the tokenizer process, the same way."""
    called = (field, names.get("max_tokens", "max_tokens"))
    if isinstance(prompt, str):
        if not prompt:
            raise InvalidRequest(f"{field} must not be empty", field=field)
        return Prompt(params, text=prompt, names=called, **where)
    check_token_ids(prompt, limits.vocab_size, field)
    params = fit(len(prompt), params, limits, field=field, max_tokens=called[1])
    return Prompt(params, tokens=array("i", prompt).tobytes(), names=called, **where)


def check_label(value: str | None, field: str) -> None:
    if value is not None and len(value) > MAX_LABEL:
        raise InvalidRequest(f"{field} must be at most {MAX_LABEL} characters, got {len(value)}", field=field)


def check_priority(value: int, field: str = "priority") -> int:
    if not -MAX_PRIORITY <= value <= MAX_PRIORITY:
        raise InvalidRequest(f"{field} must be between {-MAX_PRIORITY} and {MAX_PRIORITY}, got {value}", field=field)
    return value
