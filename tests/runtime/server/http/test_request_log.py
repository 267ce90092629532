"""A line for each request (--log-requests), and a span where the environment asks for traces."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from branchwise.runtime.errors import LoadError
from branchwise.runtime.messages import CacheReport, Delta, Finished, Generate, Message
from branchwise.runtime.server.http.app import make_app
from branchwise.runtime.server.http.engine_client import EngineClient
from branchwise.runtime.server.http.plumbing.request_log import RequestRecord
from branchwise.runtime.server.http.plumbing.tracing import span_sink, spans_of
from branchwise.runtime.server.http.state import AppState
from branchwise.runtime.server.log_format import formatter

SECRET = "what the user wrote"


@pytest.fixture
def ask(make_state: Callable[..., AppState], client: EngineClient, sent: list[Message]) -> Callable[..., Any]:
    """``await ask(path, body, key)``: every engine request gets two tokens, of 5 prompt tokens 3 are cached."""

    async def post(path: str, body: Any, key: str = "k", **settings: Any) -> httpx.Response:
        app = make_app(make_state(api_key="k", log_requests=True, **settings))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
            asking = asyncio.create_task(
                http.post(path, json=body, headers={"x-api-key": key, "x-request-id": "my-id"})
            )
            answered: set[int] = set()
            while not asking.done():
                for message in sent:
                    if isinstance(message, Generate) and message.ids and not answered.issuperset(message.ids):
                        answered.update(message.ids)
                        report = CacheReport(hit_tokens=3, reason="cold")
                        for id in message.ids:
                            tokens = np.array([7, 8], np.int32).tobytes()
                            end = Finished(id, "length", prompt_tokens=5, completion_tokens=2, cache=report)
                            client.deliver([Delta(id, "ab", tokens, prompt_tokens=5, cache=report, finish=end)])
                await asyncio.sleep(0.005)
            return await asking

    return post


def lines(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == "branchwise.requests"]


async def test_a_line_has_counts_and_no_text(ask: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    answer = await ask("/v1/completions", {"prompt": SECRET, "max_tokens": 2, "n": 2, "temperature": 1})
    assert answer.status_code == 200, answer.text
    (record,) = lines(caplog)
    said = record.getMessage()
    assert said.startswith("POST /v1/completions 200 id=my-id owner=")
    assert " prompt_tokens=10 cached_tokens=6 completion_tokens=4 ttft=0." in said and "end=length seconds=0." in said
    assert SECRET not in said and "k" not in said.split("owner=")[1].split()[0]
    fields = json.loads(formatter("json", "http").format(record))
    assert fields["process"] == "http" and fields["level"] == "info" and fields["status"] == 200
    assert (fields["prompt_tokens"], fields["cached_tokens"], fields["completion_tokens"]) == (10, 6, 4)
    assert "time" in fields and SECRET not in json.dumps(fields)


@pytest.mark.parametrize(
    ("path", "body", "key", "said"),
    [
        ("/v1/completions", {"prompt": SECRET, "temperature": -1}, "k", "400 id=my-id error=invalid_request_error"),
        ("/v1/completions", {"prompt": SECRET, "suffix": SECRET}, "k", "param=suffix"),
        ("/v1/completions", {"prompt": SECRET, "model": SECRET}, "k", "404 id=my-id error=not_found_error param=model"),
        ("/v1/completions", {"prompt": SECRET}, "wrong", "401 id=my-id error=authentication_error"),
        ("/v1/messages", {"messages": SECRET}, "k", "400 id=my-id error=invalid_request_error"),
        ("/nowhere", {}, "k", "404 id=my-id error=not_found_error"),
        ("/no%0Awhere", {}, "k", "/no\\nwhere 404"),
    ],
)
async def test_errors_have_a_line_without_what_the_client_sent(
    ask: Callable[..., Any], caplog: pytest.LogCaptureFixture, path: str, body: Any, key: str, said: str
) -> None:
    caplog.set_level(logging.INFO)
    await ask(path, body, key)
    (record,) = lines(caplog)
    assert said in record.getMessage() and SECRET not in record.getMessage()
    assert "\n" not in record.getMessage()


async def test_without_the_flag_there_is_no_line(
    make_state: Callable[..., AppState], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    app = make_app(make_state())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
        assert (await http.get("/health")).status_code == 200
    assert not lines(caplog)


def test_a_client_that_leaves_has_its_tokens_counted() -> None:
    record = RequestRecord("id", "POST", "/generate", [])
    record.owner = ""
    record.add(Delta(1, "a", b"\1\0\0\0", prompt_tokens=9, cache=CacheReport(hit_tokens=4, reason="cold")))
    record.add(Delta(1, "b", b"\2\0\0\0" * 3))
    record.end()
    fields = record.fields()
    assert (fields["prompt_tokens"], fields["cached_tokens"], fields["completion_tokens"]) == (9, 4, 4)
    assert (fields["status"], fields["end"]) == (499, "abort")


def test_exceptions_are_one_json_object() -> None:
    try:
        raise ValueError("a\nb")
    except ValueError as error:
        info = (ValueError, error, error.__traceback__)
    made = formatter("json", "scheduler").format(logging.LogRecord("x", 40, "f", 1, "it %s", ("failed",), info))
    assert "\n" not in made
    found = json.loads(made)
    assert found["message"] == "it failed" and "ValueError" in found["exception"] and found["process"] == "scheduler"


# -- spans -------------------------------------------------------------------------------------------------------------


def test_no_spans_unless_the_environment_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_TRACES_EXPORTER", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    assert span_sink("model") is None
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    assert span_sink("model") is None


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "no_such_exporter")
    with pytest.raises(LoadError, match="pip install opentelemetry-sdk"):
        span_sink("model")


async def test_a_span_for_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = pytest.importorskip("opentelemetry.sdk.trace")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    kept, provider = InMemorySpanExporter(), trace.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    record = RequestRecord("my-id", "POST", "/v1/completions", [(b"traceparent", parent.encode())])
    record.status, record.owner, record.ends = 200, "0123456789abcdef", ["stop"]
    report = CacheReport(hit_tokens=4, reason="cold")
    end = Finished(1, "stop", prompt_tokens=9, completion_tokens=2, cache=report)
    record.add(Delta(1, "a", b"\1\0\0\0" * 2, prompt_tokens=9, cache=report, finish=end))
    record.end()
    spans_of(provider, "twig")(record)
    (span,) = kept.get_finished_spans()
    assert span.name == "POST /v1/completions" and f"{span.context.trace_id:032x}" == parent.split("-")[1]
    assert span.attributes["gen_ai.response.model"] == "twig"
    assert span.attributes["gen_ai.usage.input_tokens"] == 9 and span.attributes["gen_ai.usage.output_tokens"] == 2
    assert span.attributes["gen_ai.usage.cache_read.input_tokens"] == 4
    assert span.start_time == record.started_ns and span.end_time >= span.start_time
