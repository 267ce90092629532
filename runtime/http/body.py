"""Request bodies: bounded, and parsed as strict JSON; a flat list of token ids becomes an array without a detour."""

from __future__ import annotations

import gc
from typing import Any

import msgspec
import numpy as np
from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import InvalidRequest
from ..limits import MAX_DEPTH, deeper_than
from .errors import response_for

_IDS = ("prompt", "input_ids")  # fields that may hold thousands of token ids
_ID_BYTES = b"0123456789, \n\r\t"  # what is left of a list of ids between its brackets
_DEPTH = "branchwise.max_json_depth"  # in the scope of a request
_HUGE = 2**62  # what is larger may have been clipped to an int64
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class BodyLimit:
    """Refuses bodies over ``max_bytes``: by their Content-Length before reading, by counting otherwise.

    ``max_depth`` is for those who decode them.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_depth: int = MAX_DEPTH) -> None:
        self._app = app
        self._max = max_bytes
        self._max_depth = max_depth

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope[_DEPTH] = self._max_depth
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._max:
            # Whatever follows on this connection is the body we will not read.
            response = response_for(self._too_large())
            response.headers["Connection"] = "close"
            await response(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > self._max:
                    raise self._too_large()
            return message

        await self._app(scope, counted, send)

    def _too_large(self) -> InvalidRequest:
        return InvalidRequest(f"the request body must be at most {self._max} bytes", status=413)


async def read_json_object(request: Request) -> dict[str, Any]:
    """The body as a JSON object. NaN, Infinity, lone surrogates, invalid UTF-8 and absurd nesting are a 400.

    A ``prompt`` or ``input_ids`` that is a flat list of numbers without a sign is an int64 array [n], any other list a
    list: 33,000 ids cost a third of what as many Python objects do, and a burst of such requests waits for each other.
    """
    body = await request.body()
    if not body:
        raise InvalidRequest("the body is empty: it must be a JSON object")
    value = _with_arrays(body)
    if value is None:
        value = _decode(body)
    most = request.scope.get(_DEPTH, MAX_DEPTH)
    if body.count(b"[") + body.count(b"{") > most:
        for name, field in value.items():
            # Prompts are looked at element by element anyway, and can be long.
            if name not in _IDS and isinstance(field, (dict, list)) and deeper_than(field, most - 1):
                raise InvalidRequest(f"{name[:60]} must be nested at most {most} deep", field=name[:60])
    return value


def _with_arrays(body: bytes) -> dict[str, Any] | None:
    """None: there are no arrays in it, or it is not valid (and `_decode` says how)."""
    try:
        fields = _decode_fields(body)
        arrays = {name: ids for name in _IDS if name in fields and (ids := _ids(bytes(fields[name]))) is not None}
        if not arrays:
            return None
        return {name: arrays[name] if name in arrays else msgspec.json.decode(raw) for name, raw in fields.items()}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _ids(raw: bytes) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    """Valid JSON as an array, if it is a flat list of integers without a sign; no vocabulary need have them."""
    inside = raw[1:-1]
    if raw[:1] != b"[" or not inside.strip() or inside.translate(None, _ID_BYTES):
        return None
    ids = np.fromstring(inside, np.int64, sep=",")
    return ids if ids.max() < _HUGE else None


def _decode(body: bytes) -> dict[str, Any]:
    # Decoding makes one object after the other and no garbage: the collector would walk them all again and again.
    gc.disable()
    try:
        value = msgspec.json.decode(body)
    except UnicodeDecodeError as error:
        raise InvalidRequest("the body is not valid UTF-8") from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    finally:
        gc.enable()
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body must be a JSON object, got {type(value).__name__}")
    return value
