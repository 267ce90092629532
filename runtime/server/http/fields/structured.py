"""The constraint on an output, as OpenAI, vLLM and SGLang name it: each becomes one field of `SamplingParams`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from ....errors import InvalidRequest, shown
from .parse import Strict

ANY_OBJECT = '{"type":"object"}'

# vLLM's names within structured_outputs.
_VLLM = {"json": "json_schema", "regex": "regex", "choice": "choices", "grammar": "ebnf"}


class Structured(Strict):
    """The constraint fields: at most one of OpenAI's, vLLM's, and SGLang's three."""

    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = Field(None, description="json, regex, choice or grammar.")
    json_schema: str | dict[str, Any] | None = None
    regex: str | None = None
    ebnf: str | None = None


def constraint(
    request: Structured, text_format: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """The field of `SamplingParams` that constrains the output, and the client's name of it; empty if nothing does.

    ``text_format``: of OpenAI's responses, where a schema is not nested as in a ``response_format``. Sizes and contents
    are checked later. Raises `InvalidRequest` where several fields constrain.
    """
    found: list[tuple[str, str, Any]] = []  # our field, the client's, its value
    for ours in ("regex", "json_schema", "ebnf"):
        found.append((ours, ours, getattr(request, ours)))
    if request.structured_outputs is not None:
        found += _structured_outputs(request.structured_outputs)
    if request.response_format is not None:
        found.append(("json_schema", "response_format", _response_format(request.response_format)))
    if text_format is not None:
        found.append(("json_schema", "text.format", _text_format(text_format)))
    given = [one for one in found if one[2] is not None]
    if not given:
        return {}, {}
    if len(given) > 1:
        first, second = given[0][1], given[1][1]
        raise InvalidRequest(second, "cannot be combined with {0}: an output has one constraint", others=(first,))
    ours, theirs, value = given[0]
    return {ours: tuple(value) if isinstance(value, list) else value}, {ours: theirs}


def _structured_outputs(options: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    found: list[tuple[str, str, Any]] = []
    for name, value in options.items():
        path = f"structured_outputs.{name[:60]}"
        if value is None or value is False:
            continue
        if name == "json_object":
            found.append(("json_schema", path, ANY_OBJECT))
        elif name in _VLLM:
            found.append((_VLLM[name], path, value))
        else:
            raise InvalidRequest(path, "is not supported by this server")
    if not found:
        raise InvalidRequest("structured_outputs", "must have json, regex, choice or grammar")
    return found


def _response_format(wanted: Mapping[str, Any]) -> Any:
    """The JSON schema of a response format, or None for plain text."""
    if not _names_schema(wanted, "response_format"):
        return ANY_OBJECT if wanted["type"] == "json_object" else None
    named = wanted.get("json_schema")
    if not isinstance(named, Mapping) or not isinstance(named.get("schema"), (Mapping, str)):
        raise InvalidRequest("response_format.json_schema", "must be an object with a schema")
    return named["schema"]


def _text_format(wanted: Mapping[str, Any]) -> Any:
    """See `_response_format`; the Responses API has the schema one level up."""
    if not _names_schema(wanted, "text.format"):
        return ANY_OBJECT if wanted["type"] == "json_object" else None
    schema = wanted.get("schema")
    if not isinstance(schema, dict):
        raise InvalidRequest("text.format.schema", f"must be a JSON schema, an object, got {type(schema).__name__}")
    return schema


def _names_schema(wanted: Mapping[str, Any], path: str) -> bool:
    kind = wanted.get("type")
    if kind not in ("text", "json_object", "json_schema"):
        raise InvalidRequest(f"{path}.type", f"must be text, json_object or json_schema, got {shown(kind)}")
    return bool(kind == "json_schema")
