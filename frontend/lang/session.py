"""One run of one program: its backend, its loop, its defaults, and all the states it made."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import hashlib
import threading
import uuid
import weakref
from collections.abc import Coroutine
from typing import Any

from ...runtime.sampling_params import MAX_N, MAX_SEED
from ..client import ProgramRoute, current_route
from ..errors import BackendError
from ..loop import Once, close_at_exit, runs_on
from .backend import Backend
from .codec import Codec
from .errors import ProgramError
from .expressions import Sampling
from .turns import TurnTemplate

Path = tuple[int | str, ...]  # the forks that lead to a state; the same in every run of a program


class Session:
    """The states of a run belong to its session: when the run ends, it ends their work and closes their handles.

    ``seed``: from which every ``gen`` gets its own; None: the backend chooses. ``path``: the run's place in a batch.
    ``streams``: the run's text can be read while it is generated.
    """

    def __init__(
        self,
        backend: Backend,
        loop: asyncio.AbstractEventLoop,
        defaults: Sampling | None = None,
        *,
        seed: int | None = None,
        path: Path = (),
        streams: bool = False,
    ) -> None:
        self.backend = backend
        self.loop = loop
        self.defaults = defaults or Sampling()
        self.streams = streams
        self._seed = seed
        self.path = path
        self.codec: Codec | None = None
        self.turns: TurnTemplate | None = None
        self.opened = Once(self._open)  # to be awaited before ``codec`` and ``turns`` are read
        self._route = ProgramRoute(uuid.uuid4().hex)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._unreported: dict[int, ProgramError] = {}
        self._lock = threading.Lock()
        self._handles: set[Any] = set()
        close_at_exit.add(self)

    async def _open(self) -> None:
        self.codec = await self.backend.codec()
        self.turns = None if self.codec is None else self.codec.turns

    def seed_of(self, path: Path, name: str | None, occurrence: int) -> int | None:
        """The seed of one ``gen``, from its place in the program: independent of timing."""
        if self._seed is None:
            return None
        key = repr((self._seed, self.path, path, name, occurrence)).encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") % (MAX_SEED - MAX_N)

    # -- work ----------------------------------------------------------------------------------------------------------

    @property
    def on_loop(self) -> bool:
        return runs_on(self.loop)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Starts a task; to be called on the loop. `wait` awaits it and `cancel` cancels it."""
        context = contextvars.copy_context()
        context.run(current_route.set, self._route)
        task = self.loop.create_task(work, context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def wait(self) -> None:
        """Waits until every state has done all that was appended to it."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def cancel(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- failures ------------------------------------------------------------------------------------------------------

    def failed(self, error: ProgramError) -> None:
        with self._lock:
            self._unreported.setdefault(id(error), error)

    def reported(self, error: BaseException | None) -> None:
        """Records that the program has received ``error``, so the end of the run does not raise it."""
        with self._lock:
            self._unreported.pop(id(error), None)

    @property
    def unreported(self) -> ProgramError | None:
        """The first failure that the program has not received."""
        with self._lock:
            return next(iter(self._unreported.values()), None)

    # -- handles -------------------------------------------------------------------------------------------------------

    def own_handle(self, owner: object, handle: Any) -> None:
        """``handle`` is closed when ``owner`` is garbage-collected, and at the latest when the run ends."""
        if self.backend.capabilities.branches:
            self._handles.add(handle)
            weakref.finalize(owner, self._release_soon, handle).atexit = False  # `close` does it then

    def _release_soon(self, handle: Any) -> None:
        if handle in self._handles and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(lambda: self.spawn(self.release(handle)))

    async def release(self, handle: Any) -> None:
        if handle in self._handles:
            self._handles.discard(handle)
            with contextlib.suppress(BackendError):  # it expires on the server anyway
                await self.backend.close(handle)

    async def release_all(self) -> None:
        await asyncio.gather(*(self.release(handle) for handle in list(self._handles)))

    async def close(self) -> None:
        """Ends the run early: the process exits."""
        await self.cancel()
        await self.release_all()
