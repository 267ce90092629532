"""Errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ....errors import EngineDead, InvalidRequest, Overloaded, TimedOut
from . import request_log

logger = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 1
MAX_MESSAGE = 480  # characters of a message, and of the name of a field

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
ERROR_TYPES = tuple(sorted({*_TYPES.values(), "invalid_request_error", "server_error"}))
_CODES = {401: "invalid_api_key", 429: "too_many_branches", 503: "overloaded"}
_BRANCH_CODES = {409: "branch_busy", 410: "branch_gone"}


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, dict[str, Any]]:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    usual = (_BRANCH_CODES if param == "branch" else _CODES).get(status)
    error = {"message": _cut(message), "type": kind, "param": param and _cut(param), "code": code or usual}
    record = request_log.current()
    if record is not None:
        record.error = error
    return {"error": error}


def _cut(text: str) -> str:
    """Bound a text: messages quote values and names of fields that a client sent."""
    return text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE - 1]}…"


def error_response(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(error_body(status, message)), status, headers, media_type="application/json")


class ClientGone(Exception):
    """The client closed its connection."""


class ModelNotFound(InvalidRequest):
    """The request names a model this server does not serve."""

    def __init__(self, asked: str, served: str) -> None:
        problem = f"{asked[:MAX_MESSAGE]!r} does not exist; this server serves {served!r}"
        super().__init__("model", problem, status=404, code="model_not_found")


def describe(error: Exception) -> tuple[int, dict[str, dict[str, Any]]]:
    """Status and body of an error. An unexpected error gets a fixed text; its traceback is in the log."""
    if isinstance(error, InvalidRequest):
        return error.status, error_body(error.status, error.message, error.path, error.code)
    if isinstance(error, Overloaded):
        return 503, error_body(503, str(error))
    if isinstance(error, TimedOut):
        return 504, error_body(504, str(error), code="request_timeout")
    if isinstance(error, EngineDead):
        return 500, error_body(500, str(error), code="engine_dead")
    if isinstance(error, HTTPException):
        return error.status_code, error_body(error.status_code, _http_message(error))
    logger.error("a request failed", exc_info=error)
    return 500, error_body(500, "internal error; the server's log says more")


def response_for(error: Exception) -> Response:
    if isinstance(error, (ClientGone, ClientDisconnect)):
        return Response(status_code=499)  # the client has gone
    status, body = describe(error)
    headers: dict[str, str] = {}
    if isinstance(error, HTTPException):
        headers.update(error.headers or {})
    if status in (429, 503):
        headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    return Response(msgspec.json.encode(body), status, headers, media_type="application/json")


def install(app: FastAPI, paths: Collection[str]) -> None:
    """Handle errors of ``app``. ``paths``: suggested to a client whose base_url is wrong."""

    async def handle(request: Request, error: Exception) -> Response:
        meant = request.scope["path"].removeprefix("/v1") if _is_no_route(error) else ""
        for path in (meant, f"/v1{meant}"):
            if path in paths:
                return error_response(404, f"no such route: did you mean {path}? {_BASE_URLS}")
        return response_for(error)

    for kind in (
        ClientGone,
        ClientDisconnect,
        InvalidRequest,
        Overloaded,
        TimedOut,
        EngineDead,
        HTTPException,
        Exception,
    ):
        app.add_exception_handler(kind, handle)


_BASE_URLS = "The base_url of OpenAI's clients ends with /v1, that of Anthropic's does not"


def _is_no_route(error: Exception) -> bool:
    return isinstance(error, HTTPException) and (error.status_code, error.detail) == (404, HTTPStatus.NOT_FOUND.phrase)


def _http_message(error: HTTPException) -> str:
    if _is_no_route(error):
        return "no such route: GET /openapi.json lists what there is, POST /v1/chat/completions and /generate among it"
    if error.status_code == 405:
        return "this route does not take that method"
    return str(error.detail)
