"""What goes wrong in a program, and where: every error names the variable and the line of the program it is about."""

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
# A library program (`tools`, `search`) runs on the loop, with no caller on the stack: it leaves its caller's line here.
_site: ContextVar[str | None] = ContextVar("branchwise_site", default=None)


class BackendError(BranchwiseError):
    """A backend that cannot be reached, says no, or cannot do what is asked. ``status``: HTTP's; 0 if there is none."""

    def __init__(self, message: str, *, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class ProgramError(BranchwiseError):
    """A program that cannot go on.

    ``message``: what the server or the language says; ``variable``: the variable it is about, if any; ``site``:
    ``file:line`` of the program; ``backend``: who was asked.
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
    """``file:line`` of the program line that called into the language."""
    told = _site.get()
    if told is not None:
        return told
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
    """Within: report ``site``; None: look at the stack again."""
    token = _site.set(site)
    try:
        yield
    finally:
        _site.reset(token)
