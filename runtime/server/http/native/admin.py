"""``/health``, ``/metrics``, ``/server_info``; profiling, and aborting requests."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from fastapi import Request, Response

from ....errors import InvalidRequest
from ....messages import ControlWhat
from ..fields.parse import Strict, parse
from ..plumbing.auth import is_admin, require_admin
from ..plumbing.body import read_json_object
from ..plumbing.failures import INVALID, NOT_ADMIN, RECORDING
from ..plumbing.metrics import CONTENT_TYPE
from ..plumbing.routes import Routes
from ..plumbing.sse import json_response
from ..state import AppState


class AbortRequest(Strict):
    rid: str | None = None
    abort_all: bool = False


def routes(state: AppState) -> Routes:
    routes = Routes("models")

    @routes.add("GET", "/health")
    @routes.add("HEAD", "/health")  # for load balancers
    async def health() -> Response:
        """Whether the server takes requests: 200 and ``ready``, or 503 and its state; ``stalled`` names the process."""
        status = state.status
        process = {"process": state.heartbeat.stalled} if status == "stalled" and state.heartbeat else {}
        return json_response({"status": status, **process}, 200 if status == "ready" else 503)

    @routes.add("GET", "/metrics", errors=[NOT_ADMIN], text="only", engine=False)
    async def metrics() -> Response:
        """Counters, gauges and histograms for Prometheus. Where several tenants have keys, for the operator's key."""
        if not sees_all(state):
            await require_admin()
        return Response(state.metrics.render(), media_type=CONTENT_TYPE)

    @routes.add("GET", "/get_server_info", "/server_info")
    async def server_info() -> Response:
        """Configuration, limits and counters. Keys are left out, and sums over other tenants' requests."""
        return json_response(await _facts(state))

    @routes.add("POST", "/start_profile", "/stop_profile", errors=[INVALID, RECORDING], admin=True)
    @routes.add("GET", "/start_profile", "/stop_profile", errors=[INVALID, RECORDING], admin=True)  # SGLang's client
    async def profile(request: Request) -> Response:
        """Start or stop recording the engine's steps. Needs ``--profile``; stopping writes a Chrome trace and returns
        its path, the device's idle share and the kernels that took longest."""
        if state.config.engine.profile is None:
            raise InvalidRequest(None, "the server was started without --profile FOLDER")
        what: ControlWhat = "start_profile" if request.url.path.endswith("/start_profile") else "stop_profile"
        return json_response({"profile": await state.client.control(what)})

    @routes.add("POST", "/abort_request", body=AbortRequest, errors=[NOT_ADMIN], engine=False)
    async def abort_request(request: Request) -> Response:
        """Abort the caller's requests with this ``rid``, or all requests. Their clients get what has been generated.
        Other keys' requests, and all of them, need the admin key."""
        body = parse(AbortRequest, await read_json_object(request))
        if not body.abort_all and not body.rid:
            raise InvalidRequest("rid", "is required unless abort_all is true")
        if body.abort_all:
            await require_admin()
        owner = None if is_admin() else state.namespaces.of(None)[0]
        return json_response({"aborted": state.client.abort(None if body.abort_all else body.rid, owner)})

    return routes


def sees_all(state: AppState) -> bool:
    """Whether the caller may see sums over all keys' requests: the operator, or any caller if there is one tenant."""
    return is_admin() or not state.config.extra_api_keys


async def _facts(state: AppState) -> dict[str, Any]:
    from ..... import __version__

    secrets = {"api_key": None, "extra_api_keys": (), "admin_api_key": None, "namespace_secret": None}
    server = msgspec.to_builtins(msgspec.structs.replace(state.config, **secrets))
    for name in secrets:
        del server[name]
    facts = {
        "version": __version__,
        "status": state.status,
        "model": state.model_name,
        "uptime_seconds": time.time() - state.created,
        "config": server,
        "engine": await state.client.control("info"),
    }
    if not sees_all(state):
        return facts
    return facts | {
        "requests_in_flight": state.client.in_flight,
        "cache_hit_rate_60s": state.metrics.hit_rate,
        "stats": msgspec.structs.asdict(state.metrics.stats),
    }
