"""The served model: ``GET /v1/models``, ``/v1/models/{id}``, ``/get_model_info``, ``/version``."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fastapi import Response

from ..... import __version__
from ..plumbing.failures import NO_MODEL
from ..plumbing.routes import Routes
from ..plumbing.sse import json_response
from ..state import AppState


def routes(state: AppState) -> Routes:
    routes = Routes("models")

    def card() -> dict[str, Any]:
        return {
            "id": state.model_name,
            "object": "model",
            "created": state.created,
            "owned_by": "branchwise",
            "root": state.config.engine.model,
            "parent": None,
            "max_model_len": state.client.limits.max_model_len,
            # For Anthropic's clients:
            "type": "model",
            "display_name": state.model_name,
            "created_at": datetime.fromtimestamp(state.created, UTC).isoformat(),
            "lifecycle": "active",
        }

    @routes.add("GET", "/v1/models")
    async def list_models() -> Response:
        """The one model that is served (OpenAI's list, and Anthropic's page)."""
        name = state.model_name
        page = {"first_id": name, "last_id": name, "has_more": False}
        return json_response({"object": "list", "data": [card()], **page})

    @routes.add("GET", "/v1/models/{id:path}", errors=[NO_MODEL])
    async def get_model(id: str) -> Response:
        """The served model, by its name."""
        state.check_model(id)
        return json_response(card())

    @routes.add("GET", "/version", engine=False)
    async def version() -> Response:
        """Branchwise's version."""
        return json_response({"version": __version__})

    @routes.add("GET", "/get_model_info", "/model_info")
    async def model_info() -> Response:
        """The served model (SGLang's facts)."""
        limits = state.client.limits
        return json_response(
            {
                "model_path": state.config.engine.model,
                "tokenizer_path": state.config.engine.model,
                "served_model_name": state.model_name,
                "is_generation": True,
                "preferred_sampling_params": state.preferred or None,
                "weight_version": "default",
                "has_image_understanding": False,
                "has_audio_understanding": False,
                "max_model_len": limits.max_model_len,
                "vocab_size": limits.vocab_size,
                "has_chat_template": state.tokenizer.chat_template is not None,
            }
        )

    return routes
