"""What slow clients may do to a connection, over real sockets. A test shortens the one time limit that it reaches."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import uvicorn

from branchwise.runtime.server.http.plumbing.connection import connection_of
from branchwise.runtime.server.http.plumbing.protocol import HttpProtocol

HEAD = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
LARGE = 32 << 20  # bytes of an answer: more than the sockets of a connection hold


PATIENCE = 60  # seconds: a time limit that a test must not reach


class Limited(HttpProtocol):
    head_seconds = body_seconds = unread_seconds = half_closed_seconds = PATIENCE
    body_most_seconds = 2 * PATIENCE
    body_bytes = 1000  # a second more for each thousand
    max_connections = 8


class App:
    """Answers with the length of the body; /slow once ``go`` is set, /early without reading it, /large with 32 MB."""

    def __init__(self) -> None:
        self.ended = 0  # requests whose client has left or been answered
        self.left = 0
        self.go = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            size = 0
            if scope["path"] == "/slow":
                await self.go.wait()
            while scope["path"] != "/early":
                message = await receive()
                if message["type"] == "http.disconnect":
                    self.left += 1
                    return
                size += len(message["body"])
                if not message["more_body"]:
                    break
            body = b"x" * LARGE if scope["path"] == "/large" else b"%d bytes" % size
            length = [] if scope["path"] == "/stream" else [(b"content-length", b"%d" % len(body))]
            await send({"type": "http.response.start", "status": 200, "headers": length})
            for start in range(0, len(body), 1 << 16):
                await send({"type": "http.response.body", "body": body[start : start + (1 << 16)], "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self.ended += 1


Connect = Callable[..., Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


@pytest.fixture
async def app() -> App:
    return App()


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``limits(head_seconds=0.3)`` changes the limits of connections that are made later."""

    def change(**limits: float) -> None:
        for name, value in limits.items():
            monkeypatch.setattr(Limited, name, value)

    return change


@pytest.fixture
async def connect(app: App) -> AsyncIterator[Connect]:
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(app, http=Limited, ws="none", lifespan="off", log_config=None, timeout_keep_alive=300)
    )
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    writers: list[asyncio.StreamWriter] = []

    async def connect(**options: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(*listening.getsockname(), **options)
        writers.append(writer)
        return reader, writer

    yield connect
    for writer in writers:
        writer.close()
    server.should_exit = True
    await asyncio.wait_for(serving, PATIENCE)


async def said(reader: asyncio.StreamReader) -> bytes:
    """Everything until the server closes the connection, which it resets if it has not read what was sent last."""
    found = b""
    async with asyncio.timeout(PATIENCE):
        with contextlib.suppress(ConnectionResetError):
            while piece := await reader.read(1 << 16):
                found += piece
    return found


@pytest.mark.parametrize("data", [b"", b"GET / HTTP/1.1\r\nHost:"], ids=["nothing", "half a head"])
async def test_a_head_that_does_not_come_is_not_waited_for(
    connect: Connect, app: App, limits: Callable[..., None], data: bytes
) -> None:
    limits(head_seconds=0.3)
    reader, writer = await connect()
    writer.write(data)
    assert await said(reader) == b""
    assert app.ended == 0


async def test_a_trickling_head_has_no_more_time(connect: Connect, limits: Callable[..., None]) -> None:
    limits(head_seconds=0.3)
    reader, writer = await connect()
    with contextlib.suppress(ConnectionError):
        for byte in b"GET / HTTP/1.1\r\nX: " + b"x" * 1000:
            writer.write(bytes([byte]))
            await asyncio.sleep(0.02)
            if reader.at_eof() or writer.is_closing():
                break
        else:
            pytest.fail("a head of 20 seconds was read to its end")


@pytest.mark.parametrize("piece", [b"", b"x"], ids=["stopped", "trickling"])
async def test_a_body_that_does_not_come_is_a_408(
    connect: Connect, app: App, limits: Callable[..., None], piece: bytes
) -> None:
    limits(body_seconds=0.3)
    reader, writer = await connect()
    writer.write(HEAD % 10_000 + b"begun")
    answer = asyncio.create_task(said(reader))
    while not answer.done():
        writer.write(piece)
        await asyncio.sleep(0.05)
    head, _, body = answer.result().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 Request Timeout")
    assert b"connection: close" in head
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "timeout_error"
    assert "body did not arrive in time" in error["message"]
    async with asyncio.timeout(PATIENCE):
        while not app.ended:  # whoever waited for the body knows
            await asyncio.sleep(0.01)
    assert (app.left, app.ended) == (1, 1)


async def test_a_large_body_has_the_time_it_needs(connect: Connect, limits: Callable[..., None]) -> None:
    limits(body_seconds=0.3, body_bytes=10)  # and so 100 seconds more for the body below
    reader, writer = await connect()
    writer.write(HEAD % 1000)
    for _ in range(10):
        writer.write(b"x" * 100)
        await asyncio.sleep(0.08)
    assert (await reader.readuntil(b"1000 bytes")).startswith(b"HTTP/1.1 200")
    writer.write(HEAD % 1 + b"x")  # and the connection goes on
    assert (await reader.readuntil(b"1 bytes")).startswith(b"HTTP/1.1 200")


async def test_a_body_after_its_answer_is_not_waited_for_either(connect: Connect, limits: Callable[..., None]) -> None:
    limits(body_seconds=0.3)
    reader, writer = await connect()
    writer.write(HEAD.replace(b"/ ", b"/early ") % 10_000 + b"begun")
    answer = await said(reader)
    assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"0 bytes"), "and no second answer"


async def test_a_request_behind_a_slow_one_is_not_to_blame(
    connect: Connect, app: App, limits: Callable[..., None]
) -> None:
    """Nobody reads its body until the one before it is answered: the time limit of the body begins then."""
    limits(body_seconds=0.3)
    reader, writer = await connect()
    writer.write(b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n" + HEAD % 5 + b"ab")
    await asyncio.sleep(1)
    limits(body_seconds=PATIENCE)
    app.go.set()
    assert (await reader.readuntil(b"0 bytes")).startswith(b"HTTP/1.1 200")
    writer.write(b"cde")
    assert (await reader.readuntil(b"5 bytes")).startswith(b"HTTP/1.1 200")


async def test_an_answer_that_nobody_reads_is_given_up(connect: Connect, app: App, limits: Callable[..., None]) -> None:
    limits(unread_seconds=0.3)
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.setblocking(False)
    _, port = (await connect())[1].get_extra_info("peername")
    await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", port))
    with raw:
        await asyncio.get_running_loop().sock_sendall(raw, b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n")
        async with asyncio.timeout(PATIENCE):
            while not app.ended:
                await asyncio.sleep(0.01)


async def test_an_answer_read_slowly_comes_whole(connect: Connect, limits: Callable[..., None]) -> None:
    limits(unread_seconds=1.0)  # reading all of it takes longer
    reader, writer = await connect(limit=1 << 16)
    writer.write(b"GET /large HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    size = 0
    while piece := await reader.read(1 << 20):
        size += len(piece)
        await asyncio.sleep(0.01)
    assert size > LARGE


async def test_a_connection_too_many_is_told_so(connect: Connect) -> None:
    writers = [(await connect())[1] for _ in range(Limited.max_connections)]
    reader, _ = await connect()
    head, _, body = (await said(reader)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ") and b"retry-after: 1" in head
    assert "8 connections are open" in json.loads(body)["error"]["message"]
    writers[0].close()
    async with asyncio.timeout(PATIENCE):
        status = b""
        while not status.startswith(b"HTTP/1.1 200"):  # once the server has noticed
            reader, writer = await connect()
            writer.write(HEAD % 0)
            status = await reader.readline()
            writer.close()


async def test_a_body_may_not_take_forever_however_large_it_is(connect: Connect, limits: Callable[..., None]) -> None:
    limits(body_seconds=0.3, body_most_seconds=1.5)
    reader, writer = await connect()
    writer.write(HEAD % 100_000 + b"x" * 50_000)  # by its rate alone it might take 50 seconds
    assert (await said(reader)).startswith(b"HTTP/1.1 408 ")


GET = b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def test_answers_that_are_owed_come_before_the_refusal_of_a_bad_request(connect: Connect, app: App) -> None:
    reader, writer = await connect()
    writer.write(GET % b"/slow" + HEAD % 3 + b"abc" + b"NONSENSE\r\n\r\n" + GET % b"/")
    asyncio.get_running_loop().call_later(0.2, app.go.set)
    answer = await said(reader)
    assert answer.count(b"HTTP/1.1") == 3
    first, second, third = answer.split(b"HTTP/1.1 ")[1:]
    assert first.startswith(b"200") and first.endswith(b"0 bytes")
    assert second.startswith(b"200") and second.endswith(b"3 bytes")
    assert third.startswith(b"400") and b"Invalid HTTP request" in third
    assert app.ended == 2


async def test_a_bad_body_behind_a_slow_request_replaces_no_answer(connect: Connect, app: App) -> None:
    reader, writer = await connect()
    chunked = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    writer.write(GET % b"/slow" + chunked + b"zz\r\n")
    asyncio.get_running_loop().call_later(0.2, app.go.set)
    first, second = (await said(reader)).split(b"HTTP/1.1 ")[1:]
    assert first.startswith(b"200") and first.endswith(b"0 bytes")
    assert second.startswith(b"400")


async def test_a_client_that_closed_its_side_gets_an_answer(
    connect: Connect, app: App, limits: Callable[..., None]
) -> None:
    reader, writer = await connect()
    writer.write(HEAD % 3 + b"abc")
    writer.write_eof()
    answer = await said(reader)
    assert answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"3 bytes")
    limits(half_closed_seconds=0.3)
    reader, writer = await connect()
    writer.write(GET % b"/slow")
    writer.write_eof()
    head, _, body = (await said(reader)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400"), "one that has left must not be computed to the end"
    assert "closed its side" in json.loads(body)["error"]["message"]
    app.go.set()


async def test_http_1_0_gets_no_chunks(connect: Connect) -> None:
    for path, end in ((b"/stream", b"0 bytes"), (b"/", b"0 bytes")):
        reader, writer = await connect()
        writer.write(b"GET %s HTTP/1.0\r\n\r\n" % path)
        head, _, body = (await said(reader)).partition(b"\r\n\r\n")
        assert b"chunked" not in head
        assert b"connection: close" in head
        assert body == end
    reader, writer = await connect()
    writer.write(GET % b"/stream")
    assert (await reader.readuntil(b"0\r\n\r\n")).count(b"chunked") == 1


async def test_a_request_names_one_host(connect: Connect) -> None:
    reader, writer = await connect()
    writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
    head, _, body = (await said(reader)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert "more than one Host" in json.loads(body)["error"]["message"]


class Recorded(asyncio.Transport):
    """Records what is written and whether it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.reading, self.closed = True, False

    def write(self, data: Any) -> None:
        self.written += data

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True


def connected(app: Any) -> tuple[Limited, Recorded]:
    config = uvicorn.Config(app, http=Limited, ws="none", lifespan="off", log_config=None)
    config.load()
    protocol, transport = Limited(config, uvicorn.server.ServerState(), {}), Recorded()
    protocol.connection_made(transport)
    return protocol, transport


@pytest.mark.parametrize("begun", [0, 1 << 17])
async def test_a_large_body_does_not_hide_that_the_client_leaves(begun: int) -> None:
    """Reading pauses while a large piece of a body is not yet taken, and the loss of a connection that is not read is
    not noticed."""
    read, left = asyncio.Event(), asyncio.Event()

    async def generate(scope: Any, receive: Any, _send: Any) -> None:
        while (await receive())["more_body"]:
            pass
        read.set()
        with connection_of(scope).watched(left.set):
            await left.wait()

    protocol, transport = connected(generate)
    protocol.data_received(HEAD % (begun + (1 << 17)) + b"x" * begun)
    await asyncio.sleep(0)  # the application waits for the rest
    protocol.data_received(b"x" * (1 << 17))
    await read.wait()
    assert transport.reading
    protocol.connection_lost(None)
    await left.wait()
    await asyncio.gather(*protocol.tasks)


async def test_the_request_being_answered_hears_of_the_loss_and_not_a_later_one(
    app: App, caplog: pytest.LogCaptureFixture
) -> None:
    protocol, _ = connected(app)
    protocol.data_received(GET % b"/slow" + GET % b"/")
    await asyncio.sleep(0)  # the first one is running
    protocol.connection_lost(None)
    app.go.set()
    await asyncio.gather(*protocol.tasks)
    assert (app.left, app.ended) == (1, 1)
    assert not [record for record in caplog.records if record.name.startswith("uvicorn")]


async def test_a_half_closed_connection_gets_no_error_within_an_answer() -> None:
    async def begin(_scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        await receive()

    protocol, transport = connected(begin)
    protocol.data_received(GET % b"/" + GET % b"/")
    while b"begun" not in transport.written:
        await asyncio.sleep(0)
    protocol.eof_received()
    protocol._end_half_closed()
    assert transport.closed
    assert transport.written.endswith(b"begun\r\n")
    protocol.connection_lost(None)
    await asyncio.gather(*protocol.tasks)


async def test_an_empty_line_does_not_keep_an_idle_connection(connect: Connect, limits: Callable[..., None]) -> None:
    reader, writer = await connect()
    writer.write(GET % b"/")
    await reader.readuntil(b"0 bytes")
    limits(head_seconds=0.3)
    writer.write(b"\r\n")
    assert await said(reader) == b""


async def test_a_refusal_that_waits_for_an_answer_is_kept(
    connect: Connect, app: App, limits: Callable[..., None]
) -> None:
    limits(body_seconds=0.1)
    reader, writer = await connect()
    writer.write(GET % b"/slow" + (HEAD % 5).replace(b"Host: localhost", b"Host: a\r\nHost: b"))
    await asyncio.sleep(0.5)
    app.go.set()
    first, second = (await said(reader)).split(b"HTTP/1.1 ")[1:]
    assert first.startswith(b"200")
    assert second.startswith(b"400") and b"more than one Host" in second
