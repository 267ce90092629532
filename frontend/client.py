"""The HTTP client of this room: JSON in, JSON or server-sent events out.

`Protocol` does not depend on the transport: addresses, keys, errors and events. `Client` is blocking and uses
the standard library, so that a command or `connect` makes its first request without importing aiohttp (0.3 s);
`AsyncClient` uses aiohttp, for many requests at a time.
"""

from __future__ import annotations

import asyncio
import http.client
import os
import socket
import urllib.error
import urllib.request
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec

from ..runtime.errors import InvalidRequest
from .errors import BackendError

if TYPE_CHECKING:
    import aiohttp

TIMEOUT = 600.0  # seconds without a byte from the server
MAX_CONNECTIONS = 512
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}
_MAX_RETRY_AFTER = 10.0  # seconds
_CHUNK = 1 << 16
SESSION_HEADER = "x-session-id"  # of a request: a cluster sends those with the same one to the same replica
REPLICA_HEADER = "x-branchwise-replica"  # of an answer: who gave it; of a request: who must, or with a session should


@dataclass
class Traffic:
    """The requests and bytes that a client has sent."""

    requests: int = 0  # POSTs
    bytes_sent: int = 0  # of bodies, retries included


@dataclass
class ProgramRoute:
    """Keeps the requests of one program on one replica of a cluster.

    The first request has no headers of this: the router chooses its replica by what is cached. The next ones name that
    replica, and the program: if the replica is gone or full, all routers choose the same other one.
    """

    program: str
    headers: dict[str, str] = field(default_factory=dict)  # of the next request

    def answered(self, headers: Mapping[str, str]) -> None:
        """``headers``: of an answer with status 200."""
        self.headers = {SESSION_HEADER: self.program}
        if (replica := headers.get(REPLICA_HEADER)) is not None:
            self.headers[REPLICA_HEADER] = replica


current_route: ContextVar[ProgramRoute | None] = ContextVar(
    "current_route", default=None
)  # of an `AsyncClient`'s caller


class Protocol:
    """One server. Every method of the clients raises `BackendError` and nothing else.

    ``timeout``: seconds without a byte from the server. ``key_source``: where the user sets an API key, for error
    messages.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        timeout: float = TIMEOUT,
        key_source: str = "--api-key or BRANCHWISE_API_KEY",
    ) -> None:
        # Users copy the address from an OpenAI client, whose base URL ends in /v1.
        self.url = (url if "://" in url else f"http://{url}").rstrip("/").removesuffix("/v1").rstrip("/")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BackendError(f"not a server's address: {url!r} (try http://127.0.0.1:8000)")
        # A proxy for the outside world does not reach this machine's own loopback.
        direct = parts.hostname in _LOOPBACK or urllib.request.proxy_bypass(parts.hostname)
        self._proxies = {} if direct else urllib.request.getproxies()
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._key_source = key_source
        self._timeout = timeout

    def refused(self, status: int, body: bytes) -> BackendError:
        """The error for a response with another status than 200."""
        if status == 401:
            problem = (
                "refused this key: give another" if "Authorization" in self._headers else "requires an API key: give it"
            )
            return BackendError(f"{self.url} {problem} with {self._key_source}", status=status)
        try:
            reply = msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            reply = None
        reason, invalid = error_message(reply) or "without saying why; is it a model server?", None
        error = reply.get("error") if isinstance(reply, dict) else None
        field = error.get("param") if isinstance(error, dict) else None
        if isinstance(field, str) and reason.startswith(f"{field} "):
            invalid = InvalidRequest(field, reason.removeprefix(f"{field} "), status=status)
        shown = f"{self.url} answered {status}: {reason}"
        return BackendError(shown, status=status, reason=reason, invalid=invalid)

    def _unreachable(self, cause: OSError) -> BackendError:
        known = cause.errno is not None and cause.errno > 0 and not isinstance(cause, socket.gaierror)
        reason = os.strerror(cause.errno or 0) if known else cause.strerror or str(cause)
        return BackendError(f"no server answers at {self.url} ({reason.lower()}); is it running?")

    def _timed_out(self) -> BackendError:
        return BackendError(f"{self.url} did not answer within {self._timeout:g} s")

    def _broken(self, cause: Exception) -> BackendError:
        return BackendError(f"the connection to {self.url} failed: {cause}")

    def _parse(self, data: bytes) -> Any:
        try:
            return msgspec.json.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            message = f"{self.url} answered something that is not JSON; is it a model server?"
            raise BackendError(message) from error

    def _event(self, data: bytes) -> Any:
        event = self._parse(data)
        if isinstance(event, dict) and "error" in event:
            raise BackendError(error_message(event) or "the server ended the stream with an error")
        return event


class EventParser:
    """Splits a stream of server-sent events. All supported servers write an event's data on one line."""

    def __init__(self) -> None:
        self._rest = b""
        self.done = False  # the stream's ``[DONE]`` was read

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """The data of each event that ``chunk`` completes."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and not self.done:
                data = line[5:].strip()
                if data == b"[DONE]":
                    self.done = True
                else:
                    yield data


class Client(Protocol):
    """Blocking, one connection a request."""

    def get(self, path: str) -> Any:
        return self._parse(self._read(path, None))

    def get_text(self, path: str) -> str:
        return self._read(path, None).decode("utf-8", "replace")

    def post(self, path: str, body: Any) -> Any:
        return self._parse(self._read(path, body))

    def events(self, path: str, body: Any) -> Iterator[Any]:
        """The JSON of each server-sent event. Raises `BackendError` for an event that is an error."""
        parser = EventParser()
        with self._open(path, body) as response:
            while not parser.done and (chunk := self._guarded(response.read1, _CHUNK)):
                yield from map(self._event, parser.feed(chunk))

    def _read(self, path: str, body: Any) -> bytes:
        with self._open(path, body) as response:
            return self._guarded(response.read)

    def _open(self, path: str, body: Any) -> Any:
        data = None if body is None else msgspec.json.encode(body)
        request = urllib.request.Request(self.url + path, data=data, headers=self._headers)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler(self._proxies))
        return self._guarded(opener.open, request, timeout=self._timeout)

    def _guarded(self, action: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return action(*args, **kwargs)
        except urllib.error.HTTPError as error:
            with error:
                raise self.refused(error.code, error.read()) from error
        except TimeoutError as error:
            raise self._timed_out() from error
        except urllib.error.URLError as error:
            cause = error.reason
            if isinstance(cause, TimeoutError):
                raise self._timed_out() from error
            raise (self._unreachable(cause) if isinstance(cause, OSError) else self._broken(error)) from error
        except (http.client.HTTPException, OSError) as error:
            raise self._broken(error) from error


class AsyncClient(Protocol):
    """On asyncio, from any number of event loops, with a connection pool for each.

    ``retry_seconds``: how long to repeat a request that the server answers with 429 or 503 and ``Retry-After``.
    ``max_connections``: of one loop; 0: no limit. ``traffic``: counts what is sent.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        retry_seconds: float = 0.0,
        max_connections: int = MAX_CONNECTIONS,
        traffic: Traffic | None = None,
        **options: Any,
    ) -> None:
        super().__init__(url, api_key, **options)
        self._proxy = self._proxies.get(urlsplit(self.url).scheme)
        self._retry_seconds = retry_seconds
        self._max_connections = max_connections
        self._traffic = traffic or Traffic()
        self._sessions: dict[asyncio.AbstractEventLoop, aiohttp.ClientSession] = {}
        self._closers: dict[asyncio.AbstractEventLoop, AsyncGenerator[None, None]] = {}
        weakref.finalize(self, _close, self._closers).atexit = False

    async def get(self, path: str) -> Any:
        return self._parse(await self._read("GET", path, None))

    async def post(self, path: str, body: Any, *, retry: bool = True) -> Any:
        """``retry``: False: fail at once if the server is busy, whatever ``retry_seconds``."""
        return self._parse(await self._read("POST", path, body, retry))

    async def events(self, path: str, body: Any) -> AsyncIterator[Any]:
        """See `Client.events`."""
        import aiohttp

        parser = EventParser()
        try:
            async with await self._open("POST", path, body, True) as response:
                async for chunk in response.content.iter_any():
                    for data in parser.feed(chunk):
                        yield self._event(data)
                    if parser.done:
                        return
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._failed(error) from error

    async def _read(self, method: str, path: str, body: Any, retry: bool = True) -> bytes:
        import aiohttp

        try:
            async with await self._open(method, path, body, retry) as response:
                return await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._failed(error) from error

    async def _open(self, method: str, path: str, body: Any, retry: bool) -> aiohttp.ClientResponse:
        """A response with status 200, its body unread."""
        data = None if body is None else msgspec.json.encode(body)
        session = await self._session()
        clock = asyncio.get_running_loop().time
        deadline = clock() + (self._retry_seconds if retry else 0.0)
        self._traffic.requests += method == "POST"
        route = current_route.get()
        while True:
            self._traffic.bytes_sent += len(data or b"")
            headers = None if route is None else route.headers
            response = await session.request(method, self.url + path, data=data, headers=headers, proxy=self._proxy)
            if response.status == 200:
                if route is not None and method == "POST":
                    route.answered(response.headers)
                return response
            refused = self.refused(response.status, await response.read())
            seconds = _retry_after(response) if response.status in (429, 503) else None
            if seconds is None or clock() + seconds > deadline:
                raise refused
            await asyncio.sleep(seconds)

    async def _session(self) -> aiohttp.ClientSession:
        import aiohttp

        loop = asyncio.get_running_loop()
        session = self._sessions.get(loop)
        if session is None or session.closed:
            for other in [one for one in self._sessions if one.is_closed()]:
                del self._sessions[other], self._closers[other]
            session = self._sessions[loop] = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self._max_connections),
                headers=self._headers,
                # No total: a request may have to wait for one of the connections while others generate.
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._timeout, sock_read=self._timeout),
                read_bufsize=1 << 20,
            )
            self._closers[loop] = _closer(session)
            await anext(self._closers[loop])
        return session

    def _failed(self, error: Exception) -> BackendError:
        import aiohttp

        if isinstance(error, TimeoutError):
            return self._timed_out()
        if isinstance(error, aiohttp.ClientConnectorError):
            return self._unreachable(error.os_error)
        return self._broken(error)


def error_message(reply: Any) -> str | None:
    """The message of an error in OpenAI's or FastAPI's form."""
    if not isinstance(reply, dict):
        return None
    error = reply.get("error", reply.get("detail"))
    return str(error.get("message", error)) if isinstance(error, dict) else (None if error is None else str(error))


async def _closer(session: aiohttp.ClientSession) -> AsyncGenerator[None, None]:
    """Closes the session when its loop ends, at the latest: `asyncio.run` closes generators that are still open."""
    try:
        yield
    finally:
        await session.close()


def _close(closers: Mapping[asyncio.AbstractEventLoop, AsyncGenerator[None, None]]) -> None:
    """Closes the sessions of a client that was garbage-collected, on their loops."""
    for loop, closer in closers.items():
        if loop.is_running():
            asyncio.run_coroutine_threadsafe(closer.aclose(), loop)


def _retry_after(response: aiohttp.ClientResponse) -> float | None:
    text = response.headers.get("Retry-After", "")
    return min(float(text), _MAX_RETRY_AFTER) if text.isdigit() else None


def first_model(client: Client) -> str:
    """The name of the first model that an OpenAI-compatible server lists."""
    listed = client.get("/v1/models")
    try:
        return str(listed["data"][0]["id"])
    except (KeyError, IndexError, TypeError) as error:
        raise BackendError(f"{client.url}/v1/models lists no model: name one (--model, model=)") from error
