"""Who may ask: every route needs the key unless it is listed as open. Deny by default."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import error_response

OPEN_PATHS = frozenset({"/health"})


class AuthMiddleware:
    """Compares the key of ``Authorization: Bearer KEY`` or ``x-api-key: KEY`` in constant time.

    The path is ``scope["path"]``, which is what routing uses: a URL rebuilt from the Host header can differ from it.
    """

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._digest = None if api_key is None else _digest(api_key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._digest is None or scope["type"] == "lifespan" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        if scope["type"] == "http":
            for key in _keys(scope["headers"]):
                if hmac.compare_digest(_digest(key), self._digest):
                    await self._app(scope, receive, send)
                    return
            response = error_response(
                401,
                "a valid API key is needed: send Authorization: Bearer KEY or x-api-key: KEY",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await response(scope, receive, send)
            return
        await send({"type": "websocket.close", "code": 1008})


class Namespaces:
    """Names of cache namespaces. The owner comes from the API key; what a request sends can only divide it further."""

    def __init__(self, api_key: str | None) -> None:
        self._secret = secrets.token_bytes(32)
        self._owner = "" if api_key is None else self._digest(api_key)

    def of(self, salt: str | None, extra_key: str | None = None) -> tuple[str, str]:
        """(owner, salt). SGLang has two words for the salt: either will do, and both together both count. A digest,
        because the tree is there to be shown and a salt is a secret; "ab" + "c" does not meet "a" + "bc"."""
        salt, extra_key = salt or extra_key or "", extra_key if salt and extra_key else ""
        return self._owner, self._digest(f"{len(salt)}:{salt}{extra_key}") if salt or extra_key else ""

    def _digest(self, text: str) -> str:
        return hmac.new(self._secret, text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:32]


def _keys(headers: Iterable[tuple[bytes, bytes]]) -> Iterable[bytes]:
    for name, value in headers:
        if name == b"x-api-key":
            yield value.strip()
        elif name == b"authorization":
            scheme, _, key = value.partition(b" ")
            if scheme.lower() == b"bearer":
                yield key.strip()


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
