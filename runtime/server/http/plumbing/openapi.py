"""The OpenAPI document: what FastAPI finds, and what it cannot know: errors, streams, keys, the names of schemas.

What a route says for itself stays. Everything else follows from its path and from the fields of its body.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

from fastapi import FastAPI
from pydantic import BaseModel

from ..anthropic import errors as anthropic
from .auth import OPEN_PATHS
from .errors import ERROR_TYPES, RETRY_AFTER_SECONDS, error_body

_SCHEMAS = "#/components/schemas/"
_DEFS = "#/$defs/"  # how pydantic refers within one model's schema

_SUMMARY = "One model, many branches: every shared prefix is computed once. Errors have the shape of `Error`."

# (how the path begins, tag); the first that fits. A tag is the name of a page in runtime/http/docs/.
_TAGS = (
    ("/v1/chat", "chat"),
    ("/v1/completions", "completions"),
    ("/v1/responses", "responses"),
    ("/v1/messages", "messages"),
    ("/generate", "generate"),
    ("/branches", "branches"),
    ("/cache", "cache"),
    ("/flush_cache", "cache"),
    ("/", "models"),
)
_ABOUT = {
    "chat": "Conversations, as OpenAI's clients hold them.",
    "completions": "Prompts, as OpenAI's clients send them.",
    "responses": "OpenAI's responses.",
    "messages": "Conversations, as Anthropic's clients hold them.",
    "generate": "Prompts, as SGLang's clients send them.",
    "branches": "Prompts that the server remembers, so that a client sends only what is new.",
    "cache": "What the cache did, would do, and is asked to do.",
    "models": "What is served and how it is doing: models, tokens, health, metrics, aborts.",
}

_ADMIN = {"/cache/tree", "/cache/check", "/cache/evict", "/flush_cache", "/start_profile", "/stop_profile"}
_ADMIN_PARTLY = {"/abort_request"}  # with abort_all
_GENERATES = {
    *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/generate"),
    *("/branches/{id}/generate", "/branches/{id}/score", "/cache/warm"),
}
_WITHOUT_ENGINE = {"/health", "/metrics", "/version", "/abort_request"}
_REFUSES = {
    ("get", "/cache/tree"),
    ("get", "/branches/{id}"),
    ("post", "/start_profile"),
    ("post", "/stop_profile"),
}


class Failure(NamedTuple):
    """One way to fail: its status, what it means, and bodies that were sent (parameter, code, message)."""

    status: int
    about: str
    examples: dict[str, tuple[str | None, str | None, str]]


FAILURES = {
    "Invalid": Failure(
        400,
        "It cannot be served as asked. `param` names the field, `message` the limit.",
        {
            "a value out of range": (
                "temperature",
                None,
                "temperature must be at least 0.0 and at most 100.0, got -1.0",
            ),
            "too long": (
                "max_tokens",
                None,
                "prompt 1 + max_tokens 5000 = 5001 tokens, more than the 4352 tokens of the model's context; "
                "lower max_tokens or raise --max-model-len",
            ),
            "known, and not built": ("suffix", None, "suffix is not supported by this server"),
            "no body": (None, None, "the body is empty: it must be a JSON object"),
        },
    ),
    "NoKey": Failure(
        401,
        "The server has a key, and the request has none that it knows.",
        {
            "no key": (
                None,
                "invalid_api_key",
                "a valid API key is needed: send Authorization: Bearer KEY or x-api-key: KEY",
            )
        },
    ),
    "NotAdmin": Failure(
        403,
        "It touches what is everybody's, and the key is not the operator's.",
        {"not the operator": (None, None, "this route needs the admin key (--admin-api-key)")},
    ),
    "NoModel": Failure(
        404,
        "Another model's name. A request may leave the model out.",
        {
            "another model": (
                "model",
                "model_not_found",
                "the model 'gpt-4o' does not exist; this server serves 'branchwise'",
            )
        },
    ),
    "NoBranch": Failure(
        404,
        "No branch had this id, ever, or it is another key's.",
        {"never was": ("branch", None, "there is no branch bnobody")},
    ),
    "NoPin": Failure(
        404,
        "No pin of this key has the id.",
        {"no pin": ("id", None, "there is no pin pin-nobody: it has expired or never was")},
    ),
    "BranchBusy": Failure(
        409,
        "The branch is generating. It can be read, deleted, and waited for.",
        {
            "generating": (
                "branch",
                "branch_busy",
                "the branch bsBRnzyioPmx9Gzbmy30adIiDejaqpvV9 is generating: wait for its answer, fork it before, or "
                "delete it",
            )
        },
    ),
    "NotCached": Failure(
        409,
        "Nothing of the prompt is in the cache.",
        {
            "nothing to pin": (
                None,
                "not_cached",
                "none of these 17 tokens is cached: there is nothing to pin (warm: true computes them)",
            )
        },
    ),
    "Recording": Failure(
        409,
        "A recording is under way, or none is.",
        {"nothing to stop": (None, None, "no recording is under way")},
    ),
    "BranchGone": Failure(
        410,
        "The branch has ended: make it again.",
        {
            "gone": (
                "branch",
                "branch_gone",
                "the branch bsBRnzyioPmx9Gzbmy30adIiDejaqpvV9 has expired or was deleted",
            )
        },
    ),
    "TooLarge": Failure(
        413,
        "The body has more bytes than `--max-body-bytes`.",
        {"too large": (None, None, "the request body must be at most 16777216 bytes")},
    ),
    "TooManyBranches": Failure(
        429,
        "`--max-branches` live already.",
        {
            "too many branches": (
                None,
                "too_many_branches",
                "there are 4096 branches and 1 more would pass the limit of 4096 (--max-branches); delete some, or try "
                "again when others have expired",
            )
        },
    ),
    "KeyQueue": Failure(
        429,
        "The key has as many unfinished requests as `--max-queued-per-key` lets it have.",
        {
            "its share of the queue": (
                None,
                "rate_limit_exceeded",
                "this key has 2 unfinished requests and 2 more would pass its limit of 3 (--max-queued-per-key); try "
                "again later",
            )
        },
    ),
    "PinQuota": Failure(
        429,
        "Pins and breakpoints may keep a bounded share of the cache.",
        {
            "no room for a pin": (
                None,
                "pin_quota",
                "16 tokens more to pin, and there is room for 0 of the 131072 one key may pin (--max-pinned-share, "
                "--pinned-share-per-key); unpin some, or try again when others have expired",
            )
        },
    ),
    "EngineFailed": Failure(
        500,
        "Not the request's fault. With `engine_dead` the server is going down.",
        {
            "a process has died": (
                None,
                "engine_dead",
                "the engine has stopped; the server is going down",
            )
        },
    ),
    "Unavailable": Failure(
        503,
        "Loading, shutting down, or full (`--max-queued-requests`).",
        {
            "loading": (None, "overloaded", "the model is still loading"),
            "full": (
                None,
                "overloaded",
                "4096 requests are queued and 1 more would pass the limit of 4096; try again later",
            ),
            "shutting down": (None, "overloaded", "the server is shutting down"),
        },
    ),
    "TimedOut": Failure(
        504,
        "It took longer than `--request-timeout`; in a stream this is the last event.",
        {
            "out of time": (
                None,
                "request_timeout",
                "the request did not finish within the 60 s it may take (--request-timeout)",
            )
        },
    ),
}


class _Shape(NamedTuple):
    """How the errors of some routes look. ``prefix``: of their names beside those of others."""

    prefix: str
    schema: dict[str, Any]
    status: Callable[[int], int]
    body: Callable[[Failure, str, str | None, str | None], dict[str, Any]]  # of failure, message, field, code

    @property
    def title(self) -> str:
        return str(self.schema["title"])


def takes(kind: type[BaseModel]) -> dict[str, Any]:
    """``openapi_extra`` of a route that reads a ``kind``."""
    content = {"application/json": {"schema": kind.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}


def query(**parameters: tuple[dict[str, Any], str]) -> dict[str, Any]:
    """``openapi_extra`` of a route with these query parameters: each a schema and what it is for."""
    return {
        "parameters": [
            {"name": name, "in": "query", "required": False, "schema": schema, "description": about}
            for name, (schema, about) in parameters.items()
        ]
    }


def document(app: FastAPI, *, keyed: bool) -> None:
    """Makes ``app.openapi`` tell the whole. ``keyed``: whether the server asks for a key."""
    found = app.openapi
    whole: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not whole:
            whole.update(_completed(found(), keyed))
        return whole

    app.openapi = openapi  # type: ignore[method-assign]


def _completed(document: dict[str, Any], keyed: bool) -> dict[str, Any]:
    document["info"]["summary"] = _SUMMARY
    schemas: dict[str, Any] = {shape.title: shape.schema for shape in (_OPENAI, _ANTHROPIC)}
    responses: dict[str, Any] = {name: _response(failure, _OPENAI) for name, failure in FAILURES.items()}
    document["components"] = {"schemas": schemas, "responses": responses}
    used = set()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            _describe(operation)
            operation["tags"] = [next(tag for begin, tag in _TAGS if path.startswith(begin))]
            used.update(operation["tags"])
            fields = _hoist(operation, schemas)
            responses |= _answers(method, path, fields, operation["responses"])
            if path in OPEN_PATHS and keyed:
                operation["security"] = []
    document["tags"] = [{"name": name, "description": about} for name, about in _ABOUT.items() if name in used]
    if keyed:
        document["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
        document["security"] = [{"bearer": []}, {"key": []}]
    return document


def _describe(operation: dict[str, Any]) -> None:
    """A docstring's first sentence is the summary."""
    if "description" in operation:
        paragraphs = [" ".join(one.split()) for one in operation.pop("description").replace("``", "`").split("\n\n")]
        first, stop, rest = "\n\n".join(paragraphs).partition(". ")
        operation["summary"] = first.removesuffix(".")
        if stop:
            operation["description"] = rest


def _hoist(operation: dict[str, Any], schemas: dict[str, Any]) -> set[str] | None:
    """Puts the body's schema, and those within it, under their names where every reference finds them. Returns the
    body's fields; None: it has no body."""
    content = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if content is None:
        return None
    schema = content["schema"]
    inner = schema.pop("$defs", {})
    for name, one in (*inner.items(), (schema["title"], schema)):
        schemas[name] = _renamed(one)
    content["schema"] = {"$ref": _SCHEMAS + schema["title"]}
    return set(schema.get("properties", ()))


def _renamed(value: Any) -> Any:
    """With references to where the schemas are now."""
    if isinstance(value, dict):
        return {name: _renamed(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_renamed(one) for one in value]
    return _SCHEMAS + value.removeprefix(_DEFS) if isinstance(value, str) and value.startswith(_DEFS) else value


def _answers(method: str, path: str, fields: set[str] | None, responses: dict[str, Any]) -> dict[str, Any]:
    """Completes an operation's ``responses``. Returns those it refers to that are not everybody's."""
    responses.pop("422", None)  # FastAPI's own; what is wrong with a request is a 400 here
    content = responses["200"]["content"]
    if path == "/metrics":
        del content["application/json"]
    if path in ("/metrics", "/cache/tree"):
        content["text/plain"] = {"schema": {"type": "string"}}
    if fields and "stream" in fields:
        events = "With `stream`: events, of which each has an object after `data: `."
        content["text/event-stream"] = {"schema": {"type": "string", "description": events}}
    if path in OPEN_PATHS:
        responses["503"] = {**responses["200"], "description": "The same, with another state: it takes no requests."}
        return {}
    shape = _ANTHROPIC if path.startswith(anthropic.ROOT) else _OPENAI
    used = {}
    for name in _failures(method, path, fields):
        used[shape.prefix + name] = _response(FAILURES[name], shape)
        status = str(shape.status(FAILURES[name].status))
        responses.setdefault(status, {"$ref": f"#/components/responses/{shape.prefix}{name}"})
    return used


def _failures(method: str, path: str, fields: Collection[str] | None) -> Iterator[str]:
    if fields is not None or (method, path) in _REFUSES:
        yield "Invalid"
    yield "NoKey"
    if path in _ADMIN | _ADMIN_PARTLY:
        yield "NotAdmin"
    if path.startswith("/v1/models/") or (fields and "model" in fields):
        yield "NoModel"
    of_branch = path.startswith("/branches/{id}")
    if of_branch or (method, path) == ("post", "/branches"):  # which may have a parent
        yield "NoBranch"
        yield "BranchGone"
        if method == "post":
            yield "BranchBusy"
        if path in ("/branches", "/branches/{id}/fork"):
            yield "TooManyBranches"
    if path == "/cache/pin":
        yield "NotCached"
        yield "PinQuota"
    if path in ("/start_profile", "/stop_profile"):
        yield "Recording"
    if path == "/cache/unpin":
        yield "NoPin"
    if path in _GENERATES:
        yield "KeyQueue"
        yield "TimedOut"
    if fields is not None:
        yield "TooLarge"
    if path not in _WITHOUT_ENGINE:
        yield "EngineFailed"
        yield "Unavailable"


_MESSAGE = {"type": "string", "description": "What is wrong, and the limit. For people; it may change."}


def _error_schema() -> dict[str, Any]:
    text_or_null = {"anyOf": [{"type": "string"}, {"type": "null"}]}
    inner = {
        "message": _MESSAGE,
        "type": {"type": "string", "enum": list(ERROR_TYPES), "description": "Follows from the status."},
        "param": text_or_null | {"description": "The field, in the client's own words."},
        "code": text_or_null | {"description": "For programs, where the status does not say enough."},
    }
    error = {"type": "object", "required": list(inner), "properties": inner, "additionalProperties": False}
    return {
        "type": "object",
        "title": "Error",
        "description": "The body of every 4xx and 5xx but those of /v1/messages; within a stream, its last event.",
        "required": ["error"],
        "properties": {"error": error},
    }


def _anthropic_schema() -> dict[str, Any]:
    inner = {"type": {"type": "string", "description": "Follows from the status."}, "message": _MESSAGE}
    properties = inner | {"details": {"type": "object", "description": "Only where a thread was asked for."}}
    error = {"type": "object", "required": list(inner), "properties": properties, "additionalProperties": False}
    return {
        "type": "object",
        "title": "MessagesError",
        "description": "Anthropic's: the body of every 4xx and 5xx of /v1/messages; within a stream, its last event.",
        "required": ["type", "error", "request_id"],
        "properties": {"type": {"const": "error"}, "error": error, "request_id": {"type": "string"}},
    }


_OPENAI = _Shape(
    "",
    _error_schema(),
    lambda status: status,
    lambda failure, message, param, code: error_body(failure.status, message, param, code),
)
_ANTHROPIC = _Shape(
    "Messages",
    _anthropic_schema(),
    anthropic.status_of,
    lambda failure, message, param, code: anthropic.error_body(
        anthropic.status_of(failure.status), message, "req_0123456789abcdef0123456789abcdef"
    ),
)


def _response(failure: Failure, shape: _Shape) -> dict[str, Any]:
    examples = {
        name.replace(" ", "-").replace(",", ""): {"summary": name, "value": shape.body(failure, message, param, code)}
        for name, (param, code, message) in failure.examples.items()
    }
    content = {"application/json": {"schema": {"$ref": _SCHEMAS + shape.title}, "examples": examples}}
    response: dict[str, Any] = {"description": failure.about, "content": content}
    if failure.status in (429, 503):
        schema = {"type": "integer", "const": RETRY_AFTER_SECONDS}
        response["headers"] = {"Retry-After": {"description": "Seconds to wait.", "schema": schema}}
    if failure.status == 401:
        response["headers"] = {"WWW-Authenticate": {"schema": {"type": "string", "const": "Bearer"}}}
    return response
