"""Web sites cannot use a server without a key through a visitor's browser."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import httpx
import pytest

from branchwise.runtime.messages import Control, ControlReply, Message
from branchwise.runtime.server.http.app import make_app
from branchwise.runtime.server.http.engine_client import EngineClient
from branchwise.runtime.server.http.state import AppState

OWN = "127.0.0.1:8000"
REFUSED = [
    {"Host": OWN, "Origin": "https://evil.example"},
    {"Host": OWN, "Origin": "null"},
    {"Host": OWN, "Origin": "http://localhost.evil.example"},
    {"Host": OWN, "Origin": "http://["},
    {"Host": OWN, "Sec-Fetch-Site": "cross-site"},
    {"Host": "evil.example:8000"},
    {"Host": "127.0.0.1.evil.example"},
    {"Host": "localhost@evil.example"},
]
SERVED = [
    {"Host": OWN},
    {"Host": "LOCALHOST:8000"},
    {"Host": "[::1]:8000"},
    {"Host": OWN, "Origin": "http://localhost:3000"},
    {"Host": OWN, "Sec-Fetch-Site": "none"},
    {"Host": OWN, "Sec-Fetch-Site": "same-site", "Origin": "http://127.0.0.1:3000"},
    {"Host": "models.lan:8000"},
    {"Host": OWN, "Origin": "https://models.lan"},
]


async def status(
    state: AppState, headers: dict[str, str], path: str = "/version", method: str = "GET"
) -> tuple[int, str]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(make_app(state)), base_url="http://localhost") as http:
        answer = await http.request(method, path, headers=headers)
    return answer.status_code, answer.text


@pytest.mark.parametrize("headers", REFUSED)
async def test_other_sites_are_refused(make_state: Callable[..., AppState], headers: dict[str, str]) -> None:
    code, text = await status(make_state(), headers)
    assert code == 403 and "--api-key" in text and "--allowed-host" in text


@pytest.mark.parametrize("headers", SERVED)
async def test_the_machines_own_clients_are_served(
    make_state: Callable[..., AppState], headers: dict[str, str]
) -> None:
    assert (await status(make_state(allowed_hosts=("Models.LAN",)), headers))[0] == 200


@pytest.mark.parametrize("headers", REFUSED)
async def test_a_key_is_protection_enough(make_state: Callable[..., AppState], headers: dict[str, str]) -> None:
    assert (await status(make_state(api_key="k"), headers))[0] == 401
    assert (await status(make_state(api_key="k"), {**headers, "x-api-key": "k"}))[0] == 200


async def test_health_and_other_addresses_hosts_are_open(make_state: Callable[..., AppState]) -> None:
    assert (await status(make_state(), {"Host": "evil.example"}, "/health"))[0] == 200
    assert (await status(make_state(host="0.0.0.0"), {"Host": "gpu-7.lan"}))[0] == 200
    assert (await status(make_state(host="0.0.0.0"), {"Host": OWN, "Origin": "https://evil.example"}))[0] == 403


LOCAL_PAGE = {"Host": OWN, "Origin": "http://localhost:3000"}


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
)
async def test_a_page_cannot_post_without_asking_first(make_state: Callable[..., AppState], kind: str | None) -> None:
    headers = {"Content-Type": kind} if kind else {}
    for mark in (LOCAL_PAGE, {"Host": OWN, "Sec-Fetch-Site": "same-site"}):
        for path in ("/abort_request", "/v1/completions", "/flush_cache"):
            code, text = await status(make_state(), {**mark, **headers}, path, "POST")
            assert code == 403 and "application/json" in text


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/json"])
async def test_other_clients_may_leave_the_type_out(make_state: Callable[..., AppState], kind: str | None) -> None:
    headers = {"Content-Type": kind} if kind else {}
    code, text = await status(make_state(), {"Host": OWN, **headers}, "/v1/completions", "POST")
    assert code == 400 and "the body is empty" in text
    if kind == "application/json":
        marked = {**LOCAL_PAGE, "Content-Type": "application/json; charset=utf-8"}
        assert (await status(make_state(), marked, "/v1/completions", "POST"))[0] == 400


@pytest.mark.parametrize("path", ["/flush_cache", "/start_profile", "/stop_profile"])
@pytest.mark.parametrize("mark", [LOCAL_PAGE, {"Sec-Fetch-Site": "none"}, {"User-Agent": "Mozilla/5.0 (X11; Linux)"}])
async def test_a_browser_changes_nothing_by_get(
    make_state: Callable[..., AppState], client: EngineClient, path: str, mark: dict[str, str]
) -> None:
    asked = []

    def scheduler(messages: Sequence[Message]) -> None:
        for message in messages:
            assert isinstance(message, Control)
            asked.append(message.what)
            # Later: the client does not wait for the answer yet. One that comes before is lost, after half a minute.
            asyncio.get_running_loop().call_soon(client.answer, ControlReply(message.id, True, None))

    client._to_scheduler = scheduler
    code, text = await status(make_state(), {"Host": OWN, **mark}, path)
    assert code == 403 and f"GET {path}" in text and not asked
    code, _ = await status(make_state(), {"Host": OWN, "User-Agent": "python-requests/2.32"}, path)
    assert code != 403
    assert asked == (["flush_cache"] if path == "/flush_cache" else [])


@pytest.mark.parametrize("marks", [{"User-Agent": "Mozilla/5.0"}, {"Sec-Fetch-Site": "same-origin"}])
async def test_a_rebound_name_is_refused_on_any_address(
    make_state: Callable[..., AppState], marks: dict[str, str]
) -> None:
    """After DNS rebinding a page's GETs are of its own origin, and name its own domain."""
    state = make_state(host="0.0.0.0", allowed_hosts=("models.example",))
    code, text = await status(state, {"Host": "evil.example:8000", **marks})
    assert code == 403 and "--allowed-host" in text
    for host in ("models.example", "10.1.2.3:8000", "[fe80::1]:8000", "gpubox:8000", "gpubox.local", "localhost"):
        assert (await status(state, {"Host": host, **marks}))[0] == 200
    assert (await status(state, {"Host": "service.cluster.example"}))[0] == 200, "other clients have any name for it"
