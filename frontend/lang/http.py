"""JSON over HTTP for asyncio: one session a loop, errors in the server's words, patience with a busy server."""

from __future__ import annotations

import asyncio
import json
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from ..client import error_message
from .backend import Usage
from .errors import BackendError

if TYPE_CHECKING:
    import aiohttp

MAX_CONNECTIONS = 512
TIMEOUT = 600.0  # seconds a server may say nothing
PATIENCE = 60.0  # seconds a request is offered again to a server that says it is busy


class Http:
    """Talks to one server from any number of loops. Raises `BackendError`, and nothing else."""

    def __init__(self, url: str, api_key: str | None, timeout: float, usage: Usage) -> None:
        self.url = url
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout = timeout
        self._usage = usage
        self._sessions: dict[asyncio.AbstractEventLoop, aiohttp.ClientSession] = {}
        self._keepers: dict[asyncio.AbstractEventLoop, AsyncGenerator[None, None]] = {}
        weakref.finalize(self, _close, self._keepers).atexit = False

    async def post(self, path: str, body: Any, *, patient: bool = True) -> Any:
        """``patient``: offer it again while the server says that it is busy."""
        return await self._whole("POST", path, body, patient)

    async def get(self, path: str) -> Any:
        return await self._whole("GET", path, None)

    async def _whole(self, method: str, path: str, body: Any, patient: bool = True) -> Any:
        import aiohttp

        try:
            async with await self._send(method, path, body, patient) as response:
                return _parse(await response.read(), self.url)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._broke(error) from error

    async def events(self, path: str, body: Any) -> AsyncIterator[Any]:
        """The JSON of each ``data:`` line until ``[DONE]``."""
        import aiohttp

        try:
            async with await self._send("POST", path, body, True) as response:
                async for line in response.content:
                    if not line.startswith(b"data:"):
                        continue
                    data = line[5:].strip()
                    if data == b"[DONE]":
                        return
                    event = _parse(data, self.url)
                    if isinstance(event, dict) and "error" in event:
                        raise BackendError(error_message(event) or "the server ended the stream with an error")
                    yield event
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._broke(error) from error

    async def _send(self, method: str, path: str, body: Any, patient: bool) -> aiohttp.ClientResponse:
        """A response with status 200, its body unread."""
        data = None if body is None else msgspec.json.encode(body)
        session = await self._session()
        give_up = asyncio.get_running_loop().time() + PATIENCE
        if method == "POST":
            self._usage.requests += 1
        while True:
            self._usage.bytes_sent += len(data or b"")
            response = await session.request(method, self.url + path, data=data)
            if response.status == 200:
                return response
            raw = await response.read()
            again = _retry_after(response) if patient and response.status in (429, 503) else None
            if again is None or asyncio.get_running_loop().time() + again > give_up:
                try:
                    said = error_message(json.loads(raw))
                except ValueError:
                    said = None
                raise BackendError(said or f"answered {response.status} without saying why", status=response.status)
            await asyncio.sleep(again)

    def _broke(self, error: Exception) -> BackendError:
        if isinstance(error, TimeoutError):
            return BackendError(f"{self.url} did not answer within {self._timeout:g} s")
        return BackendError(f"the connection to {self.url} failed: {error}")

    async def _session(self) -> aiohttp.ClientSession:
        import aiohttp  # a quarter of a second: paid by the first request, not by `import branchwise`

        loop = asyncio.get_running_loop()
        session = self._sessions.get(loop)
        if session is None or session.closed:
            for other in [one for one in self._sessions if one.is_closed()]:
                del self._sessions[other], self._keepers[other]
            session = self._sessions[loop] = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=MAX_CONNECTIONS),
                headers=self._headers,
                # Not of all it takes: branches may have to wait for a connection while others generate.
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._timeout, sock_read=self._timeout),
                read_bufsize=1 << 20,
            )
            self._keepers[loop] = _keeper(session)
            await anext(self._keepers[loop])
        return session


def _close(keepers: Mapping[asyncio.AbstractEventLoop, AsyncGenerator[None, None]]) -> None:
    """Of a backend that nobody has any more."""
    for loop, keeper in keepers.items():
        if loop.is_running():
            asyncio.run_coroutine_threadsafe(keeper.aclose(), loop)


async def _keeper(session: aiohttp.ClientSession) -> AsyncGenerator[None, None]:
    """Closes the session at the latest when its loop ends: `asyncio.run` finishes generators that are still open."""
    try:
        yield
    finally:
        await session.close()


def _retry_after(response: aiohttp.ClientResponse) -> float | None:
    text = response.headers.get("Retry-After", "")
    return min(float(text), 10.0) if text.isdigit() else None


def _parse(data: bytes, url: str) -> Any:
    try:
        return msgspec.json.decode(data)
    except msgspec.DecodeError as error:
        raise BackendError(f"{url} answered something that is not JSON") from error
