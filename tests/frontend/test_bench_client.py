"""The bench's client and report against a tiny OpenAI-compatible server in this process."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from branchwise.frontend.bench.client import CompletionsClient, Measured, ids_of, open_client
from branchwise.frontend.bench.report import percentiles, table, warm
from branchwise.frontend.bench.runner import BenchConfig, run
from branchwise.frontend.errors import BackendError


class Fake:
    """Answers ``t7 t7 …``; claims 10 cached tokens; fails the requests ``fails`` picks, by their number from 0."""

    def __init__(self, fails: Callable[[int], bool] = lambda number: False) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.fails = fails

    async def completions(self, request: web.Request) -> web.StreamResponse:
        number = len(self.bodies)
        body = await request.json()
        self.bodies.append(body)
        self.keys.append(request.headers.get("Authorization"))
        if self.fails(number):
            return web.json_response({"error": {"message": "no"}}, status=503)
        words = ["t7"] * body["max_tokens"]
        usage = {
            "prompt_tokens": len(body["prompt"]),
            "completion_tokens": len(words),
            "prompt_tokens_details": {"cached_tokens": 10},
        }
        if not body["stream"]:
            return web.json_response({"choices": [{"text": " ".join(words)}], "usage": usage})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for word in words:
            await _event(response, {"choices": [{"text": f" {word}"}]})
        await _event(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response


async def _event(response: web.StreamResponse, chunk: dict[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")


Serve = Callable[[Fake], Any]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    servers: list[TestServer] = []

    async def start(fake: Fake) -> str:
        app = web.Application(client_max_size=1 << 24)
        app.router.add_post("/v1/completions", fake.completions)
        server = TestServer(app)
        await server.start_server()
        servers.append(server)
        return str(server.make_url(""))

    yield start
    for server in servers:
        await server.close()


class Watch:
    def __init__(self) -> None:
        self.done = 0
        self.order: list[str] = []
        self.errors: list[str] = []

    def started(self, name: str, requests: int) -> None:
        self.order.append(name)

    def request_done(self) -> None:
        self.done += 1

    def finished(self, name: str, result: dict[str, Any], errors: list[str]) -> None:
        self.errors += errors


@pytest.mark.parametrize("stream", [False, True])
async def test_measures_what_the_server_did(serve: Serve, stream: bool) -> None:
    fake = Fake()
    client = CompletionsClient(open_client(await serve(fake), "secret"), "some-model", stream=stream)
    assert await client.generate([5, 6, 7], 4, seed=3, temperature=1.0) == [7, 7, 7, 7]
    sent = fake.bodies[0]
    assert sent["prompt"] == [5, 6, 7] and sent["max_tokens"] == 4 and sent["model"] == "some-model"
    assert sent["seed"] == 3 and sent["temperature"] == 1.0 and sent["ignore_eos"] is True
    assert sent.get("stream_options") == ({"include_usage": True} if stream else None)
    assert fake.keys == ["Bearer secret"]
    measured = client.measured
    assert (measured.prompt_tokens, measured.output_tokens, measured.cached_tokens) == (3, 4, 10)
    assert measured.failed == 0 and len(measured.latency) == 1
    assert len(measured.ttft) == (1 if stream else 0)
    assert len(measured.itl) == (3 if stream else 0)


async def test_a_run_counts_failures_and_goes_on(serve: Serve) -> None:
    fake = Fake(fails=lambda number: number >= 64 and number % 5 == 0)  # the 64 warm-up requests pass
    watch = Watch()
    bench = BenchConfig(url=await serve(fake), model="m", workloads=["chat", "fewshot"], scale=0.02, vocab=8000)
    results = await run(bench, watch)
    assert watch.order == ["warm-up", "chat", "fewshot"]
    assert list(results) == ["chat", "fewshot"]
    failed = [number for number in range(64, len(fake.bodies)) if number % 5 == 0]
    assert sum(result["failed"] for result in results.values()) == len(failed) > 0
    assert sum(result["requests"] for result in results.values()) == len(fake.bodies) - 64 - len(failed)
    assert watch.done == len(fake.bodies) == 64 + 10 + 10
    assert watch.errors == ["HTTP 503: no"] * 2  # a message once a workload
    assert all(result["cached_tokens"] == 10 * result["requests"] for result in results.values())


async def test_a_warm_up_that_fails_ends_the_run_in_the_servers_words(serve: Serve) -> None:
    fake, watch = Fake(fails=lambda number: True), Watch()
    with pytest.raises(BackendError, match=r"^every request of the warm-up failed: HTTP 503: no$"):
        await run(BenchConfig(url=await serve(fake), model="m", workloads=["chat"]), watch)
    assert len(fake.bodies) == 64 and watch.order == ["warm-up"]


def test_a_few_messages_are_kept_once_each() -> None:
    measured = Measured()
    for error in ["a", "a", "b", "a", "c", "d"]:
        measured.fail(error)
    assert measured.failed == 6 and measured.errors == ["a", "b", "c"]


async def test_an_unreachable_server_is_a_failure_not_an_exception(unused_port: int) -> None:
    client = CompletionsClient(open_client(f"http://127.0.0.1:{unused_port}", None), "m")
    assert await client.generate([1], 1) == []
    assert client.measured.failed == 1 and client.measured.prompt_tokens == 0


def test_percentiles_pick_the_value_at_the_rank() -> None:
    assert percentiles([]) is None
    assert percentiles([float(value) for value in range(100, 0, -1)]) == {
        "p50": 51.0,
        "p90": 91.0,
        "p99": 100.0,
        "mean": 50.5,
    }
    assert percentiles([2.0]) == {"p50": 2.0, "p90": 2.0, "p99": 2.0, "mean": 2.0}


def test_ids_come_back_from_text() -> None:
    assert ids_of("t7 t12 <unk> tx  t0") == [7, 12, 0]


async def test_the_table_shows_every_workload(serve: Serve) -> None:
    bench = BenchConfig(url=await serve(Fake()), model="m", workloads=["fewshot"], scale=0.01, vocab=8000, stream=True)
    results = await run(bench, Watch())
    drawn = table(results)
    assert drawn.row_count == 1
    cells = [next(iter(column.cells)) for column in drawn.columns]
    assert cells[0] == "fewshot" and cells[-1] == "0" and "TTFT s" in [column.header for column in drawn.columns]
    prompt = results["fewshot"]["prompt_tokens"]
    assert prompt == 5 * (2048 + 64)
    assert results["fewshot"]["ideal_cached_share"] == pytest.approx(4 * 2048 / prompt, abs=1e-4)


def test_workloads_that_an_earlier_run_had_cached_are_named() -> None:
    rows = {
        "cold": {"cached_share": 0.8703, "ideal_cached_share": 0.8700},
        "warm": {"cached_share": 0.9995, "ideal_cached_share": 0.8700},
        "evicted": {"cached_share": 0.1, "ideal_cached_share": 0.8700},
    }
    assert warm(rows) == ["warm"]
