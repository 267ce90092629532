"""The error of a program: it names the variable and the line of the program."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from ...runtime.errors import BranchwiseError

_HERE = str(Path(__file__).parent)
_ASYNCIO = str(Path(asyncio.__file__).parent)
# Library programs (`tools`, `search`) run on the loop, without their caller on the stack; this is the caller's line.
_site: ContextVar[str | None] = ContextVar("branchwise_site", default=None)


class ProgramError(BranchwiseError):
    """A program that cannot continue.

    ``message``: the words of the server or of the language. ``variable``: the name of the one that could not be set, if
    any. ``site``: ``file:line`` of the program. ``backend``: the backend's name.
    """

    def __init__(self, message: str, *, variable: str | None = None, site: str = "", backend: str = "") -> None:
        about = f"{variable!r} " if variable else ""
        asked = f" on {backend}" if backend and backend not in message else ""
        super().__init__(f"{site}: {about}failed{asked}: {message}" if site else message)
        self.message = message
        self.variable = variable
        self.site = site
        self.backend = backend


def call_site() -> str:
    """``file:line`` of the program's line that called into the language."""
    site = _site.get()
    if site is not None:
        return site
    frame = sys._getframe(1)
    inside = frame
    while True:
        name = frame.f_code.co_filename
        if not name.startswith(_HERE):
            break
        inside = frame
        if frame.f_back is None:
            break
        frame = frame.f_back
    if frame.f_code.co_filename.startswith(_ASYNCIO):
        frame = inside
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


@contextmanager
def at_site(site: str | None) -> Iterator[None]:
    """Within the block, `call_site` returns ``site``; None: it inspects the stack again."""
    token = _site.set(site)
    try:
        yield
    finally:
        _site.reset(token)
