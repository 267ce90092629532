"""What the OpenAPI document says of errors is what a server sends: every example, and whatever else goes wrong."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from jsonschema import Draft202012Validator

from branchwise.runtime.config import EngineConfig, ServerConfig
from branchwise.runtime.server.http.plumbing import failures

FAILURES = {one.name: one for one in vars(failures).values() if isinstance(one, failures.Failure)}

KEY, ADMIN = "ann-key", "operator-key"
PARTLY_ADMIN = ("/abort_request", "/metrics")  # with abort_all; where there are several tenants
# tests/runtime/http/test_openapi.py, and test_client.py beside it
NOT_HERE = {"loading", "shutting down", "a process has died", "its share of the queue", "out of time"}
EXAMPLES = [(name, one) for name, failure in FAILURES.items() for one, *_ in failure.examples if one not in NOT_HERE]


class Api:
    """A server, and the document it serves."""

    def __init__(self, server: Any) -> None:
        self.url: str = server.url
        self.http: httpx.Client = server.http
        self.document = self.http.get("/openapi.json").json()

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def branch(self) -> str:
        return str(self.post("/branches", input_ids=[5, 6, 7]).json()["id"])

    def declared(self, method: str, path: str, answer: httpx.Response) -> str | None:
        """The failure that the document has for this answer, whose shape is checked."""
        operation = self.document["paths"][path][method.lower()]
        assert str(answer.status_code) in operation["responses"], (method, path, answer.status_code, answer.text)
        if answer.status_code == 200:
            return None
        if path == "/health":
            return None
        assert answer.headers["content-type"] == "application/json"
        name = operation["responses"][str(answer.status_code)]["$ref"].rpartition("/")[2]
        response = self.document["components"]["responses"][name]
        schema = response["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        assert schema == ("MessagesError" if path.startswith("/v1/messages") else "Error")
        Draft202012Validator(self.document["components"]["schemas"][schema]).validate(answer.json())
        headers = response.get("headers", {})
        for header, about in headers.items():
            assert answer.headers[header] == str(about["schema"]["const"])
        assert ("Retry-After" in answer.headers) == ("Retry-After" in headers)
        return str(name)


@pytest.fixture(scope="module")
def api(tokenizer_folder: Any, run_server_process: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    engine = EngineConfig(
        model=str(tokenizer_folder),
        check_when_idle=True,
        kv_cache_tokens=4096,
        max_model_len=1024,
        max_branches=2,
        max_pinned_share=0.01,
        profile=str(tmp_path_factory.mktemp("traces")),
    )
    config = ServerConfig(
        engine=engine,
        port=0,
        null_executor=True,
        null_step_seconds=0.01,
        served_model_name="branchwise",
        api_key=KEY,
        admin_api_key=ADMIN,
        max_queued_requests=4,
        max_body_bytes=10_000,
    )
    with run_server_process(config, tmp_path_factory.mktemp("run")) as server:
        yield Api(server)


def busy(api: Api) -> httpx.Response:
    branch = api.branch()
    body = {"stream": True, "sampling_params": {"max_new_tokens": 900, "ignore_eos": True}}
    with api.http.stream("POST", f"/branches/{branch}/generate", json=body) as stream:
        lines = stream.iter_lines()  # dropping it would close the stream
        next(lines)
        answer = api.post(f"/branches/{branch}/fork", n=1)
    api.http.delete(f"/branches/{branch}")
    return answer


def gone(api: Api) -> httpx.Response:
    branch = api.branch()
    api.http.delete(f"/branches/{branch}")
    return api.post(f"/branches/{branch}/extend", text="x")


def one_too_many(api: Api) -> httpx.Response:
    branches = [api.branch(), api.branch()]
    answer = api.post("/branches")
    for branch in branches:
        api.http.delete(f"/branches/{branch}")
    return answer


# What sends each example: (method, path as the document has it, what to do).
CASES: dict[str, tuple[str, str, Callable[[Api], httpx.Response]]] = {
    "a value out of range": (
        "POST",
        "/v1/completions",
        lambda api: api.post("/v1/completions", prompt="x", temperature=-1),
    ),
    "too long": ("POST", "/v1/completions", lambda api: api.post("/v1/completions", prompt=[5], max_tokens=5000)),
    "known, and not built": (
        "POST",
        "/v1/completions",
        lambda api: api.post("/v1/completions", prompt="x", suffix="y"),
    ),
    "no body": ("POST", "/generate", lambda api: api.http.post("/generate")),
    "no key": ("GET", "/v1/models", lambda api: httpx.get(f"{api.url}/v1/models")),
    "not the operator": ("POST", "/flush_cache", lambda api: api.post("/flush_cache")),
    "another model": (
        "POST",
        "/v1/chat/completions",
        lambda api: api.post("/v1/chat/completions", model="gpt-4o", messages=[{"role": "user", "content": "x"}]),
    ),
    "never was": ("GET", "/branches/{id}", lambda api: api.http.get("/branches/bnobody")),
    "no node": ("POST", "/ui/node", lambda api: api.http.post("/ui/node", json={"path": [10**6]})),
    "no pin": ("POST", "/cache/unpin", lambda api: api.post("/cache/unpin", id="pin-nobody")),
    "generating": ("POST", "/branches/{id}/fork", busy),
    "nothing to pin": ("POST", "/cache/pin", lambda api: api.post("/cache/pin", input_ids=[9] * 17)),
    "nothing to stop": (
        "POST",
        "/stop_profile",
        lambda api: api.http.post("/stop_profile", headers={"Authorization": f"Bearer {ADMIN}"}),
    ),
    "gone": ("POST", "/branches/{id}/extend", gone),
    "too large": ("POST", "/generate", lambda api: api.post("/generate", text="x" * 20_000)),
    "compressed": (
        "POST",
        "/generate",
        lambda api: api.http.post("/generate", content=b"\x1f\x8b", headers={"Content-Encoding": "gzip"}),
    ),
    "too many branches": ("POST", "/branches", one_too_many),
    "no room for a pin": (
        "POST",
        "/cache/pin",
        lambda api: api.post("/cache/pin", input_ids=[8] * 64, warm=True),
    ),
    "full": ("POST", "/generate", lambda api: api.post("/generate", text="x", sampling_params={"n": 5})),
}


def masked(body: Any) -> str:
    """Without numbers and ids, which are another server's."""
    return re.sub(r"[0-9]+", "#", re.sub(r"\bb[A-Za-z0-9_-]{32}", "ID", str(body)))


@pytest.mark.parametrize(("name", "example"), EXAMPLES)
def test_every_example_is_what_a_server_sends(api: Api, name: str, example: str) -> None:
    method, path, ask = CASES[example]
    answer = ask(api)
    assert api.declared(method, path, answer) == name
    examples = api.document["components"]["responses"][name]["content"]["application/json"]["examples"]
    [expected] = [one["value"] for one in examples.values() if one["summary"] == example]
    assert masked(answer.json()) == masked(expected)


def operations(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def test_whatever_goes_wrong_on_a_route_is_declared(api: Api) -> None:
    """No key, the wrong key, no body, a broken one, one without fields, one of wrong fields, one too large."""
    bodies = [b"", b"{", b"[]", b"{}", b'{"messages": 1, "prompt": 1, "text": 1, "tokens": 1, "ops": 1, "n": "x"}']
    bodies.append(b'{"model": "other", "messages": [], "prompt": "x", "tokens": [], "parent": "nobody", "id": "x"}')
    seen: set[str] = set()
    for method, path, operation in operations(api.document):
        if method == "HEAD":
            continue
        url = path.replace("{id}", "nobody")
        has_body = "requestBody" in operation
        with contextlib.closing(httpx.Client(base_url=api.url)) as stranger:
            refused = stranger.request(method, url)
        assert refused.status_code == (200 if path in ("/health", "/ui", "/docs") else 401)
        api.declared(method, path, refused)
        if path == "/ui/events":  # without an error it has no end
            url += "?max_nodes=0"
        for body in [*bodies, b"{" + b" " * 20_000] if has_body else [b""]:
            answer = api.http.request(method, url, content=body)
            name = api.declared(method, path, answer)
            seen.update([name] if name else [])
            if operation["responses"].get("403") and path not in PARTLY_ADMIN:
                assert name in ("NotAdmin", "TooLarge"), (path, body)
    assert seen >= {"Invalid", "NotAdmin", "NoModel", "NoBranch", "NoPin", "TooLarge"}
    assert api.http.get("/cache/check", headers={"Authorization": f"Bearer {ADMIN}"}).json() == {"check": "clean"}
