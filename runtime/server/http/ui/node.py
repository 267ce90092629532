"""``POST /ui/node``: one node of the tree in full, when a person clicks on it."""

from __future__ import annotations

from typing import Any

from fastapi import Request, Response
from pydantic import Field

from ..fields.parse import Strict, parse
from ..plumbing.auth import is_admin
from ..plumbing.body import read_json_object
from ..plumbing.failures import NO_NODE
from ..plumbing.routes import Routes
from ..plumbing.sse import json_response
from ..state import AppState

MAX_DEPTH = 4096


class NodeRequest(Strict):
    owner: str = Field("", description="The namespace's owner, as in /ui/events.")
    salt: str = Field("", description="The namespace's salt, as in /ui/events.")
    path: list[int] = Field(
        description="Node ids, from the child of the root to the requested node.", max_length=MAX_DEPTH
    )


def routes(state: AppState) -> Routes:
    routes = Routes("ui")

    @routes.add("POST", "/ui/node", body=NodeRequest, errors=[NO_NODE])
    async def node(request: Request) -> Response:
        """A node's text, its holders, and recent requests whose reuse ended in it. A tenant reaches its own nodes, the
        operator all of them."""
        body = parse(NodeRequest, await read_json_object(request), unsupported=frozenset())
        question = {
            "owner": None if is_admin() else state.namespaces.of(None)[0],
            "namespace": (body.owner, body.salt),
            "path": body.path,
        }
        found: dict[str, Any] = await state.client.control("node", question)
        for where, names in ((found, ("head", "tail")), *((stop, ("after", "instead")) for stop in found["stops"])):
            for name in names:
                where[name] = state.tokenizer.decode(
                    memoryview(where[name]).cast("i").tolist(), skip_special_tokens=False
                )
        return json_response(found)

    return routes
