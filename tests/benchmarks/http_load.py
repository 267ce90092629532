"""A lean load generator for `bench_http.py`: raw sockets and epoll, so that it is never the slower side.

    http_load.py PORT streams  --connections 128 --prompt-tokens 300 --max-tokens 400
    http_load.py PORT requests --connections 32 --prompt-tokens 33000 --max-tokens 96 --total 200

Connects, prints ``ready``, waits for a line on standard input, sends, and prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import select
import socket
import sys
import time
from dataclasses import dataclass, field

_EVENT = b'"text":'  # once in every event that carries text


def percentiles(values: list[float]) -> dict[str, float]:
    """p50, p99 and maximum, in milliseconds of ``values`` in seconds."""
    ordered = sorted(values)
    if not ordered:
        return {}
    pick = {"p50": len(ordered) // 2, "p99": len(ordered) * 99 // 100, "max": len(ordered) - 1}
    return {name: round(ordered[i] * 1e3, 2) for name, i in pick.items()}


class Prompts:
    """Token-id prompts of one length: a long common beginning and a tail of their own, as JSON."""

    def __init__(self, tokens: int, max_tokens: int, stream: bool, seed: int, vocab: int) -> None:
        self._vocab = vocab
        self._random = random.Random(seed)
        self._tail = min(tokens, 64)
        shared = random.Random(0)
        self._head = "".join(f"{shared.randrange(3, vocab)}, " for _ in range(tokens - self._tail))
        self._rest = (
            f'], "max_tokens": {max_tokens}, "temperature": 0, "ignore_eos": true, "stream": {json.dumps(stream)}}}'
        )

    def request(self) -> bytes:
        tail = ", ".join(str(self._random.randrange(3, self._vocab)) for _ in range(self._tail))
        body = f'{{"prompt": [{self._head}{tail}{self._rest}'.encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


@dataclass
class Connection:
    socket: socket.socket
    received: bytes = b""
    tail: bytes = b""  # of the last piece: an event may begin in one and end in the next
    events: int = 0
    sent: float = 0.0
    last: float = 0.0


@dataclass
class Figures:
    requests: int = 0
    events: int = 0
    first: list[float] = field(default_factory=list)  # seconds from sending to the first event
    gaps: list[float] = field(default_factory=list)  # seconds between a stream's pieces
    latency: list[float] = field(default_factory=list)


def connect(port: int, count: int) -> dict[int, Connection]:
    sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
    for one in sockets:
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return {one.fileno(): Connection(one) for one in sockets}


def send(connection: Connection, request: bytes) -> None:
    connection.sent = connection.last = time.perf_counter()
    connection.socket.sendall(request)


def streams(connections: dict[int, Connection], requests: list[bytes]) -> Figures:
    """One streamed completion on every connection, all at once."""
    figures = Figures()
    poll = select.epoll()
    for (fd, connection), request in zip(connections.items(), requests, strict=True):
        poll.register(fd, select.EPOLLIN)
        send(connection, request)
    left = len(connections)
    while left:
        for fd, _ in poll.poll():
            connection = connections[fd]
            data = connection.socket.recv(1 << 18)
            now = time.perf_counter()
            if not data:
                raise RuntimeError("the server closed a stream early")
            events = data.count(_EVENT)
            if not connection.tail and not data.startswith(b"HTTP/1.1 200 "):
                raise RuntimeError(data[:600].decode(errors="replace"))
            if events:
                if connection.events:
                    figures.gaps.append(now - connection.last)
                else:
                    figures.first.append(now - connection.sent)
                connection.events += events
                connection.last = now
            connection.tail = connection.tail[-8:] + data[-32:]
            if b"[DONE]" in connection.tail:
                left -= 1
                figures.requests += 1
                figures.events += connection.events
                figures.latency.append(now - connection.sent)
                poll.unregister(fd)
    return figures


def closed_loop(connections: dict[int, Connection], requests: list[bytes]) -> Figures:
    """Whole completions; a connection sends its next request when it has its answer."""
    figures = Figures()
    poll = select.epoll()
    for fd, connection in connections.items():
        poll.register(fd, select.EPOLLIN)
        send(connection, requests.pop())
    left = len(connections)
    while left:
        for fd, _ in poll.poll():
            connection = connections[fd]
            data = connection.socket.recv(1 << 18)
            if not data:
                raise RuntimeError("the server closed a connection")
            connection.received += data
            head, end, body = connection.received.partition(b"\r\n\r\n")
            if not end:
                continue
            if not head.startswith(b"HTTP/1.1 200 "):
                raise RuntimeError(connection.received[:600].decode(errors="replace"))
            length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n", 1)[0])
            if len(body) < length:
                continue
            figures.latency.append(time.perf_counter() - connection.sent)
            figures.requests += 1
            connection.received = b""
            if requests:
                send(connection, requests.pop())
            else:
                poll.unregister(fd)
                left -= 1
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int)
    parser.add_argument("what", choices=["streams", "requests"])
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=300)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--total", type=int, default=0, help="requests, over all connections")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--vocab", type=int, default=8000, help="prompt token ids are below this")
    args = parser.parse_args()
    streamed = args.what == "streams"
    prompts = Prompts(args.prompt_tokens, args.max_tokens, streamed, args.seed, args.vocab)
    requests = [prompts.request() for _ in range(args.connections if streamed else args.total)]
    connections = connect(args.port, args.connections)
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    figures = streams(connections, requests) if streamed else closed_loop(connections, requests)
    seconds = time.perf_counter() - start
    print(
        json.dumps(
            {
                "seconds": round(seconds, 3),
                "requests": figures.requests,
                "events": figures.events,
                "first": percentiles(figures.first),
                "gaps": percentiles(figures.gaps),
                "latency": percentiles(figures.latency),
            }
        )
    )


if __name__ == "__main__":
    main()
