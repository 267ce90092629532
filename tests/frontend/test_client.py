"""The HTTP client: both transports return and raise the same."""

from __future__ import annotations

import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from branchwise.frontend.client import AsyncClient, Client, EventParser, Traffic
from branchwise.frontend.errors import BackendError

LARGE = "x" * (5 << 20)  # an event beyond what aiohttp reads as one line


class Server(BaseHTTPRequestHandler):
    busy = 0  # how many requests are still answered with 503

    def do_GET(self) -> None:
        answers = {"/json": (200, b'{"a": 1}'), "/text": (200, b"not JSON"), "/odd": (500, b"<html>")}
        self._answer(*answers.get(self.path, (404, b'{"detail": "Not Found"}')))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/refused":
            self._answer(400, b'{"error": {"message": "top_p must be at most 1", "param": "top_p"}}')
        elif self.path == "/busy" and type(self).busy:
            type(self).busy -= 1
            self._answer(503, b'{"error": {"message": "busy"}}', {"Retry-After": "0"})
        elif self.path in ("/events", "/failing"):
            events = [json.dumps({"n": n, "text": LARGE if n == 1 else ""}) for n in range(3)]
            events += ['{"error": {"message": "out of luck"}}'] if self.path == "/failing" else []
            self._answer(200, b": a comment\n" + b"".join(f"data: {one}\n\n".encode() for one in [*events, "[DONE]"]))
        else:
            self._answer(200, json.dumps(body).encode())

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


Call = Callable[..., Awaitable[Any]]


@pytest.fixture(params=[Client, AsyncClient])
def call(request: pytest.FixtureRequest) -> Call:
    """Calls a method of a new client of either transport; of ``events``, returns the list."""

    async def call(url: str, method: str, *args: Any) -> Any:
        result = getattr(request.param(url), method)(*args)
        if method != "events":
            return await result if request.param is AsyncClient else result
        return [event async for event in result] if request.param is AsyncClient else list(result)

    return call


async def test_answers(call: Call, url: str) -> None:
    assert await call(url, "get", "/json") == {"a": 1}
    assert await call(url, "post", "/echo", {"b": [1, "ü"]}) == {"b": [1, "ü"]}


async def test_events_of_any_size(call: Call, url: str) -> None:
    events = await call(url, "events", "/events", {})
    assert [event["n"] for event in events] == [0, 1, 2] and events[1]["text"] == LARGE


@pytest.mark.parametrize(
    ("method", "args", "message", "status"),
    [
        ("get", ("/text",), "{url} answered something that is not JSON; is it a model server?", 0),
        ("get", ("/none",), "{url} answered 404: Not Found", 404),
        ("get", ("/odd",), "{url} answered 500: without saying why; is it a model server?", 500),
        ("post", ("/refused", {}), "{url} answered 400: top_p must be at most 1", 400),
        ("events", ("/failing", {}), "out of luck", 0),
    ],
)
async def test_errors(call: Call, url: str, method: str, args: tuple[Any, ...], message: str, status: int) -> None:
    with pytest.raises(BackendError) as caught:
        await call(url, method, *args)
    assert str(caught.value) == message.format(url=url) and caught.value.status == status


async def test_nobody_answers(call: Call, unused_port: int) -> None:
    with pytest.raises(BackendError) as caught:
        await call(f"http://127.0.0.1:{unused_port}", "get", "/json")
    assert str(caught.value) == (
        f"no server answers at http://127.0.0.1:{unused_port} (connection refused); is it running?"
    )


async def test_a_busy_server_is_asked_again_for_a_while(url: str) -> None:
    traffic = Traffic()
    client = AsyncClient(url, retry_seconds=5.0, traffic=traffic)
    Server.busy = 2
    assert await client.post("/busy", {"c": 1}) == {"c": 1}
    assert traffic == Traffic(requests=1, bytes_sent=3 * len(b'{"c":1}'))
    Server.busy = 1
    with pytest.raises(BackendError, match="503: busy"):
        await client.post("/busy", {}, retry=False)


def test_events_may_be_split_anywhere() -> None:
    stream = b'event: x\ndata: {"a": 1}\r\n\r\ndata:{"b": 2}\n\ndata: [DONE]\n\ndata: {"c": 3}\n\n'
    for size in (1, 2, 7, len(stream)):
        parser = EventParser()
        chunks = [stream[i : i + size] for i in range(0, len(stream), size)]
        assert [data for chunk in chunks for data in parser.feed(chunk)] == [b'{"a": 1}', b'{"b": 2}']
        assert parser.done
