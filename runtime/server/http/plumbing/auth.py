"""API keys: every route needs one unless it is listed as open. Denies by default."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from typing import NamedTuple

from starlette.types import ASGIApp, Receive, Scope, Send

from ....errors import InvalidRequest
from .errors import error_response

OPEN_PATHS = frozenset({"/health"})


class Caller(NamedTuple):
    """The key and role of a request. The operator shares the cache of the server's first key."""

    key: str | None
    admin: bool


_caller: ContextVar[Caller] = ContextVar("caller")  # of the task that serves a request


def is_admin() -> bool:
    """Whether the request being served came with the operator's key. False outside of `AuthMiddleware`."""
    caller = _caller.get(None)
    return caller is not None and caller.admin


async def require_admin() -> None:
    """Raises `InvalidRequest` (403) unless the request being served came with the operator's key."""
    if not is_admin():
        raise InvalidRequest(None, "this route needs the admin key (--admin-api-key)", status=403)


class AuthMiddleware:
    """Compares the key of ``Authorization: Bearer KEY`` or ``x-api-key: KEY`` in constant time.

    The path is ``scope["path"]``, which is what routing uses: a URL rebuilt from the Host header can differ from it.
    """

    def __init__(
        self,
        app: ASGIApp,
        api_key: str | None,
        extra_api_keys: Sequence[str] = (),
        admin_api_key: str | None = None,
        open_paths: Iterable[str] = (),
    ) -> None:
        """``extra_api_keys``: of further tenants. ``admin_api_key``: the operator's; None: ``api_key`` is the
        operator's. ``open_paths``: need no key, as `OPEN_PATHS`."""
        self._app = app
        self._open = OPEN_PATHS.union(open_paths)
        self._callers = [(_digest(key.encode()), Caller(key, False)) for key in extra_api_keys]
        if api_key is not None:
            self._callers.append((_digest(api_key.encode()), Caller(api_key, admin_api_key is None)))
        self._anonymous = None if self._callers else Caller(None, admin_api_key is None)
        if admin_api_key is not None:
            self._callers.append((_digest(admin_api_key.encode()), Caller(api_key, True)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] in self._open:
            await self._app(scope, receive, send)
            return
        caller = self._anonymous
        if scope["type"] == "http":
            caller = self._who(scope) or caller
        if caller is not None:
            token = _caller.set(caller)
            try:
                await self._app(scope, receive, send)
            finally:
                _caller.reset(token)
            return
        if scope["type"] == "http":
            response = error_response(
                401,
                "a valid API key is needed: send Authorization: Bearer KEY or x-api-key: KEY",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await response(scope, receive, send)
            return
        await send({"type": "websocket.close", "code": 1008})

    def _who(self, scope: Scope) -> Caller | None:
        """The caller whose key was sent. With several keys, the operator's counts before the others."""
        found = None
        for key in map(_digest, _keys(scope["headers"]) if self._callers else ()):
            for digest, caller in self._callers:
                if hmac.compare_digest(key, digest) and not (found is not None and found.admin):
                    found = caller
        return found


class Namespaces:
    """Names of cache namespaces.

    The owner is derived from the key of the request being served (``api_key`` outside of `AuthMiddleware`); what a
    request sends can only divide the owner's part further.
    """

    def __init__(self, api_key: str | None, secret: bytes | None = None) -> None:
        """``secret``: the key of the digests, where they must be the same after a restart: those of a disk cache."""
        self._secret = secret or secrets.token_bytes(32)
        self._default = Caller(api_key, False)
        self._owners: dict[str | None, str] = {None: ""}

    def of(self, salt: str | None, extra_key: str | None = None, partition: str | None = None) -> tuple[str, str]:
        """(owner, salt). ``extra_key`` is SGLang's other name for the salt: with both, both count. ``partition``
        divides the result once more. The salt is a digest, since the tree can be shown and a salt is a secret; lengths
        are part of it, so that "ab" + "c" differs from "a" + "bc".
        """
        salt, extra_key = salt or extra_key or "", extra_key if salt and extra_key else ""
        words = f"{len(salt)}:{salt}{extra_key}" if salt or extra_key else ""
        if partition:
            words = f"key{len(partition)}:{partition}{words}"
        return self._owner(), self._digest(words) if words else ""

    def _owner(self) -> str:
        key = _caller.get(self._default).key
        owner = self._owners.get(key)
        if owner is None:
            owner = self._owners[key] = self._digest(f"{key}")
        return owner

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
