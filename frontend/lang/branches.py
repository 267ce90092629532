"""A Branchwise server as a backend, the stateful way: the server keeps the prompts, and only what is new travels.

A program means the same as the stateless way: a handle still knows its tokens, so a branch that the server has let go
(410), or that a server started anew never had (404), is made again from them, and where there is no room for more
branches (429) prompts are sent whole.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from .backend import Capabilities, Completion, GenerationRequest, OnDelta, Piece, SharedTokens
from .codec import Run
from .errors import BackendError
from .server import ServerBackend, wire

GONE, FULL = (404, 410), 429
MAX_OPS = 1024  # of one batch
MAX_FORK = 1024  # branches of one fork
LEAVING = 2.0  # seconds that one who is cancelled waits for the branches it was making


class BranchHandle:
    """A prompt, the server's branch of it (None: there is none), and what of the prompt that branch still lacks."""

    __slots__ = ("id", "new", "rope")

    def __init__(self, rope: SharedTokens, id: str | None = None) -> None:
        self.rope = rope
        self.id = id
        self.new: list[int] = []

    @property
    def length(self) -> int:
        return self.rope.length


class BranchBackend(ServerBackend):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.capabilities = Capabilities(branches=True, constraints=None, prefill=True)
        self._closing: dict[asyncio.AbstractEventLoop, tuple[list[str], asyncio.Future[None]]] = {}

    async def create(self) -> BranchHandle:  # type: ignore[override]
        return BranchHandle(SharedTokens())

    async def extend(self, handle: BranchHandle, piece: Piece) -> None:  # type: ignore[override]
        await super().extend(handle.rope, piece)
        if handle.id is not None:
            handle.new += piece  # type: ignore[arg-type]

    async def fork(self, handle: BranchHandle, n: int) -> list[BranchHandle]:  # type: ignore[override]
        ids: list[str] = []
        try:
            while handle.length and len(ids) < n and await self._sync(handle):
                asked = {"n": min(n - len(ids), MAX_FORK)}
                ids += await self._made(lambda asked=asked: self._on(handle, "fork", asked))  # type: ignore[misc]
        except BackendError as error:
            if error.status != FULL:
                raise
        return [BranchHandle(handle.rope.fork(), id) for id in [*ids, *[None] * (n - len(ids))]]

    async def generate(  # type: ignore[override]
        self, handle: BranchHandle, ask: GenerationRequest, on_delta: OnDelta | None = None
    ) -> list[Completion]:
        codec = await self.codec()
        if not await self._have(handle):
            return await super().generate(handle.rope, ask, on_delta)
        replies = await self._on(handle, "generate", wire(ask), on_delta if ask.params.n == 1 else None)
        if replies is None:
            return await super().generate(handle.rope, ask, on_delta)
        done = []
        for reply in replies if isinstance(replies, list) else [replies]:
            one = await self.completion(reply, [])
            end = one.meta.get("branch")
            if end is not None:  # the first sample's: where the branch ends is the server's to say
                one.ids = [*reply["output_ids"][: end["kept_tokens"]], *codec.encode([Run(end["pending_text"])])]
            done.append(one)
        if ask.params.max_tokens != 0:
            handle.rope.extend(done[0].ids or [])
            if on_delta is not None and ask.params.n > 1:
                on_delta(done[0].text)
        return done

    async def score(  # type: ignore[override]
        self, handle: BranchHandle, continuations: Sequence[Piece]
    ) -> list[list[tuple[int | str, float]]]:
        room = await self._sync(handle)
        reply = await self._on(handle, "score", {"continuations": list(continuations)}) if room else None
        if reply is None:
            return await super().score(handle.rope, continuations)
        self.usage.sent_tokens += sum(map(len, continuations))  # type: ignore[arg-type]
        rows: list[list[tuple[int | str, float]]] = []
        for one in reply["scores"]:
            self.usage.count(one["prompt_tokens"], one["cached_tokens"], 0)
            rows.append(list(zip(one["token_ids"], one["logprobs"], strict=True)))
        return rows

    async def close(self, handle: BranchHandle) -> None:  # type: ignore[override]
        """Those closed at the same time are closed in one round trip."""
        if handle.id is None:
            return
        loop = asyncio.get_running_loop()
        if loop not in self._closing:
            self._closing[loop] = [], asyncio.ensure_future(self._close_all(loop))
        ids, closed = self._closing[loop]
        ids.append(handle.id)
        handle.id, handle.new = None, []
        await asyncio.shield(closed)

    async def _close_all(self, loop: asyncio.AbstractEventLoop) -> None:
        await asyncio.sleep(0)
        ids, _ = self._closing.pop(loop)
        await self._delete(ids)

    async def _delete(self, ids: Sequence[str]) -> None:
        for start in range(0, len(ids), MAX_OPS):
            ops = [{"op": "delete", "id": id} for id in ids[start : start + MAX_OPS]]
            await self.http.post("/branches/batch", {"ops": ops})

    async def _made(self, make: Callable[[], Awaitable[Any]]) -> list[str]:
        """The ids of new branches. Who is cancelled meanwhile gives them back: nobody else will hear of them."""
        making = asyncio.ensure_future(make())
        try:
            reply = await asyncio.shield(making)
        except asyncio.CancelledError:
            with contextlib.suppress(BackendError, TimeoutError):
                await self._delete(_ids(await asyncio.wait_for(making, LEAVING)))
            raise
        return _ids(reply)

    async def _have(self, handle: BranchHandle) -> bool:
        """A branch of the handle's whole prompt, made if there is none; False: there is no room for one."""
        if handle.id is None:
            body: dict[str, Any] = {"input_ids": handle.rope.tokens()}
            if self._salt is not None:
                body["cache_salt"] = self._salt
            try:
                (handle.id,) = await self._made(lambda: self.http.post("/branches", body, patient=False))
            except BackendError as error:
                if error.status != FULL:
                    raise
                return False
            self.usage.sent_tokens += handle.length
            handle.new = []
        return True

    async def _sync(self, handle: BranchHandle) -> bool:
        """`_have`, and what is new of the prompt is in it."""
        if not await self._have(handle):
            return False
        if handle.new:
            try:
                await self.http.post(f"/branches/{handle.id}/extend", {"input_ids": handle.new}, patient=False)
            except BackendError as error:
                if error.status not in GONE:
                    raise
                handle.id = None
                return await self._have(handle)
            self._sent(handle)
        return True

    def _sent(self, handle: BranchHandle) -> None:
        self.usage.sent_tokens += len(handle.new)
        handle.new = []

    async def _on(
        self, handle: BranchHandle, what: str, body: dict[str, Any], on_delta: OnDelta | None = None
    ) -> Any | None:
        """One request on the handle's branch; generating takes along what is new of the prompt. A branch that is gone
        is made again, once. None: there is no room for it any more."""
        for last in (False, True):
            generates = what == "generate"
            sent = {**body, "extend": handle.new} if generates and handle.new else body
            path = f"/branches/{handle.id}/{what}"
            try:
                if on_delta is None:
                    reply = await self.http.post(path, sent, patient=generates)
                else:
                    reply = await self._follow({**sent, "stream": True}, on_delta, path)
            except BackendError as error:
                if error.status not in GONE or last:
                    raise
                handle.id = None
                if not await self._have(handle):
                    return None
                continue
            if generates:
                self._sent(handle)
            return reply
        return None


def _ids(reply: dict[str, Any] | None) -> list[str]:
    """Of a fork (None: of none), or of a branch just made."""
    return [] if reply is None else reply.get("ids") or [reply["id"]]
