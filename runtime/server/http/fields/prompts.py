"""Validates a request's prompts and converts them to `Generate` messages, for both dialects."""

from __future__ import annotations

from array import array
from typing import Any

import msgspec
import numpy as np

from ....chat.json_bounds import deeper_than_now
from ....config import ServerConfig
from ....errors import InvalidRequest
from ....limits import MAX_DEPTH, MAX_LABEL, check_token_ids, fit
from ....messages import Generate, Limits
from ....sampling_params import SamplingParams, validate

Ids = list[int] | np.ndarray[Any, np.dtype[np.int64]]  # one prompt's token ids; an array as `body` makes them
MAX_PRIORITY = 2**31 - 1


def prepare_params(params: SamplingParams, vocab_size: int) -> SamplingParams:
    """Check every bound. Raises `InvalidRequest` with `SamplingParams`' field names.

    A constraint is bounded as the client sent it, before anything is added to it. A schema becomes text: it may hold
    numbers that do not fit into a message between processes.
    """
    validate(params, vocab_size)
    constraint = params.constraint
    if constraint is not None and constraint.kind == "json_schema":
        if deeper_than_now(constraint.text.encode(), MAX_DEPTH):
            raise InvalidRequest("json_schema", f"must be nested at most {MAX_DEPTH} deep")
        return msgspec.structs.replace(params, json_schema=constraint.text)
    return params


def check_prompts(prompts: int, n: int, config: ServerConfig, field: str) -> None:
    """Check the number of prompts, and of samples of all of them."""
    if prompts > config.max_prompts_per_request:
        raise InvalidRequest(field, f"must be at most {config.max_prompts_per_request} prompts, got {prompts}")
    check_count(prompts * n, config.max_samples_per_request, field)


def split_prompts(value: Any, field: str, *, text: bool = True) -> tuple[list[str | Ids], bool]:
    """The prompts of a field that takes ``str | list[str] | list[int] | list[list[int]]``, and whether it is a list.

    An array is one prompt of token ids; see `id_arrays`. ``text``: whether strings are allowed. Raises `InvalidRequest`
    for anything else, with the path of the element.
    """
    if not text and (isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], str))):
        raise InvalidRequest(field, "must hold token ids, got str")
    if isinstance(value, (str, np.ndarray)):
        return [value], False
    if not isinstance(value, list):
        raise InvalidRequest(
            field,
            "must be a string, a list of strings, a list of token ids or a list of such lists, "
            f"got {type(value).__name__}",
        )
    if not value:
        raise InvalidRequest(field, "must not be empty")
    if not isinstance(value[0], (str, list, np.ndarray)):
        return [value], False  # one prompt of token ids; `token_bytes` checks them against the vocabulary
    kind = type(value[0])
    for i, element in enumerate(value):
        if type(element) is not kind:
            raise InvalidRequest(
                f"{field}[{i}]", f"must be a {_NAMES[kind]} like the first element, got {type(element).__name__}"
            )
    return value, True


_NAMES: dict[type, str] = {str: "string", list: "list of token ids", np.ndarray: "list of token ids"}


def check_count(samples: int, bound: int, field: str) -> None:
    """Prompts × n against the server's bound."""
    if samples > bound:
        raise InvalidRequest(
            field,
            f"times n is {samples}, more than the {bound} samples that one request may ask for",
            value=samples,
            limit=bound,
        )


def make_prompt(prompt: str | Ids, params: SamplingParams, limits: Limits, path: str, **options: Any) -> Generate:
    """Token ids are checked here, as ``path``; a text's length in tokens is checked by the tokenizer process.

    ``options``: further fields of `Generate`.
    """
    if isinstance(prompt, str):
        if not prompt:
            raise InvalidRequest(path, "must not be empty")
        return Generate([], params, text=prompt, **options)
    params = fit(len(prompt), params, limits, path=path)  # first: it bounds the ids that are looked at
    return Generate([], params, tokens=token_bytes(prompt, limits.vocab_size, path), **options)


def token_bytes(ids: Ids, vocab_size: int, field: str) -> bytes:
    """Checked token ids as int32 bytes."""
    check_token_ids(ids, vocab_size, field)
    return ids.astype("<i4").tobytes() if isinstance(ids, np.ndarray) else array("i", ids).tobytes()


def check_label(value: str | None, field: str) -> None:
    if value is not None and len(value) > MAX_LABEL:
        raise InvalidRequest(field, f"must be at most {MAX_LABEL} characters, got {len(value)}")


def openai_priority(value: int) -> int:
    """The engine's priority (larger is more urgent) for vLLM's (lower is earlier)."""
    return -check_priority(value)


def check_priority(value: int) -> int:
    if not -MAX_PRIORITY <= value <= MAX_PRIORITY:
        raise InvalidRequest("priority", f"must be between {-MAX_PRIORITY} and {MAX_PRIORITY}, got {value}")
    return value
