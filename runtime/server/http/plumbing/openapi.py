"""The OpenAPI document: FastAPI's, completed with the bodies, queries and errors that `Routes` declare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI

from .auth import OPEN_PATHS
from .routes import PAGES, SCHEMAS, Routes

_DEFS = "#/$defs/"  # how pydantic refers within one model's schema
_SUMMARY = "One model, many branches: every shared prefix is computed once. Errors have the shape of `Error`."


def document(app: FastAPI, routes: Sequence[Routes], *, keyed: bool) -> None:
    """Complete ``app.openapi``. ``keyed``: whether the server requires a key."""
    generated = app.openapi
    completed: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not completed:
            completed.update(_completed(generated(), routes, keyed))
        return completed

    app.openapi = openapi  # type: ignore[method-assign]


def _completed(document: dict[str, Any], routes: Sequence[Routes], keyed: bool) -> dict[str, Any]:
    document["info"]["summary"] = _SUMMARY
    schemas: dict[str, Any] = {}
    responses: dict[str, Any] = {}
    for one in routes:
        for (path, method), make in one.operations.items():
            operation, made = document["paths"].get(path.replace(":path", ""), {}).get(method.lower()), make()
            if operation is not None:  # not hidden
                parameters = [*operation.get("parameters", ()), *made.pop("parameters", ())]
                operation |= made | ({"parameters": parameters} if parameters else {})
        schemas[one.shape.schema["title"]] = one.shape.schema
        responses |= {one.shape.prefix + name: one.shape.response(found) for name, found in one.failures.items()}
    document["components"] = {"schemas": schemas, "responses": responses}
    used = set()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _describe(operation)
            used.update(operation["tags"])
            _hoist(operation, schemas)
            if path in OPEN_PATHS and keyed:
                operation["security"] = []
    document["tags"] = [{"name": name, "description": about} for name, about in PAGES.items() if name in used]
    if keyed:
        document["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
        document["security"] = [{"bearer": []}, {"key": []}]
    return document


def _describe(operation: dict[str, Any]) -> None:
    """The first sentence of a docstring becomes the summary."""
    if "description" in operation:
        paragraphs = [" ".join(one.split()) for one in operation.pop("description").replace("``", "`").split("\n\n")]
        first, stop, rest = "\n\n".join(paragraphs).partition(". ")
        operation["summary"] = first.removesuffix(".")
        if stop:
            operation["description"] = rest


def _hoist(operation: dict[str, Any], schemas: dict[str, Any]) -> None:
    """Move the body's schema, and those within it, to the document's components."""
    content = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if content is None:
        return
    schema = content["schema"]
    inner = schema.pop("$defs", {})
    for name, one in (*inner.items(), (schema["title"], schema)):
        schemas[name] = _moved(one)
    content["schema"] = {"$ref": SCHEMAS + schema["title"]}


def _moved(value: Any) -> Any:
    """``value`` with references to where the schemas are now, and without defaults of null: descriptions say what null
    means."""
    if isinstance(value, dict):
        return {name: _moved(one) for name, one in value.items() if name != "default" or one is not None}
    if isinstance(value, list):
        return [_moved(one) for one in value]
    return SCHEMAS + value.removeprefix(_DEFS) if isinstance(value, str) and value.startswith(_DEFS) else value
