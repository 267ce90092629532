"""A Branchwise server as a backend, the stateful way: the server keeps the prompts, and only what is new travels.

A program means the same as the stateless way: a handle still knows its tokens, so a branch that the server has let go
(410), or that a server started anew never had (404), is made again from them, and where there is no room for more
branches (429) prompts are sent whole.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from .backend import Ask, Capabilities, Completion, OnDelta, Piece, Rope
from .codec import Run
from .errors import BackendError
from .server import ServerBackend, wire

GONE, FULL = (404, 410), 429
MAX_OPS = 1024  # of one batch
MAX_FORK = 1024  # branches of one fork


class BranchHandle:
    """A prompt, the server's branch of it (None: there is none), and what of the prompt that branch still lacks."""

    __slots__ = ("id", "new", "rope")

    def __init__(self, rope: Rope, id: str | None = None) -> None:
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
        self._closing: list[str] = []
        self._closed: asyncio.Future[None] | None = None

    async def create(self) -> BranchHandle:  # type: ignore[override]
        return BranchHandle(Rope())

    async def extend(self, handle: BranchHandle, piece: Piece) -> None:  # type: ignore[override]
        await super().extend(handle.rope, piece)
        if handle.id is not None:
            handle.new += piece  # type: ignore[arg-type]

    async def fork(self, handle: BranchHandle, n: int) -> list[BranchHandle]:  # type: ignore[override]
        ids: list[str] = []
        try:
            while handle.length and len(ids) < n and await self._sync(handle):
                ids += (await self._on(handle, "fork", {"n": min(n - len(ids), MAX_FORK)}))["ids"]
        except BackendError as error:
            if error.status != FULL:
                raise
        return [BranchHandle(handle.rope.fork(), id) for id in [*ids, *[None] * (n - len(ids))]]

    async def generate(  # type: ignore[override]
        self, handle: BranchHandle, ask: Ask, on_delta: OnDelta | None = None
    ) -> list[Completion]:
        codec = await self.codec()
        if not await self._have(handle):
            return await super().generate(handle.rope, ask, on_delta)
        replies = await self._on(handle, "generate", wire(ask), on_delta=on_delta if ask.params.n == 1 else None)
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
        if not await self._sync(handle):
            return await super().score(handle.rope, continuations)
        self.usage.sent_tokens += sum(len(piece) for piece in continuations if isinstance(piece, list))
        reply = await self._on(handle, "score", {"continuations": list(continuations)})
        rows: list[list[tuple[int | str, float]]] = []
        for one in reply["scores"]:
            self.usage.count(one["prompt_tokens"], one["cached_tokens"], 0)
            rows.append(list(zip(one["token_ids"], one["logprobs"], strict=True)))
        return rows

    async def close(self, handle: BranchHandle) -> None:  # type: ignore[override]
        """Those closed at the same time are closed in one round trip."""
        if handle.id is None:
            return
        self._closing.append(handle.id)
        handle.id, handle.new = None, []
        if self._closed is None:
            self._closed = asyncio.ensure_future(self._close_all())
        await asyncio.shield(self._closed)

    async def _close_all(self) -> None:
        await asyncio.sleep(0)
        ids, self._closing, self._closed = self._closing, [], None
        for start in range(0, len(ids), MAX_OPS):
            ops = [{"op": "delete", "id": id} for id in ids[start : start + MAX_OPS]]
            await self.http.post("/branches/batch", {"ops": ops})

    async def _have(self, handle: BranchHandle) -> bool:
        """A branch of the handle's, made if there is none; False: there is no room for one."""
        if handle.id is None:
            body: dict[str, Any] = {"input_ids": handle.rope.tokens()}
            if self._salt is not None:
                body["cache_salt"] = self._salt
            try:
                made = await self.http.post("/branches", body, patient=False)
            except BackendError as error:
                if error.status != FULL:
                    raise
                return False
            self.usage.sent_tokens += handle.length
            handle.id, handle.new = made["id"], []
        return True

    async def _sync(self, handle: BranchHandle) -> bool:
        """`_have`, and it has the whole prompt."""
        if not await self._have(handle):
            return False
        if handle.new:
            await self._on(handle, "extend", {}, field="input_ids")
        return handle.id is not None

    async def _on(
        self, handle: BranchHandle, what: str, body: dict[str, Any], *, field: str = "extend", on_delta: Any = None
    ) -> Any:
        """One request on the handle's branch, with what is new. A branch that is gone is made again, once."""
        for last in (False, True):
            new = handle.new if what in ("generate", "extend") else []
            sent = {**body, **({field: new} if new else {})}
            path = f"/branches/{handle.id}/{what}"
            try:
                if on_delta is None:
                    reply = await self.http.post(path, sent, patient=what == "generate")
                else:
                    reply = await self._follow({**sent, "stream": True}, on_delta, path)
            except BackendError as error:
                if error.status not in GONE or last:
                    raise
                handle.id = None
                if not await self._have(handle):
                    raise
                if what == "extend":
                    return None  # it was made with all of it
                continue
            self.usage.sent_tokens += len(new)
            if new:
                handle.new = []
            return reply
        return None
