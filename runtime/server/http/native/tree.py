"""``/cache/tree`` and ``/cache/check`` show the radix tree, ``/flush_cache`` empties it. For the operator."""

from __future__ import annotations

import asyncio

import msgspec
from fastapi import Request, Response
from starlette.responses import PlainTextResponse

from ....errors import InvalidRequest
from ....fleet.block_events import snapshot
from ..plumbing.routes import Query, Routes, count, flag, read_query
from ..plumbing.sse import json_response
from ..state import AppState
from .tree_text import add_text, decoder, tree_text

MAX_NODES = 100_000
DEFAULT_NODES = 1000
MAX_HOTTEST, DEFAULT_HOTTEST = 1024, 32
_HOTTEST_QUERY = {
    "count": count("At most.", MAX_HOTTEST, DEFAULT_HOTTEST),
    "all_namespaces": flag("Of every key and salt."),
}
_TREE_QUERY = {
    "format": Query({"enum": ["json", "text"], "default": "json"}, "text: a drawing."),
    "max_nodes": count("At most.", MAX_NODES, DEFAULT_NODES),
}


def routes(state: AppState) -> Routes:
    routes = Routes("cache")

    @routes.add("GET", "/cache/tree", query=_TREE_QUERY, admin=True, text="also")
    async def tree(request: Request) -> Response:
        """The radix tree: cached prefixes, and what uses them."""
        form, nodes = read_query(request, _TREE_QUERY)
        dump = add_text(await state.client.control("tree", {"max_nodes": nodes}), decoder(state.tokenizer))
        return PlainTextResponse(tree_text(dump)) if form == "text" else json_response(dump)

    @routes.add("GET", "/cache/hottest", query=_HOTTEST_QUERY, admin=True)
    async def hottest(request: Request) -> Response:
        """The most used prefixes of the caller's part of the cache, or of all parts, to warm another server with."""
        most, everything = read_query(request, _HOTTEST_QUERY)
        question = {"namespace": state.namespaces.of(None), "count": most, "everything": everything}
        return json_response(await state.client.control("cache_hottest", question))

    @routes.add("GET", "/cache/check", admin=True)
    async def check() -> Response:
        """Check the invariants of tree and pages between two steps. A 500 names the one that is broken."""
        return json_response({"check": await state.client.control("check")})

    @routes.add("GET", "/cache/events/snapshot", admin=True)
    async def events_snapshot() -> Response:
        """The state after the KV events up to number ``seq``, for a subscriber that starts late or has missed some.
        Needs ``--kv-events``."""
        facts = await state.client.control("kv_events")
        if facts is None:
            raise InvalidRequest(None, "the server was started without --kv-events ADDRESS")
        made = await asyncio.to_thread(lambda: msgspec.json.encode(snapshot(facts)))  # large: not on the event loop
        return Response(made, media_type="application/json")

    @routes.add("POST", "/flush_cache", admin=True)
    @routes.add("GET", "/flush_cache", admin=True)  # SGLang takes both
    async def flush_cache() -> Response:
        """Evict everything that no running request uses, pinned or not."""
        return json_response(await state.client.control("flush_cache"))

    return routes
