"""Health, facts, metrics, the tree, and the two levers: flushing the cache and aborting requests."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from fastapi import APIRouter, Request, Response
from starlette.responses import PlainTextResponse

from ....errors import InvalidRequest, shown
from ....messages import ControlWhat
from ..fields.requests import AbortRequest, parse
from ..plumbing.auth import is_admin, require_admin
from ..plumbing.body import read_json_object
from ..plumbing.metrics import CONTENT_TYPE
from ..plumbing.openapi import query, takes
from ..plumbing.sse import json_response
from ..state import AppState
from .tree_text import add_text, tree_text

MAX_NODES = 100_000
DEFAULT_NODES = 1000


def router(state: AppState) -> APIRouter:
    routes = APIRouter()

    @routes.get("/health")
    @routes.head("/health")  # as load balancers ask
    async def health() -> Response:
        """Whether the server takes requests: 200 and ``ready``, or 503 and its state."""
        status = state.client.state
        return json_response({"status": status}, 200 if status == "ready" else 503)

    @routes.get("/metrics")
    async def metrics() -> Response:
        """Counters, gauges and histograms for Prometheus."""
        return Response(state.metrics.render(), media_type=CONTENT_TYPE)

    @routes.get("/get_server_info")
    @routes.get("/server_info")
    async def server_info() -> Response:
        """Configuration, limits and counters. Keys are left out."""
        return json_response(await _facts(state))

    @routes.get(
        "/cache/tree",
        openapi_extra=query(
            format=({"enum": ["json", "text"], "default": "json"}, "text: a drawing."),
            max_nodes=({"type": "integer", "minimum": 1, "maximum": MAX_NODES, "default": DEFAULT_NODES}, "At most."),
        ),
    )
    async def tree(request: Request) -> Response:
        """The radix tree: what the server remembers, and who uses it."""
        require_admin()
        form = request.query_params.get("format", "json")
        if form not in ("json", "text"):
            raise InvalidRequest("format", f"must be json or text, got {shown(form)}")
        nodes = _count(request.query_params.get("max_nodes"))
        dump = add_text(await state.client.control("tree", {"max_nodes": nodes}), state.tokenizer)
        return PlainTextResponse(tree_text(dump)) if form == "text" else json_response(dump)

    @routes.get("/cache/check")
    async def check() -> Response:
        """Walks the tree and the pages between two steps. A 500 names the invariant that does not hold."""
        require_admin()
        return json_response({"check": await state.client.control("check")})

    @routes.post("/flush_cache")
    @routes.get("/flush_cache")  # SGLang takes both
    async def flush_cache() -> Response:
        """Forgets everything that no running request holds, pinned or not."""
        require_admin()
        return json_response(await state.client.control("flush_cache"))

    @routes.post("/start_profile")
    @routes.post("/stop_profile")
    async def profile(request: Request) -> Response:
        """Starts or stops recording the engine's steps. Needs ``--profile``; stopping writes a Chrome trace and answers
        with its path, the device's idle share and the kernels that took most."""
        require_admin()
        if state.config.engine.profile is None:
            raise InvalidRequest(None, "the server was started without --profile FOLDER")
        what: ControlWhat = "start_profile" if request.url.path.endswith("/start_profile") else "stop_profile"
        return json_response({"profile": await state.client.control(what)})

    @routes.post("/abort_request", openapi_extra=takes(AbortRequest))
    async def abort_request(request: Request) -> Response:
        """Ends the caller's requests with this very ``rid``, or all there are. Their clients get what has been
        generated. Other keys' requests and all of them need the admin key."""
        body = parse(AbortRequest, await read_json_object(request))
        if not body.abort_all and not body.rid:
            raise InvalidRequest("rid", "is required unless abort_all is true")
        if body.abort_all:
            require_admin()
        owner = None if is_admin() else state.namespaces.of(None)[0]
        return json_response({"aborted": state.client.abort(None if body.abort_all else body.rid, owner)})

    return routes


async def _facts(state: AppState) -> dict[str, Any]:
    from ..... import __version__

    secrets = {"api_key": None, "extra_api_keys": (), "admin_api_key": None}
    server = msgspec.to_builtins(msgspec.structs.replace(state.config, **secrets))
    for name in secrets:
        del server[name]
    return {
        "version": __version__,
        "status": state.client.state,
        "model": state.model_name,
        "uptime_seconds": time.time() - state.created,
        "config": server,
        "engine": await state.client.control("info"),
        "requests_in_flight": state.client.in_flight,
        "cache_hit_rate_60s": state.metrics.hit_rate,
        "stats": msgspec.structs.asdict(state.metrics.stats),
    }


def _count(text: str | None) -> int:
    if text is None:
        return DEFAULT_NODES
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= MAX_NODES and len(text) < 9):
        raise InvalidRequest("max_nodes", f"must be between 1 and {MAX_NODES}, got {shown(text)}")
    return int(text)
