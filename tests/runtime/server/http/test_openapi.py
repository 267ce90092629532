"""The OpenAPI document is whole: references lead somewhere, schemas are schemas, every failure has its shape."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from branchwise.runtime.server.http.app import make_app, make_framework, make_routes
from branchwise.runtime.server.http.plumbing import failures
from branchwise.runtime.server.http.state import AppState

FAILURES = {one.name: one for one in vars(failures).values() if isinstance(one, failures.Failure)}


@pytest.fixture
def document(make_state: Callable[..., AppState]) -> dict[str, Any]:
    return openapi(make_state(api_key="sesame"))


def openapi(state: AppState) -> dict[str, Any]:
    return make_framework(state, make_routes(state)).openapi()


def operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == "$ref":
                yield inner
            yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    found = set(references(document))
    assert "#/components/schemas/StreamOptions" in found, "one from within a body's schema"
    for reference in found:
        value: Any = document
        for part in reference.removeprefix("#/").split("/"):
            value = value[part]
    text = str(document)
    assert "$defs" not in text and "HTTPValidationError" not in text


def test_it_is_a_valid_document(document: dict[str, Any]) -> None:
    if importlib.util.find_spec("openapi_spec_validator") is not None:
        importlib.import_module("openapi_spec_validator").validate(document)
    assert document["openapi"].startswith("3.1")
    for name, schema in document["components"]["schemas"].items():
        Draft202012Validator.check_schema(schema)
        assert re.fullmatch(r"[A-Z][A-Za-z]+", name), name
    for name, operation in operations(document):
        assert set(operation["tags"]) <= {tag["name"] for tag in document["tags"]}, name
        in_path = {one["name"] for one in operation.get("parameters", ()) if one["in"] == "path"}
        assert in_path == set(re.findall(r"{(\w+)}", name)), name
        for parameter in operation.get("parameters", ()):
            Draft202012Validator.check_schema(parameter["schema"])
        if "requestBody" in operation:
            assert operation["requestBody"]["required"], name
            assert list(operation["requestBody"]["content"]["application/json"]["schema"]) == ["$ref"], name
    ids = [operation["operationId"] for _, operation in operations(document)]
    assert len(ids) == len(set(ids))


def test_every_route_says_what_it_is_for_and_how_it_fails(document: dict[str, Any]) -> None:
    summaries = [operation["summary"] for _, operation in operations(document)]
    for name, operation in operations(document):
        function = operation["summary"].lower().replace(" ", "_")
        assert not operation["operationId"].startswith(f"{function}_"), f"{name} has no docstring"
        statuses = operation["responses"].keys() - {"200"}
        if name.endswith(" /health"):
            assert statuses == {"503"}
            continue
        assert "401" in statuses, name
        assert "422" not in statuses, name
        for status in statuses:
            failure = operation["responses"][status]["$ref"].rpartition("/")[2]
            anthropic = failure.startswith("Messages")
            assert anthropic == ("/v1/messages" in name)
            known = FAILURES[failure.removeprefix("Messages")].status
            assert int(status) == (529 if anthropic and known == 503 else known), name
        assert ("413" in statuses) == ("requestBody" in operation) <= ("400" in statuses), name
    assert len(set(summaries)) > 25, "aliases share theirs, nobody else does"


def test_examples_are_errors(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    for name, response in document["components"]["responses"].items():
        content = response["content"]["application/json"]
        title = "MessagesError" if name.startswith("Messages") else "Error"
        assert content["schema"] == {"$ref": f"#/components/schemas/{title}"}
        assert content["examples"], name
        for example in content["examples"].values():
            Draft202012Validator(schemas[title]).validate(example["value"])
        status = FAILURES[name.removeprefix("Messages")].status
        assert ("Retry-After" in response.get("headers", {})) == (status in (429, 503))
    schema = schemas["Error"]
    broken = [{}, {"error": "x"}, {"error": {"message": "x"}}, {"detail": "Not Found"}]
    broken.append({"error": {"message": "x", "type": "made_up", "param": None, "code": None}})
    for value in broken:
        assert not Draft202012Validator(schema).is_valid(value), value


@pytest.mark.parametrize(
    ("failure", "example", "state"),
    [
        ("Unavailable", "loading", "starting"),
        ("Unavailable", "shutting down", "draining"),
        ("EngineFailed", "a process has died", "dead"),
    ],
)
async def test_what_a_server_that_does_not_serve_says(
    make_state: Callable[..., AppState], document: dict[str, Any], failure: str, example: str, state: Any
) -> None:
    """Those that can be had from a running server are in tests/e2e/test_openapi_errors.py."""
    app = make_state()
    app.client.state = state
    async with httpx.AsyncClient(transport=httpx.ASGITransport(make_app(app)), base_url="http://localhost") as http:
        answer = await http.post("/v1/completions", json={"prompt": [5], "max_tokens": 1})
    described = document["components"]["responses"][failure]
    [expected] = [
        one for one in described["content"]["application/json"]["examples"].values() if one["summary"] == example
    ]
    assert (answer.status_code, answer.json()) == (FAILURES[failure].status, expected["value"])
    assert answer.headers.get("Retry-After") == ("1" if failure == "Unavailable" else None)


def test_streams_and_texts_are_called_that(document: dict[str, Any]) -> None:
    def kinds(method: str, path: str) -> set[str]:
        return set(document["paths"][path][method]["responses"]["200"]["content"])

    assert kinds("post", "/v1/chat/completions") == {"application/json", "text/event-stream"}
    assert kinds("post", "/branches/{id}/generate") == {"application/json", "text/event-stream"}
    assert kinds("post", "/tokenize") == {"application/json"}
    assert kinds("get", "/metrics") == {"text/plain"}
    assert kinds("get", "/ui/events") == {"text/event-stream"}
    assert kinds("get", "/cache/tree") == {"application/json", "text/plain"}


def test_a_key_is_asked_for_where_there_is_one(make_state: Callable[..., AppState], document: dict[str, Any]) -> None:
    assert document["security"] == [{"bearer": []}, {"key": []}]
    assert document["paths"]["/health"]["get"]["security"] == []
    assert set(document["components"]["securitySchemes"]) == {"bearer", "key"}
    assert "security" not in openapi(make_state())


def test_what_depends_on_the_model_has_no_default_of_its_own(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    for name in ("ChatRequest", "CompletionRequest", "ResponsesRequest", "MessagesRequest"):
        fields = schemas[name]["properties"]
        for field, neutral in (("temperature", 1), ("top_p", 1), ("top_k", 0), ("min_p", 0), ("repetition_penalty", 1)):
            if field not in fields:
                assert (name, field) == ("MessagesRequest", "repetition_penalty")
                continue
            assert "default" not in fields[field], f"{name}.{field}"
            assert {"type": "null"} in fields[field]["anyOf"]
            assert fields[field]["description"] == (
                f"null: the served model's own (`/get_model_info` shows it), else {neutral}."
            )
