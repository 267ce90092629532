"""Request bodies: bounded, and parsed as strict JSON; lists of token ids are parsed into arrays directly."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ....chat.json_bounds import NONE, SLICE, count_values, deeper_than
from ....errors import InvalidRequest, Overloaded
from ....limits import MAX_DEPTH
from .errors import response_for
from .id_arrays import Array, count_ids, id_arrays

MAX_VALUES = 262_144  # as `count_values` counts them, without token ids: parsed and freed in less than 50 ms
MAX_TOTAL_BYTES = 512 * 1024 * 1024
SMALL_BODY = 64 * 1024
IDS = 16  # times as many values with token ids
MAX_FIELDS = 256
ESCAPES = 4  # times as many backslashes in strings as values
_DEPTH = "branchwise.max_json_depth"  # keys of the ASGI scope
_VALUES = "branchwise.max_json_values"
_INVALID = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


class BodyLimit:
    """Refuses bodies over ``max_bytes``: by their Content-Length before reading, else while reading.

    ``max_total_bytes`` bounds the bodies of all unfinished requests together: one that would exceed it is a 503. The
    first `SMALL_BODY` bytes of each are not counted, so that large bodies cannot keep small requests out.
    ``max_depth`` and ``max_values`` are put into the scope, for `read_json_object`.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_bytes: int,
        max_depth: int = MAX_DEPTH,
        max_values: int = MAX_VALUES,
        max_total_bytes: int = MAX_TOTAL_BYTES,
    ) -> None:
        self._app = app
        self._max = max_bytes
        self._max_total = max(max_total_bytes, max_bytes)
        self._total = 0  # counted bytes of unfinished requests
        self._max_depth = max_depth
        self._max_values = max_values

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope[_DEPTH], scope[_VALUES] = self._max_depth, self._max_values
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._max:
            # The body will not be read, so the connection cannot be used again.
            response = response_for(self._too_large())
            response.headers["Connection"] = "close"
            await response(scope, receive, send)
            return
        seen = counted_bytes = 0

        async def counted() -> Message:
            nonlocal seen, counted_bytes
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > self._max:
                    raise self._too_large()
                more = max(0, seen - SMALL_BODY) - counted_bytes
                if self._total + more > self._max_total:
                    raise Overloaded(
                        f"the bodies of unfinished requests have {self._total} bytes, and this one would exceed the "
                        f"limit of {self._max_total} (--max-total-body-bytes); try again later"
                    )
                counted_bytes += more
                self._total += more
            return message

        try:
            await self._app(scope, counted, send)
        finally:
            self._total -= counted_bytes

    def _too_large(self) -> InvalidRequest:
        return InvalidRequest(None, f"the request body must be at most {self._max} bytes", status=413)


async def read_json_object(request: Request) -> dict[str, Any]:
    """The body as a JSON object. NaN, Infinity, lone surrogates, invalid UTF-8 and absurd nesting are a 400.

    A compressed body is a 415. A body with more values than the server allows is a 413 before it is parsed: parsing it
    would block the event loop. Scans of large bodies yield to the event loop between slices.

    A list of non-negative integers in a field for token ids becomes an int64 array [n], a list of long ones a list of
    arrays; other lists stay lists. 33,000 ids cost a third of the time that as many Python objects take, during which
    other requests wait.
    """
    encoding = dict(request.scope["headers"]).get(b"content-encoding", b"identity").decode("latin-1")
    if encoding.strip().lower() != "identity":
        raise InvalidRequest(
            None, f"Content-Encoding {encoding[:60]} is not supported: send the body as it is", status=415
        )
    body = await _read(request.receive)
    if not body:
        raise InvalidRequest(None, "the body is empty: it must be a JSON object")
    most = request.scope.get(_VALUES, MAX_VALUES)
    levels = request.scope.get(_DEPTH, MAX_DEPTH)
    large = len(body) > SLICE
    values = await count_values(body, most) if len(body) > most else NONE  # a value takes a byte
    if values.escapes > ESCAPES * most:
        raise _too_many(ESCAPES * most, "backslashes in its strings", values.escapes)
    if values.all > IDS * most:
        raise _too_many(IDS * most, "names, values and token ids", values.all)
    many = values.all > most
    fields = _fields(body, many) if values.large <= most else {}
    if len(fields) > MAX_FIELDS:
        raise InvalidRequest(None, f"the body must have at most {MAX_FIELDS} fields, got {len(fields)}")
    if large:
        await asyncio.sleep(0)
    arrays = await id_arrays(fields)
    counted = values.all - count_ids(arrays)
    if counted > most:
        raise _too_many(most, "names and values (--max-json-values) beside token ids", counted)
    for name, raw in fields.items():
        if name not in arrays and await deeper_than(bytes(raw), levels - 1):
            raise InvalidRequest(name[:60], f"must be nested at most {levels} deep")
    value = _decode_beside(fields, arrays, many) if arrays else None
    if value is None:
        value = _decode(body)
    if large:
        await asyncio.sleep(0)
    return value


async def _read(receive: Receive) -> bytes:
    """The whole body. Raises `ClientDisconnect`."""
    pieces: list[bytes] = []
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        pieces.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(pieces)


def _too_many(most: int, what: str, found: int) -> InvalidRequest:
    return InvalidRequest(None, f"the body must have at most {most} {what}, got {found}", status=413)


def _fields(body: bytes, many: bool) -> dict[str, msgspec.Raw]:
    """The body's fields, undecoded. Empty for an invalid body: `_decode` raises its error, unless there are ``many``
    values, which are not to be decoded; then it is raised here."""
    try:
        return _decode_fields(body)
    except msgspec.ValidationError:  # not an object
        return {}
    except _INVALID as error:
        if many:
            raise _invalid(error) from error
        return {}


def _decode_beside(
    fields: Mapping[str, msgspec.Raw], arrays: Mapping[str, Array | list[Array]], many: bool
) -> dict[str, Any] | None:
    """The fields with ``arrays`` in their places. None if another field is invalid, as `_fields`."""
    try:
        return {name: arrays[name] if name in arrays else _decoded(raw) for name, raw in fields.items()}
    except _INVALID as error:
        if many:
            raise _invalid(error) from error
        return None


def _decode(body: bytes) -> dict[str, Any]:
    try:
        value = _decoded(body)
    except _INVALID as error:
        raise _invalid(error) from error
    if not isinstance(value, dict):
        raise InvalidRequest(None, f"the body must be a JSON object, got {type(value).__name__}")
    return value


def _invalid(error: Exception) -> InvalidRequest:
    utf8 = isinstance(error, UnicodeDecodeError)
    return InvalidRequest(None, "the body is not valid UTF-8" if utf8 else f"the body is not valid JSON: {error}")


def _decoded(text: bytes | msgspec.Raw) -> Any:
    # Decoding makes no garbage, and every collection would walk all objects made so far.
    gc.disable()
    try:
        return msgspec.json.decode(text)
    finally:
        gc.enable()
