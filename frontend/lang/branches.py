"""A Branchwise server as a stateful backend: the server keeps the prompts as branches, and only new tokens are sent.

A handle still has all its tokens, so programs behave as with `ServerBackend`: a branch that has expired (410) or was
lost in a restart of the server (404) is created again, and if the server has no room for more branches (429),
prompts are sent whole.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import BackendError
from .backend import Capabilities, Completion, GenerationRequest, OnDelta, Piece, TokenScores
from .codec import Codec, Run
from .server import ServerBackend, wire
from .token_backend import SampleReply, token_ids

if TYPE_CHECKING:
    from .handles import BranchHandle, Prompt

GONE, FULL = (404, 410), 429
MAX_OPS = 1024  # operations of one batch
MAX_FORK = 1024  # branches of one fork
CANCEL_SECONDS = 2.0  # how long a cancelled caller waits until the branches it was creating are deleted


class BranchBackend(ServerBackend):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.capabilities = Capabilities(branches=True, constraints=None, prefill=True)
        self._closing: dict[asyncio.AbstractEventLoop, tuple[list[str], asyncio.Future[None]]] = {}
        self._deleting: set[asyncio.Task[None]] = set()

    async def create(self) -> BranchHandle:
        from .handles import BranchHandle

        return BranchHandle()

    async def extend(self, handle: BranchHandle, piece: Piece) -> None:
        await super().extend(handle, piece)
        if handle.id is not None:
            handle.unsent += token_ids(piece)

    async def fork(self, handle: BranchHandle, n: int) -> list[BranchHandle]:
        ids: list[str] = []
        try:
            while handle.length and len(ids) < n and await self._sync(handle):
                body = {"n": min(n - len(ids), MAX_FORK)}
                ids += await self._created(lambda body=body: self._request(handle, "fork", body))  # type: ignore[misc]
        except BaseException as error:
            if not isinstance(error, BackendError) or error.status != FULL:
                await self._give_back(self._delete(ids))  # of the batches before
                raise
        return [handle.fork(id) for id in [*ids, *[None] * (n - len(ids))]]

    async def generate(
        self, handle: BranchHandle, request: GenerationRequest, on_delta: OnDelta | None = None
    ) -> list[Completion]:
        replies = None
        if await self._ensure(handle):
            streamed = on_delta if request.params.n == 1 else None
            replies = await self._request(handle, "generate", wire(request), streamed)
        if replies is None:
            return await super().generate(handle, request, on_delta)
        return await self._append(handle, request, replies, on_delta)

    def _kept_ids(self, codec: Codec, handle: Prompt, reply: SampleReply) -> list[int]:
        end = reply.meta.get("branch")
        if end is None:  # only the first sample stays in the branch
            return super()._kept_ids(codec, handle, reply)
        return [*reply.ids[: end["kept_tokens"]], *codec.encode([Run(end["pending_text"])])]

    async def score(self, handle: BranchHandle, continuations: Sequence[Piece]) -> list[TokenScores]:
        reply = None
        if await self._sync(handle):
            reply = await self._request(handle, "score", {"continuations": list(continuations)})
        if reply is None:
            return await super().score(handle, continuations)
        self.usage.sent_tokens += sum(len(token_ids(piece)) for piece in continuations)
        scores: list[TokenScores] = []
        for one in reply["scores"]:
            self.usage.count(one["prompt_tokens"], one["cached_tokens"], 0)
            scores.append(list(zip(one["token_ids"], one["logprobs"], strict=True)))
        return scores

    async def close(self, handle: BranchHandle) -> None:
        """Handles closed at the same time are closed in one round trip."""
        if handle.id is None:
            return
        loop = asyncio.get_running_loop()
        if loop not in self._closing:
            self._closing[loop] = [], asyncio.ensure_future(self._close_all(loop))
        ids, closed = self._closing[loop]
        ids.append(handle.id)
        handle.id, handle.unsent = None, []
        await asyncio.shield(closed)

    async def _close_all(self, loop: asyncio.AbstractEventLoop) -> None:
        await asyncio.sleep(0)
        ids, _ = self._closing.pop(loop)
        await self._delete(ids)

    async def _delete(self, ids: Sequence[str]) -> None:
        for start in range(0, len(ids), MAX_OPS):
            ops = [{"op": "delete", "id": id} for id in ids[start : start + MAX_OPS]]
            await self.http.post("/branches/batch", {"ops": ops})

    async def _created(self, create: Callable[[], Awaitable[Any]]) -> list[str]:
        """The ids of new branches. If the caller is cancelled meanwhile, deletes them: no caller has their ids."""
        creating = asyncio.ensure_future(create())
        try:
            return _ids(await asyncio.shield(creating))
        except asyncio.CancelledError:

            async def delete() -> None:
                await self._delete(_ids(await creating))

            await self._give_back(delete())
            raise

    async def _give_back(self, delete: Coroutine[Any, Any, None]) -> None:
        """Deletes new branches of which nobody has the ids: at once, or when a busy server has made them."""

        async def quietly() -> None:
            with contextlib.suppress(BackendError):  # they expire on the server anyway
                await delete

        deleting = asyncio.create_task(quietly())
        self._deleting.add(deleting)
        deleting.add_done_callback(self._deleting.discard)
        await asyncio.wait((deleting,), timeout=CANCEL_SECONDS)

    async def _ensure(self, handle: BranchHandle) -> bool:
        """Gives the handle a branch, created with its whole prompt if it has none. False: the server has no room."""
        if handle.id is None:
            body: dict[str, Any] = {"input_ids": handle.array().tolist()}
            if self._cache_salt is not None:
                body["cache_salt"] = self._cache_salt
            try:
                (handle.id,) = await self._created(lambda: self.http.post("/branches", body, retry=False))
            except BackendError as error:
                if error.status != FULL:
                    raise
                return False
            self.usage.sent_tokens += handle.length
            handle.unsent = []
        return True

    async def _sync(self, handle: BranchHandle) -> bool:
        """`_ensure`, and sends the branch the tokens it lacks."""
        if not await self._ensure(handle):
            return False
        if handle.unsent:
            try:
                await self.http.post(f"/branches/{handle.id}/extend", {"input_ids": handle.unsent}, retry=False)
            except BackendError as error:
                if error.status not in GONE:
                    raise
                handle.id = None
                return await self._ensure(handle)
            self._sent(handle)
        return True

    def _sent(self, handle: BranchHandle) -> None:
        self.usage.sent_tokens += len(handle.unsent)
        handle.unsent = []

    async def _request(
        self, handle: BranchHandle, route: str, body: dict[str, Any], on_delta: OnDelta | None = None
    ) -> Any | None:
        """One request on the handle's branch; ``generate`` also sends the tokens that the branch lacks. A branch that
        is gone is created again, once. None: the server has no room for it."""
        for last in (False, True):
            path = f"/branches/{handle.id}/{route}"
            try:
                if route != "generate":
                    return await self.http.post(path, body, retry=False)
                sent = {**body, "extend": handle.unsent} if handle.unsent else body
                replies = await self._replies(path, sent, on_delta)
                self._sent(handle)
                return replies
            except BackendError as error:
                if error.status not in GONE or last:
                    raise
                handle.id = None
                if not await self._ensure(handle):
                    return None
        return None


def _ids(reply: dict[str, Any] | None) -> list[str]:
    """The ids in the reply to a fork (None: no room) or to the creation of one branch."""
    return [] if reply is None else reply.get("ids") or [reply["id"]]
