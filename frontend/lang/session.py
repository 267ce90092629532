"""One run of one program: its backend, its loop, its defaults, and all the states it made."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
import weakref
from collections.abc import Coroutine
from typing import Any

from ...runtime.sampling_params import MAX_N, MAX_SEED
from .backend import Backend
from .chat import Turns
from .codec import Codec
from .errors import BackendError, ProgramError
from .expressions import Sampling
from .loop import Once, guests

Path = tuple[int | str, ...]  # which branch: the forks that led to it. Equal in every run of the same program.


class Session:
    """States belong to one; when the run ends, what is left of them is ended with it."""

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
        self.turns: Turns | None = None
        self.opened = Once(self._open)  # it has learnt the model's tokenizer and template
        self._tasks: set[asyncio.Task[Any]] = set()
        self._unseen: dict[int, ProgramError] = {}
        self._lock = threading.Lock()
        self._handles: set[Any] = set()
        guests.add(self)

    async def _open(self) -> None:
        self.codec = await self.backend.codec()
        self.turns = None if self.codec is None else self.codec.turns

    def seed_of(self, path: Path, name: str | None, occurrence: int) -> int | None:
        """The seed of one ``gen``: from where it stands in the program, so that timing has no say."""
        if self._seed is None:
            return None
        key = repr((self._seed, self.path, path, name, occurrence)).encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") % (MAX_SEED - MAX_N)

    # -- work ----------------------------------------------------------------------------------------------------------

    @property
    def on_loop(self) -> bool:
        try:
            return asyncio.get_running_loop() is self.loop
        except RuntimeError:
            return False

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Call it on the loop. What is spawned is awaited by `finish` and cancelled by `cancel`."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def finish(self) -> None:
        """Until every state has done all that was appended to it."""
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
            self._unseen.setdefault(id(error), error)

    def seen(self, error: BaseException | None) -> None:
        """Somebody has been told of ``error``."""
        with self._lock:
            self._unseen.pop(id(error), None)

    @property
    def unseen(self) -> ProgramError | None:
        """The first failure nobody has been told of."""
        with self._lock:
            return next(iter(self._unseen.values()), None)

    # -- handles -------------------------------------------------------------------------------------------------------

    def adopt(self, owner: object, handle: Any) -> None:
        """``handle`` is given back when ``owner`` is forgotten, at the latest when the run ends."""
        if self.backend.capabilities.branches:
            self._handles.add(handle)
            weakref.finalize(owner, self._forgotten, handle).atexit = False  # `leave` sees to it

    def _forgotten(self, handle: Any) -> None:
        if handle in self._handles and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(lambda: self.spawn(self.release(handle)))

    async def release(self, handle: Any) -> None:
        if handle in self._handles:
            self._handles.discard(handle)
            with contextlib.suppress(BackendError):  # it expires by itself, and nobody is left to tell
                await self.backend.close(handle)

    async def release_all(self) -> None:
        await asyncio.gather(*(self.release(handle) for handle in list(self._handles)))

    async def leave(self) -> None:
        """The process ends before the run does."""
        await self.cancel()
        await self.release_all()
