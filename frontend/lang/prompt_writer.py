"""Moves the text of a state into its backend handle, and to the readers of a run that streams."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any

from .backend import Backend, GenerationRequest
from .session import Session
from .transcript import Item, Out, Run, Transcript
from .variables import ReplayStream

_LONG = 20_000  # characters; encoding more than this would block the event loop for too long


class PromptWriter:
    """One state's prompt: a transcript of what was appended and the backend's handle. Used on the session's loop only.

    ``stream``: gets all of the state's text; only the first state of a run that streams has one.
    """

    def __init__(self, session: Session, stream: ReplayStream | None) -> None:
        self.session = session
        self.stream = stream
        self.transcript: Transcript | None = None  # None until the first operation
        self.handle: Any = None
        self.uncomputed = 0  # tokens in the handle that no request has computed yet
        self._streamed = 0  # characters

    @property
    def backend(self) -> Backend:
        return self.session.backend

    async def open(self) -> Transcript:
        """The transcript; the first call creates it and the handle."""
        if self.transcript is None:
            await self.session.opened.get()
            transcript = Transcript(self.session.turns, self.backend.name, chats=self.session.codec is None)
            self.start(transcript, await self.backend.create())
            return transcript
        return self.transcript

    def start(self, transcript: Transcript, handle: Any, uncomputed: int = 0) -> None:
        self.transcript, self.handle, self.uncomputed = transcript, handle, uncomputed
        self.session.own_handle(self, handle)

    def add(self, item: Item) -> Awaitable[None] | None:
        """Appends to the transcript: at once (None), or when awaited if it is not open yet."""
        if self.transcript is None:
            return self._open_and_add(item)
        self.transcript.add(item)
        return None

    async def _open_and_add(self, item: Item) -> None:
        (await self.open()).add(item)

    async def write(self, outs: Sequence[Out]) -> None:
        """Appends text and tokens that the transcript has handed over to the handle."""
        await self.extend(await self._encoded(outs))
        self.show()

    async def _encoded(self, outs: Sequence[Out]) -> list[int] | str:
        """Adjacent runs of text are encoded as one text."""
        codec = self.session.codec
        if codec is None:
            return "".join(out.text for out in outs)
        ids: list[int] = []
        runs: list[Run] = []
        for out in [*outs, None]:
            if isinstance(out, Run):
                runs.append(out)
                continue
            opening = not ids and self.handle.length == 0
            if sum(len(run.text) for run in runs) > _LONG:
                ids += await asyncio.to_thread(codec.encode, runs, opening=opening)
            elif runs:
                ids += codec.encode(runs, opening=opening)
            runs = []
            if out is not None:
                ids += out.ids
        return ids

    async def extend(self, piece: list[int] | str) -> None:
        if piece:
            await self.backend.extend(self.handle, piece)
            self.uncomputed += len(piece)

    async def prepare_fork(self, n: int, transcript: Transcript) -> list[Any]:
        """``n`` handles that continue this one. Computes their shared prefix first, so that it is computed once."""
        if not transcript.as_messages:
            await self.write(transcript.take_settled())
            if n > 1 and self.uncomputed and self.backend.capabilities.prefill:
                await self.backend.generate(self.handle, GenerationRequest({"max_tokens": 0}))
                self.uncomputed = 0
        return await self.backend.fork(self.handle, n)

    def generated(self, ids: list[int] | None, text: str, transcript: Transcript) -> None:
        """Records that the model wrote ``text`` and that the handle contains it."""
        transcript.wrote(ids, text)
        self.uncomputed = 1  # the last token was sampled but not computed
        self.show()

    def show(self) -> None:
        """Streams what the handle contains."""
        if self.stream is not None and self.transcript is not None:
            text = self.transcript.shown()
            self.stream.put(text[self._streamed :])
            self._streamed = len(text)

    def show_delta(self, text: str) -> None:
        """Streams text while it is generated."""
        if self.stream is not None:
            self.stream.put(text)
            self._streamed += len(text)

    async def end_stream(self, error: BaseException | None) -> None:
        """Streams the rest and ends the stream."""
        if self.stream is not None:
            if error is None:
                self.stream.put((await self.open()).text()[self._streamed :])
            self.stream.end(error)
