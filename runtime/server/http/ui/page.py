"""``GET /ui``: the page and its assets. Static files of the package, the same for everybody: they hold no data.

A browser cannot send a key with a link, so these paths are open; the page asks for the key and sends it with what it
fetches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import Request, Response

from ..plumbing.routes import Routes

ASSETS = Path(__file__).parent / "assets"
PAGE = "/ui"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Only files of this server, no inline script or style, and no other page may frame it.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # ask each time; an unchanged file is a 304
}


def paths() -> dict[str, Path]:
    """The file of each path that is served."""
    files = (file for file in sorted(ASSETS.rglob("*")) if file.suffix in _TYPES)
    found = {f"{PAGE}/{file.relative_to(ASSETS).as_posix()}": file for file in files}
    return {PAGE: ASSETS / "index.html", f"{PAGE}/": ASSETS / "index.html", **found}


def routes() -> Routes:
    """Each file is read once, when the server starts."""
    routes = Routes("ui")
    for path, file in paths().items():
        routes.add("GET", path, engine=False, text="only", hidden=path != PAGE)(_handler(file))
    return routes


def _handler(file: Path) -> Callable[[Request], Awaitable[Response]]:
    body = file.read_bytes()
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {**_HEADERS, "ETag": tag, "Content-Type": _TYPES[file.suffix]}

    async def asset(request: Request) -> Response:
        """The page, or one of its files."""
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers)

    return asset
