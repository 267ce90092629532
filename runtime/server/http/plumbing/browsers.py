"""Refuses requests that other web sites make through a visitor's browser, where no API key prevents them.

Any page can send requests to a server on its visitor's machine. A browser marks them with ``Origin`` or
``Sec-Fetch-Site``; after DNS rebinding they name another ``Host``. With an API key these checks are not
needed: a page does not have the key.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from .auth import OPEN_PATHS
from .errors import error_response

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
ACTING_GETS = frozenset({"/flush_cache", "/start_profile", "/stop_profile"})  # which SGLang's clients send


class BrowserGuard:
    """For servers without a key. ``host``: the address listened on; ``allowed``: further host names (--allowed-host);
    ``origins``: of web sites that may call this server (--allow-origins).

    On a loopback address ``Host`` must be one of its names. Elsewhere the names of the server are unknown: a browser's
    must be an IP address, a name without a dot or of the local network (.local), or allowed, as no public domain is.

    A browser's POST must be declared as JSON, which makes the browser ask the server first (a CORS preflight, which is
    refused), and its GET cannot act, as the address of an image would. Other clients are free to do both.
    """

    def __init__(self, app: ASGIApp, host: str, allowed: Collection[str] = (), origins: Collection[str] = ()) -> None:
        self._app = app
        self._origins = {origin.encode() for origin in origins}
        self._names = LOOPBACK | {name.lower() for name in allowed}
        self._check_host = host in LOOPBACK

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = None
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            headers = dict(scope["headers"])
            problem = self._problem(headers) or _acts(scope["method"], scope["path"], headers)
        if problem is None:
            await self._app(scope, receive, send)
            return
        hint = "start the server with --api-key, name the host with --allowed-host or the web site with --allow-origins"
        await error_response(403, f"{problem}: {hint}")(scope, receive, send)

    def _problem(self, headers: dict[bytes, bytes]) -> str | None:
        origin, host = headers.get(b"origin"), headers.get(b"host", b"")
        if origin is not None:
            if origin not in self._origins and _host_name(origin) not in self._names:
                return f"requests from the web site {origin[:100].decode('latin-1')} are refused"
        elif headers.get(b"sec-fetch-site") == b"cross-site":
            return "requests from other web sites are refused"
        name = _host_name(b"//" + host)
        if host and name not in self._names and (self._check_host or (_from_browser(headers) and not _is_local(name))):
            return f"requests to the host {host[:100].decode('latin-1')} are refused"
        return None


def _acts(method: str, path: str, headers: dict[bytes, bytes]) -> str | None:
    """The fault in a browser's request that a page can send without a preflight, or None."""
    marked = b"origin" in headers or b"sec-fetch-site" in headers
    if method == "POST" and marked:
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        return None if kind == b"application/json" else "a browser's POST must have Content-Type: application/json"
    # A browser marks no GET for an address without TLS that is not its own machine's.
    if method == "GET" and path in ACTING_GETS and _from_browser(headers):
        return f"GET {path} is refused to browsers, send POST"
    return None


def _from_browser(headers: dict[bytes, bytes]) -> bool:
    return b"origin" in headers or b"sec-fetch-site" in headers or headers.get(b"user-agent", b"")[:8] == b"Mozilla/"


def _is_local(name: str | None) -> bool:
    """Whether it is an IP address or a name that DNS rebinding cannot use."""
    if name is None:
        return False
    return "." not in name or name.endswith(".local") or name.replace(".", "").isdigit()


@lru_cache(maxsize=64)
def _host_name(url: bytes) -> str | None:
    """Lower case, without the port; None if it is not the URL of a host, such as ``null``."""
    try:
        return urlsplit(url.decode("ascii")).hostname
    except ValueError:
        return None
