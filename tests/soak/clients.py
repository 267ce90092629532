"""Clients of a soak: what they send, how they misbehave, and how their requests end."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

LATE_SECONDS = 120.0  # an answer after so long is counted as late: the machine may be busy with other work
HANG_SECONDS = 600.0  # without an answer a request counts as hung
TEXT = "the a river mountain of and opens quietly while seven lamps turn under old snow"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}}, "required": ["a"]}


@dataclass
class Tally:
    """How requests ended, and what small requests of each owner waited (seconds)."""

    ends: Counter[str] = field(default_factory=Counter)
    waits: dict[str, list[float]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    expect_failures: bool = False  # while a process is being killed, errors of the engine are the right answer
    stop: bool = False

    def end(self, what: str, detail: str = "") -> None:
        self.ends[what] += 1
        if what in ("hang", "wrong") or (what in ("failed", "cut") and not self.expect_failures):
            self.faults.append(f"{what}: {detail[:300]}")


class Clients:
    """All clients of one server. ``keys``: of the flood, the small requests and the hostile ones."""

    def __init__(self, url: str, keys: tuple[str, str, str], tally: Tally, seed: int) -> None:
        self._url = url
        self._keys = keys
        self._tally = tally
        self._random = random.Random(seed)
        host, port = url.removeprefix("http://").split(":")
        self._address = host, int(port)

    async def run(self, flood: int) -> None:
        """Runs until ``tally.stop``: ``flood`` clients of one key, two of small requests, three hostile ones."""
        limits = httpx.Limits(max_connections=None)
        timeout = httpx.Timeout(HANG_SECONDS)
        async with contextlib.AsyncExitStack() as stack:
            flooding, small, hostile = [
                await stack.enter_async_context(
                    httpx.AsyncClient(base_url=self._url, headers={"x-api-key": key}, limits=limits, timeout=timeout)
                )
                for key in self._keys
            ]
            kinds = [
                *(self._repeat(self._flood, flooding) for _ in range(flood)),
                *(self._repeat(self._small, small) for _ in range(2)),
                self._repeat(self._hostile_body, hostile),
                self._repeat(self._slow_reader, hostile),
                self._repeat(self._half_body, hostile),
            ]
            await asyncio.gather(*kinds)

    async def _repeat(self, once: Callable[[httpx.AsyncClient], Awaitable[None]], client: httpx.AsyncClient) -> None:
        while not self._tally.stop:
            start = time.monotonic()
            try:
                await once(client)
            except httpx.TimeoutException as error:
                self._tally.end("hang", f"{error.request.url.path}: no answer within {HANG_SECONDS:g} s")
            except (httpx.TransportError, OSError) as error:
                self._tally.end("cut", f"{once.__name__}: {error!r}")
                await asyncio.sleep(0.2)
            if time.monotonic() - start > LATE_SECONDS:
                self._tally.ends["late"] += 1

    def _text(self, words: int) -> str:
        stem = TEXT[: self._random.randrange(len(TEXT))]  # a prefix that others share
        return stem + " " + " ".join(self._random.choices(TEXT.split(), k=words))

    # -- the flood: everything that a client may do, much of it at once ------------------------------------------------

    async def _flood(self, client: httpx.AsyncClient) -> None:
        pick = self._random.random()
        if pick < 0.35:
            await self._complete(client)
        elif pick < 0.6:
            await self._stream(client)
        elif pick < 0.7:
            await self._abort(client)
        elif pick < 0.8:
            await self._branches(client)
        elif pick < 0.88:
            await self._post(client, "/v1/chat/completions", self._chat() | {"json_schema": SCHEMA})
        elif pick < 0.92:
            body = {"prompt": self._text(50), "ttl": 2, "warm": True}
            await self._post(client, "/cache/pin", body)
        elif pick < 0.96:
            await self._post(client, "/cache/explain", {"prompt": self._text(40)})
        else:
            await self._post(client, "/tokenize", {"prompt": self._text(20_000)})

    def _completion(self) -> dict[str, Any]:
        choose = self._random
        return {
            "prompt": self._text(choose.choice([3, 30, 200])),
            "max_tokens": choose.choice([1, 20, 200]),
            "n": choose.choice([1, 1, 1, 3]),
            "ignore_eos": True,
            "prompt_cache_options": {"ttl": "3s"} if choose.random() < 0.1 else None,
            "stop": ["river"] if choose.random() < 0.2 else None,
            "logprobs": 2 if choose.random() < 0.1 else None,
        }

    def _chat(self) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": self._text(10)}], "max_tokens": 40}

    async def _complete(self, client: httpx.AsyncClient) -> None:
        await self._post(client, "/v1/completions", self._completion())

    async def _stream(self, client: httpx.AsyncClient) -> None:
        """Reads a stream, to its end or until it leaves."""
        leave_after = self._random.choice([0, 1, 5, 10_000, 10_000])
        body = self._completion() | {"stream": True}
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                self._ended(response)
                return
            last, lines = "", 0
            async for line in response.aiter_lines():
                if line:
                    last, lines = line, lines + 1
                if lines > leave_after:
                    self._tally.end("left")
                    return
        if last == "data: [DONE]":
            self._tally.end("ok")
        else:
            self._tally.end("failed" if '"error"' in last else "cut", last)

    async def _abort(self, client: httpx.AsyncClient) -> None:
        name = f"r{self._random.getrandbits(60)}"
        body = {"text": self._text(5), "rid": name, "sampling_params": {"max_new_tokens": 300, "ignore_eos": True}}
        request = asyncio.ensure_future(self._post(client, "/generate", body))
        await asyncio.sleep(self._random.random() * 0.2)
        await asyncio.gather(request, self._post(client, "/abort_request", {"rid": name}))

    async def _branches(self, client: httpx.AsyncClient) -> None:
        made = await self._post(client, "/branches", {"text": self._text(20), "ttl": 20})
        if made is None:
            return
        trunk = made["id"]
        forked = await self._post(client, f"/branches/{trunk}/fork", {"n": 4})
        ids = [] if forked is None else forked["ids"]
        body = {"sampling_params": {"max_new_tokens": 20}}
        await asyncio.gather(*(self._post(client, f"/branches/{id}/generate", body) for id in ids))
        for id in [trunk, *ids[:2]]:  # the others expire
            self._ended(await client.delete(f"/branches/{id}"))

    # -- small requests: what somebody waits for beside the flood ------------------------------------------------------

    async def _small(self, client: httpx.AsyncClient) -> None:
        start = time.perf_counter()
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
        if await self._post(client, "/v1/chat/completions", body) is not None:
            self._tally.waits.setdefault("small", []).append(time.perf_counter() - start)
        await asyncio.sleep(0.05)

    # -- hostile ones --------------------------------------------------------------------------------------------------

    async def _hostile_body(self, client: httpx.AsyncClient) -> None:
        choose = self._random
        body = choose.choice(
            [
                b"",
                b"{",
                b"[" * 5000,
                b'{"prompt": "\xff"}',
                b'{"prompt": ' + b"[[1]," * 50 + b"[2]" + b"]" * 50 + b"}",
                b'{"prompt": "' + b"\\n" * 100_000 + b'"}',
                b'{"prompt": "a", "max_tokens": 1e999}',
                b'{"prompt": "a", "n": 100000}',
                b'{"prompt": "' + b"x" * 3_000_000 + b'", "max_tokens": 1}',
                b'{"messages": [{"role": "user", "content": "a"}], "regex": "((a{1,99}){1,99}){1,99}"}',
                choose.randbytes(200),
            ]
        )
        path = choose.choice(["/v1/completions", "/v1/chat/completions", "/generate", "/branches", "/cache/pin"])
        self._ended(await client.post(path, content=body, headers={"content-type": "application/json"}))
        await asyncio.sleep(0.1)

    async def _slow_reader(self, client: httpx.AsyncClient) -> None:
        """Starts a stream, reads nothing for a while, and leaves."""
        body = self._completion() | {"stream": True, "max_tokens": 200, "n": 1}
        async with client.stream("POST", "/v1/completions", json=body):
            await asyncio.sleep(self._random.random() * 5)
        self._tally.end("left")

    async def _half_body(self, client: httpx.AsyncClient) -> None:
        """Connects, sends part of a request, waits and leaves."""
        _, writer = await asyncio.open_connection(*self._address)
        head = (
            f"POST /generate HTTP/1.1\r\nHost: localhost\r\nx-api-key: {self._keys[2]}\r\nContent-Length: 99\r\n\r\n{{"
        )
        writer.write(head[: self._random.randrange(len(head) + 1)].encode())
        await writer.drain()
        await asyncio.sleep(self._random.random() * 3)
        writer.close()
        self._tally.end("left")

    # -- answers -------------------------------------------------------------------------------------------------------

    async def _post(self, client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Any:
        """Sends a request; its JSON if it was served."""
        response = await client.post(path, json=body)
        self._ended(response)
        return response.json() if response.status_code == 200 else None

    def _ended(self, response: httpx.Response) -> None:
        status = response.status_code
        what = "ok" if status == 200 else "busy" if status in (429, 503) else "refused" if status < 500 else "failed"
        try:
            if status != 200 and set(response.json()) != {"error"}:
                what = "wrong"
        except ValueError:
            what = "wrong"
        self._tally.end(what, f"{response.request.url.path} {status} {response.text[:200]}")
