"""The OpenAPI document, made from what `Routes` declare, and its route."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import compile_path

from ..... import __version__
from . import failures
from .auth import OPEN_PATHS
from .failures import Failure
from .routes import PAGES, SCHEMAS, ErrorShape, Route, Routes

_RESPONSES = "#/components/responses/"
_INFO = {
    "title": "Branchwise",
    "version": __version__,
    "summary": "One model, many branches: every shared prefix is computed once. Errors have the shape of `Error`.",
}


def routes(described: Sequence[Routes], *, keyed: bool) -> Routes:
    """``GET /openapi.json``, made at its first request. ``keyed``: whether the server requires a key."""
    routes = Routes("models")
    made: list[bytes] = []

    @routes.add("GET", "/openapi.json", hidden=True)
    async def openapi(_: Request) -> Response:
        if not made:
            made.append(msgspec.json.encode(document(described, keyed=keyed)))
        return Response(made[0], media_type="application/json")

    return routes


def document(described: Sequence[Routes], *, keyed: bool) -> dict[str, Any]:
    schemas: dict[str, Any] = {}
    responses: dict[str, Any] = {}
    paths: dict[str, dict[str, Any]] = {}
    shown = [(one, route) for one in described for route in one.all if not route.hidden]
    for one, route in shown:
        schemas[one.shape.schema["title"]] = one.shape.schema
        found = list(_failures(route))
        responses |= {one.shape.prefix + failure.name: one.shape.response(failure) for failure in found}
        operation = {"tags": [one.page], **_operation(route, found, one.shape)}
        if route.body is not None:
            operation["requestBody"] = {"required": True, "content": _json({"$ref": _hoisted(route.body, schemas)})}
        if route.path in OPEN_PATHS and keyed:
            operation["security"] = []
        paths.setdefault(compile_path(route.path)[1], {})[route.method.lower()] = operation
    used = {one.page for one, _ in shown}
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": _INFO,
        "paths": paths,
        "components": {"schemas": schemas, "responses": responses},
        "tags": [{"name": name, "description": about} for name, about in PAGES.items() if name in used],
    }
    if keyed:
        document["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
        document["security"] = [{"bearer": []}, {"key": []}]
    return document


def _operation(route: Route, found: Sequence[Failure], shape: ErrorShape) -> dict[str, Any]:
    """A route's entry without its body. The first sentence of the handler's docstring is the summary."""
    _, path, in_path = compile_path(route.path)
    paragraphs = inspect.cleandoc(route.handler.__doc__ or "").replace("``", "`").split("\n\n")
    first, stop, rest = "\n\n".join(" ".join(one.split()) for one in paragraphs).partition(". ")
    name = re.sub(r"\W", "_", f"{route.handler.__name__}{path}")
    operation: dict[str, Any] = {"summary": first.removesuffix("."), "operationId": f"{name}_{route.method.lower()}"}
    if stop:
        operation["description"] = rest
    operation["responses"] = _responses(route, found, shape)
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in in_path
    ]
    for name, one in (route.query or {}).items():
        about = {"schema": one.schema, "description": one.about}
        parameters.append({"name": name, "in": "query", "required": False, **about})
    if parameters:
        operation["parameters"] = parameters
    return operation


def _responses(route: Route, found: Sequence[Failure], shape: ErrorShape) -> dict[str, Any]:
    """The document refers to the first failure of each status."""
    answer: dict[str, Any] = {"text/event-stream": {"schema": {}}} if route.events else _json({})
    if route.text == "only":
        answer = {}
    if route.text is not None:
        answer["text/plain"] = {"schema": {"type": "string"}}
    if route.body is not None and "stream" in route.body.model_fields:
        about = "With `stream`: events, of which each has an object after `data: `."
        answer["text/event-stream"] = {"schema": {"type": "string", "description": about}}
    responses: dict[str, Any] = {"200": {"description": "Successful Response", "content": answer}}
    if route.path in OPEN_PATHS:
        responses["503"] = {"description": "The same, with another state: it takes no requests.", "content": answer}
    for failure in found:
        reference = {"$ref": f"{_RESPONSES}{shape.prefix}{failure.name}"}
        responses.setdefault(str(shape.status(failure.status)), reference)
    return responses


def _failures(route: Route) -> Iterator[Failure]:
    if route.path in OPEN_PATHS:
        return
    if route.body is not None or route.query is not None:
        yield failures.INVALID
    yield failures.NO_KEY
    if route.admin:
        yield failures.NOT_ADMIN
    if route.body is not None and "model" in route.body.model_fields:
        yield failures.NO_MODEL
    yield from route.errors
    if route.generates:
        yield failures.KEY_QUEUE
        yield failures.TIMED_OUT
    if route.body is not None:
        yield failures.TOO_LARGE
        yield failures.COMPRESSED
    if route.engine:
        yield failures.ENGINE_FAILED
        yield failures.UNAVAILABLE


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _hoisted(body: type[BaseModel], schemas: dict[str, Any]) -> str:
    """Adds the body's schema, and those within it, to the document's ``schemas``; returns a reference to it."""
    schema = body.model_json_schema(ref_template=SCHEMAS + "{model}")
    made = {**schema.pop("$defs", {}), schema["title"]: schema}
    for field in [field for one in made.values() for field in one.get("properties", {}).values()]:
        if "default" in field and field["default"] is None:
            del field["default"]  # the description says what null means
    schemas |= made
    return f"{SCHEMAS}{schema['title']}"
