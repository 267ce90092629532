"""What a tenant sees of the others: no sums over their requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from branchwise.runtime.messages import Control, ControlReply, Message
from branchwise.runtime.server.http.app import make_app
from branchwise.runtime.server.http.engine_client import EngineClient
from branchwise.runtime.server.http.state import AppState

TENANTS = {"api_key": "first", "extra_api_keys": ("second",), "admin_api_key": "operator"}


@pytest.fixture
def ask(make_state: Callable[..., AppState], client: EngineClient, sent: list[Message]) -> Callable[..., Any]:
    """``await ask(path, key, **settings)``; the scheduler's answers to control messages are {"argument": theirs}."""

    async def get(path: str, key: str, **settings: Any) -> httpx.Response:
        transport = httpx.ASGITransport(make_app(make_state(**settings)))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            asking = asyncio.create_task(http.get(path, headers={"x-api-key": key}))
            while not asking.done():
                for message in sent:
                    if isinstance(message, Control):
                        client.answer(ControlReply(message.id, True, {"argument": message.argument}))
                await asyncio.sleep(0.01)
            return await asking

    return get


async def test_metrics_are_the_operators_where_there_are_tenants(ask: Callable[..., Any]) -> None:
    assert (await ask("/metrics", "second", **TENANTS)).status_code == 403
    assert (await ask("/metrics", "first", **TENANTS)).status_code == 403
    assert (await ask("/metrics", "operator", **TENANTS)).status_code == 200
    assert (await ask("/metrics", "only", api_key="only", admin_api_key="operator")).status_code == 200


async def test_server_info_has_no_sums_for_a_tenant(ask: Callable[..., Any]) -> None:
    sums = {"requests_in_flight", "cache_hit_rate_60s", "stats"}
    assert not sums & (await ask("/server_info", "second", **TENANTS)).json().keys()
    assert sums <= (await ask("/server_info", "operator", **TENANTS)).json().keys()


async def test_a_tenant_counts_its_own_branches(ask: Callable[..., Any]) -> None:
    owners = [(await ask("/branches", key, **TENANTS)).json()["argument"] for key in ("first", "second", "operator")]
    assert owners[0] and owners[1] and owners[0] != owners[1]
    assert owners[2] is None
