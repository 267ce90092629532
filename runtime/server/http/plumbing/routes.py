"""Routes, each declared with its entry in the OpenAPI document: its body, its query, and its errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse, PlainTextResponse

from ....errors import InvalidRequest, shown
from . import failures
from .auth import OPEN_PATHS, require_admin
from .errors import ERROR_TYPES, RETRY_AFTER_SECONDS, error_body
from .failures import Failure
from .shortcut import Handler

Method = Literal["GET", "HEAD", "POST", "DELETE"]
Function = TypeVar("Function", bound=Callable[..., Any])

SCHEMAS = "#/components/schemas/"
_RESPONSES = "#/components/responses/"

# The pages of the manual (docs/http), and the tags of the document.
PAGES = {
    "chat": "Conversations, as OpenAI's clients send them.",
    "completions": "Prompts, as OpenAI's clients send them.",
    "responses": "OpenAI's responses.",
    "messages": "Conversations, as Anthropic's clients send them.",
    "generate": "Prompts, as SGLang's clients send them.",
    "inference": "Token ids, as vLLM's clients send them.",
    "branches": "Prompts that the server keeps, so that a client sends only what is new.",
    "cache": "What the cache did and would do, and commands to it.",
    "ui": "What the page at /ui shows.",
    "models": "What is served and how it is doing: models, tokens, health, metrics, aborts.",
}


class Query(NamedTuple):
    """A query parameter: its JSON schema (a flag, a choice or a bounded number, with a default) and what it does."""

    schema: dict[str, Any]
    about: str

    def value(self, text: str | None, name: str) -> Any:
        """The parameter as sent, or its default. Raises `InvalidRequest`."""
        if text is None:
            return self.schema["default"]
        match self.schema:
            case {"enum": choices}:
                if text in choices:
                    return text
                wanted = " or ".join(choices)
            case {"minimum": low, "maximum": high}:
                if text.isascii() and text.isdigit() and len(text) < 9 and low <= int(text) <= high:
                    return int(text)
                wanted = f"between {low} and {high}"
            case _:
                if text in ("true", "false", "1", "0"):
                    return text in ("true", "1")
                wanted = "true or false"
        raise InvalidRequest(name, f"must be {wanted}, got {shown(text)}")


def read_query(request: Request, declared: Mapping[str, Query]) -> list[Any]:
    """The values of the declared parameters, in their order. Raises `InvalidRequest`."""
    return [one.value(request.query_params.get(name), name) for name, one in declared.items()]


def flag(about: str) -> Query:
    return Query({"type": "boolean", "default": False}, about)


def count(about: str, most: int, default: int) -> Query:
    return Query({"type": "integer", "minimum": 1, "maximum": most, "default": default}, about)


@dataclass(frozen=True, slots=True)
class ErrorShape:
    """The errors of a dialect. ``prefix``: of its response components; ``schema``: with a title."""

    prefix: str
    schema: dict[str, Any]
    status: Callable[[int], int]  # the dialect's status for one of ours
    body: Callable[[int, str, str | None, str | None], dict[str, Any]]  # of our status, message, param, code

    def response(self, failure: Failure) -> dict[str, Any]:
        """The response component of a failure."""
        examples = {
            one.name.replace(" ", "-").replace(",", ""): {
                "summary": one.name,
                "value": self.body(failure.status, one.message, one.param, one.code),
            }
            for one in failure.examples
        }
        content = {"application/json": {"schema": {"$ref": SCHEMAS + self.schema["title"]}, "examples": examples}}
        response: dict[str, Any] = {"description": failure.about, "content": content}
        if failure.status in (429, 503):
            schema = {"type": "integer", "const": RETRY_AFTER_SECONDS}
            response["headers"] = {"Retry-After": {"description": "Seconds to wait.", "schema": schema}}
        if failure.status == 401:
            response["headers"] = {"WWW-Authenticate": {"schema": {"type": "string", "const": "Bearer"}}}
        return response


MESSAGE = {"type": "string", "description": "What is wrong, and the limit. For people; it may change."}
_TEXT_OR_NULL = {"anyOf": [{"type": "string"}, {"type": "null"}]}
_ERROR = {
    "message": MESSAGE,
    "type": {"type": "string", "enum": list(ERROR_TYPES), "description": "Follows from the status."},
    "param": {**_TEXT_OR_NULL, "description": "The field, as the client names it."},
    "code": {**_TEXT_OR_NULL, "description": "For programs, where the status does not say enough."},
}
OPENAI_SHAPE = ErrorShape(
    prefix="",
    schema={
        "type": "object",
        "title": "Error",
        "description": "The body of every 4xx and 5xx but those of /v1/messages; within a stream, its last event.",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": list(_ERROR),
                "properties": _ERROR,
                "additionalProperties": False,
            }
        },
    },
    status=lambda status: status,
    body=error_body,
)


class Routes:
    """The routes of one module. ``page``: of `PAGES`; ``shape``: of their errors."""

    def __init__(self, page: str, shape: ErrorShape = OPENAI_SHAPE) -> None:
        self.router = APIRouter(tags=[page])
        self.fast: dict[str, Handler] = {}  # by path: POST handlers that `Shortcut` calls directly
        self.shape = shape
        self.failures: dict[str, Failure] = {}  # by name: those of `operations` made so far
        # By path and method: what the document adds to FastAPI's entry. The schemas of all bodies take 40 ms.
        self.operations: dict[tuple[str, str], Callable[[], dict[str, Any]]] = {}

    def add(
        self,
        method: Method,
        *paths: str,
        body: type[BaseModel] | None = None,
        query: dict[str, Query] | None = None,
        errors: Iterable[Failure] = (),
        admin: bool = False,
        generates: bool = False,
        engine: bool = True,
        text: Literal["also", "only"] | None = None,
        events: bool = False,
        fast: bool = False,
        hidden: bool = False,
    ) -> Callable[[Function], Function]:
        """Decorate the handler of a route.

        Args:
            paths: The path and its aliases.
            body: The model of the JSON body.
            query: The parameters of the query, by name.
            errors: Failures beside those that follow from the other arguments.
            admin: Whether only the operator's key may call it, which is enforced here.
            generates: Whether it opens engine requests: they have a share of the queue, and a time limit.
            engine: Whether it needs the engine to be ready.
            text: Whether it answers in plain text.
            events: Whether it always answers with server-sent events.
            fast: Whether `Shortcut` calls it without the framework's routing.
            hidden: Whether the document leaves it out.
        """

        def decorate(handler: Function) -> Function:
            for path in paths:
                found = [] if path in OPEN_PATHS else list(_failures(body, query, errors, admin, generates, engine))
                self.operations[path, method] = partial(self._operation, path, body, query, found, text, events)
                self.router.add_api_route(
                    path,
                    handler,
                    methods=[method],
                    dependencies=[Depends(require_admin)] if admin else None,
                    include_in_schema=not hidden,
                    response_class=PlainTextResponse if text == "only" else JSONResponse,
                )
                if fast:
                    self.fast[path] = handler
            return handler

        return decorate

    def _operation(
        self,
        path: str,
        body: type[BaseModel] | None,
        query: dict[str, Query] | None,
        found: list[Failure],
        text: str | None,
        events: bool,
    ) -> dict[str, Any]:
        answer: dict[str, Any] = {"text/event-stream" if events else "application/json": {"schema": {}}}
        if text == "only":
            answer = {}
        if text is not None:
            answer["text/plain"] = {"schema": {"type": "string"}}
        if body is not None and "stream" in body.model_fields:
            about = "With `stream`: events, of which each has an object after `data: `."
            answer["text/event-stream"] = {"schema": {"type": "string", "description": about}}
        responses: dict[str, Any] = {"200": {"description": "Successful Response", "content": answer}}
        if path in OPEN_PATHS:
            responses["503"] = {"description": "The same, with another state: it takes no requests.", "content": answer}
        for failure in found:
            self.failures[failure.name] = failure
            reference = {"$ref": f"{_RESPONSES}{self.shape.prefix}{failure.name}"}
            responses.setdefault(str(self.shape.status(failure.status)), reference)
        operation: dict[str, Any] = {"responses": responses}
        if body is not None:
            content = {"application/json": {"schema": body.model_json_schema()}}
            operation["requestBody"] = {"required": True, "content": content}
        if query is not None:
            operation["parameters"] = [
                {"name": name, "in": "query", "required": False, "schema": one.schema, "description": one.about}
                for name, one in query.items()
            ]
        return operation


def _failures(
    body: type[BaseModel] | None,
    query: dict[str, Query] | None,
    errors: Iterable[Failure],
    admin: bool,
    generates: bool,
    engine: bool,
) -> Iterator[Failure]:
    """A route's failures. The document refers to the first of each status."""
    if body is not None or query is not None:
        yield failures.INVALID
    yield failures.NO_KEY
    if admin:
        yield failures.NOT_ADMIN
    if body is not None and "model" in body.model_fields:
        yield failures.NO_MODEL
    yield from errors
    if generates:
        yield failures.KEY_QUEUE
        yield failures.TIMED_OUT
    if body is not None:
        yield failures.TOO_LARGE
        yield failures.COMPRESSED
    if engine:
        yield failures.ENGINE_FAILED
        yield failures.UNAVAILABLE
