"""One replica: a server in a child process, and an HTTP client of it. No Ray."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
from collections.abc import AsyncGenerator
from typing import Any

import aiohttp
import msgspec
from yarl import URL

from ...runtime.config import ServerConfig
from ...runtime.errors import LoadError
from ...runtime.fleet.view import ReplicaReport
from ...runtime.server.engine_processes import exit_seconds
from .forward import HOP_BY_HOP, REPLICA_HEADER, ForwardedRequest, Head, ReplicaGone

logger = logging.getLogger(__name__)

CHILD = "branchwise.frontend.cluster.child"
SPARE_SECONDS = 30.0  # on a busy machine


def stop_seconds(config: ServerConfig) -> float:
    """Longest time that a server may take to end after SIGTERM; then it hangs."""
    return config.drain_delay + config.drain_seconds + exit_seconds(config) + SPARE_SECONDS


class ReplicaProcess:
    """Starts a server and forwards requests to it. Used on one event loop.

    A separate process: one that is killed, hangs or runs out of memory takes nothing else with it, and its answers do
    not pass through an actor's threads.
    """

    def __init__(self, config: ServerConfig, name: str) -> None:
        engine = msgspec.structs.replace(config.engine, instance=name)
        self._config = msgspec.structs.replace(config, engine=engine)
        self.name = name
        self._process: asyncio.subprocess.Process | None = None
        self._session: aiohttp.ClientSession | None = None
        self._info: dict[str, Any] = {}
        self._draining = False

    @property
    def pid(self) -> int:
        """Of the server."""
        return self._running.pid

    @property
    def url(self) -> str:
        """Of the server."""
        return str(self._info["url"])

    @property
    def _running(self) -> asyncio.subprocess.Process:
        if self._process is None:
            raise RuntimeError(f"replica {self.name} has not been started")
        return self._process

    @property
    def _http(self) -> aiohttp.ClientSession:
        if self._session is None or self._session.closed:
            raise ReplicaGone(f"replica {self.name} is not running", self.name)
        return self._session

    async def start(self, seconds: float) -> None:
        """Returns when the server takes requests. Raises `LoadError` with what it wrote last if it does not."""
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", CHILD, self.name),  # the name is for people who look at processes
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ},
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(msgspec.json.encode(self._config))
            self._process.stdin.close()
            async with asyncio.timeout(seconds):
                line = await self._process.stdout.readline()
            if not line:
                code = await self._process.wait()
                raise LoadError(f"replica {self.name} ended with code {code} while starting; its log has the reason")
            self._info = json.loads(line)
        except TimeoutError:
            await self.kill()
            raise LoadError(f"replica {self.name} was not ready after {seconds:.0f} s") from None
        except BaseException:
            await self.kill()
            raise
        headers = {}
        key = self._config.admin_api_key or self._config.api_key
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        self._admin_headers = headers
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None, sock_connect=5.0)
        )

    async def forward(self, request: ForwardedRequest) -> AsyncGenerator[Head | bytes]:
        """The server's answer. Closing the iterator aborts the request. Raises `ReplicaGone`."""
        headers = [
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in request.headers
            if name not in HOP_BY_HOP and name != REPLICA_HEADER and name != b"content-length"
        ]
        try:
            async with self._http.request(
                request.method,
                URL(self.url + request.target, encoded=True),
                headers=headers,
                data=request.body or None,
                allow_redirects=False,
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
                auto_decompress=False,
            ) as answer:
                kept = [(name.lower(), value) for name, value in answer.raw_headers if name.lower() not in HOP_BY_HOP]
                yield Head(answer.status, [*kept, (REPLICA_HEADER, self.name.encode())])
                async for chunk in answer.content.iter_any():
                    yield chunk
        except (aiohttp.ClientError, ConnectionError) as error:
            raise ReplicaGone(f"replica {self.name}: {type(error).__name__}", self.name) from error

    async def report(self) -> ReplicaReport:
        """The report for routers. Raises `ReplicaGone`."""
        facts = await self._get_json("/server_info")
        stats, engine = facts["stats"], facts["engine"]
        waiting, running = stats["waiting"], stats["running"]
        # Prompt tokens to compute are not counted by the engine: as many as an average request computes.
        computed = stats["computed_tokens"] / max(1, stats["finished"])
        return ReplicaReport(
            self.url,
            engine["kv_events"],  # another one after the engine has restarted
            engine["kv_events_replay"],
            engine["kv_events_seq"],
            engine["page_size"],
            waiting * computed,
            running,
            self._draining or waiting + running >= self._config.max_queued_requests,
        )

    async def status(self) -> str | None:
        """What ``/health`` says: ``ready``, or why not. None: the server has ended, or has not answered for seconds.

        Only None is a failure. A server ends by itself once its engine has been ``stalled`` for ``hang_timeout``, and
        replaces a dead one as ``restart`` says; until then a step may take long, and loading again too.
        """
        if self._process is None or self._process.returncode is not None:
            return None
        try:
            async with self._http.get(f"{self.url}/health", timeout=aiohttp.ClientTimeout(total=10.0)) as answer:
                found: str = msgspec.json.decode(await answer.read())["status"]
                return found
        except (aiohttp.ClientError, ConnectionError, TimeoutError, ReplicaGone):
            return None

    async def snapshot(self) -> bytes:
        """The body of ``/cache/events/snapshot``. Raises `ReplicaGone`."""
        return await self._get("/cache/events/snapshot")

    async def hottest(self, count: int) -> list[dict[str, Any]]:
        """``token_ids`` and ``namespace`` of its most used prefixes, of all keys and salts. Raises `ReplicaGone`."""
        prefixes: list[dict[str, Any]] = (await self._get_json(f"/cache/hottest?count={count}&all_namespaces=true"))[
            "prefixes"
        ]
        return prefixes

    async def warm(self, prefixes: list[dict[str, Any]]) -> None:
        """Computes another replica's prefixes, each in its own namespace: replicas share the secret that namespaces are
        derived from. A failure only costs a cache miss later: it is logged."""
        if not prefixes:
            return
        with contextlib.suppress(Exception):
            async with self._http.post(
                f"{self.url}/cache/warm",
                json={
                    "prompts": [each["token_ids"] for each in prefixes],
                    "namespaces": [each["namespace"] for each in prefixes],
                },
                headers=self._admin_headers,
            ) as answer:
                if answer.status != 200:
                    logger.warning("replica %s was not warmed: %s", self.name, (await answer.text())[:500])

    async def wait(self) -> int:
        """Waits until the server has ended; returns its exit code."""
        return await self._running.wait()

    async def stop(self) -> int:
        """Stops the server after its requests have finished, at most ``drain_seconds``; returns the exit code."""
        self._draining = True
        process = self._running
        if process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(stop_seconds(self._config)):
                    await process.wait()
            except TimeoutError:
                await self.kill()
        if self._session is not None:
            await self._session.close()
        return process.returncode or 0

    async def kill(self) -> None:
        """Kills the server."""
        if self._running.returncode is None:
            self._running.kill()
            await self._running.wait()
        if self._session is not None:
            await self._session.close()

    async def _get(self, path: str) -> bytes:
        try:
            async with self._http.get(self.url + path, headers=self._admin_headers) as answer:
                answer.raise_for_status()
                return await answer.read()
        except (aiohttp.ClientError, ConnectionError) as error:
            raise ReplicaGone(f"replica {self.name}: {type(error).__name__}", self.name) from error

    async def _get_json(self, path: str) -> Any:
        return msgspec.json.decode(await self._get(path))
