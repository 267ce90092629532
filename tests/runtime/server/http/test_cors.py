"""Web sites that --allow-origins names may call the server from their pages; the others may not."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest

from branchwise.runtime.config import EngineConfig, ServerConfig, check_server
from branchwise.runtime.errors import LoadError
from branchwise.runtime.server.http.app import make_app
from branchwise.runtime.server.http.state import AppState

APP = "https://app.example"
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, content-type"}


async def ask(state: AppState, method: str, path: str, headers: dict[str, str]) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(make_app(state)), base_url="http://localhost") as http:
        return await http.request(method, path, headers=headers)


@pytest.mark.parametrize("key", [None, "k"])
async def test_a_preflight_is_answered_without_a_key(make_state: Callable[..., AppState], key: str | None) -> None:
    state = make_state(api_key=key, allow_origins=(APP,))
    answer = await ask(state, "OPTIONS", "/v1/chat/completions", {"Origin": APP, **PREFLIGHT})
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == APP
    allowed = answer.headers["access-control-allow-headers"].lower()
    assert "authorization" in allowed and "content-type" in allowed
    assert "access-control-allow-credentials" not in answer.headers
    other = await ask(state, "OPTIONS", "/v1/chat/completions", {"Origin": "https://evil.example", **PREFLIGHT})
    assert other.status_code == 400 and "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize("key", [None, "k"])
async def test_answers_and_errors_can_be_read(make_state: Callable[..., AppState], key: str | None) -> None:
    state = make_state(api_key=key, allow_origins=(APP,))
    headers = {"Origin": APP, "Sec-Fetch-Site": "cross-site", **({"Authorization": f"Bearer {key}"} if key else {})}
    answer = await ask(state, "GET", "/version", headers)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == APP
    assert "x-request-id" in answer.headers["access-control-expose-headers"].lower()
    wrong = await ask(state, "POST", "/v1/completions", {**headers, "Content-Type": "application/json"})
    assert wrong.status_code == 400 and wrong.headers["access-control-allow-origin"] == APP


async def test_only_that_origin_and_only_this_host(make_state: Callable[..., AppState]) -> None:
    state = make_state(allow_origins=(APP,))
    for headers in (
        {"Origin": "http://app.example"},
        {"Origin": f"{APP}.evil.example"},
        {"Origin": APP, "Host": "app.example"},  # DNS rebinding
    ):
        assert (await ask(state, "GET", "/version", headers)).status_code == 403, headers
    without = await ask(make_state(), "GET", "/version", {"Origin": APP})
    assert without.status_code == 403 and "--allow-origins" in without.text


async def test_a_key_is_still_needed(make_state: Callable[..., AppState]) -> None:
    answer = await ask(make_state(api_key="k", allow_origins=("*",)), "GET", "/version", {"Origin": APP})
    assert answer.status_code == 401 and answer.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize(
    ("origins", "key", "said"),
    [
        (("*",), None, "it needs --api-key"),
        (("app.example",), "k", "is not an origin"),
        (("https://app.example/page",), "k", "is not an origin"),
    ],
)
def test_what_is_refused(origins: tuple[str, ...], key: str | None, said: str) -> None:
    with pytest.raises(LoadError, match="--allow-origins.*" + said):
        check_server(ServerConfig(engine=EngineConfig(), api_key=key, allow_origins=origins))
    check_server(ServerConfig(engine=EngineConfig(), api_key="k", allow_origins=("*", "chrome-extension://abc")))
