"""OpenTelemetry spans, one a request, enabled by OpenTelemetry's own environment variables.

``OTEL_TRACES_EXPORTER`` or ``OTEL_EXPORTER_OTLP_ENDPOINT`` (or ``..._TRACES_ENDPOINT``) enables them; the SDK reads the
service name, the sampler and the exporter's settings from its other variables. A ``traceparent`` header makes a span
part of the client's trace. Attributes follow the semantic conventions for generative AI.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import metadata
from typing import Any

from ....errors import LoadError
from .request_log import RequestRecord

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_INSTALL = "pip install opentelemetry-sdk opentelemetry-exporter-otlp"


def span_sink(model: str) -> Callable[[RequestRecord], None] | None:
    """A function that records a request as a span; None if the environment does not enable traces.

    Raises `LoadError` if it does and the SDK or the exporter is not installed.
    """
    name = os.environ.get("OTEL_TRACES_EXPORTER") or ("otlp" if any(map(os.environ.get, _ENDPOINTS)) else "none")
    if name == "none" or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    try:
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise LoadError(f"the environment asks for traces, and OpenTelemetry is not installed: {_INSTALL}") from error
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(_exporter(name)))
    return spans_of(provider, model)


def _exporter(name: str) -> Any:
    if name == "otlp":
        protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
        name = "otlp_proto_http" if (protocol or "grpc").startswith("http") else "otlp_proto_grpc"
    found = metadata.entry_points(group="opentelemetry_traces_exporter", name=name)
    if not found:
        raise LoadError(f"the environment asks for the trace exporter {name}, which is not installed: {_INSTALL}")
    return next(iter(found)).load()()


def spans_of(provider: Any, model: str) -> Callable[[RequestRecord], None]:
    """The sink of a ``TracerProvider``."""
    from opentelemetry.trace import SpanKind, Status, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    tracer = provider.get_tracer("branchwise")
    propagator = TraceContextTextMapPropagator()

    def record(request: RequestRecord) -> None:
        carrier = {
            name.decode(): value.decode("latin-1")
            for name, value in request.headers
            if name in (b"traceparent", b"tracestate")
        }
        span = tracer.start_span(
            f"{request.method} {request.path}",
            context=propagator.extract(carrier),
            kind=SpanKind.SERVER,
            attributes=_attributes(request, model),
            start_time=request.started_ns,
        )
        if request.status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        span.end(request.started_ns + int(request.seconds * 1e9))

    return record


def _attributes(request: RequestRecord, model: str) -> dict[str, Any]:
    fields = request.fields()
    found = {
        "http.request.method": request.method,
        "url.path": request.path,
        "http.response.status_code": request.status,
        "error.type": fields.get("code") or fields.get("error"),
        "branchwise.request_id": request.id,
        "branchwise.owner": fields.get("owner"),
    }
    if request.owner is not None:
        found |= {
            "gen_ai.provider.name": "branchwise",
            "gen_ai.response.model": model,
            "gen_ai.usage.input_tokens": fields["prompt_tokens"],
            "gen_ai.usage.cache_read.input_tokens": fields["cached_tokens"],
            "gen_ai.usage.output_tokens": fields["completion_tokens"],
            "gen_ai.server.time_to_first_token": fields.get("ttft"),
            "gen_ai.response.finish_reasons": request.ends or ["abort"],
        }
    return {name: value for name, value in found.items() if value is not None}
