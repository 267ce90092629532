"""``GET /ui``: the page and its assets; ``GET /docs``: the manual and a reference of the routes.

Files of the package, the same for everybody: they hold no data. A browser cannot send a key with a link, so these paths
are open; the pages ask for the key and send it with what they fetch.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from functools import cache, partial
from html import escape
from pathlib import Path

from fastapi import Request, Response

from ..plumbing.routes import Routes
from . import manual

ASSETS = Path(__file__).parent / "assets"
PAGE = "/ui"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
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


def files() -> dict[str, Path]:
    """The file of each path that is served as it is."""
    assets = (file for file in sorted(ASSETS.rglob("*")) if file.suffix in _TYPES)
    found = {f"{PAGE}/{file.relative_to(ASSETS).as_posix()}": file for file in assets}
    return {PAGE: ASSETS / "index.html", f"{PAGE}/": ASSETS / "index.html", **found, **manual.images()}


def open_paths() -> list[str]:
    """Every path of this module: none needs a key."""
    return [*files(), manual.BASE, *(f"{manual.BASE}/{name}" for name in manual.pages())]


def routes() -> Routes:
    """Each file is read, and each page of the manual rendered, at its first request."""
    routes = Routes("ui")
    for path, file in files().items():
        handler = _handler(file.read_bytes, _TYPES[file.suffix], "The page.")
        routes.add("GET", path, engine=False, text="only", hidden=path != PAGE)(handler)
    index = _handler(_index, _TYPES[".html"], "The manual, and a reference of the routes.")
    routes.add("GET", manual.BASE, engine=False, text="only")(index)
    for name in manual.pages():
        handler = _handler(partial(_document, name), _TYPES[".html"], "A page of the manual.")
        routes.add("GET", f"{manual.BASE}/{name}", engine=False, text="only", hidden=True)(handler)
    return routes


def _handler(make: Callable[[], bytes], kind: str, about: str) -> Callable[[Request], Awaitable[Response]]:
    made = cache(make)

    async def asset(request: Request) -> Response:
        body = await asyncio.to_thread(made)  # rendering the longest page takes 60 ms
        tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        headers = {**_HEADERS, "ETag": tag, "Content-Type": kind}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers)

    asset.__doc__ = about
    return asset


def _index() -> bytes:
    """The list of the manual's pages, and the place where docs.js writes the reference."""
    links = "".join(
        f'<li><a href="{manual.BASE}/{name}">{escape(manual.title(file))}</a> <span class="quiet">{name}</span></li>'
        for name, file in manual.pages().items()
    )
    return _html("Manual", f'<h1>Manual</h1><ul class="pages">{links}</ul><div id="reference"></div>', "docs.js")


def _document(name: str) -> bytes:
    back = f'<p><a href="{manual.BASE}">Manual</a> · {escape(name)}</p>'
    return _html(manual.title(manual.pages()[name]), back + manual.body(name))


def _html(title: str, body: str, script: str = "") -> bytes:
    loaded = f'<script src="{PAGE}/{script}" type="module"></script>' if script else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} · Branchwise</title>"
        f'<link rel="icon" href="{PAGE}/icon.svg" type="image/svg+xml">'
        f'<link rel="stylesheet" href="{PAGE}/style.css">{loaded}</head>'
        f'<body><main class="manual">{body}</main></body></html>'
    ).encode()
