"""``GET /v1/models`` and ``/v1/models/{id}``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

from .site import Site
from .sse import json_response


def router(site: Site) -> APIRouter:
    routes = APIRouter()

    def card() -> dict[str, Any]:
        return {
            "id": site.model_name,
            "object": "model",
            "created": site.created,
            "owned_by": "branchwise",
            "max_model_len": site.client.limits.max_model_len,
        }

    @routes.get("/v1/models")
    async def list_models() -> Response:
        return json_response({"object": "list", "data": [card()]})

    @routes.get("/v1/models/{name:path}")
    async def get_model(name: str) -> Response:
        site.check_model(name)
        return json_response(card())

    return routes
