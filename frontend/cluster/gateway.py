"""The HTTP side of a cluster: routes each request to a replica and relays the answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

import msgspec

from ...runtime.config import ServerConfig
from ...runtime.fleet.hashes import block_hashes, root_hash
from ...runtime.fleet.instances import instance_of, instance_tag
from ...runtime.fleet.view import RoutingHint
from ...runtime.server.dry_run import RequestReader
from .fan_out import BATCH, EVERYWHERE, Answer, BatchPart, error_answer, first_failed, joined_batch, split_batch, summed
from .forward import (
    REPLICA_HEADER,
    SESSION_HEADER,
    Dispatch,
    ForwardedRequest,
    Head,
    Headers,
    NoReplica,
    ReplicaGone,
)
from .metrics import CONTENT_TYPE, labelled

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

TRIES = 3  # of a request before the first byte of an answer
ABSENT_SECONDS = 0.5  # between tries. Serve takes a replica whose options change from routers for about 0.1 s
METRICS_SECONDS = 5.0  # for a replica to answer; Prometheus gives up after 10 by default
GONE = "the replica that made this id, or that x-branchwise-replica names, is gone, and what it kept with it"


class Gateway:
    """An ASGI application. Several can serve one cluster; they share no state."""

    def __init__(
        self,
        config: ServerConfig,
        dispatch: Dispatch,
        members: Callable[[], Collection[str]],
        block_size: Callable[[], int],
    ) -> None:
        """``config``: of the replicas, with their ``namespace_secret``. ``members``: names of the running replicas.
        Raises `LoadError`."""
        self._config, self._dispatch = config, dispatch
        self._members, self._block_size = members, block_size
        self._reader = RequestReader(config)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for state in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{state}.complete"})
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        body = await self._body(receive)
        if body is None:
            await _answer(send, 413, f"the body is longer than {self._config.max_body_bytes} bytes (max_body_bytes)")
            return
        target = scope.get("raw_path") or scope["path"].encode()
        query = scope["query_string"]
        request = ForwardedRequest(
            scope["method"], (target + (b"?" + query if query else b"")).decode("latin-1"), scope["headers"], body
        )
        work = asyncio.create_task(self._serve(request, scope, send))
        left = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait((work, left), return_when=asyncio.FIRST_COMPLETED)
        finally:
            left.cancel()
            if not work.done():
                work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await work

    async def _body(self, receive: Receive) -> bytes | None:
        parts, size = [], 0
        while True:
            message = await receive()
            part = message.get("body", b"")
            size += len(part)
            if size > self._config.max_body_bytes:
                return None
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)

    async def hint(self, scope: Scope, body: bytes) -> RoutingHint:
        """The facts of a request that routing uses: tokens, block hashes, replica, session."""
        headers = dict(scope["headers"])
        named, session = headers.get(REPLICA_HEADER), headers.get(SESSION_HEADER)
        tag = None if named is None else instance_tag(named.decode("latin-1"))
        if session is None and tag is not None:
            return RoutingHint(instance=tag)
        if scope["method"] == "GET" and not scope["path"].startswith("/branches/"):
            return RoutingHint()
        asked = await self._reader.read(scope, body)
        hint = RoutingHint(prompt_tokens=sum(len(tokens) for _, tokens in asked.prompts))
        if asked.prompts:
            namespace, tokens = max(asked.prompts, key=lambda prompt: len(prompt[1]))
            hint.hashes = block_hashes(tokens, self._block_size(), root_hash(namespace))
        if asked.id is not None:
            hint.instance = instance_of(asked.id)
        if session is not None:
            hint.session, hint.preferred = session.decode("latin-1")[:256], tag
        return hint

    async def _serve(self, request: ForwardedRequest, scope: Scope, send: Send) -> None:
        route = request.method, scope["path"]
        headers = dict(request.headers)
        if REPLICA_HEADER not in headers or SESSION_HEADER in headers:
            if route in EVERYWHERE:
                await _send_whole(send, summed((await self._everywhere(request)).values()))
                return
            if route == ("GET", "/metrics"):
                await _send_whole(send, await self._metrics(request))
                return
            parts = split_batch(request.body) if route == BATCH else []
            if len(parts) > 1:
                answers = await asyncio.gather(*(self._part(request, scope, part) for part in parts))
                await _send_whole(send, joined_batch(parts, answers))
                return
        await self._forward(request, await self.hint(scope, request.body), scope["path"], send)

    async def _forward(self, request: ForwardedRequest, hint: RoutingHint, path: str, send: Send) -> None:
        """Sends a request to a replica and relays its answer: one complete answer, or an event stream."""
        for attempt in range(1, TRIES + 1):
            head: Head | None = None
            streamed, body = False, b""  # other answers than event streams are sent once they are complete
            try:
                async with contextlib.aclosing(self._dispatch(request, hint)) as parts:
                    async for part in parts:
                        if isinstance(part, Head):
                            head, streamed = part, _is_stream(part)
                            if streamed:
                                await _start(send, head.status, head.headers)
                        elif streamed:
                            await send({"type": "http.response.body", "body": part, "more_body": True})
                        else:
                            body += part
                if head is None:
                    raise ReplicaGone("it answered nothing")
                if not streamed:
                    await _start(send, head.status, head.headers)
                await send({"type": "http.response.body", "body": body, "more_body": False})
                return
            except NoReplica as error:
                if hint.instance is None:
                    await _answer(send, 503, f"no replica can take the request: {error}")
                    return
                if attempt == TRIES:
                    await _answer(send, 410, GONE)
                    return
                await asyncio.sleep(ABSENT_SECONDS)
            except ReplicaGone as error:
                logger.warning("%s %s, try %d: %s", request.method, path, attempt, error)
                if streamed:
                    await _break(send, path)
                    return
                if error.replica is not None:
                    hint.failed.append(instance_tag(error.replica))
                if hint.instance is not None or attempt == TRIES:
                    await _answer(send, 503, "the replica that served the request ended; try again")
                    return

    async def _part(self, request: ForwardedRequest, scope: Scope, part: BatchPart) -> Answer:
        answer, request = Answer(), msgspec.structs.replace(request, body=part.body)
        await self._forward(request, await self.hint(scope, part.body), scope["path"], answer.send)
        return answer

    async def _metrics(self, request: ForwardedRequest) -> Answer:
        answers = await self._everywhere(request, METRICS_SECONDS)
        failed = first_failed(answers.values())
        if failed is not None:
            return failed
        page = labelled({name: answer.body.decode() for name, answer in answers.items()})
        return Answer(200, [(b"content-type", CONTENT_TYPE)], page.encode())

    async def _everywhere(self, request: ForwardedRequest, seconds: float | None = None) -> dict[str, Answer]:
        """The answers of all replicas by name, without replicas that have ended or take longer than ``seconds``."""
        names = sorted(set(self._members()))
        answers = await asyncio.gather(*(self._ask(request, name, seconds) for name in names))
        return {name: answer for name, answer in zip(names, answers, strict=True) if answer is not None}

    async def _ask(self, request: ForwardedRequest, name: str, seconds: float | None) -> Answer | None:
        """The answer of one replica; None if it has ended or takes longer."""
        answer = Answer()
        try:
            dispatched = self._dispatch(request, RoutingHint(instance=instance_tag(name)))
            async with asyncio.timeout(seconds), contextlib.aclosing(dispatched) as parts:
                async for part in parts:
                    if isinstance(part, Head):
                        answer.status, answer.headers = part.status, part.headers
                    else:
                        answer.body += part
        except (ReplicaGone, NoReplica, TimeoutError) as error:
            problem = str(error) or type(error).__name__
            logger.warning("%s %s on replica %s: %s", request.method, request.target, name, problem)
            return None
        return answer


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _is_stream(head: Head) -> bool:
    return dict(head.headers).get(b"content-type", b"").startswith(b"text/event-stream")


async def _break(send: Send, path: str) -> None:
    """Ends a started event stream with an error event."""
    error: dict[str, Any] = {"type": "server_error", "message": "the replica ended in the middle of the answer"}
    event = b""
    if path.startswith("/v1/messages"):
        event, error = b"event: error\n", {"type": "error", "error": {**error, "type": "api_error"}}
    else:
        error = {"error": {**error, "code": "replica_gone", "param": None}}
    data = event + b"data: " + json.dumps(error).encode() + b"\n\n"
    await send({"type": "http.response.body", "body": data, "more_body": False})


async def _start(send: Send, status: int, headers: Headers) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def _send_whole(send: Send, answer: Answer) -> None:
    await _start(send, answer.status, answer.headers)
    await send({"type": "http.response.body", "body": answer.body})


async def _answer(send: Send, status: int, problem: str) -> None:
    await _send_whole(send, error_answer(status, problem))
