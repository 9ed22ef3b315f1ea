"""OpenTelemetry traces: a span per HTTP request, and within it a span of the engine's work."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from dpn_rt.outputs import RequestOutput
from dpn_rt.prompts.processor import ProcessedPrompt
from dpn_rt.server.gen_ai import Operation, common_attributes, num_output_tokens
from dpn_rt.server.otlp import named_resource

if TYPE_CHECKING:
    from fastapi import FastAPI
    from opentelemetry.sdk.trace import TracerProvider

UNTRACED = "health,metrics"
"""Paths without spans: supervisors and collectors ask for them all the time."""


class Tracing:
    """Makes spans. They hold counts and times, never text or images."""

    def __init__(self, provider: TracerProvider, model_name: str) -> None:
        self._provider, self._model_name = provider, model_name
        self._tracer = provider.get_tracer("dpn_rt")

    def watch(self, app: FastAPI) -> None:
        """Gives every request to an application a span; its parent is that of the `traceparent` header, if any."""
        from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor

        FastAPIInstrumentor.instrument_app(
            app, tracer_provider=self._provider, excluded_urls=UNTRACED, exclude_spans=["receive", "send"]
        )

    def record_finished(self, prompt: ProcessedPrompt, output: RequestOutput, operation: Operation) -> None:
        """Records the span of a request that has ended in the engine, within the span of its HTTP request."""
        from opentelemetry.trace import SpanKind, Status, StatusCode

        metrics = output.metrics
        offset = time.time() - time.monotonic()  # the engine's times are those of a monotonic clock
        span = self._tracer.start_span("generate", kind=SpanKind.INTERNAL, start_time=_ns(metrics.arrival + offset))
        completions = output.outputs
        span.set_attributes(
            {
                **common_attributes(self._model_name, operation, output),
                "gen_ai.usage.input_tokens": prompt.num_rows,
                "gen_ai.usage.output_tokens": num_output_tokens(output),
                "gen_ai.response.finish_reasons": [c.finish_reason or "error" for c in completions],
                "gen_ai.usage.cache_read.input_tokens": output.num_cached_tokens,
                "dpn_rt.request_id": output.request_id,
                "dpn_rt.cached_tokens": output.num_cached_tokens,
                "dpn_rt.visual_tokens": list(output.pyramid.visual_tokens),
                "dpn_rt.route": ["-" if expert is None else str(expert) for expert in output.pyramid.experts],
            }
        )
        if metrics.queue is not None:
            span.add_event("first step", timestamp=_ns(metrics.arrival + metrics.queue + offset))
        if metrics.first_token is not None:
            span.add_event("first token", timestamp=_ns(metrics.first_token + offset))
        if output.error is not None:
            span.set_status(Status(StatusCode.ERROR, type(output.error).__name__))
        span.end(None if metrics.finish is None else _ns(metrics.finish + offset))

    def close(self) -> None:
        """Sends the spans that have not been sent yet."""
        self._provider.shutdown()


def otlp_tracing(endpoint: str, model_name: str, service_name: str) -> Tracing:
    """Traces that are sent to a collector.

    Args:
        endpoint: URL of the collector, OTLP over HTTP, for instance http://localhost:4318/v1/traces.
        model_name: an attribute of the spans.
        service_name: of this server; the variable OTEL_SERVICE_NAME overrides it.

    Raises:
        ConfigError: the packages are missing, or the endpoint is no URL.
    """
    resource = named_resource(endpoint, "traces", service_name)
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return Tracing(provider, model_name)


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
